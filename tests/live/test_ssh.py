"""SSH into real boxes with OpenSSH's own programs, through both doors: what works, what is refused, what ends."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pexpect
import pytest

from config import first
from config.state import free_port

pytestmark = pytest.mark.live

WITHIN = 40.0


@dataclasses.dataclass
class Login:
    """A way into a devbox: `door` is plain, or tls as the published command line dials."""

    berth: Any
    box: str
    key: Path
    url: str
    folder: Path
    door: str = "plain"

    @property
    def address(self) -> str:
        return f"user+{self.box}@127.0.0.1" if self.door == "plain" else f"user@{self.url}"

    def options(self, port: str = "-p") -> list[str]:
        plain, tls = self.berth.env["BERTH_SSH_BIND"], self.berth.env["BERTH_SSH_TLS_BIND"]
        told = ["IdentitiesOnly=yes", "BatchMode=yes", "StrictHostKeyChecking=no", "ConnectTimeout=20"]
        told += [f"UserKnownHostsFile={self.folder}/known_hosts", "LogLevel=ERROR"]
        if self.door == "tls":
            told.append(f"ProxyCommand=openssl s_client -quiet -servername %h -connect {tls} 2>/dev/null")
        where = [port, plain.rpartition(":")[2]] if self.door == "plain" else []
        return ["-F", "none", "-i", str(self.key), *(word for option in told for word in ("-o", option)), *where]

    def run(self, *command: str, more: Sequence[str] = (), given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        argv = ["ssh", *more, *self.options(), self.address, *command]  # of an option the first value counts
        return subprocess.run(argv, input=given, capture_output=True, timeout=WITHIN, check=False)

    def out(self, *command: str, given: bytes = b"") -> str:
        done = self.run(*command, given=given)
        assert done.returncode == 0, done
        return done.stdout.decode()

    @contextlib.contextmanager
    def started(self, *command: str, more: Sequence[str] = (), address: bool = True) -> Iterator[Any]:
        argv = ["ssh", *more, *self.options(), self.address, *command]  # of an option the first value counts
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.communicate(timeout=WITHIN)


def login_to(berth, box: str, folder: Path, door: str = "plain", key: Any = None) -> Login:
    told = (key or berth.owner).post(f"/v1/devboxes/{box}/create_ssh_key")
    path = folder / f"{box}.{time.monotonic_ns()}.pem"
    path.touch(mode=0o600)
    path.write_text(told["ssh_private_key"])
    return Login(berth, box, path, told["url"], folder, door)


@pytest.fixture(scope="module")
def shared(berth) -> Iterator[str]:
    """One devbox for most of them."""
    box = berth.owner.create(name="ssh", environment_variables={"COLOUR": "sea green"})
    yield box
    berth.owner.shutdown(box)


@pytest.fixture(params=["plain", "tls"])
def login(berth, shared: str, tmp_path: Path, request: pytest.FixtureRequest) -> Login:
    return login_to(berth, shared, tmp_path, request.param)


@pytest.fixture
def plain(berth, shared: str, tmp_path: Path) -> Login:
    return login_to(berth, shared, tmp_path)


def eventually(check: Any, what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


# --- commands


def test_a_command_has_its_streams_its_status_and_its_environment(login: Login) -> None:
    done = login.run("echo out; echo err >&2; id -un; pwd; echo $COLOUR; exit 7")
    assert (done.returncode, done.stderr) == (7, b"err\n")
    assert done.stdout.decode().splitlines() == ["out", "user", "/home/user", "sea green"]
    assert login.run("exec kill -9 $$").returncode == 255, "as sshd says it: the exit was a signal's"


def test_every_byte_passes_both_ways(login: Login) -> None:
    data = os.urandom(1 << 20) * 16 + bytes(range(256))
    done = login.run("tee >(sha256sum >&2)", given=data)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).hexdigest() == hashlib.sha256(data).hexdigest()
    assert done.stderr.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_an_end_of_input_and_a_reader_that_leaves_are_felt(plain: Login) -> None:
    assert plain.out("wc -c; echo after", given=b"12345") == "5\nafter\n"
    with plain.started("yes") as process:
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        process.wait(timeout=WITHIN)


def test_what_a_client_leaves_behind_is_hung_up(plain: Login) -> None:
    for more in ((), ("-tt",)):
        mark = f"1000.{time.monotonic_ns()}"
        with plain.started(f"echo ready; sleep {mark}", more=more) as process:
            assert process.stdout.readline().strip() == b"ready"
        eventually(lambda mark=mark: plain.run(f"pgrep -fx 'sleep {mark}'").returncode == 1, "it is still there")


def test_a_terminal(login: Login) -> None:
    argv = [*login.options(), "-tt", login.address]
    child = pexpect.spawn(
        "ssh", argv, dimensions=(33, 91), timeout=WITHIN, encoding="utf-8", env={"TERM": "xterm", **PATH}
    )
    child.sendline("stty size; echo $TERM $0 $COLOUR")
    child.expect(r"33 91\r\nxterm -?\S*bash sea green")
    child.setwinsize(40, 120)
    child.sendline("for i in $(seq 50); do [ \"$(stty size)\" = '40 120' ] && echo re''sized && break; sleep 0.2; done")
    child.expect("resized")
    child.sendline("bash -c \"trap 'echo in''terrupted; exit' INT; echo rea''dy; while :; do sleep 0.1; done\"")
    child.expect("ready")
    child.sendcontrol("c")
    child.expect("interrupted")
    child.sendline("exit 3")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 3


PATH = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root")}


# --- files


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(3 << 20) + b"\0\r\n\xff")
    return path


def copy(argv: list[str], **more: Any) -> None:
    done = subprocess.run(argv, capture_output=True, timeout=WITHIN, check=False, **more)
    assert done.returncode == 0, done


def test_scp_in_both_ways_of_its(login: Login, blob: Path, tmp_path: Path) -> None:
    for way in ([], ["-O"]):
        copy(["scp", *way, *login.options("-P"), str(blob), f"{login.address}:copied"])
        copy(["scp", *way, *login.options("-P"), f"{login.address}:copied", str(tmp_path / "back")])
        assert (tmp_path / "back").read_bytes() == blob.read_bytes()
    assert login.out("stat -c %U copied") == "user\n"


def test_sftp(login: Login, blob: Path, tmp_path: Path) -> None:
    batch = f"put {blob} sent\nmkdir -p made\nrename sent made/moved\nget made/moved {tmp_path}/got\nls -l made\n"
    batch = batch.replace("mkdir -p", "-mkdir")
    copy(["sftp", *login.options("-P"), "-b", "-", login.address], input=batch.encode())
    assert (tmp_path / "got").read_bytes() == blob.read_bytes()
    login.out("rm -r made")


def test_rsync(login: Login, blob: Path, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync on this machine")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    shutil.copy(blob, tree / "deep" / "blob")
    (tree / "link").symlink_to("deep/blob")
    through = " ".join(f"'{word}'" for word in ["ssh", *login.options()])
    copy(["rsync", "-ac", "-e", through, f"{tree}/", f"{login.address}:tree/"])
    copy(["rsync", "-a", "-e", through, f"{login.address}:tree/", f"{tmp_path}/again/"])
    assert (tmp_path / "again" / "deep" / "blob").read_bytes() == blob.read_bytes()
    assert os.readlink(tmp_path / "again" / "link") == "deep/blob"


# --- ports


@pytest.fixture(scope="module")
def served(berth, shared: str) -> int:
    """A web server in the devbox, on its loopback."""
    berth.owner.post(f"/v1/devboxes/{shared}/execute_async", {"command": "python3 -m http.server -b 127.0.0.1 8123"})
    return 8123


def test_a_port_of_the_devbox_is_forwarded(login: Login, served: int) -> None:
    login.out("head -c 5000000 /dev/zero > big")
    mine = free_port()
    with login.started(more=["-N", "-L", f"{mine}:localhost:{served}"]), httpx.Client(trust_env=False) as client:

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return client.get(f"http://127.0.0.1:{mine}/").status_code == 200
            return False

        eventually(answers, "nothing came through")
        assert client.get(f"http://127.0.0.1:{mine}/big").content == bytes(5_000_000)
        assert client.get(f"http://127.0.0.1:{mine}/none").status_code == 404


@pytest.mark.parametrize("place", ["10.0.0.1:22", "127.0.0.2:22", "example.com:80", "localhost:1"])
def test_nothing_else_is(plain: Login, place: str) -> None:
    done = plain.run(more=["-W", place])
    assert done.returncode == 255
    assert b"forwarding failed" in done.stderr


def test_what_is_never_forwarded(plain: Login, tmp_path: Path) -> None:
    done = plain.run("true", more=["-o", "ExitOnForwardFailure=yes", "-R", "0:localhost:22"])
    assert done.returncode == 255
    assert b"remote port forwarding failed" in done.stderr
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        eventually((tmp_path / "agent").exists, "no agent")
        argv = ["ssh", *plain.options(), "-A", plain.address, "echo [$SSH_AUTH_SOCK$DISPLAY]"]
        env = {**PATH, "SSH_AUTH_SOCK": str(tmp_path / "agent"), "DISPLAY": ":0"}
        done = subprocess.run(argv, env=env, capture_output=True, timeout=WITHIN, check=False)
        assert (done.returncode, done.stdout) == (0, b"[]\n")
    finally:
        agent.kill()
        agent.wait()
    mine = tmp_path / "mine.sock"
    with plain.started(more=["-N", "-L", f"{mine}:/run/dbus/system_bus_socket"]):
        eventually(mine.exists, "it does not listen")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WITHIN)
            sock.connect(str(mine))
            assert sock.recv(1) == b""


# --- who may come in


DENIED = b"Permission denied (publickey)."


def refused(login: Login) -> bytes:
    done = login.run("echo in")
    assert (done.returncode, done.stdout) == (255, b""), done
    assert DENIED in done.stderr, done
    return done.stderr.replace(login.address.encode(), b"ADDRESS")


def test_keys_and_names_that_do_not_fit_look_alike(berth, shared: str, tmp_path: Path) -> None:
    mine = login_to(berth, shared, tmp_path)
    assert mine.out("echo in") == "in\n"
    other = berth.owner.create(name="other")
    theirs = berth.stranger.create(name="theirs")
    try:
        stranger = login_to(berth, theirs, tmp_path, key=berth.stranger)
        assert stranger.out("echo in") == "in\n"
        unknown = other[:-4] + ("0000" if not other.endswith("0000") else "1111")
        said = set()
        for door in ("plain", "tls"):
            for box in (other, unknown):
                url = f"{box.replace('_', '-')}.ssh.berth.localhost"
                said.add(refused(dataclasses.replace(mine, box=box, url=url, door=door)))
            said.add(refused(dataclasses.replace(stranger, box=shared, url=mine.url, door=door)))
        assert len(said) == 1, said
        root = dataclasses.replace(mine, door="tls")
        done = subprocess.run(
            ["ssh", *root.options(), f"root@{mine.url}", "true"], capture_output=True, timeout=WITHIN, check=False
        )
        assert DENIED in done.stderr
    finally:
        berth.owner.shutdown(other)
        berth.stranger.shutdown(theirs)
    refused(stranger)  # it ended with its devbox


def test_a_key_ends_with_the_api_key_that_made_it_and_takes_its_connections_along(berth, shared: str, tmp_path) -> None:
    made = berth.owner.post("/v1/apikeys", {"name": "for ssh"})
    caller = type(berth.owner)(berth.base_url, made["key_secret"], berth.owner.account_id)
    login = login_to(berth, shared, tmp_path, key=caller)
    with login.started("echo ready; sleep 1000") as process:
        assert process.stdout.readline() == b"ready\n"
        berth.rows("UPDATE accounts_apikey SET revoked_at = now() WHERE name = 'for ssh' RETURNING id")
        refused(login)
        assert process.wait(timeout=WITHIN) == 255


def test_an_expired_key_opens_nothing(berth, shared: str, plain: Login) -> None:
    berth.rows(
        "UPDATE ssh_access_sshkey SET expires_at = now() - interval '1 second' WHERE id = "
        "(SELECT max(id) FROM ssh_access_sshkey WHERE devbox_id = %s) RETURNING id",
        shared,
    )
    refused(plain)


def test_only_keys_are_asked_for_and_not_for_ever(plain: Login, tmp_path: Path) -> None:
    keys = []
    for number in range(12):
        path = tmp_path / f"wrong{number}"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=WITHIN)
        keys += ["-i", str(path)]
    argv = [
        "ssh",
        *keys,
        *plain.options(),
        "-o",
        "BatchMode=no",
        "-o",
        "PreferredAuthentications=password",
        plain.address,
    ]
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=WITHIN, check=False)
    assert done.returncode == 255
    assert DENIED in done.stderr
    done = subprocess.run(
        ["ssh", *keys, *plain.options(), plain.address], capture_output=True, timeout=WITHIN, check=False
    )
    assert done.returncode == 255
    assert b"too many keys" in done.stderr.lower()


# --- the service


def test_its_host_key_stays_and_it_says_that_it_stops(berth, plain: Login) -> None:
    kept = berth.rows("SELECT public FROM ssh_access_hostkey")[0][0].split()[1]

    def shown() -> bool:
        port = berth.env["BERTH_SSH_BIND"].rpartition(":")[2]
        argv = ["ssh-keyscan", "-p", port, "-t", "ed25519", "127.0.0.1"]
        return kept in subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN, check=False).stdout

    assert shown()
    before = berth.pids()["ssh"]
    with plain.started("echo ready; sleep 1000") as process:
        assert process.stdout.readline() == b"ready\n"
        os.kill(before, signal.SIGTERM)
        assert process.wait(timeout=WITHIN) == 255
        assert b"restarted" in process.stderr.read()
    eventually(lambda: berth.pids().get("ssh", before) != before and shown(), "it did not come back")
    assert plain.out("echo back") == "back\n"


def test_the_lines_that_make_up_prints_need_no_question(berth, tmp_path: Path) -> None:
    lines = first.lines_to_paste(berth.state, berth.base_url, berth.owner.secret, berth.env["BERTH_SSH_BIND"])["SSH"]
    env = {**PATH, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", lines], input=b"uname -n\n", env=env, capture_output=True, timeout=WITHIN)
    assert done.returncode == 0, done
    name = done.stdout.decode().strip()
    assert (tmp_path / f"{name.replace('-', '_')}.pem").stat().st_mode & 0o077 == 0
    berth.owner.shutdown(name.replace("-", "_"))


def test_nonsense_and_silence_do_not_hold_it_up(berth, plain: Login) -> None:
    held = []
    try:
        for bind in ("BERTH_SSH_BIND", "BERTH_SSH_TLS_BIND"):
            host, _, port = berth.env[bind].rpartition(":")
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n" + os.urandom(3000), os.urandom(100_000)):
                sock = socket.create_connection((host, int(port)), timeout=WITHIN)
                held.append(sock)
                with contextlib.suppress(OSError):
                    sock.sendall(said)
        assert plain.out("echo fine") == "fine\n"
        for sock in held:  # who does not log in is sent away
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
    finally:
        for sock in held:
            sock.close()


def test_a_client_that_reads_nothing_costs_no_memory(berth, plain: Login) -> None:
    def resident() -> int:
        with open(f"/proc/{berth.pids()['ssh']}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    with plain.started("cat /dev/zero") as process:
        assert process.stdout.read(10)
        time.sleep(1)  # it has filled whatever is in between
        before = resident()
        time.sleep(2)
        assert resident() < before + 8192
        assert plain.out("echo others") == "others\n"


def test_an_account_has_as_many_open_as_it_may(berth, tmp_path: Path) -> None:
    box = berth.stranger.create(name="capped")
    cap = "UPDATE accounts_account SET max_open_streams = %s WHERE id = %s RETURNING id"
    login = login_to(berth, box, tmp_path, key=berth.stranger)
    try:
        berth.rows(cap, 1, berth.stranger.account_id)
        with login.started("echo ready; sleep 1000") as process:
            assert process.stdout.readline() == b"ready\n"
            done = login.run("true")
            assert (done.returncode, b"1 streams open" in done.stderr) == (255, True), done
            done = login.run(more=["-W", "localhost:22"])
            assert b"forwarding failed" in done.stderr
        eventually(lambda: login.run("true").returncode == 0, "its place was not given back")
    finally:
        berth.rows(cap, None, berth.stranger.account_id)
        berth.stranger.shutdown(box)


def test_a_session_ends_with_its_box_and_the_key_opens_it_again_when_it_is_resumed(berth, tmp_path: Path) -> None:
    box = berth.owner.create(name="sleeper")
    login = login_to(berth, box, tmp_path)
    try:
        with login.started("echo ready; sleep 1000") as process:
            assert process.stdout.readline() == b"ready\n"
            berth.owner.post(f"/v1/devboxes/{box}/suspend")
            assert process.wait(timeout=WITHIN) == 255
        berth.owner.wait(box, "suspended")
        done = login.run("true")
        assert (done.returncode, b"suspended" in done.stderr) == (255, True), done
        berth.owner.post(f"/v1/devboxes/{box}/resume")
        berth.owner.wait(box, "running")
        assert login.out("echo again") == "again\n"
    finally:
        berth.owner.shutdown(box)
    refused(login)


def test_it_counts_as_use(berth, shared: str, plain: Login) -> None:
    plain.out("true")
    view = berth.owner.get(f"/v1/devboxes/{shared}")
    assert view["last_activity_kind"] == "ssh"
