"""Boxes: made twice, destroyed twice, killed halfway, attacked from inside."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hostd import boxes, bundles, cgroups, disks, keeper_spec, network, slots
from hostd.boxes import Made
from hostd.config import HostConfig
from hostd.messages import Refused
from tests.hostd.trial import LIMITS, Trial

pytestmark = pytest.mark.live

DEVBOX = "dbx_" + "0" * 25 + "{}"


@pytest.fixture(scope="module")
def box(trial: Trial) -> Iterator[Made]:
    with trial.box() as made:
        yield made


def nothing_left(trial: Trial, slot: str, n: int) -> None:
    cfg = trial.cfg
    driver = cgroups.detect()
    assert not any(os.path.exists(folder) for folder in driver.folders(cfg.box_cgroup(slot)))
    assert not any(os.path.exists(folder) for folder in driver.folders(cfg.keeper_cgroup(slot)))
    paths = [cfg.bundle(slot), f"{cfg.runtime_state}/{slot}", cfg.disk(slot), cfg.output(slot), cfg.keeper_socket(slot)]
    assert [path for path in paths if os.path.lexists(path)] == []
    assert slot not in slots.recorded(cfg)
    assert slot not in slots.warm(cfg)
    assert slot not in slots.owners(cfg)
    assert slot not in trial.do(mounts)
    deadline = time.monotonic() + 3
    while cfg.link(n) in network.links(cfg):
        assert time.monotonic() < deadline, f"{cfg.link(n)} is still there"
        time.sleep(0.02)


def mounts(cfg: object) -> str:
    with open("/proc/self/mounts") as file:
        return file.read()


# --- life -----------------------------------------------------------------------------------------------------------


def test_made_and_destroyed_twice(trial: Trial) -> None:
    made = trial.make()
    again = trial.do(boxes.make_box, made.slot, made.n, LIMITS, "other")
    assert (again.init_pid, again.init_start) == (made.init_pid, made.init_start)
    trial.do(boxes.make_disk, made.slot, made.n, trial.cfg.image, LIMITS.disk_bytes)
    state = next(state for state in trial.do(boxes.list_slots) if state.slot == made.slot)
    assert (state.state, state.box, state.made) == ("up", None, made)
    trial.destroy(made)
    trial.destroy(made)
    nothing_left(trial, made.slot, made.n)
    assert bundles.start_time(made.init_pid) is None


def test_what_is_inside(trial: Trial, box: Made) -> None:
    said = trial.run(
        box,
        "hostname; id -u; sudo id -u; echo $HOME; cat /etc/resolv.conf; stat -c %a /tmp; wc -c < /etc/machine-id;"
        "getent hosts trial; tr '\\0' ' ' < /proc/1/cmdline; echo; findmnt -no FSTYPE /tmp || echo on disk",
        check=True,
    ).stdout.splitlines()
    assert said[:4] == ["trial", "1000", "0", "/home/user"]
    assert said[4].startswith("nameserver ")
    assert said[-5:-3] == ["1777", "33"]
    assert said[-3].split()[1] == "trial"
    assert said[-2:] == ["/run/berth/init -P ", "on disk"]


def test_a_given_path_survives_a_login_shell(trial: Trial, box: Made) -> None:
    assert trial.run(box, "PATH=/mine:$PATH bash -lc 'echo $PATH'").stdout.startswith("/mine:")


def test_a_boxs_setuid_files_are_worth_nothing_on_the_machine(trial: Trial, box: Made) -> None:
    assert os.statvfs(trial.cfg.pool).f_flag & os.ST_NOSUID
    assert stat.S_IMODE(os.stat(trial.cfg.pool).st_mode) == 0o700
    assert trial.run(box, "sudo true").returncode == 0  # inside they work


def test_init_outlives_a_massacre_by_root(trial: Trial, box: Made) -> None:
    trial.run(box, "sleep 100 & sleep 0.1; sudo kill -9 -1")
    assert boxes.find_made(trial.cfg, box.slot) is not None
    assert trial.run(box, "pgrep -c sleep").stdout.strip() == "0"


def test_orphans_are_reaped(trial: Trial, box: Made) -> None:
    trial.run(box, "for i in 1 2 3 4 5; do (sleep 0.05 &) ; done", check=True)
    time.sleep(0.3)
    assert "defunct" not in trial.run(box, "ps -ef").stdout


def test_sudo_apt_and_chown_work_with_the_mapped_disk(trial: Trial, box: Made) -> None:
    said = trial.run(
        box,
        "touch f && sudo chown 33:44 f && stat -c %u:%g f && sudo setcap cap_net_raw+p /usr/bin/env 2>&1; "
        "sudo dpkg -P strace >/dev/null && ! command -v strace",
    )
    assert said.stdout.splitlines()[0] == "33:44"
    assert said.returncode == 0, said.stdout
    found = os.stat(f"{trial.cfg.disk(box.slot)}/home/user/f")
    assert (found.st_uid, found.st_gid) == (33, 44)  # on disk nothing is shifted


def test_stopped_and_booted_again_on_the_same_disk(trial: Trial) -> None:
    made = trial.make()
    try:
        trial.run(made, "echo kept > f", check=True)
        trial.do(boxes.stop_box, made.slot, made.n)
        trial.do(boxes.stop_box, made.slot, made.n)
        assert trial.do(boxes.list_slots)[-1].state == "disk"
        again = trial.do(boxes.make_box, made.slot, made.n, LIMITS, "trial")
        assert again.init_pid != made.init_pid
        assert trial.run(again, "cat f").stdout == "kept\n"
    finally:
        trial.destroy(made)


def test_a_box_whose_init_died_is_down_and_can_be_made_again(trial: Trial) -> None:
    made = trial.make()
    try:
        os.kill(made.init_pid, 9)
        deadline = time.monotonic() + 5
        while boxes.find_made(trial.cfg, made.slot) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        states = {state.slot: state.state for state in trial.do(boxes.list_slots)}
        assert states[made.slot] == "down"
        again = trial.do(boxes.make_box, made.slot, made.n, LIMITS, "trial")
        assert trial.run(again, "echo alive").stdout == "alive\n"
    finally:
        trial.destroy(made)


def test_four_makers_at_once(trial: Trial) -> None:
    def some(cfg: object) -> list[tuple[str, int]]:
        found = []
        for _ in range(4):
            slot = boxes.new_slot(trial.cfg, trial.cfg.image, LIMITS.disk_bytes)
            boxes.make_disk(trial.cfg, slot.slot, slot.n, slot.image, LIMITS.disk_bytes)
            made = boxes.make_box(trial.cfg, slot.slot, slot.n, LIMITS, "trial")
            assert boxes.find_made(trial.cfg, slot.slot) == made
            boxes.destroy_box(trial.cfg, slot.slot, slot.n)
            found.append((slot.slot, slot.n))
        return found

    started = [trial.start(some) for _ in range(4)]
    found = [pair for child in started for pair in trial.answer(*child)]
    assert len({n for _, n in found}) == 16
    for slot, n in found:
        nothing_left(trial, slot, n)


def test_without_a_disk_or_an_image(trial: Trial) -> None:
    slot = boxes.new_slot(trial.cfg, "img_000000000000", LIMITS.disk_bytes)
    with pytest.raises(Refused) as refused:
        trial.do(boxes.make_disk, slot.slot, slot.n, slot.image, LIMITS.disk_bytes)
    assert refused.value.code == "unknown_image"
    with pytest.raises(Refused) as refused:
        trial.do(boxes.make_box, slot.slot, slot.n, LIMITS, "trial")
    assert refused.value.code == "not_ready"
    trial.do(boxes.destroy_box, slot.slot, slot.n)
    nothing_left(trial, slot.slot, slot.n)


def test_limits_are_rewritten(trial: Trial, box: Made) -> None:
    more = replace(LIMITS, memory_bytes=512 << 20, pids=100, disk_bytes=400 << 20)
    trial.do(boxes.set_limits, box.slot, more)
    trial.do(boxes.set_limits, box.slot, more)
    assert disks.disk_usage(trial.cfg, box.slot)[1] == 400 << 20
    trial.do(boxes.set_limits, box.slot, LIMITS)
    with pytest.raises(Refused) as refused:
        trial.do(boxes.set_limits, box.slot, replace(LIMITS, memory_bytes=4096))
    assert refused.value.code == "busy"


def test_a_box_that_is_up_gets_another_host_name(trial: Trial, box: Made) -> None:
    def rename(cfg: HostConfig) -> list[str]:
        before = os.uname().nodename
        boxes.set_limits(cfg, box.slot, LIMITS, "dbx-renamed")
        boxes.set_limits(cfg, box.slot, LIMITS, "dbx-renamed")
        return [before, os.uname().nodename]

    before, after = trial.do(rename)
    assert before == after != "dbx-renamed", "the maker keeps its own"
    assert trial.run(box, "hostname", check=True).stdout == "dbx-renamed\n"
    trial.do(boxes.set_limits, box.slot, LIMITS, "trial")


def test_disks_are_kept_on_request(trial: Trial) -> None:
    made = trial.make()
    trial.run(made, "echo precious > f", check=True)
    trial.destroy(made, keep_disk=True)
    nothing_left(trial, made.slot, made.n)
    [(name, slot, _)] = disks.kept(trial.cfg)
    assert slot == made.slot
    assert trial.do(boxes.drop_kept_disks, 3600) == 0
    with open(f"{trial.cfg.kept_disks}/{name}/home/user/f") as file:
        assert file.read() == "precious\n"
    assert trial.do(boxes.drop_kept_disks, 0) == 1
    assert disks.kept(trial.cfg) == []


def test_keeper_descriptors(trial: Trial, box: Made) -> None:
    def opened(cfg: object) -> list[tuple[str, bool, str]]:
        found = boxes.open_keeper_fds(trial.cfg, box.slot, box.n)
        return [(role, os.get_inheritable(fd), os.readlink(f"/proc/self/fd/{fd}")) for role, fd in found]

    found = trial.do(opened)
    roles = [role for role, _, _ in found]
    assert set(roles) == set(keeper_spec.ROLES) - {keeper_spec.LISTEN}
    assert roles.count(keeper_spec.KEEPER_CGROUP) == roles.count(keeper_spec.BOX_CGROUP) >= 1
    assert not any(inheritable for _, inheritable, _ in found)
    out = os.stat(trial.cfg.output(box.slot))
    assert (out.st_uid, stat.S_IMODE(out.st_mode)) == (trial.cfg.keeper_uid(box.n), 0o700)
    with pytest.raises(Refused):
        boxes.open_keeper_fds(trial.cfg, f"s{box.n}-ffffff", box.n)


def test_the_keepers_uid_owns_the_box_and_no_other(trial: Trial, box: Made) -> None:
    with trial.box() as other:

        def as_keeper(cfg: object) -> list[str]:
            uid = trial.cfg.keeper_uid(box.n)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            said = []
            for made in (box, other):
                try:
                    os.kill(made.init_pid, 0)
                    said.append("may signal")
                except PermissionError:
                    said.append("refused")
            return said

        assert trial.do(as_keeper) == ["may signal", "refused"]


# --- slots ----------------------------------------------------------------------------------------------------------


def test_a_warm_slot_is_given_once(trial: Trial) -> None:
    cfg = trial.cfg
    first, second = DEVBOX.format(1), DEVBOX.format(2)
    slot = boxes.new_slot(cfg, cfg.image, LIMITS.disk_bytes)
    try:
        assert not boxes.claim_warm(cfg, slot.slot, first)
        boxes.mark_warm(cfg, slot.slot)
        boxes.mark_warm(cfg, slot.slot)
        assert boxes.claim_warm(cfg, slot.slot, first)
        assert not boxes.claim_warm(cfg, slot.slot, second)
        assert boxes.slot_of(cfg, first) == slot
        assert boxes.slot_of(cfg, second) is None
        assert boxes.new_slot(cfg, cfg.image, 1, first) == slot
    finally:
        trial.do(boxes.destroy_box, slot.slot, slot.n)
    assert boxes.slot_of(cfg, first) is None
    nothing_left(trial, slot.slot, slot.n)


# --- killed halfway -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_making_killed_anywhere_leaves_nothing_behind_its_destruction(trial: Trial, seed: int) -> None:
    cfg = trial.cfg
    slot = boxes.new_slot(cfg, cfg.image, LIMITS.disk_bytes)

    def making(_: object) -> None:
        boxes.make_disk(cfg, slot.slot, slot.n, slot.image, LIMITS.disk_bytes)
        boxes.make_box(cfg, slot.slot, slot.n, LIMITS, "trial")

    child, answer = trial.start(making)
    time.sleep(random.Random(seed).uniform(0.005, 0.06))
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(answer)
    if seed % 3 == 0:  # a retry of the making succeeds
        trial.do(making)
        assert trial.run(trial.do(boxes.find_made, slot.slot), "echo alive").stdout == "alive\n"
    destroying, answer = trial.start(boxes.destroy_box, slot.slot, slot.n)
    time.sleep(random.Random(seed).uniform(0, 0.01))
    os.kill(destroying, 9)
    os.waitpid(destroying, 0)
    os.close(answer)
    trial.do(boxes.destroy_box, slot.slot, slot.n)
    nothing_left(trial, slot.slot, slot.n)


def test_a_frozen_box_full_of_processes_is_destroyed(trial: Trial) -> None:
    made = trial.make()
    trial.run(made, "for i in $(seq 30); do setsid sleep 1000 >/dev/null 2>&1 </dev/null & done; sleep 0.1", check=True)
    cgroups.detect().freeze(trial.cfg.box_cgroup(made.slot))
    began = time.monotonic()
    trial.destroy(made)
    assert time.monotonic() - began < 5
    nothing_left(trial, made.slot, made.n)


def test_thaw_all(trial: Trial, box: Made) -> None:
    cgroups.detect().freeze(trial.cfg.box_cgroup(box.slot))
    trial.do(boxes.thaw_all)
    assert trial.run(box, "echo thawed").stdout == "thawed\n"


# --- attacks --------------------------------------------------------------------------------------------------------


def reach(host: str, port: int) -> str:
    return f"timeout 3 bash -c '</dev/tcp/{host}/{port}' 2>&1 && echo open || echo closed"


def closed(said: str) -> bool:
    return said.strip().splitlines()[-1] == "closed"


@pytest.fixture
def listener() -> Iterator[int]:
    """A service of the machine on all its addresses, as sshd is."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.settimeout(0.2)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        done.set()
        thread.join()


