"""A box without an OCI runtime, and a stand-in for hostd before its keeper.

The box is a process that owns nothing but namespaces, made by the keeper's uid like a real one, on the machine's own
root directory; with v1 cgroups where the machine has them. Enough for the zygote, the keeper and the spawner to be
themselves; what needs a real box (disk, network, filter) is tested with one.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from hostd import keeper_spec, packets

INSTALL = 2
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x02000000
CGROUP = "/sys/fs/cgroup"
CONTROLLERS = ("memory", "pids", "cpu", "freezer")
USER = {"name": "tester", "uid": 1000, "gid": 1000, "home": "/tmp"}
ROOT = {"name": "root", "uid": 0, "gid": 0, "home": "/tmp"}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclasses.dataclass
class Config:
    run: str
    root: str


class BareBox:
    """Namespaces with a process that reaps."""

    def __init__(self, n: int, memory_bytes: int = 256 << 20) -> None:
        self.uid = (1 << 28) - (1 << 20) + INSTALL * 4096 + n
        self.base = (1 << 28) + INSTALL * (1 << 27) + n * 65536
        self.name = f"t{os.getpid()}-{n}"
        self.cgroups = []
        for controller in CONTROLLERS:
            if os.path.isdir(f"{CGROUP}/{controller}"):
                for kind in ("b", "k"):
                    path = f"{CGROUP}/{controller}/berth_{INSTALL}/{kind}-{self.name}"
                    os.makedirs(path, exist_ok=True)
                    self.cgroups.append((controller, kind, path))
                    if controller == "memory":
                        with open(f"{path}/memory.limit_in_bytes", "w") as file:
                            file.write(str(memory_bytes))
        ready_read, ready_write = os.pipe()
        mapped_read, mapped_write = os.pipe()
        pid_read, pid_write = os.pipe()
        self.maker = os.fork()
        if self.maker == 0:
            try:
                self._make(ready_write, mapped_read, pid_write)
            except BaseException as error:
                os.write(2, f"box: {error!r}\n".encode())
            finally:
                os._exit(1)
        for end in (ready_write, mapped_read, pid_write):
            os.close(end)
        assert os.read(ready_read, 1) == b"1"
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{self.maker}/{kind}", "w") as file:
                file.write(f"0 {self.base} 65536\n")
        os.write(mapped_write, b"1")
        assert os.read(pid_read, 1) == b"1"
        with open(f"/proc/{self.maker}/task/{self.maker}/children") as file:
            self.init_pid = int(file.read().split()[0])
        for end in (ready_read, mapped_write, pid_read):
            os.close(end)
        for _, kind, path in self.cgroups:
            if kind == "b":
                with open(f"{path}/cgroup.procs", "w") as file:
                    file.write(str(self.init_pid))

    def _make(self, ready: int, mapped: int, told: int) -> None:
        os.setgroups([])
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)
        libc.prctl(4, 1, 0, 0, 0)
        check(libc.unshare(NAMESPACES))
        os.write(ready, b"1")
        os.read(mapped, 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        check(libc.mount(None, b"/", None, 0x4000 | 0x80000, None))  # MS_REC | MS_SLAVE
        init = os.fork()
        if init:
            os.waitpid(init, 0)
            os._exit(0)
        libc.prctl(1, 9, 0, 0, 0)
        check(libc.mount(b"proc", b"/proc", b"proc", 0, None))
        check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b"mode=1777,size=200m"))
        check(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777,size=64m"))
        os.chdir("/")
        os.closerange(3, told)
        os.write(told, b"1")
        os.closerange(told, 1024)
        os.execv("/bin/sh", ["init", "-c", "while :; do sleep 1000 & wait $!; done"])

    def descriptors(self) -> list[tuple[str, int]]:
        """Open what a keeper needs, without LISTEN and OUT."""
        found = []
        for controller, kind, path in self.cgroups:
            role = keeper_spec.BOX_CGROUP if kind == "b" else keeper_spec.KEEPER_CGROUP
            found.append((role, os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)))
            if controller == "memory" and kind == "b":
                found.append((keeper_spec.OOM, os.open(f"{path}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)))
                found.append((keeper_spec.MEMORY, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
        return [*found, (keeper_spec.INIT, os.pidfd_open(self.init_pid))]

    def pids(self) -> list[int]:
        """Return the host pids of everything in the box's pid namespace."""
        found = []
        wanted = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") == wanted:
                    found.append(int(entry))
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.init_pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self.maker, 0)  # it waits for the init
        for _, _, path in self.cgroups:
            for _ in range(200):
                try:
                    os.rmdir(path)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)


