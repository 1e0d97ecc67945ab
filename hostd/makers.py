"""Maker processes: what blocks, forks or mounts is done by them, so that hostd's loop never waits.

A maker is single-threaded, shares hostd's private mount namespace, takes one job at a time over a socket pair and
answers with its result. A maker that is killed fails its job as `internal` and is replaced; whatever it left half made
is the retry's to clean, because every job may be run twice.

In charge of: forking, feeding, bounding and replacing them. Not in charge of what a job does (`jobs.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hostd.messages import Refused

QUEUE_MAX = 256  # jobs waiting for a maker
JOB_SECONDS = 60.0  # the longest a job may take before its maker is killed
MESSAGE_MAX = 128 * 1024
_RESPAWN_SECONDS = 0.2  # pause before a maker that dies at birth is tried again
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("hostd.makers")

Run = Callable[[str, dict[str, Any]], dict[str, Any]]


@dataclass(slots=True)
class _Job:
    name: str
    args: dict[str, Any]
    seconds: float
    done: asyncio.Future[dict[str, Any]]
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Maker:
    pid: int
    socket: socket.socket
    job: _Job | None = None
    timer: asyncio.TimerHandle | None = None
    born_at: float = field(default_factory=time.monotonic)


class Makers:
    """A fixed number of makers. Create it before the loop, `attach` it inside, `do` jobs with it."""

    def __init__(self, count: int, run: Run) -> None:
        self._run = run
        self._count = count
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: deque[_Job] = deque()
        self._closing = False
        self._makers: list[_Maker] = [self._fork() for _ in range(count)]

    @property
    def idle(self) -> bool:
        """True when a maker is free and no job waits: the time for work ahead of need."""
        return not self._queue and any(maker.job is None for maker in self._makers)

    @property
    def pids(self) -> list[int]:
        return [maker.pid for maker in self._makers]

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        for maker in self._makers:
            self._watch(maker)

    async def do(self, name: str, seconds: float = JOB_SECONDS, **args: Any) -> dict[str, Any]:
        """Run a job and return its result.

        Raises Refused: whatever the job refused with; busy when :data:`QUEUE_MAX` jobs wait; internal when it failed,
        its maker died, or it took longer than ``seconds`` (waiting for a maker not counted).
        The job goes on when the caller is cancelled.
        """
        if self._closing:
            raise Refused("not_ready", "hostd is restarting")
        if len(self._queue) >= QUEUE_MAX:
            raise Refused("busy", f"{QUEUE_MAX} jobs wait for a maker already")
        assert self._loop is not None
        job = _Job(name, args, seconds, self._loop.create_future())
        self._queue.append(job)
        self._feed()
        return await asyncio.shield(job.done)

    async def close(self, seconds: float) -> None:
        """Take no more jobs, let the running ones end within ``seconds``, then stop all makers."""
        self._closing = True
        for job in self._queue:
            job.done.set_exception(Refused("not_ready", "hostd is restarting"))
        self._queue.clear()
        running = [maker.job.done for maker in self._makers if maker.job is not None]
        if running:
            await asyncio.wait(running, timeout=seconds)
        for maker in list(self._makers):
            self._bury(maker)

    def dying(self, pid: int) -> None:
        """Called by the reaper for each dead child before it is reaped, while its number is still its own."""
        if pid in self.pids:
            _kill_group(pid)

    # --- the parent's side

    def _fork(self) -> _Maker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_maker(theirs, parent, self._run)
        theirs.close()
        try:
            os.setpgid(pid, pid)  # by both of us: neither can know who comes first
        except OSError:
            pass
        ours.setblocking(False)
        return _Maker(pid, ours)

    def _watch(self, maker: _Maker) -> None:
        assert self._loop is not None
        self._loop.add_reader(maker.socket, self._answered, maker)

    def _feed(self) -> None:
        assert self._loop is not None
        for maker in self._makers:
            if not self._queue:
                return
            if maker.job is not None:
                continue
            job = self._queue.popleft()
            maker.job = job
            maker.timer = self._loop.call_later(job.seconds, self._overdue, maker, job)
            try:
                maker.socket.send(json.dumps({"job": job.name, "args": job.args}).encode())
            except OSError:
                self._lost(maker)
                return  # a replacement feeds the rest

    def _answered(self, maker: _Maker) -> None:
        try:
            data = maker.socket.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        job = maker.job
        if not data or job is None:
            self._lost(maker)
            return
        maker.job = None
        if maker.timer is not None:
            maker.timer.cancel()
        _settle(job, json.loads(data))
        self._feed()

    def _overdue(self, maker: _Maker, job: _Job) -> None:
        if maker.job is job:
            log.error("job %s took longer than %s s; its maker is killed", job.name, job.seconds)
            self._lost(maker)

    def _lost(self, maker: _Maker) -> None:
        """A maker died or must die: fail its job, put another in its place."""
        job = maker.job
        at = self._makers.index(maker) if maker in self._makers else None
        self._bury(maker)
        if job is not None:
            log.error("maker %s was lost during %s", maker.pid, job.name)
            if not job.done.done():
                job.done.set_exception(Refused("internal", f"{job.name} was cut short on the host"))
        if at is None or self._closing or self._loop is None:
            return
        young = time.monotonic() - maker.born_at < _RESPAWN_SECONDS
        self._loop.call_later(_RESPAWN_SECONDS if young else 0, self._replace)

    def _replace(self) -> None:
        if self._closing or len(self._makers) >= self._count:
            return
        maker = self._fork()
        self._makers.append(maker)
        self._watch(maker)
        self._feed()

    def _bury(self, maker: _Maker) -> None:
        if maker in self._makers:
            self._makers.remove(maker)
        if maker.timer is not None:
            maker.timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(maker.socket)
        maker.socket.close()
        _kill_group(maker.pid)


def _kill_group(pid: int) -> None:
    try:
        # The whole group: a half-done crun must not go on while the retry cleans up behind it.
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _settle(job: _Job, answer: dict[str, Any]) -> None:
    if job.done.done():
        return
    if "result" in answer:
        job.done.set_result(answer["result"])
    elif "refused" in answer:
        code, message, extra = answer["refused"]
        job.done.set_exception(Refused(code, message, **extra))
    else:
        log.error("job %s failed: %s", job.name, answer.get("failed"))
        job.done.set_exception(Refused("internal", f"{job.name} failed on the host: {answer.get('summary')}"))


# --- the maker's side


def _be_maker(ours: socket.socket, parent: int, run: Run) -> None:
    """Never returns."""
    try:
        # What we were forked with belongs to the parent: neither collect it (a closed socket object would close a
        # descriptor number that is ours by now) nor keep its descriptors open.
        gc.freeze()
        keep = ours.fileno()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, keep)
        os.closerange(keep + 1, 2**20)
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)
        while True:
            data = ours.recv(MESSAGE_MAX)
            if not data:
                os._exit(0)
            ours.send(_answer(json.loads(data), run))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _answer(job: dict[str, Any], run: Run) -> bytes:
    try:
        answer: dict[str, Any] = {"result": run(job["job"], job["args"])}
    except Refused as refused:
        answer = {"refused": [refused.code, refused.message, refused.extra]}
    except Exception as error:
        answer = {"failed": traceback.format_exc()[-8000:], "summary": f"{type(error).__name__}: {error}"[:300]}
    data = json.dumps(answer).encode()
    if len(data) > MESSAGE_MAX:
        data = json.dumps({"failed": "the answer is too long", "summary": "the answer is too long"}).encode()
    return data
