"""hostd itself: the socket, its connections, and the life of the process.

In charge of: listening, reading one line and giving it to whom it concerns, answering host verbs, replacing itself by a
shipped bundle without losing a connection that waits. Not in charge of: what verbs do (`verbs.py`, `report.py`), the
bytes of box verbs, which the keepers exchange with the client themselves.

One thread, one loop. Nothing here blocks: what does is a maker's job.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import grp
import hashlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from logging.handlers import RotatingFileHandler
from typing import Any

from hostd import bundle, jobs, keeper_spec, messages, namespaces, setup, zygotes
from hostd.config import HostConfig
from hostd.events import Events
from hostd.fences import Fences
from hostd.keepers import Keepers
from hostd.makers import Makers
from hostd.messages import BOX_VERBS, IDLE_SECONDS, KEPT_SECONDS, LINE_MAX, Refused
from hostd.notices import Notices
from hostd.report import Report, boot_id
from hostd.snapshot_messages import VERBS as SNAPSHOT_VERBS
from hostd.snapshot_verbs import MOVERS, Snapshots
from hostd.verbs import Verbs

OF_BOXES = frozenset({"prepare_disk", "boot", "suspend", "resume", "destroy"})  # what `Verbs` does, by these names
BACKLOG = 4096
CONNECTIONS_MAX = 4096  # open at once in hostd; those handed to keepers do not count
ACCEPT_AT_ONCE = 64
SEND_SECONDS = 30.0  # a client that takes no byte of a reply for so long is dropped
BODY_SECONDS = 60.0
DRAIN_SECONDS = 15.0  # a restart waits so long for requests and jobs to end
FRESH_SECONDS = 1.0  # and so long for the first line of connections that were accepted
BUNDLES_KEPT = 4
KEPT_DISK_SECONDS = 24 * 3600.0
_LOG_BYTES, _LOG_FILES = 5 * 1024 * 1024, 4
_PR_SET_CHILD_SUBREAPER = 36

log = logging.getLogger("hostd.serve")


class AlreadyServed(Exception):
    """Another hostd serves this install."""


class Connection:
    """A client's connection while it is hostd's: from accept until it is handed over, closed, or becomes a watch."""

    def __init__(self, daemon: Daemon, sock: socket.socket) -> None:
        self._daemon = daemon
        self._socket = sock
        self._held = b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._served = False
        self._wait(IDLE_SECONDS)

    @property
    def is_fresh(self) -> bool:
        """True until its first line has arrived."""
        return not self._served

    @property
    def is_idle(self) -> bool:
        return self._timer is not None

    def close(self) -> None:
        self._let_go()
        self._socket.close()

    def _wait(self, seconds: float) -> None:
        """Wait for a line."""
        self._timer = self._loop.call_later(seconds, self.close)
        self._loop.add_reader(self._socket, self._readable)

    def _busy(self) -> None:
        """Read no further for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._loop.remove_reader(self._socket)

    def _let_go(self) -> None:
        self._busy()
        self._daemon.connections.discard(self)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(LINE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._held += data
        self._advance()

    def _advance(self) -> None:
        line, newline, rest = self._held.partition(b"\n")
        if not newline:
            if len(self._held) >= LINE_MAX:
                self._refuse(Refused("too_large", f"a request line is over the limit of {LINE_MAX} bytes"))
            return
        self._held = b""
        self._served = True
        try:
            request = messages.parse_request(line)
        except Refused as refused:
            # Whether a body follows is unknown, so the connection ends with the answer.
            self._refuse(refused)
            return
        verb = request["verb"]
        if verb in BOX_VERBS:
            self._let_go()
            self._daemon.keepers.route(self._socket, request, rest)
        elif verb == "watch":
            self._let_go()
            self._watch(request, rest)
        else:
            self._busy()
            self._daemon.run(self._serve(request, rest))

    def _watch(self, request: dict[str, Any], rest: bytes) -> None:
        try:
            self._socket.send(messages.ok())
        except OSError:
            self._socket.close()
            return
        if "stats_seconds" in request:
            self._daemon.notices.stats_seconds = request["stats_seconds"]
        self._daemon.events.watch(self._socket, rest)

    def _refuse(self, refused: Refused) -> None:
        try:
            self._socket.send(messages.refusal(refused))
        except OSError:
            pass
        self.close()

    async def _serve(self, request: dict[str, Any], rest: bytes) -> None:
        after: Callable[[], None] | None = None
        try:
            if "body" in request:
                body, rest = await asyncio.wait_for(self._body(request["body"], rest), BODY_SECONDS)
                request["body"] = body
            reply, after = await self._daemon.answer(request)
            await asyncio.wait_for(self._loop.sock_sendall(self._socket, reply), SEND_SECONDS)
        except (OSError, TimeoutError, ConnectionError):
            self.close()
            return
        finally:
            if after is not None:
                after()
        if self._daemon.is_leaving:
            self.close()
            return
        self._held = rest
        self._wait(KEPT_SECONDS)
        if self._held:
            self._advance()

    async def _body(self, length: int, rest: bytes) -> tuple[bytes, bytes]:
        found = bytearray(rest)
        while len(found) < length:
            data = await self._loop.sock_recv(self._socket, 1 << 18)
            if not data:
                raise ConnectionError("the body was cut short")
            found += data
        return bytes(found[:length]), bytes(found[length:])


class Daemon:
    """One install's hostd."""

    def __init__(
        self, cfg: HostConfig, makers: Makers, movers: Makers, listener: socket.socket | None, lock: int
    ) -> None:
        self._cfg = cfg
        self._makers = makers
        self._movers = movers
        self._listener = listener
        self._lock = lock
        self._tasks: set[asyncio.Task[None]] = set()
        self._zygote: socket.socket | None = None
        self._leave: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.connections: set[Connection] = set()
        boot = boot_id()
        self.events = Events(
            lambda box, ids: self.keepers.acknowledged(box, ids), lambda box, flag: self.keepers.room(box, flag)
        )
        self.keepers = Keepers(cfg, makers, self.events, boot)
        self.fences = Fences(f"{cfg.root}/fences")
        self.verbs = Verbs(cfg, makers, self.keepers, self.events, self.fences, boot)
        self.snapshots = Snapshots(cfg, makers, movers, self.fences, self.verbs.named)
        self.report = Report(cfg, self.verbs, self.snapshots, boot)
        self.notices = Notices(cfg, self.events, self.verbs.named, self.keepers.limits_of, boot)
        self.keepers.noticed = self.notices.spawner

    @property
    def is_leaving(self) -> bool:
        return self._leave.done()

    def run(self, work: Awaitable[None]) -> None:
        """Start work that a restart waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task failed", exc_info=task.exception())

    async def serve(self, orphaned: bool) -> str | None:
        """Serve until told to leave. Returns the digest of the bundle that is to take over, None to end.

        ``orphaned``: the keepers' zygote was replaced, and they are to be introduced to the new one.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_leave, None)
        # Handled, not ignored: what is ignored would be ignored by everything in every box as well.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        self._makers.attach(loop)
        self._movers.attach(loop)
        self.snapshots.recover()
        self._hold_zygote()
        await self.verbs.recover()
        if orphaned:
            await self.keepers.zygote_was_replaced()
        self._listen()
        self.notices.listen()
        own = [loop.create_task(work) for work in (self.verbs.warm.run(), self._tick(), self.notices.sample_for_ever())]
        self._mark_current()
        log.info(
            "serving %s as %s, %s boxes",
            self._cfg.socket_path,
            self.report.digest[:12] or "source",
            len(self.verbs.named),
        )
        digest = await self._leave
        self.notices.close()
        await self._drain(own)
        return digest

    # --- connections

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        path = self._cfg.socket_path
        if self._listener is None:
            # Under another name until it listens: a client finds the old socket or a working one.
            fresh = f"{path}.new"
            try:
                os.unlink(fresh)
            except FileNotFoundError:
                pass
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(fresh)
            os.chmod(fresh, 0o600)
            if self._cfg.socket_group:
                os.chown(fresh, 0, grp.getgrnam(self._cfg.socket_group).gr_gid)
                os.chmod(fresh, 0o660)
            listener.listen(BACKLOG)
            os.rename(fresh, path)
            self._listener = listener
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    log.error("no connection can be accepted: %s", error)
                    self._pause_accepting(0.1)
                return
            sock.setblocking(False)
            if len(self.connections) >= CONNECTIONS_MAX:
                try:
                    sock.send(messages.error("busy", f"{CONNECTIONS_MAX} connections are open already"))
                except OSError:
                    pass
                sock.close()
                continue
            self.connections.add(Connection(self, sock))

    def _pause_accepting(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        listener = self._listener
        assert listener is not None
        loop.remove_reader(listener)

        def again() -> None:
            if not self.is_leaving:
                loop.add_reader(listener, self._accept)

        loop.call_later(seconds, again)

    # --- verbs

    async def answer(self, request: dict[str, Any]) -> tuple[bytes, Callable[[], None] | None]:
        """The reply line to a host verb, and what is to be done once it was sent."""
        verb = request["verb"]
        args = {name: value for name, value in request.items() if name in messages.fields_of(verb)}
        try:
            if verb == "restart":
                await self._check_bundle(args["digest"])
                return messages.ok(), lambda: self._ask_to_leave(args["digest"])
            if verb in SNAPSHOT_VERBS:
                work = getattr(self.snapshots, verb)(**args)
            else:
                work = getattr(self.verbs, verb)(**args) if verb in OF_BOXES else self._VERBS[verb](self, **args)
            return messages.ok(**await work), None
        except Refused as refused:
            log.info("%s %s: %s", verb, request.get("box", ""), refused)
            return messages.refusal(refused), None
        except Exception as error:
            log.exception("%s %s failed", verb, request.get("box", ""))
            return messages.error("internal", f"{verb} failed on the host: {type(error).__name__}"), None

    async def _hello(self) -> dict[str, Any]:
        return self.report.hello()

    async def _report(self) -> dict[str, Any]:
        return await self.report.report()

    async def _set_warm(self, count: int, image: str) -> dict[str, Any]:
        self.verbs.warm.set(count, image)
        return {}

    async def _ship(self, digest: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != digest:
            raise Refused("bad_request", "the body does not have that digest")
        folder = f"{self._cfg.root}/bundles"
        os.makedirs(folder, mode=0o755, exist_ok=True)
        path = f"{folder}/{digest}.pyz"
        if not os.path.exists(path):
            handle = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            with open(handle, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{path}.new", path)
        return {}

    _VERBS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "hello": _hello,
        "report": _report,
        "set_warm": _set_warm,
        "ship": _ship,
    }

    # --- replacing itself

    def _bundle(self, digest: str) -> str:
        return f"{self._cfg.root}/bundles/{digest}.pyz"

    async def _check_bundle(self, digest: str) -> None:
        path = self._bundle(digest)
        if not os.path.exists(path) or bundle.digest_of(path) != digest:
            raise Refused("bad_request", "this bundle was not shipped here")
        await self._makers.do("check_bundle", path=path)

    def _mark_current(self) -> None:
        """Point `current.pyz` at what runs, for whoever starts hostd after a crash; keep a few older ones."""
        running = bundle.running_path()
        folder = f"{self._cfg.root}/bundles"
        if running is None or os.path.dirname(os.path.realpath(running)) != os.path.realpath(folder):
            return
        running = os.path.realpath(running)
        fresh = f"{folder}/current.new"
        try:
            os.unlink(fresh)
        except FileNotFoundError:
            pass
        os.symlink(os.path.basename(running), fresh)
        os.rename(fresh, f"{folder}/current.pyz")
        others = [f"{folder}/{name}" for name in os.listdir(folder) if messages.is_digest(name.removesuffix(".pyz"))]
        others.sort(key=os.path.getmtime, reverse=True)
        for path in [path for path in others if path != running][BUNDLES_KEPT:]:
            os.unlink(path)

    def _ask_to_leave(self, digest: str | None) -> None:
        if not self._leave.done():
            log.info("leaving; next is %s", digest or "nobody")
            self._leave.set_result(digest)

    async def _drain(self, own: list[asyncio.Task[None]]) -> None:
        """Finish what was begun. Connections that wait in the backlog are the successor's."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
        deadline = loop.time() + FRESH_SECONDS
        while any(connection.is_fresh for connection in self.connections) and loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            if connection.is_idle:
                connection.close()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=DRAIN_SECONDS)
        for task in own:
            task.cancel()
        await self._movers.close(0)  # a disk on its way is begun again by whoever wants it
        await self._makers.close(DRAIN_SECONDS)
        for slot in self.keepers.slots:
            self.keepers.let_go(slot)
        self.events.close()

    def successor(self, digest: str, config_path: str) -> None:
        """Become the shipped bundle. Does not return; raises OSError when that fails."""
        assert self._listener is not None
        for handle in (self._listener.fileno(), self._lock):
            os.set_inheritable(handle, True)
        argv = [sys.executable, "-I", self._bundle(digest), "serve", "--config", config_path]
        os.execv(sys.executable, [*argv, "--inherit", f"{self._listener.fileno()},{self._lock}"])

    # --- children

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None:
                    return
                self._makers.dying(found.si_pid)
                self._movers.dying(found.si_pid)
                pid, raw = os.waitpid(found.si_pid, os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                self.keepers.reaped(pid, os.waitstatus_to_exitcode(raw))

    def _hold_zygote(self) -> None:
        """Keep a connection to the zygote, to know when it dies."""
        conn = keeper_spec.start_zygote(self._cfg)
        conn.setblocking(False)
        self._zygote = conn
        asyncio.get_running_loop().add_reader(conn, self._zygote_readable)

    def _zygote_readable(self) -> None:
        assert self._zygote is not None
        try:
            if self._zygote.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._zygote)
        self._zygote.close()
        self._zygote = None
        if not self.is_leaving:
            log.error("the zygote is dead")
            self.run(self._new_zygote())

    async def _new_zygote(self) -> None:
        while not self.is_leaving:
            try:
                await self._makers.do("start_zygote")
                self._hold_zygote()
                await self.keepers.zygote_was_replaced()
                return
            except (Refused, OSError) as error:
                log.error("no new zygote: %s", error)
                await asyncio.sleep(1.0)

    async def _tick(self) -> None:
        seconds = 0
        while True:
            await asyncio.sleep(1.0)
            self.keepers.expire()
            seconds += 1
            if seconds % 60 == 0:
                self.fences.forget_old()
                self._bound_logs()
            if seconds % 3600 == 0:
                try:
                    await self._makers.do("drop_kept_disks", older_than_seconds=KEPT_DISK_SECONDS)
                except Refused as refused:
                    log.warning("kept disks: %s", refused)

    def _bound_logs(self) -> None:
        """What is written by descriptor (the zygote's and our own last words) rotates by being emptied."""
        for path in (f"{self._cfg.root}/zygote.log", f"{self._cfg.root}/log/hostd.err"):
            try:
                if os.path.getsize(path) > _LOG_BYTES:
                    os.truncate(path, 0)
            except FileNotFoundError:
                pass


def serve(cfg: HostConfig, config_path: str, inherited: tuple[int, int] | None = None) -> int:
    """Run hostd. ``inherited``: the listening socket and the lock of the hostd that became this one.

    Raises AlreadyServed when another one serves the install.
    """
    _log_to(cfg)
    if inherited is None:
        lock, listener = take_lock(cfg), None
    else:
        listener, lock = socket.socket(fileno=inherited[0]), inherited[1]
        for handle in inherited:
            os.set_inheritable(handle, False)
    _raise_limits()
    os.umask(0o022)
    os.chdir("/")
    if inherited is None:
        setup.bring_up(cfg)  # what a restart of the machine took away
    namespaces.enter(cfg)
    # Inits of boxes become our children, so that their exit status can be told.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    running = bundle.running_path()
    orphaned = zygotes.ensure(cfg, bundle.digest_of(running) if running else "")
    makers = Makers(maker_count(), jobs.runner(cfg))
    movers = Makers(MOVERS, jobs.runner(cfg))
    daemon: Daemon | None = None

    async def main() -> str | None:
        nonlocal daemon
        daemon = Daemon(cfg, makers, movers, listener, lock)
        return await daemon.serve(orphaned)

    digest = asyncio.run(main())
    if digest is not None and daemon is not None:
        logging.shutdown()
        daemon.successor(digest, config_path)
    return 0


def maker_count() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0))))


def take_lock(cfg: HostConfig) -> int:
    """The install's lock, held as long as this process lives. Raises AlreadyServed."""
    handle = os.open(f"{cfg.root}/hostd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A record lock, not flock: it is kept over exec but not shared with the makers.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise AlreadyServed(f"another hostd serves install {cfg.install}") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _log_to(cfg: HostConfig) -> None:
    """Log to the install's own file, bounded. Nothing of what tenants run or set is ever logged."""
    folder = f"{cfg.root}/log"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    handler = RotatingFileHandler(f"{folder}/hostd.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("hostd", "asyncio"):  # the loop tells of exceptions in callbacks
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