class Host:
    """hostd's part: a zygote, and the keepers of bare boxes."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="berth-hb-")
        os.chmod(self.directory, 0o711)
        self.config: Any = Config(run=self.directory + "/run", root=self.directory)
        os.mkdir(self.config.run, 0o700)
        self.conn = keeper_spec.start_zygote(self.config)
        self.boxes: list[Box] = []

    def zygote_pid(self) -> int:
        return keeper_spec.zygote_pid(self.conn)

    def box(self, n: int = 1, **spec: Any) -> Box:
        box = Box(self, n, **spec)
        self.boxes.append(box)
        return box

    def log(self) -> str:
        with open(self.config.root + "/zygote.log") as file:
            return file.read()

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        with contextlib.suppress(OSError):
            os.kill(self.zygote_pid(), signal.SIGKILL)
        self.conn.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Box:
    """A bare box with its keeper, and what a client of it does."""

    def __init__(
        self,
        host: Host,
        n: int,
        *,
        name: str | None = "dbx_test",
        memory_bytes: int = 256 << 20,
        out_mount: str = "",
        **spec: Any,
    ):
        self.host, self.bare, self.name = host, BareBox(n, memory_bytes), name
        self.slot = f"s{n}"
        self.out = f"{host.config.root}/out-{n}"
        os.mkdir(self.out, 0o700)
        self.mounted = bool(out_mount)
        if out_mount:
            run_in_machine("mount", "-t", "tmpfs", "-o", out_mount, "tmpfs", self.out)
            os.chmod(self.out, 0o700)
        os.chown(self.out, self.bare.uid, self.bare.uid)
        self.spec = keeper_spec.KeeperSpec(
            slot=self.slot, box=name, uid=self.bare.uid, uid_base=self.bare.base, init_pid=self.bare.init_pid, **spec
        )
        listener = keeper_spec.listening_socket(host.config.run, self.slot)
        with self.opened() as fds:
            fds.append((keeper_spec.LISTEN, listener.fileno()))
            self.pid, self.start = keeper_spec.start_keeper(host.conn, self.spec, fds)
        listener.close()
        self.events: list[dict[str, Any]] = []
        self.link = self.connect()

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[tuple[str, int]]]:
        fds = self.bare.descriptors()
        fds.append((keeper_spec.OUT, os.open(self.out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
        mine = [fd for _, fd in fds]
        try:
            yield fds
        finally:
            packets.close_all(mine)

    def connect(self) -> socket.socket:
        """Connect, and wait for the greeting: a connection that nobody has accepted yet outlives the keeper."""
        link = keeper_spec.connect_keeper(self.host.config.run, self.slot, self.pid)
        ready, _, _ = select.select([link], [], [], 20)
        assert ready, "the keeper does not greet"
        return link

    def restart(self) -> None:
        """What hostd does when the link has ended."""
        self.link.close()
        self.pid, self.start = keeper_spec.restart_keeper(self.host.conn, self.slot)
        self.link = self.connect()

    def kill_keeper(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.link.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while self.link.recv(1 << 18):
                pass
        self.restart()

    def open(self, **request: Any) -> Client:
        """Start a request on a connection of its own."""
        ours, theirs = socket.socketpair()
        body = request.pop("raw", b"")
        if body:
            request["body"] = len(body)
        with theirs:
            packets.send(self.link, {"connection": {"v": 1, "box": self.name, **request}}, [theirs.fileno()])
        client = Client(ours)
        if body:
            ours.sendall(body)
        return client

    def ask(self, **request: Any) -> dict[str, Any]:
        with self.open(**request) as client:
            return client.line()

    def spawn(self, name: str, command: str | None = None, *, fence: int = 1, hold_ms: int = 0, **body: Any) -> Any:
        if command is not None:
            body["command"] = command
        body.setdefault("user", USER)
        raw = json.dumps(body).encode()
        return self.ask(verb="spawn", id=name, fence=fence, hold_ms=hold_ms, raw=raw)

    def run(self, name: str, command: str | None = None, **body: Any) -> dict[str, Any]:
        """Spawn and wait for the exit."""
        answer = self.spawn(name, command, hold_ms=5000, **body)
        assert "error" not in answer, answer
        return answer if answer["state"] == "exited" else self.wait(name)

    def wait(self, name: str, timeout: float = 20) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            answer = self.ask(verb="state", id=name)
            if answer.get("state") != "running":
                return answer
            assert time.monotonic() < deadline, f"{name} runs after {timeout} s"
            time.sleep(0.01)

    def event(self, timeout: float = 5.0) -> dict[str, Any]:
        """Return the next event of the link."""
        ready, _, _ = select.select([self.link], [], [], timeout)
        assert ready, "no event"
        message, _ = packets.receive(self.link)
        assert message is not None, "the link has ended"
        return message

    def exit_event(self, name: str, timeout: float = 5.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            event = self.event(deadline - time.monotonic())
            if event["event"] == "exit" and event["id"] == name:
                return event
        raise AssertionError(f"no exit of {name}")

    def ack(self, *names: str) -> None:
        packets.send(self.link, {"ack": list(names)})

    def file(self, name: str, number: int | str = 1) -> bytes:
        try:
            with open(f"{self.out}/{name}.{number}", "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    def spawner(self) -> int:
        """Return the host pid of the spawner; wait for the next one if there is none just now."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for pid in self.bare.pids():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
                    if file.read() == "boxd\n":
                        return pid
            time.sleep(0.002)
        raise AssertionError("no spawner")

    def close(self) -> None:
        self.link.close()
        with contextlib.suppress(OSError, keeper_spec.ZygoteError):
            keeper_spec.forget(self.host.conn, self.slot)
        with contextlib.suppress(OSError):
            if keeper_start(self.pid) == self.start:
                os.kill(self.pid, signal.SIGKILL)
        self.bare.close()
        if self.mounted:
            run_in_machine("umount", "-l", self.out)
            self.mounted = False


class Client:
    """A client's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(30)
        self.file = sock.makefile("rb")

    def line(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the connection ended without an answer"
        return dict(json.loads(line))

    def more(self, **request: Any) -> dict[str, Any]:
        self.sock.sendall(json.dumps({"v": 1, **request}).encode() + b"\n")
        return self.line()

    def frame(self) -> bytes:
        header = self.file.read(4)
        assert len(header) == 4, "cut off"
        return self.file.read(struct.unpack("!I", header)[0])

    def frames(self) -> tuple[bytes, dict[str, Any]]:
        """Return all bytes and the trailer."""
        data = bytearray()
        while frame := self.frame():
            data += frame
        return bytes(data), self.line()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()


def text(answer: dict[str, Any], stream: str = "stdout") -> str:
    return base64.b64decode(answer[stream]).decode()


def keeper_start(pid: int) -> int | None:
    from hostd import procs

    return procs.start_time(pid)


def pss_kb(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def run_in_machine(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout
