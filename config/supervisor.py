"""One foreground supervisor for the private servers and the roles: start in order, watch, restart with back-off, stop
in reverse.

In charge of processes only: it does not know what PostgreSQL or a worker is (``config.servers`` and ``config.roles``
describe them as ``Service``), and it does not know what a devbox is (``config.up`` decides what happens around start
and stop).

It is synchronous and has one thread on purpose: a child asks the kernel to be told when its parent *thread* ends, so
a killed supervisor takes its children along instead of leaving servers behind that the next start would trip over.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from config.seclusion import View, become
from config.state import Owner, State

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

#: Back-off between starts of a service that ended by itself, in seconds; forgotten after ``_STEADY`` seconds of life.
_FIRST_BACK_OFF, _LONGEST_BACK_OFF, _STEADY = 0.25, 5.0, 15.0

#: A log file is copied to ``NAME.log.1`` and emptied when it is longer than this many bytes; looked at every minute.
_LOG_LIMIT, _LOG_LOOK = 64 << 20, 60.0

#: Open files of a process, a client each: thousands wait on one web server.
OPEN_FILES = 65_536


class StepFailed(RuntimeError):
    """A step of the start did not get where it had to.  Says which step, why, and where its log is."""

    def __init__(self, step: str, why: str, log: Path | None) -> None:
        self.step, self.why, self.log = step, why, log
        place = f"\n    log: {log}" if log else ""
        super().__init__(f"{step}: {why}{place}")


class NotReady(Exception):
    """Raised by a readiness probe, with what it still waits for."""


@dataclass(frozen=True)
class Service:
    """A process that is kept running, and how one knows that it is ready."""

    name: str
    argv: Sequence[str]
    #: Returns when the service answers; raises NotReady (or OSError) while it does not.  Must not block over 3 seconds.
    ready: Callable[[], None]
    #: Shown on the progress line: an address, a path.
    where: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    #: The user that the process runs as; None: the caller's own.
    user: Owner | None = None
    cwd: Path = Path("/")
    ready_within: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_within: float = 15.0
    #: What the user sees of closed folders; None: what everybody sees.
    view: View | None = None


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    #: When to start it again (monotonic seconds); None while it runs.
    again_at: float | None = None


class Progress:
    """Lines on standard output with the time since the start, so that a slow step is seen while it is slow."""

    def __init__(self, quiet: bool = False) -> None:
        self.began = time.monotonic()
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            sys.stdout.write(f"[{time.monotonic() - self.began:6.1f} s] {text}\n")
            sys.stdout.flush()


def _launch(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    user: Owner | None,
    stdout: int,
    stderr: int,
    dies_with: signal.Signals,
    view: View | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child that gets ``dies_with`` when this process goes, with its open-file limit as high as it may be."""
    parent = os.getpid()

    def setup() -> None:
        if view:
            view.enter()
            os.chdir(cwd)  # the folder as the view has it
        if user:
            become(user)
        # Only now: changing the user clears it.
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(dies_with), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=dict(env),
        start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor, which stops them in order
        preexec_fn=setup,
    )