def test_services_of_the_machine_are_closed(trial: Trial, box: Made, listener: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet: only to learn the machine's own address
        own = probe.getsockname()[0]
    with socket.create_connection((own, listener), timeout=3):
        pass  # open to the machine itself
    for address in (own, trial.cfg.gateway, "10.213.255.254", "169.254.169.254"):
        assert closed(trial.run(box, reach(address, listener)).stdout), address


def test_other_boxes_are_closed_and_the_box_itself_is_open(trial: Trial, box: Made) -> None:
    with trial.box() as other:
        serve = "setsid python3 -m http.server 80 >/dev/null 2>&1 </dev/null & sleep 0.7"
        trial.run(other, serve, check=True)
        assert not closed(trial.run(other, reach("127.0.0.1", 80)).stdout)
        assert not closed(trial.run(other, reach(other.address, 80)).stdout)
        assert closed(trial.run(box, reach(other.address, 80)).stdout)
        with socket.create_connection((other.address, 80), timeout=3):
            pass  # the machine may dial into its boxes


def test_the_gateway_answers_its_user(trial: Trial, box: Made) -> None:
    trial.run(box, f"ping -c 1 -W 2 {trial.cfg.gateway}", check=True)


def test_the_resolver_is_open(trial: Trial, box: Made) -> None:
    resolver = network.resolvers(trial.cfg)
    if not resolver:
        pytest.skip("this machine has no resolver that boxes could reach")
    if subprocess.run(["getent", "hosts", "deb.debian.org"], check=False, capture_output=True).returncode:
        pytest.skip("this machine resolves no names")
    assert trial.run(box, "getent hosts deb.debian.org").returncode == 0


def test_the_network_cannot_be_changed_from_inside(trial: Trial, box: Made) -> None:
    for command in ("ip addr add 10.9.9.9/32 dev eth0", "ip route del default", "ip link set eth0 down"):
        assert trial.run(box, command, root=True).returncode != 0, command
    raw = "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"
    assert "PermissionError" in trial.run(box, f"python3 -c '{raw}'", root=True).stdout
    assert "inet6" not in trial.run(box, "ip address").stdout


def test_mounts_namespaces_and_devices_are_refused(trial: Trial, box: Made) -> None:
    for command in (
        "mount -t tmpfs none /mnt",
        "mount --bind / /mnt",
        "umount /proc/keys",
        "umount /etc/resolv.conf",
        "mount -o remount,rw /proc/sys",
        "unshare -U true",
        "unshare -rm true",
        "unshare -n true",
        "nsenter -t 1 -m true",
        "mknod /tmp/d b 254 0",
        "echo 1 > /proc/sys/kernel/core_pattern",
        "echo b > /proc/sysrq-trigger",
        "dmesg",
        "chmod 600 /dev/null",
        "echo x > /etc/machine-id",
        "ls /sys/fs/cgroup",
        "touch /sys/x",
        "date -s 2001-01-01",
        "swapoff -a && false",
    ):
        assert trial.run(box, command, root=True).returncode != 0, command
    assert stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666
    assert os.stat("/dev/null").st_uid == 0


def test_system_calls_of_the_filter(trial: Trial, box: Made) -> None:
    program = r"""
import ctypes, errno, fcntl, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    r = libc.syscall(*[ctypes.c_long(x) for x in a])
    return errno.errorcode.get(ctypes.get_errno(), "?") if r < 0 else "ok"
for name, nr in {"io_uring_setup": 425, "bpf": 321, "keyctl": 250, "userfaultfd": 323, "perf_event_open": 298,
                 "clone3": 435, "mount": 165, "setns": 308, "open_by_handle_at": 304}.items():
    print(name, call(nr, 0, 0, 0, 0, 0))
print("unshare", call(272, 0x10000000))
print("clone", call(56, 0x10000000 | 17, 0, 0, 0, 0))
print("unshare_files", call(272, 0x400))
d = os.open("/home/user", os.O_RDONLY)
try:
    fcntl.ioctl(d, 0x5000940e, bytearray(struct.pack("=q4088s", 0, b"nested")))
    print("subvolume made")
except OSError as e:
    print("subvolume", errno.errorcode[e.errno])
open("/home/user/a", "w").write("x" * 9000)
os.system("cp --reflink=always /home/user/a /home/user/b && echo reflink ok")
"""
    done = trial.run(box, f"cat > /tmp/p.py <<'E'\n{program}\nE\npython3 /tmp/p.py")
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said["clone3"] == "ENOSYS"
    assert said["unshare"] == said["clone"] == said["mount"] == said["setns"] == "EPERM"
    assert said["unshare_files"] == "ok"
    assert all(said[name] in ("ENOSYS", "EPERM") for name in ("io_uring_setup", "bpf", "keyctl", "userfaultfd"))
    assert said["subvolume"] in ("ENOSYS", "EPERM")
    assert said["reflink"] == "ok"


def test_a_fork_bomb_stays_in_its_box(trial: Trial) -> None:
    with trial.box() as made:
        trial.run(made, "setsid bash -c 'f() { f | f & }; f' >/dev/null 2>&1 </dev/null & sleep 1")
        with open(cgroups.detect().pids_events_file(trial.cfg.box_cgroup(made.slot))) as file:
            assert int(file.read().split()[1]) > 0
        assert len(cgroups.detect().members(trial.cfg.box_cgroup(made.slot))) <= LIMITS.pids
        assert boxes.find_made(trial.cfg, made.slot) is not None


def test_a_memory_bomb_is_killed_inside(trial: Trial, box: Made) -> None:
    before = boxes.oom_kills(trial.cfg, box.slot)
    done = trial.run(box, "python3 -c 'b = bytearray(600 << 20)'; echo $?")
    assert "137" in done.stdout
    assert boxes.oom_kills(trial.cfg, box.slot) > before
    assert boxes.find_made(trial.cfg, box.slot) is not None
    # Files of RAM disks count as well.
    trial.run(box, "head -c 600M /dev/zero > /dev/shm/x; rm -f /dev/shm/x")
    assert boxes.find_made(trial.cfg, box.slot) is not None


def test_a_full_disk_is_only_the_boxs(trial: Trial) -> None:
    small = replace(LIMITS, disk_bytes=64 << 20)
    with trial.box(small) as made:
        done = trial.run(made, "head -c 200M /dev/urandom > f; sync; echo done")
        assert "quota exceeded" in done.stdout.lower(), done.stdout
        held, limit = disks.disk_usage(trial.cfg, made.slot)
        assert limit == 64 << 20
        assert held <= 65 << 20
        trial.run(made, "rm f && sync && echo again > f && cat f", check=True)
    with trial.box() as other:
        trial.run(other, "head -c 32M /dev/urandom > f && sync", check=True)


def test_an_inode_bomb_is_only_the_boxs(trial: Trial) -> None:
    small = replace(LIMITS, disk_bytes=4 << 20)
    with trial.box(small) as made:
        make = 'import os\nfor i in range(200000): open(f"f{i}", "w").close()'
        done = trial.run(made, f"mkdir d && cd d && python3 -c '{make}'", seconds=60)
        assert done.returncode != 0
        assert "quota" in done.stdout.lower()


def test_cpu_is_bounded(trial: Trial) -> None:
    with trial.box(replace(LIMITS, cpu_millis=200)) as made:
        said = trial.run(made, "timeout 2 bash -c 'while :; do :; done'; times").stdout
        minutes, seconds = said.splitlines()[1].split()[0].rstrip("s").split("m")
        assert float(minutes) * 60 + float(seconds) < 1.0  # of the two seconds it wanted


def test_nothing_of_the_machine_is_seen(trial: Trial, box: Made) -> None:
    assert trial.run(box, "ls /proc | grep -c '^[0-9]'").stdout.strip() not in ("", "0")
    assert "pytest" not in trial.run(box, "ps -ef", root=True).stdout
    assert "10.213." in trial.run(box, "ip -o -4 address show eth0").stdout
    assert trial.run(box, "head -c 1 /proc/kcore | wc -c", root=True).stdout.splitlines()[-1] == "0"
    assert trial.run(box, "ls /proc/1/root/tmp && ls -A /dev/disk 2>/dev/null; ls /dev/vda", root=True).returncode != 0
