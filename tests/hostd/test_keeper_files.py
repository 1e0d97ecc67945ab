"""Files in a box, moved by a process of the box: exact, atomic, with the user's rights, never blocked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import files, transfers
from tests.hostd.bare_box import Box, Client, Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(31)


@pytest.fixture
def home(box: Box) -> Iterator[pathlib.Path]:
    """A folder of the box's user; the bare box sees the machine's own root directory."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="berth-files-", dir="/var/tmp"))
    os.chown(folder, box.bare.base + 1000, box.bare.base + 1000)
    yield folder
    shutil.rmtree(folder)


def user(home: pathlib.Path, uid: int = 1000) -> dict[str, Any]:
    return {"name": "tester", "uid": uid, "gid": uid, "home": str(home)}


def path64(path: str | bytes) -> str:
    return base64.b64encode(os.fsencode(path)).decode()


def opened(box: Box, home: pathlib.Path, op: str, path: str | bytes | None, uid: int = 1000, **more: Any) -> Client:
    named = {} if path is None else {"path64": path64(path)}
    return box.open(verb="file", op=op, user=user(home, uid), **named, **more)


def read(box: Box, home: pathlib.Path, path: str | bytes, **more: Any) -> tuple[dict[str, Any], bytes]:
    """The answer line, and the bytes when there are some."""
    with opened(box, home, "read", path, **more) as client:
        answer = client.line()
        if "error" in answer:
            return answer["error"], b""
        data, trailer = client.frames()
        assert trailer["complete"] is True
        assert trailer["total"] == len(data) == answer["length"]
        return answer, data


def framed(data: bytes, size: int = 100_000, **trailer: Any) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    frames = b"".join(struct.pack("!I", len(part)) + part for part in parts)
    return frames + struct.pack("!I", 0) + json.dumps({"total": len(data), **trailer}).encode() + b"\n"


def write(box: Box, home: pathlib.Path, path: str | bytes, data: bytes, uid: int = 1000) -> dict[str, Any]:
    """The last answer line, or the error."""
    with opened(box, home, "write", path, uid) as client:
        go = client.line()
        if "error" in go:
            return dict(go["error"])
        client.sock.sendall(framed(data))
        answer = client.line()
        return dict(answer.get("error", answer))


@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_000])
def test_written_and_read_back_exactly(box: Box, home: pathlib.Path, size: int) -> None:
    data = os.urandom(size)
    assert write(box, home, "some/new folder/file", data) == {"ok": True, "size": size}
    path = home / "some/new folder/file"
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert path.stat().st_uid == box.bare.base + 1000
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read(box, home, "~/some/new folder/file")[1] == data
    assert read(box, home, str(path))[1] == data


def test_names_with_any_bytes(box: Box, home: pathlib.Path) -> None:
    for name in (b"\xff\xfe", b"new\nline", b"'\"$(x)`", " ä".encode(), b"~", b"-rf"):
        assert write(box, home, b"./" + name, name)["ok"]
        assert (home / os.fsdecode(name)).read_bytes() == name
        assert read(box, home, b"./" + name)[1] == name


def test_ranges(box: Box, home: pathlib.Path) -> None:
    write(box, home, "f", b"0123456789")
    assert read(box, home, "f", offset=3, length=4)[1] == b"3456"
    assert read(box, home, "f", offset=-3)[1] == b"789"
    answer, data = read(box, home, "f", offset=50)
    assert (data, answer["size"]) == (b"", 10)


def test_text_only(box: Box, home: pathlib.Path) -> None:
    write(box, home, "good", "ä€😀".encode() * 300_000)
    assert read(box, home, "good", text=True)[0]["ok"]
    write(box, home, "bad", "ä€😀".encode() * 300_000 + b"\xf0\x9f")
    assert read(box, home, "bad", text=True)[0] == {
        "code": "not_text",
        "message": f"{home}/bad: not UTF-8 at byte 2700000",
    }
    assert read(box, home, "good", limit=1000)[0]["code"] == "too_large"


def test_a_write_is_seen_whole_or_not_at_all(box: Box, home: pathlib.Path) -> None:
    write(box, home, "f", b"before")
    os.chmod(home / "f", 0o750)
    with opened(box, home, "write", "f") as client:
        client.line()
        client.sock.sendall(framed(b"x" * 1000)[:500])
        time.sleep(0.05)
        assert (home / "f").read_bytes() == b"before"
        assert os.listdir(home) == ["f"], "nothing half made has a name"
    deadline = time.monotonic() + 5
    while held(box) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not held(box), "of a client that left nothing stays open"
    assert (home / "f").read_bytes() == b"before"
    write(box, home, "f", b"after")
    assert (home / "f").read_bytes() == b"after"
    assert stat.S_IMODE((home / "f").stat().st_mode) == 0o750, "what could be run can be run still"
    assert os.listdir(home) == ["f"]