def raise_open_files(say: Progress) -> None:
    """Let what is started from here have OPEN_FILES files open, or say what it will do without."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, OPEN_FILES))
        except (OSError, ValueError):
            say(f"limits       {hard} open files a process, which this machine does not raise: fewer clients can wait")


class Supervisor:
    """Runs services for one state folder.  Use from the main thread."""

    def __init__(self, state: State, say: Progress) -> None:
        self.state, self.say = state, say
        self._running: list[_Running] = []
        self._log_looked = time.monotonic()

    # -- starting ------------------------------------------------------------------------------------------------------

    def start(self, services: Sequence[Service]) -> None:
        """Start these together and wait until each is ready.  Raises StepFailed; what was started stays, for
        ``stop``."""
        begun = time.monotonic()
        waiting = [self._spawn(service) for service in services]
        self._running += waiting
        self._write_pids()
        reasons: dict[str, str] = {}
        while waiting:
            for running in list(waiting):
                service = running.service
                if (code := running.process.poll()) is not None:
                    raise StepFailed(
                        service.name, f"ended with {_exit_text(code)} before it was ready", self.log_of(service.name)
                    )
                try:
                    service.ready()
                except (NotReady, OSError) as error:
                    reasons[service.name] = str(error)
                else:
                    waiting.remove(running)
                    self.say(f"{service.name:<12} ready   {service.where}")
                    continue
                if time.monotonic() - begun > service.ready_within:
                    raise StepFailed(
                        service.name,
                        f"not ready within {service.ready_within:g} s: {reasons[service.name]}",
                        self.log_of(service.name),
                    )
            time.sleep(0.05)

    def log_of(self, name: str) -> Path:
        return self.state.logs / f"{name}.log"

    def _spawn(self, service: Service) -> _Running:
        path = self.log_of(service.name)
        with open(path, "ab", buffering=0) as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} starting {service.name}\n".encode())
            try:
                process = _launch(
                    service.argv,
                    service.env,
                    service.cwd,
                    service.user,
                    log.fileno(),
                    log.fileno(),
                    service.stop_signal,
                    service.view,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise StepFailed(service.name, f"could not be started: {error}", path) from error
        return _Running(service, process, time.monotonic())

    def run_step(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        within: float,
        user: Owner | None = None,
        cwd: Path = Path("/"),
        needs_services: bool = True,
    ) -> list[str]:
        """Run a command that ends; its standard output comes back as lines, shown as progress when they begin with
        ``# ``.

        Its standard error goes to a log named after the step.  Raises StepFailed when it fails, or after ``within``
        seconds, or when a service that it may need has ended meanwhile.
        """
        log_path = self.log_of(name)
        lines: list[str] = []
        check = self._require_alive if needs_services else _nothing
        with open(log_path, "ab", buffering=0) as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n".encode())
            process = _launch(argv, env, cwd, user, subprocess.PIPE, log.fileno(), signal.SIGTERM)
            try:
                for line in _lines_until(process, time.monotonic() + within, check):
                    if line.startswith("# "):
                        log.write(line.encode() + b"\n")
                        self.say(f"{name:<12} {line[2:]}")
                    else:  # the caller's alone: it may hold a secret
                        lines.append(line)
                code = process.wait(timeout=5)
            except TimeoutError:
                raise StepFailed(name, f"not done within {within:g} s", log_path) from None
            finally:
                if process.poll() is None:
                    _end(process, signal.SIGTERM, 5.0)
        if code != 0:
            raise StepFailed(name, last_words(log_path) or f"ended with {_exit_text(code)}", log_path)
        return lines

    def _require_alive(self) -> None:
        for running in self._running:
            if running.again_at is None and (code := running.process.poll()) is not None:
                name = running.service.name
                raise StepFailed(
                    name, f"ended with {_exit_text(code)} while others were being started", self.log_of(name)
                )

    # -- watching ------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Keep everything running until SIGINT or SIGTERM.  Returns the moment one arrives."""
        with woken_by_signals() as (wake, stop_asked):
            while not stop_asked():
                self._look()
                waits = [
                    running.again_at - time.monotonic() for running in self._running if running.again_at is not None
                ]
                readable, _, _ = select.select([wake], [], [], max(0.0, min([5.0, *waits])))
                if readable:
                    os.read(wake, 4096)

    def _look(self) -> None:
        now = time.monotonic()
        for running in self._running:
            if running.again_at is not None:
                if running.again_at <= now:
                    self._restart(running)
                continue
            code = running.process.poll()
            if code is None:
                continue
            _end_session(running.process.pid)
            lived = now - running.started
            if lived > _STEADY:
                running.failures = 0
            # The pause is between two starts: what has worked for longer than that is needed back at once.
            apart = min(_LONGEST_BACK_OFF, _FIRST_BACK_OFF * 2**running.failures)
            delay = max(_FIRST_BACK_OFF, apart - lived)
            running.failures += 1
            running.again_at = now + delay
            name = running.service.name
            pid = running.process.pid
            self.say(
                f"{name:<12} ended with {_exit_text(code)} (pid {pid}); again in {delay:g} s   log: {self.log_of(name)}"
            )
        if now - self._log_looked > _LOG_LOOK:
            self._log_looked = now
            self._shorten_logs()

    def _restart(self, running: _Running) -> None:
        running.again_at = None
        try:
            fresh = self._spawn(running.service)
        except StepFailed as failure:
            running.again_at = time.monotonic() + _LONGEST_BACK_OFF
            self.say(str(failure))
            return
        running.process, running.started = fresh.process, fresh.started
        self._write_pids()
        self.say(f"{running.service.name:<12} started again (pid {running.process.pid})")

    def _shorten_logs(self) -> None:
        # Writers hold the file open for appending, so it cannot be renamed away: copied, then emptied in place.
        for path in self.state.logs.glob("*.log"):
            if path.stat().st_size > _LOG_LIMIT:
                shutil.copyfile(path, path.with_suffix(".log.1"))
                os.truncate(path, 0)

    # -- stopping ------------------------------------------------------------------------------------------------------

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Stop all services, or those named, the last started first; each within its own bound, then by force."""
        for running in reversed(self._running):
            if names is not None and running.service.name not in names:
                continue
            if running.process.poll() is None:
                began = time.monotonic()
                forced = _end(running.process, running.service.stop_signal, running.service.stop_within)
                took = time.monotonic() - began
                self.say(f"{running.service.name:<12} {'killed' if forced else 'stopped'}  {took:.1f} s")
            _end_session(running.process.pid)
        self._running = [r for r in self._running if names is not None and r.service.name not in names]
        if self._running:
            self._write_pids()
        else:
            self.state.supervisor_file.unlink(missing_ok=True)

    def pids(self) -> dict[str, int]:
        return {running.service.name: running.process.pid for running in self._running if running.again_at is None}

    def announce(self, **facts: object) -> None:
        """Add facts to the supervisor's file, for those who look for a running installation."""
        self._facts = facts
        self._write_pids()

    _facts: Mapping[str, object] = {}

    def _write_pids(self) -> None:
        me = os.getpid()
        content = {
            "pid": me,
            "started": start_time(me),
            "services": {name: {"pid": pid, "started": start_time(pid)} for name, pid in self.pids().items()},
            **self._facts,
        }
        fresh = self.state.supervisor_file.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.rename(self.state.supervisor_file)


