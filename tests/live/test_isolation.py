"""A devbox tries to get out, or to take everything; the machine and its neighbours stay well."""

from __future__ import annotations

import json
import socket
import subprocess
import time

import pytest

from config import servers
from hostd.config import UIDS_PER_BOX, slot_number

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def prisoner(berth):
    box = berth.owner.create(name="prisoner")
    yield box
    berth.owner.shutdown(box)


@pytest.fixture
def run(berth, prisoner):
    return lambda command, **more: berth.owner.run(prisoner, command, **more)


def reaches(run, address: str, port: int) -> bool:
    """Does a TCP connection from the box come about?"""
    return bool(run(f"timeout 3 bash -c '</dev/tcp/{address}/{port}' && echo open", timeout=30)[0] == "open\n")


def test_the_hosts_servers_cannot_be_reached(berth, run) -> None:
    gateway = berth.host_config().gateway
    memory = berth.state.path / "servers.json"
    ports = [value for name, value in json.loads(memory.read_text()).items() if name.endswith("_port")]
    ports += [servers.sshd_port(berth.state), int(berth.base_url.rsplit(":", 1)[1])]
    for address in (gateway, "127.0.0.1"):
        assert [port for port in set(ports) if reaches(run, address, port)] == [], address


def test_none_of_the_machines_own_addresses_can_be_reached(berth, run) -> None:
    """Whatever listens there, on every address: a server that was started for everybody."""
    told = subprocess.run(["ip", "-j", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    own = {one["local"] for link in json.loads(told) for one in link["addr_info"]} - {"127.0.0.1"}
    assert berth.host_config().gateway in own
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        for address in own:
            socket.create_connection((address, port), 3).close()
            assert not reaches(run, address, port), address


def test_metadata_and_private_networks_cannot_be_reached(run) -> None:
    for address, port in (("169.254.169.254", 80), ("10.0.0.1", 22), ("192.168.0.1", 80)):
        assert not reaches(run, address, port), address


def test_neighbours_cannot_be_reached_nor_seen(berth, run) -> None:
    neighbour = berth.owner.create(name="neighbour")
    try:
        address = berth.rows("SELECT address FROM devboxes_devbox WHERE id = %s", neighbour)[0][0]
        berth.owner.run(neighbour, "python3 -m http.server 8000 >/dev/null 2>&1 & sleep 0.7")
        assert berth.owner.run(neighbour, "curl -s -o /dev/null -w '%{http_code}' 127.0.0.1:8000")[0] == "200"
        assert not reaches(run, address, 8000)
        assert run(f"ping -c 1 -W 1 {address} >/dev/null 2>&1 && echo answers")[0] == ""
        assert "http.server" not in run("ps aux")[0]
    finally:
        berth.owner.shutdown(neighbour)


@pytest.mark.parametrize(
    "attempt",
    [
        "sudo mount -t tmpfs none /mnt",
        "sudo mount --bind / /mnt",
        "sudo mknod /tmp/disk b 254 0 && sudo head -c 1 /tmp/disk",
        "sudo sh -c 'echo b > /proc/sysrq-trigger'",
        "sudo sh -c 'echo /tmp/x > /proc/sys/kernel/core_pattern'",
        "sudo dmesg",
        "sudo nsenter --target 1 --mount --net true",
        "sudo pivot_root / /mnt",
        "sudo unshare --mount true",
        "unshare --user --map-root-user true",
        "sudo ip link add dummy0 type dummy",
        "sudo python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        "sudo sysctl -w net.ipv4.ip_forward=1",
        "sudo date -s 2001-01-01",
        "sudo mount -t cgroup2 none /mnt",
        "sudo head -c 1 /dev/mem",
        # init_module of junk: an operator of the machine is told that it is no module, anybody else is refused.
        "sudo python3 -c 'import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True); "
        'libc.syscall(175, b"junk", 4, b""); sys.exit(ctypes.get_errno() in (1, 38))\'',
    ],
)
def test_what_only_the_machine_may_do_is_refused(run, attempt: str) -> None:
    _, stderr, status = run(attempt)
    assert status != 0
    assert "command not found" not in stderr and "AttributeError" not in stderr, "it was not even tried"


#: Make a subvolume, as each of the calls that there are would, and a snapshot of the disk; 0 when any of them worked.
SUBVOLUMES = """
import fcntl, os, struct, sys
here = os.open("/home/user", os.O_RDONLY)
made = []
for call, arguments in (
    (0x5000940E, struct.pack("q4088s", 0, b"one")),
    (0x50009418, struct.pack("QQQ32s4040s", 0, 0, 0, b"", b"two")),
    (0x50009401, struct.pack("q4088s", os.open("/", os.O_RDONLY), b"three")),
    (0x50009417, struct.pack("qQQ32s4040s", os.open("/", os.O_RDONLY), 0, 0, b"", b"four")),
):
    try:
        fcntl.ioctl(here, call, bytearray(arguments))
        made.append(hex(call))
    except OSError as error:
        print(hex(call), error)
sys.exit(f"made by {made}" if made else 7)
"""


@pytest.mark.parametrize("who", ["", "sudo "])
def test_no_subvolume_is_made_inside_a_disk(berth, run, prisoner: str, who: str) -> None:
    stdout, stderr, status = run(f"{who}python3 -c '{SUBVOLUMES}'")
    assert (status, stderr) == (7, ""), stderr
    assert len(stdout.splitlines()) == 4
    (slot,) = berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", prisoner)[0]
    listed = subprocess.run(
        ["btrfs", "subvolume", "list", berth.host_config().pool], capture_output=True, text=True, check=True
    )
    assert f"{slot}/" not in listed.stdout


def test_the_hosts_files_are_not_there(berth, run, prisoner: str) -> None:
    for path in (str(berth.state.path), "/var/lib/berth", berth.host_config().root, berth.host_config().run):
        assert run(f"sudo ls {path} 2>/dev/null")[0] == "", path
    assert run("sudo cat /etc/shadow | grep -c berth")[0] == "0\n"
    uid = run("cat /proc/self/uid_map")[0].split()
    (slot,) = berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", prisoner)[0]
    assert [int(number) for number in uid] == [0, berth.host_config().uid_base(slot_number(slot)), UIDS_PER_BOX]


def test_a_fork_bomb_stops_at_the_limit_and_the_box_recovers(berth, box: str) -> None:
    owner = berth.owner
    begun = owner.post(
        f"/v1/devboxes/{box}/execute_async",
        {"command": "bomb() { bomb | bomb & }; bomb; sleep 5; echo survived"},
    )
    time.sleep(2)
    assert owner.get("/v1/accounts/me")
    path = f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
    owner.post(f"{path}/kill", {"kill_process_group": True})
    owner.shutdown(box)
    other = owner.create(name="after-the-bomb")
    try:
        assert owner.run(other, "echo well") == ("well\n", "", 0)
    finally:
        owner.shutdown(other)


def test_a_full_disk_fails_the_writer_alone(berth) -> None:
    owner = berth.owner
    box = owner.create(name="full", launch_parameters={"resource_size_request": "X_SMALL"})
    try:
        _, stderr, status = owner.run(
            box, "timeout 50 dd if=/dev/urandom of=/home/user/fill bs=1M count=20000 status=none", timeout=90
        )
        assert status != 0
        assert "space" in stderr or "quota" in stderr.lower(), stderr
        assert (
            owner.run(box, "rm /home/user/fill; sync; echo freed > /home/user/note; cat /home/user/note")[0]
            == "freed\n"
        )
    finally:
        owner.shutdown(box)


def test_memory_exhausted_by_a_command_ends_that_command_or_the_box_as_out_of_memory(berth) -> None:
    owner = berth.owner
    box = owner.create(name="hungry", launch_parameters={"resource_size_request": "X_SMALL"})
    try:
        done = owner.post(
            f"/v1/devboxes/{box}/execute_sync",
            {"command": "python3 -c 'x = bytearray(64 << 30)' || tail /dev/zero"},
            timeout=90,
        )
        view = owner.get(f"/v1/devboxes/{box}")
        if view["status"] == "running":
            assert done["exit_status"] not in (0, None)
            assert owner.run(box, "echo well") == ("well\n", "", 0)
        else:
            assert (view["status"], view["failure_reason"]) == ("failure", "out_of_memory")
    finally:
        owner.post(f"/v1/devboxes/{box}/shutdown")


def test_a_stranger_sees_nothing(berth, prisoner: str) -> None:
    for method, path in (("GET", ""), ("POST", "/shutdown"), ("POST", "/execute_async"), ("POST", "/keep_alive")):
        answer = berth.stranger.client.request(
            method, f"/v1/devboxes/{prisoner}{path}", json={"command": "id"} if path else None
        )
        assert answer.status_code in (400, 404), (path, answer.text)
    assert berth.colleague.get(f"/v1/devboxes/{prisoner}")["status"] == "running"
    assert prisoner not in berth.stranger.client.get("/v1/devboxes").text
