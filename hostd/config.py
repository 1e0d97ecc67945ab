"""One install of hostd on one machine: its settings, and every name, path, address and id range that follows from them.

In charge of: reading, checking and writing `host.json`; all derived names; taking one of the machine's sixteen install
numbers. Not in charge of: making anything exist (`setup`), nor what a name is used for.

Several installs may share a machine. Whatever one of them creates outside its own folders (addresses, uids, interfaces,
cgroups, firewall tables, sockets) carries the install number, so they never meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INSTALLS = 16
BOXES = 2000  # box numbers 0..1999 of an install
UIDS_PER_BOX = 65_536

LOCK_FOLDER = "/run/lock"
DEFAULT_ROOTS = "/var/lib/berth-host"
DEFAULT_IMAGE_CACHE = "/var/cache/berth/images"

# First host uid of box 0 of install 0. All sixteen installs end below 2**31, where the kernel's ping_group_range ends.
_BOX_UIDS = 47 << 20
_BOX_UIDS_PER_INSTALL = BOXES * UIDS_PER_BOX
_KEEPER_UIDS = _BOX_UIDS - (1 << 20)
_KEEPER_UIDS_PER_INSTALL = 4096

_SLOT = re.compile(r"s(\d{1,4})-[0-9a-f]{6}")
_HOST = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GROUP = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class ConfigError(Exception):
    """`host.json` cannot be used as it is; the message names the field and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The contents of `host.json`. Sizes in bytes.

    ``pool_bytes`` asks for a loop file of that size; with ``pool_device`` the pool lies on that block device instead;
    with neither, `<root>/pool` must be a mounted btrfs already. ``image`` is the image boxes are made from when nothing
    else is said; empty: the one `setup` builds.
    """

    cluster: str
    host: str
    install: int
    root: str
    run: str
    pool_bytes: int | None = None
    pool_device: str | None = None
    dns: tuple[str, ...] = ()
    socket_group: str | None = None
    warm: int = 0
    image: str = ""
    image_cache: str = DEFAULT_IMAGE_CACHE
    connections_per_box: int = 4096
    keeper_cpu_millis: int = 1000
    keeper_memory_bytes: int = 256 << 20
    nested_user_namespaces: bool = False

    # --- files ------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where this configuration lies."""
        return f"{self.root}/host.json"

    @property
    def pool(self) -> str:
        """The mounted btrfs, in the machine's own mount namespace."""
        return f"{self.root}/pool"

    @property
    def pool_file(self) -> str:
        return f"{self.root}/pool.img"

    @property
    def images(self) -> str:
        return f"{self.pool}/images"

    @property
    def disks(self) -> str:
        return f"{self.pool}/boxes"

    @property
    def kept_disks(self) -> str:
        return f"{self.pool}/boxes-kept"

    @property
    def asleep_disks(self) -> str:
        """Disks of suspended devboxes."""
        return f"{self.pool}/boxes-asleep"

    @property
    def snapshots(self) -> str:
        """Copies of disks, each in a folder of its own."""
        return f"{self.pool}/snapshots"

    @property
    def moves(self) -> str:
        """What is known of disks on their way to S3 and from there."""
        return f"{self.root}/moves"

    @property
    def outputs(self) -> str:
        return f"{self.root}/out"

    @property
    def slots(self) -> str:
        """One record per box number in use."""
        return f"{self.root}/slots"

    @property
    def names(self) -> str:
        """Devbox id -> slot, as symbolic links."""
        return f"{self.root}/names"

    @property
    def warm_slots(self) -> str:
        """Boxes that are up and nobody's yet."""
        return f"{self.root}/warm"

    @property
    def seccomp_profile(self) -> str:
        """The profile in OCI form (JSON)."""
        return f"{self.root}/seccomp.json"

    @property
    def seccomp_filter(self) -> str:
        """The same profile compiled for this machine (BPF)."""
        return f"{self.root}/seccomp.bpf"

    @property
    def sysctls_was(self) -> str:
        return f"{self.root}/sysctls.was"

    @property
    def namespace_pin(self) -> str:
        """The install's private mount namespace, pinned here so that every hostd of it shares one."""
        return f"{self.run}/mounts/ns"

    @property
    def runtime_state(self) -> str:
        """crun's own state folder."""
        return f"{self.run}/crun"

    @property
    def socket_path(self) -> str:
        """hostd's socket, the only one that is dialled from outside."""
        return f"{self.run}/hostd.sock"

    def disk(self, slot: str) -> str:
        return f"{self.disks}/{slot}"

    def image_path(self, image: str) -> str:
        return f"{self.images}/{image}"

    def output(self, slot: str) -> str:
        return f"{self.outputs}/{slot}"

    def bundle(self, slot: str) -> str:
        """The run-time folder of a box: `config.json`, `made.json` and the files bound into it."""
        return f"{self.run}/b/{slot}"

    def keeper_socket(self, slot: str) -> str:
        return f"{self.run}/k/{slot}.sock"

    # --- names in the kernel ----------------------------------------------------------------------------------------

    @property
    def cgroup(self) -> str:
        """The install's cgroup, relative to a controller's mount point."""
        return f"berth_{self.install}"

    def box_cgroup(self, slot: str) -> str:
        return f"{self.cgroup}/b-{slot}"

    def keeper_cgroup(self, slot: str) -> str:
        return f"{self.cgroup}/k-{slot}"

    @property
    def firewall_table(self) -> str:
        return f"berth_{self.install}"

    @property
    def link_prefix(self) -> str:
        return f"vb{self.install:x}"

    def link(self, n: int) -> str:
        """The host's end of box n's veth."""
        return f"{self.link_prefix}{n}"

    # --- addresses and ids ------------------------------------------------------------------------------------------

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"10.213.{16 * self.install}.0/20")

    @property
    def gateway(self) -> str:
        """The last usable address of the subnet: a /32 on the host's loopback."""
        return str(self.subnet.broadcast_address - 1)

    def address(self, n: int) -> str:
        return str(self.subnet.network_address + 1 + _number(n))

    def uid_base(self, n: int) -> int:
        """Uid 0 of box n is this uid of the host; likewise for gids."""
        return _BOX_UIDS + self.install * _BOX_UIDS_PER_INSTALL + _number(n) * UIDS_PER_BOX

    def keeper_uid(self, n: int) -> int:
        """The uid (and gid) of box n's keeper, which owns the box's user namespace."""
        return _KEEPER_UIDS + self.install * _KEEPER_UIDS_PER_INSTALL + _number(n)

    # --- to and from JSON -------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dns": list(self.dns)}

    def save(self) -> None:
        """Write `<root>/host.json` whole or not at all. Raises OSError."""
        write_file(self.path, json.dumps(self.as_dict(), indent=2).encode() + b"\n", mode=0o600)


