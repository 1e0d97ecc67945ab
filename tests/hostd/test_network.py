"""Names and addresses; the machine's settings put back; a box's network made, found stale, and made again.

What touches the machine's own settings runs in a network namespace of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostd import config, firewall, network, syscalls
from hostd.config import ConfigError, HostConfig
from hostd.netlink import Netlink
from tests.hostd.trial import Trial, why_not

FORWARD = "net/ipv4/ip_forward"


def made(tmp_path: Path, install: int = 5, **more: object) -> HostConfig:
    root = tmp_path / f"root{install}"
    root.mkdir(exist_ok=True)
    given = {"cluster": "c", "host": "hst_x", "install": install, "root": str(root), "run": str(tmp_path / "run")}
    return config.from_dict({**given, **more})


def in_a_network_of_its_own(action: Callable[[], None]) -> None:
    if why_not():
        pytest.skip(str(why_not()))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            network._MACHINE_SETTINGS = {FORWARD: 1}  # the others belong to the whole machine
            network._set_sysctl(FORWARD, b"0")
            action()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- names and numbers ----------------------------------------------------------------------------------------------


def test_installs_never_meet() -> None:
    cfgs = [config.from_dict({"cluster": "c", "host": "h", "install": install}) for install in range(config.INSTALLS)]
    nets = [cfg.subnet for cfg in cfgs]
    assert all(not a.overlaps(b) for a in nets for b in nets if a is not b)
    ranges = sorted((cfg.uid_base(0), cfg.uid_base(config.BOXES - 1) + config.UIDS_PER_BOX) for cfg in cfgs)
    ranges += sorted((cfg.keeper_uid(0), cfg.keeper_uid(config.BOXES - 1) + 1) for cfg in cfgs)
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[0][0] > 65_536  # nobody who is real
    assert ranges[-1][1] < 2**31  # the kernel's ping_group_range ends there
    for cfg in cfgs:
        assert cfg.address(config.BOXES - 1) != cfg.gateway


def test_box_numbers_are_bounded() -> None:
    cfg = config.from_dict({"cluster": "c", "host": "h", "install": 1})
    assert (cfg.address(0), cfg.gateway, cfg.link(7)) == ("10.213.16.1", "10.213.31.254", "vb17")
    for n in (-1, config.BOXES):
        with pytest.raises(ValueError, match="box number"):
            cfg.address(n)
        with pytest.raises(ValueError, match="box number"):
            cfg.uid_base(n)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("install", 16),
        ("install", True),
        ("install", None),
        ("root", "relative"),
        ("root", "/a/../b"),
        ("root", "/"),
        ("run", "/" + "x" * 90),
        ("dns", ["::1"]),
        ("dns", ["1.1.1.1"] * 4),
        ("dns", [17]),
        ("dns", "1.1.1.1"),
        ("pool_bytes", 5),
        ("warm", -1),
        ("socket_group", "no such; group"),
        ("image", "../x"),
        ("cluster", ""),
        ("nested_user_namespaces", 1),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        config.from_dict({"cluster": "c", "host": "h", "install": 1, field: value})


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    cfg = made(tmp_path, dns=["1.1.1.1"], pool_bytes=2 << 30, warm=3)
    cfg.save()
    assert config.load(cfg.path) == cfg
    newer = {**json.loads(Path(cfg.path).read_text()), "a_field_of_the_future": 1}
    Path(cfg.path).write_text(json.dumps(newer))
    assert config.load(cfg.path) == cfg


def test_install_numbers_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LOCK_FOLDER", str(tmp_path / "lock"))
    monkeypatch.setattr(config, "DEFAULT_ROOTS", str(tmp_path / "roots"))
    assert config.claim_install(None) == (0, str(tmp_path / "roots/0"))
    assert config.claim_install(str(tmp_path / "mine")) == (1, str(tmp_path / "mine"))
    assert config.claim_install(str(tmp_path / "mine")) == (1, str(tmp_path / "mine"))
    assert config.claim_install(str(tmp_path / "mine"), 1)[0] == 1
    with pytest.raises(ConfigError, match="belongs to"):
        config.claim_install(str(tmp_path / "other"), 1)
    config.release_install(1, str(tmp_path / "other"))  # not its own
    with pytest.raises(ConfigError, match="belongs to"):
        config.claim_install(str(tmp_path / "other"), 1)
    config.release_install(1, str(tmp_path / "mine"))
    assert config.claim_install(str(tmp_path / "other"), 1)[0] == 1
    for _ in range(2, config.INSTALLS):
        config.claim_install(None)
    with pytest.raises(ConfigError, match="all 16"):
        config.claim_install(None)
    for install, root in config.installs_on_machine().items():
        config.release_install(install, root)
    assert list((tmp_path / "lock").iterdir()) == []


def test_the_machine_s_lock_holds_though_it_is_taken_away_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "LOCK_FOLDER", str(tmp_path / "lock"))
    monkeypatch.setattr(config, "DEFAULT_ROOTS", str(tmp_path / "roots"))
    holders: list[int] = []

    def come_and_go(n: int) -> None:
        for _ in range(60):
            install, root = config.claim_install(str(tmp_path / f"root-{n}"))
            holders.append(install)
            assert holders.count(install) == 1
            holders.remove(install)
            config.release_install(install, root)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert list((tmp_path / "lock").iterdir()) == []


def test_resolvers_only_the_machine_can_reach_are_left_out(tmp_path: Path) -> None:
    assert made(tmp_path, dns=["9.9.9.9"]) and network.resolvers(made(tmp_path, dns=["9.9.9.9"])) == ("9.9.9.9",)
    assert not any(address.startswith("127.") for address in network.resolvers(made(tmp_path)))


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.live
def test_settings_are_noted_once_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "installs_on_machine", lambda: {5: str(tmp_path / "root5")})
    cfg = made(tmp_path)

    def check() -> None:
        assert not network.is_machine_up(cfg)
        network.machine_up(cfg)
        network.machine_up(cfg)
        with Netlink() as netlink:
            netlink.set_up(netlink.index("lo"))
        assert network.is_machine_up(cfg)
        assert network._sysctl(FORWARD) == "1"
        assert json.loads(Path(cfg.sysctls_was).read_text())[FORWARD] == "0"
        network.machine_down(cfg)
        network.machine_down(cfg)
        assert network._sysctl(FORWARD) == "0"
        assert not network.is_machine_up(cfg)
        assert not os.path.exists(cfg.sysctls_was)

    in_a_network_of_its_own(check)


@pytest.mark.live
def test_the_last_install_puts_back_what_the_first_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made(tmp_path, 5), made(tmp_path, 6)
    alive = {5: first.root, 6: second.root}
    monkeypatch.setattr(network, "installs_on_machine", lambda: dict(alive))

    def check() -> None:
        network.machine_up(first)
        network.machine_up(second)
        network.machine_down(first)
        assert network._sysctl(FORWARD) == "1"  # the second still needs it
        del alive[5]
        network.machine_down(second)
        assert network._sysctl(FORWARD) == "0"

    in_a_network_of_its_own(check)


@pytest.mark.live
def test_a_box_is_wired_again_over_a_stale_link(tmp_path: Path) -> None:
    cfg = made(tmp_path)

    def check() -> None:
        with Netlink() as netlink:
            netlink.set_up(netlink.index("lo"))
        network.machine_up(cfg)
        before = os.stat("/proc/self/ns/net").st_ino
        namespace = network.wire(cfg, 7)  # somebody keeps this one open
        assert os.stat("/proc/self/ns/net").st_ino == before
        assert network.links(cfg) == ["vb57"]
        again = network.wire(cfg, 7)
        assert network.links(cfg) == ["vb57"]
        assert os.fstat(namespace).st_ino != os.fstat(again).st_ino
        for descriptor in (namespace, again):
            os.close(descriptor)
        deadline = time.monotonic() + 5
        while network.links(cfg):  # pinned nowhere: it goes by itself
            assert time.monotonic() < deadline
            time.sleep(0.01)
        network.unwire(cfg, 7)

    in_a_network_of_its_own(check)


@pytest.mark.live
def test_errors_of_the_kernel_are_told() -> None:
    def check() -> None:
        with Netlink() as netlink:
            with pytest.raises(OSError, match="No such device"):
                netlink.index("none")
            with pytest.raises(OSError, match="No such device"):
                netlink.add_address(4711, "10.0.0.1", 32)
            netlink.delete_link("none")

    in_a_network_of_its_own(check)


@pytest.mark.live
def test_connections_per_box_are_capped(trial: Trial) -> None:
    """With a cap of 16, and a resolver as the only far end every machine has."""
    resolvers = network.resolvers(trial.cfg)
    if not resolvers:
        pytest.skip("this machine has no resolver that boxes could reach")
    program = (
        "import socket, time\n"
        "def port():\n"
        "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)\n"
        f"    s.connect(({resolvers[0]!r}, 53))\n"
        "    s.send(bytes.fromhex('123401000001000000000000036465620664656269616e036f72670000010001'))\n"
        "    try: s.recv(512); return s\n"
        "    except TimeoutError: return None\n"
        "held = []\n"
        "for _ in range(40):\n"
        "    s = port()\n"
        "    if s is None: break\n"
        "    held.append(s)\n"
        "print(len(held))\n"
    )
    with trial.box() as box:
        few = dataclasses.replace(trial.cfg, connections_per_box=16)
        firewall.load(few, resolvers)
        try:
            said = trial.run(box, f"cat > p.py <<'E'\n{program}E\npython3 p.py", check=True).stdout.strip()
        finally:
            firewall.load(trial.cfg, resolvers)
        if said == "0":
            pytest.skip("the resolver does not answer")
        assert said == "16"
        assert trial.run(box, "python3 p.py", check=True).stdout.strip() == "40"
