"""The network of boxes: a namespace and a routed veth each, no bridge.

In charge of: the gateway address and the kernel settings of the machine, the wiring of a box, resolvers. Not in charge
of: what a box may reach (`firewall`).

A box has one address (/32), a route to the gateway, a default route through it and a permanent neighbour; the machine
has a route to the box. No two boxes share a link, so there is nothing to spoof or overhear. A box's namespace is pinned
nowhere: it goes with the box's last process, and the veth with it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import socket
import time

from hostd import syscalls
from hostd.config import HostConfig, installs_on_machine, write_file
from hostd.netlink import (
    SCOPE_LINK,
    SCOPE_UNIVERSE,
    Netlink,
    address_message,
    link_up_message,
    neighbour_message,
    route_message,
)

# Name -> the least value boxes need.
_MACHINE_SETTINGS = {
    "net/ipv4/ip_forward": 1,
    "kernel/pid_max": 4_194_304,  # the default of 32,768 is spent by 64 boxes of 512 processes
}
_BOX_SETTINGS = (
    ("net/ipv6/conf/all/disable_ipv6", b"1"),
    ("net/ipv6/conf/default/disable_ipv6", b"1"),
    # A box's root has no capability in this namespace (the machine owns it), so what needs one is opened here.
    ("net/ipv4/ping_group_range", b"0 2147483647"),
    ("net/ipv4/ip_unprivileged_port_start", b"0"),
)
_STALE_LINK_SECONDS = 0.3


def machine_up(cfg: HostConfig) -> None:
    """Gateway address and forwarding. What was there before is noted once, for :func:`machine_down`. Repeatable.
    Raises OSError."""
    was = _read_was(cfg)
    for name, least in _MACHINE_SETTINGS.items():
        value = _sysctl(name)
        was.setdefault(name, value)
        write_file(cfg.sysctls_was, json.dumps(was).encode())  # before the change: a kill between leaves it noted
        if int(value) < least:
            _set_sysctl(name, b"%d" % least)
    with Netlink() as netlink:
        netlink.add_address(netlink.index("lo"), cfg.gateway, 32)


def machine_down(cfg: HostConfig) -> None:
    """Undo :func:`machine_up`. While another install lives, its note inherits the old values instead. Repeatable."""
    with Netlink() as netlink:
        netlink.delete_address(netlink.index("lo"), cfg.gateway, 32)
    was = _read_was(cfg)
    heirs = [root for install, root in installs_on_machine().items() if install != cfg.install and root != cfg.root]
    for heir in heirs:
        path = f"{heir}/{os.path.basename(cfg.sysctls_was)}"
        if os.path.exists(path):
            with open(path, encoding="ascii") as file:
                theirs = json.load(file)
            write_file(path, json.dumps({**theirs, **was}).encode())
            break
    else:
        for name, value in was.items():
            _set_sysctl(name, value.encode())
    with contextlib.suppress(FileNotFoundError):
        os.unlink(cfg.sysctls_was)


def is_machine_up(cfg: HostConfig) -> bool:
    """Whether boxes can be wired: forwarding is on and the gateway is ours."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((cfg.gateway, 0))
        except OSError:
            return False
    return all(int(_sysctl(name)) >= least for name, least in _MACHINE_SETTINGS.items())


def wire(cfg: HostConfig, n: int) -> int:
    """Make box n's network and return its namespace (a descriptor, close-on-exec). Raises OSError."""
    namespace, inside = _new_namespace()
    try:
        with inside, Netlink() as machine:
            address, gateway, link = cfg.address(n), cfg.gateway, cfg.link(n)
            packed = socket.inet_aton(address)
            ours, theirs = b"\x02\xa0" + packed, b"\x02\xb0" + packed
            _add_veth(machine, link, ours, theirs, namespace)
            index = machine.index(link)
            machine.do(route_message(index, address, scope=SCOPE_LINK), neighbour_message(index, address, theirs))
            inner = inside.index("eth0")
            inside.do(
                link_up_message(inside.index("lo")),
                link_up_message(inner),
                address_message(inner, address, 32),
                neighbour_message(inner, gateway, ours),
                route_message(inner, gateway, scope=SCOPE_LINK),
                route_message(inner, None, via=gateway, scope=SCOPE_UNIVERSE),
            )
    except BaseException:
        os.close(namespace)
        raise
    return namespace


def _add_veth(machine: Netlink, link: str, ours: bytes, theirs: bytes, namespace: int) -> None:
    deadline = time.monotonic() + _STALE_LINK_SECONDS
    while True:
        try:
            machine.add_veth(link, ours, "eth0", theirs, namespace)
            return
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        # The number's last box is dead, its namespace not collected yet; or somebody keeps it open.
        if time.monotonic() > deadline:
            machine.delete_link(link)
        time.sleep(0.005)


def unwire(cfg: HostConfig, n: int) -> None:
    """Remove box n's link if it outlived its namespace's processes. Not needed on the way down of an ordinary box."""
    with Netlink() as machine:
        machine.delete_link(cfg.link(n))


def links(cfg: HostConfig) -> list[str]:
    """Names of the install's links that exist."""
    return sorted(name for _, name in socket.if_nameindex() if name.startswith(cfg.link_prefix))


def _new_namespace() -> tuple[int, Netlink]:
    """A namespace with its settings made, and a netlink socket inside it. The caller is back outside afterwards."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for name, value in _BOX_SETTINGS:
                    # A kernel without IPv6 has no such file, and nothing to switch off.
                    with contextlib.suppress(FileNotFoundError):
                        _set_sysctl(name, value)
                return namespace, Netlink()
            except BaseException:
                os.close(namespace)
                raise
        finally:
            syscalls.setns(outside, syscalls.CLONE_NEWNET)
    finally:
        os.close(outside)


def resolvers(cfg: HostConfig) -> tuple[str, ...]:
    """The resolvers boxes use: the configured ones, else the machine's own, less those only the machine can reach."""
    if cfg.dns:
        return cfg.dns
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        found = []
        with contextlib.suppress(FileNotFoundError):
            with open(path, encoding="utf-8", errors="replace") as file:
                found = [words[1] for words in map(str.split, file) if words[:1] == ["nameserver"] and len(words) > 1]
        usable = []
        for text in found:
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(text)
                if address.version == 4 and not address.is_loopback:
                    usable.append(text)
        if usable:
            return tuple(usable[:3])
    return ()


def _read_was(cfg: HostConfig) -> dict[str, str]:
    try:
        with open(cfg.sysctls_was, encoding="ascii") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    return {name: value for name, value in found.items() if name in _MACHINE_SETTINGS}


def _sysctl(name: str) -> str:
    with open(f"/proc/sys/{name}", encoding="ascii") as file:
        return file.read().strip()


def _set_sysctl(name: str, value: bytes) -> None:
    file = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, value)
    finally:
        os.close(file)