# -- processes known only by a file ----------------------------------------------------------------------------------


def start_time(pid: int) -> int:
    """Clock ticks after boot at which this process began, 0 when it has ended: a pid alone may name another by now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_same_process(pid: int, started: int) -> bool:
    return started != 0 and start_time(pid) == started


def _end_session(leader: int) -> None:
    """The leader has ended: what it started (the workers of a web server) must not outlive it and serve on unseen."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_leftovers(state: State, say: Progress, patience: float = 10.0) -> int:
    """End services that a killed supervisor left behind.  Returns how many there were."""
    try:
        known = json.loads(state.supervisor_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    if is_same_process(known["pid"], known["started"]):
        return 0
    ended = 0
    for name, entry in known.get("services", {}).items():
        pid, started = entry["pid"], entry["started"]
        if not is_same_process(pid, started):
            continue
        say(f"{name:<12} left behind by a supervisor that is gone (pid {pid}); ending it")
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            deadline = time.monotonic() + wait
            while is_same_process(pid, started) and time.monotonic() < deadline:
                time.sleep(0.02)
        ended += 1
    state.supervisor_file.unlink(missing_ok=True)
    return ended


# -- pieces ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def woken_by_signals() -> Iterator[tuple[int, Callable[[], bool]]]:
    """Yield a descriptor that becomes readable at SIGINT, SIGTERM, SIGHUP or SIGCHLD, and a question: was a stop
    asked for?"""
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in stops}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _n, _f: None)
    old_wake = signal.set_wakeup_fd(write_end)
    try:
        yield read_end, lambda: asked
    finally:
        signal.set_wakeup_fd(old_wake)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)


def _end(process: subprocess.Popen[bytes], how: signal.Signals, within: float) -> bool:
    """Signal, wait, kill.  True when it had to be killed."""
    process.send_signal(how)
    try:
        process.wait(timeout=within)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        return True
    return False


def _lines_until(process: subprocess.Popen[bytes], deadline: float, check: Callable[[], None]) -> Iterator[str]:
    """Lines of a child's standard output until it closes it.  Raises TimeoutError at the deadline, and whatever
    ``check`` raises."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if not select.select([descriptor], [], [], min(left, 1.0))[0]:
            check()
            continue
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
    process.stdout.close()


def _nothing() -> None:
    return None


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def last_words(log: Path) -> str:
    """The last line of a log that says something, for the message of a failed step."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines and not lines[-1].startswith("---") else ""