def movers(box: Box) -> list[int]:
    """The processes of the box's user that are no commands."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid in (0, box.bare.base + 1000):
                    status = pathlib.Path(f"/proc/{name}/status").read_text()
                    if f"Uid:\t{box.bare.base + 1000}\t" in status and "State:\tZ" not in status:
                        found.append(int(name))
            except OSError:
                pass
    return found


def held(box: Box) -> list[str]:
    """What movers have open beside the socket to their keeper."""
    found = []
    for pid in movers(box):
        with contextlib.suppress(FileNotFoundError):
            found += [number for number in os.listdir(f"/proc/{pid}/fd") if int(number) > files.CONTROL]
    return found


def asked(client: Client, box: Box, home: pathlib.Path, op: str, path: str) -> None:
    """One more request over a connection that is there."""
    request = {"v": 1, "verb": "file", "box": box.name, "op": op, "user": user(home), "path64": path64(path)}
    client.sock.sendall(json.dumps(request).encode() + b"\n")


def test_one_connection_and_one_process_serve_many_requests(box: Box, home: pathlib.Path) -> None:
    with opened(box, home, "read", "nothing") as client:
        assert client.line()["error"]["code"] == "no_such_file"
        before: list[int] = []
        for number in range(20):
            data = os.urandom(number * 5000)
            asked(client, box, home, "write", "f")
            client.sock.sendall(framed(data))
            assert client.line() == {"ok": True}
            assert client.line() == {"ok": True, "size": len(data)}
            asked(client, box, home, "read", "f")
            assert client.line()["length"] == len(data)
            assert client.frames()[0] == data
            before = before or movers(box)
        assert movers(box) == before, "the same process all the time"
        asked(client, box, home, "write", ".")
        with contextlib.suppress(BrokenPipeError):  # it may have hung up already
            client.sock.sendall(framed(b"x"))
        assert client.line()["error"]["code"] == "not_a_file"
        with contextlib.suppress(ConnectionResetError):
            assert client.file.read() == b"", "what still comes is no request"
    assert not held(box)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_waits_and_is_stopped_or_killed_costs_nothing(
    box: Box, home: pathlib.Path, number: signal.Signals
) -> None:
    write(box, home, "f", b"before")
    waiting = movers(box)
    assert waiting
    for pid in waiting:
        os.kill(pid, number)
    assert write(box, home, "f", b"after") == {"ok": True, "size": 5}
    assert read(box, home, "f")[1] == b"after"
    deadline = time.monotonic() + transfers.KEPT_S + 20
    while set(waiting) & set(movers(box)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(waiting) & set(movers(box)), "none stays for ever, though it is stopped"


def test_each_user_has_a_process_of_its_own(box: Box, home: pathlib.Path) -> None:
    write(box, home, "f", b"of the user's")
    os.chmod(home / "f", 0o600)
    os.chmod(home, 0o755)
    with opened(box, home, "read", str(home / "f"), uid=1001) as client:
        assert client.line()["error"]["code"] == "denied"
    assert read(box, home, "f")[1] == b"of the user's"


def test_a_path_that_comes_with_the_trailer(box: Box, home: pathlib.Path) -> None:
    with opened(box, home, "write", None) as client:
        assert client.line() == {"ok": True}
        client.sock.sendall(framed(b"late", path64=path64("a/b")))
        assert client.line() == {"ok": True, "size": 4}
    assert (home / "a/b").read_bytes() == b"late"
    other = "/tmp/elsewhere"  # another file system in the box
    with opened(box, home, "write", None) as client:
        client.line()
        client.sock.sendall(framed(b"elsewhere", path64=path64(other)))
        assert client.line() == {"ok": True, "size": 9}
    assert read(box, home, other)[1] == b"elsewhere"


def test_links_mean_what_they_mean_in_the_box(box: Box, home: pathlib.Path) -> None:
    write(box, home, "real", b"1")
    (home / "link").symlink_to("real")
    write(box, home, "link", b"2")
    assert (home / "link").is_symlink()
    assert (home / "real").read_bytes() == b"2"
    (home / "loop").symlink_to("loop")
    assert write(box, home, "loop", b"3")["code"] == "bad_path"
    assert read(box, home, "loop")[0]["code"] == "bad_path"
    (home / "dangling").symlink_to("made/later")
    assert write(box, home, "dangling", b"4")["ok"]
    assert (home / "made/later").read_bytes() == b"4"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing", "no_such_file"),
        (".", "not_a_file"),
        ("/", "not_a_file"),
        ("/dev/null", "not_a_file"),
        ("fifo", "not_a_file"),
        ("socket", "not_a_file"),
        ("file/below", "bad_path"),
        ("x" * 256, "bad_path"),
        ("x/" * 2040, "bad_path"),
        ("", "bad_path"),
        ("nul\0", "bad_path"),
        ("secret", "denied"),
        ("/proc/1/mem", "denied"),
    ],
    ids=lambda value: value[:20],
)
def test_what_cannot_be_read(box: Box, home: pathlib.Path, path: str, code: str) -> None:
    _furnish(home)
    began = time.monotonic()
    assert read(box, home, path)[0]["code"] == code
    assert time.monotonic() - began < 5, "nothing blocks"


def _furnish(home: pathlib.Path) -> None:
    import socket

    (home / "file").write_text("x")
    os.mkfifo(home / "fifo", 0o666)
    os.chmod(home / "fifo", 0o666)
    (home / "secret").write_text("of the machine's root")
    os.chmod(home / "secret", 0o600)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "socket"))
    listener.close()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("folder/", "not_a_file"),
        (".", "not_a_file"),
        ("fifo", "not_a_file"),
        ("/dev/null", "not_a_file"),
        ("file/below", "bad_path"),
        ("x" * 256, "bad_path"),
        ("", "bad_path"),
        ("secret", "denied"),
        ("/etc/hostname", "denied"),
        ("/not-by-this-user", "denied"),
        ("/proc/self/comm", "denied"),
    ],
    ids=lambda value: value[:20],
)
def test_what_cannot_be_written(box: Box, home: pathlib.Path, path: str, code: str) -> None:
    _furnish(home)
    answer = write(box, home, path, b"x")
    assert answer.get("code") == code, answer


def test_what_the_kernel_makes_up_can_be_read(box: Box, home: pathlib.Path) -> None:
    answer, data = read(box, home, "/proc/self/status")
    assert b"Name:\tboxd" in data
    assert answer["size"] == len(data)
    capabilities = [line for line in data.decode().splitlines() if line.startswith(("CapPrm", "CapEff", "CapInh"))]
    assert [line.split()[1] for line in capabilities] == ["0000000000000000"] * 3, "no right of the spawner's"
    assert f"\t{1000}\t" in data.decode().split("Uid:")[1].split("\n")[0]


def test_a_folder_that_is_not_the_users_own(box: Box, home: pathlib.Path) -> None:
    (home / "theirs").mkdir()
    (home / "theirs/shared").write_bytes(b"a longer text than the new one")
    os.chown(home / "theirs/shared", box.bare.base + 1000, -1)
    assert write(box, home, "theirs/shared", b"short") == {"ok": True, "size": 5}
    assert (home / "theirs/shared").read_bytes() == b"short"
    assert write(box, home, "theirs/new", b"x")["code"] == "denied"


def test_no_room(host: Host, box: Box, home: pathlib.Path) -> None:
    assert write(box, home, "/dev/full", b"x")["code"] == "not_a_file"
    command = "ulimit -f 1"  # nothing of a command's limits reaches a file that is moved
    box.run("exe_limit", command)
    assert write(box, home, "f", b"x" * 5000)["ok"]


def test_more_in_one_box_than_allowed(box: Box, home: pathlib.Path) -> None:
    clients: list[Client] = []
    deadline = time.monotonic() + 10
    while len(clients) < transfers.MAX_TRANSFERS:  # what an earlier test left behind may take a moment to end
        client = opened(box, home, "write", f"f{len(clients)}")
        if client.line() == {"ok": True}:
            clients.append(client)
        assert time.monotonic() < deadline
    assert read(box, home, "f0")[0]["code"] == "busy"
    for number, client in enumerate(clients):
        client.sock.sendall(framed(b"%d" % number))
        assert client.line()["ok"]
        with client:
            pass
    deadline = time.monotonic() + 10
    while (answer := read(box, home, "f63"))[1] != b"63":
        assert time.monotonic() < deadline, answer


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "erase", "path64": "eA=="},
        {"op": "read"},
        {"op": "read", "path64": 7},
        {"op": "read", "path64": "x" * 6000},
        {"op": "read", "path64": "!!"},
        {"op": "read", "path64": "eA==", "offset": "1"},
        {"op": "read", "path64": "eA==", "length": -1},
        {"op": "read", "path64": "eA==", "text": 1},
    ],
)
def test_nonsense_is_refused(box: Box, home: pathlib.Path, request_: dict[str, Any]) -> None:
    with box.open(verb="file", user=user(home), **request_) as client:
        assert client.line()["error"]["code"] == "bad_request"


def test_a_frame_that_is_too_long_or_a_total_that_does_not_fit(box: Box, home: pathlib.Path) -> None:
    for data in (struct.pack("!I", files.FRAME_MAX + 1), framed(b"abc", total=4), struct.pack("!I", 0) + b"{]\n"):
        with opened(box, home, "write", "f") as client:
            client.line()
            client.sock.sendall(data)
            assert client.file.read() == b""
    assert os.listdir(home) == []


def test_losing_keeper_or_mover(box: Box, home: pathlib.Path) -> None:
    big = os.urandom(3_000_000)
    with opened(box, home, "write", "f") as client:
        client.line()
        client.sock.sendall(framed(big)[:1_000_000])
        box.kill_keeper()
        client.sock.sendall(framed(big)[1_000_000:])
        assert client.line() == {"ok": True, "size": len(big)}, "the keeper is not on its way"
    assert (home / "f").read_bytes() == big
    assert box.run("exe_after", "echo still here")["exit"] == 0
    with opened(box, home, "write", "f") as client:
        client.line()
        deadline = time.monotonic() + 10
        while len(found := movers(box)) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)  # those of the lost keeper end by themselves
        (pid,) = found
        os.kill(pid, signal.SIGKILL)
        assert client.file.read() == b"", "a cut, no answer"
    assert (home / "f").read_bytes() == big