def _number(n: int) -> int:
    if not 0 <= n < BOXES:
        raise ValueError(f"box number {n} is outside 0..{BOXES - 1}")
    return n


def slot_number(slot: str) -> int:
    """The box number n inside a slot id (`s<n>-<6 hex digits>`). Raises ValueError for anything else."""
    found = _SLOT.fullmatch(slot)
    if not found:
        raise ValueError(f"{slot!r} is not a slot id")
    return _number(int(found[1]))


def load(path: str) -> HostConfig:
    """Read and check a configuration. Raises ConfigError (fields) or OSError (the file)."""
    with open(path, "rb") as file:
        raw = file.read(1 << 20)
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    return from_dict(data)


def from_dict(data: object) -> HostConfig:
    """Check a decoded `host.json`; ``root`` and ``run`` default to the install's own. Unknown fields are ignored, so
    that an older hostd can read a newer file. Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError("host.json must hold a JSON object")
    install: Any = data.get("install")
    if not _is_int(install) or not 0 <= install < INSTALLS:
        raise ConfigError(f"install must be a number 0..{INSTALLS - 1}, not {install!r}")
    known = {field.name for field in dataclasses.fields(HostConfig)}
    given = {key: value for key, value in data.items() if key in known and value is not None}
    given.setdefault("root", f"{DEFAULT_ROOTS}/{install}")
    given.setdefault("run", f"/run/berth-{install}")
    for name in ("cluster", "host"):
        _need(isinstance(given.get(name), str) and _HOST.fullmatch(given[name]), name, "an id", given.get(name))
    for name in ("root", "run", "image_cache", "pool_device"):
        if name in given:
            value = given[name]
            _need(_is_plain_path(value), name, "an absolute path without dots or a slash at its end", value)
    # A Unix socket's path ends at 107 bytes, and the longest of ours is <run>/k/<slot>.sock.
    _need(len(os.fsencode(given["run"])) <= 80, "run", "at most 80 bytes long", given["run"])
    if "pool_bytes" in given:
        value = given["pool_bytes"]
        _need(_is_int(value) and value >= 1 << 30, "pool_bytes", "at least 1 GiB, in bytes", value)
        _need("pool_device" not in given, "pool_bytes", "absent when pool_device is given", value)
    dns = given.get("dns", [])
    addresses = isinstance(dns, (list, tuple)) and len(dns) <= 3 and all(map(_is_ipv4, dns))
    _need(addresses, "dns", "up to 3 IPv4 addresses", dns)
    given["dns"] = tuple(dns)
    for name, low, high in (
        ("warm", 0, 200),
        ("connections_per_box", 16, 1 << 20),
        ("keeper_cpu_millis", 10, 1_024_000),
        ("keeper_memory_bytes", 32 << 20, 1 << 40),
    ):
        if name in given:
            _need(_is_int(given[name]) and low <= given[name] <= high, name, f"a number {low}..{high}", given[name])
    if "socket_group" in given:
        value = given["socket_group"]
        _need(isinstance(value, str) and _GROUP.fullmatch(value), "socket_group", "a group's name", value)
    if given.get("image"):
        value = given["image"]
        _need(isinstance(value, str) and _IMAGE.fullmatch(value), "image", "an image id", value)
    if "nested_user_namespaces" in given:
        value = given["nested_user_namespaces"]
        _need(isinstance(value, bool), "nested_user_namespaces", "true or false", value)
    return HostConfig(**given)


def _need(held: object, name: str, wanted: str, value: object) -> None:
    if not held:
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain_path(value: object) -> bool:
    return isinstance(value, str) and os.path.isabs(value) and os.path.normpath(value) == value and value != "/"


def _is_ipv4(value: object) -> bool:
    try:
        ipaddress.IPv4Address(value)
    except ValueError:
        return False
    return isinstance(value, str)


# --- install numbers ------------------------------------------------------------------------------------------------


def install_lock(install: int) -> str:
    return f"{LOCK_FOLDER}/berth-install-{install}.lock"


def installs_on_machine() -> dict[int, str]:
    """Install number -> root, of every install this machine still carries.

    A lock file tells where the root is; /run may be emptied by a restart of the machine, so the default roots are
    looked at as well.
    """
    found = {}
    for install in range(INSTALLS):
        for root in (_read_root(install_lock(install)), f"{DEFAULT_ROOTS}/{install}"):
            if root and os.path.isdir(root):
                found[install] = root
                break
    return found


def claim_install(root: str | None, install: int | None = None) -> tuple[int, str]:
    """Take install number ``install`` (the lowest free one when None) for ``root`` (its default when None).

    Returns (install, root), which exists afterwards. An install that already has that root keeps it, so this may be
    repeated. Raises ConfigError when the number belongs to another root or all are taken.
    """
    with _machine_lock():
        taken = installs_on_machine()
        if install is None:
            mine = [number for number, path in taken.items() if root is not None and path == root]
            free = [number for number in range(INSTALLS) if number not in taken]
            if not mine and not free:
                raise ConfigError(f"all {INSTALLS} install numbers of this machine are taken")
            install = (mine or free)[0]
        root = root or f"{DEFAULT_ROOTS}/{install}"
        if taken.get(install, root) != root:
            raise ConfigError(f"install {install} of this machine belongs to {taken[install]}")
        os.makedirs(root, mode=0o711, exist_ok=True)
        write_file(install_lock(install), json.dumps({"root": root}).encode() + b"\n", mode=0o644)
        return install, root


def release_install(install: int, root: str) -> None:
    """Give the number back, if it is ``root``'s. Safe to repeat. The last one takes the machine's lock along."""
    with _machine_lock():
        if _read_root(install_lock(install)) == root:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(install_lock(install))
        if not any(os.path.exists(install_lock(number)) for number in range(INSTALLS)):
            os.unlink(_machine_lock_path())


@contextlib.contextmanager
def _machine_lock() -> Iterator[None]:
    # Held for a few file operations only, so waiting for it needs no bound of its own.
    os.makedirs(LOCK_FOLDER, exist_ok=True)
    while True:
        lock = os.open(_machine_lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_still(_machine_lock_path(), lock):
                continue  # its last holder took it away
            yield
            return
        finally:
            os.close(lock)


def _machine_lock_path() -> str:
    return f"{LOCK_FOLDER}/berth-installs.lock"


def _is_still(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read_root(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            root = json.loads(file.read(65_536))["root"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return root if isinstance(root, str) else None


def write_file(path: str, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` at ``path`` by one rename: a reader sees the old file or the new one. Raises OSError."""
    temporary = f"{path}.{os.getpid()}.new"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(file, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(file)
    os.rename(temporary, path)
