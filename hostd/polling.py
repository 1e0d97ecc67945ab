"""The loop of the zygote and of a keeper: epoll and timers, one thread.

In charge of: calling who asked when a descriptor is ready or a moment has come; an exception of one callback must not
end a process on which a box's commands depend.
Not in charge of: what is done then. hostd itself has a loop of its own (serve.py).
"""

from __future__ import annotations

import heapq
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP | select.EPOLLERR

LOG_BYTES = 8 << 20
"""A longer log starts over: nobody rotates it, and a box must not fill the disk through it."""


class Timer:
    """A call that is due at `when` (monotonic seconds)."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Forget the call. Harmless when it has been made already."""
        self.call = None


class Poller:
    """Descriptors and timers of one process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], object]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._counter = 0

    def fileno(self) -> int:
        """Return the epoll descriptor (to be closed in a forked child)."""
        return self._epoll.fileno()

    def on(self, descriptor: int, call: Callable[[int], object], events: int = READ) -> None:
        """Call `call(events)` whenever `descriptor` is ready. Level-triggered; a hang-up always counts as ready."""
        self._calls[descriptor] = call
        self._epoll.register(descriptor, events)

    def change(self, descriptor: int, events: int) -> None:
        """Watch for other events on a descriptor that is already watched."""
        self._epoll.modify(descriptor, events)

    def off(self, descriptor: int) -> None:
        """Stop watching. Must come before the close: the number may be another file's a moment later."""
        if self._calls.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Make one call, `seconds` from now."""
        timer = Timer(time.monotonic() + seconds, call)
        self._counter += 1
        heapq.heappush(self._timers, (timer.when, self._counter, timer))
        return timer

    def turn(self) -> None:
        """Wait for something to happen and make the calls for it."""
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
        for descriptor, events in self._epoll.poll(timeout, 64):
            call = self._calls.get(descriptor)  # an earlier call of this turn may have taken it off
            if call is not None:
                self._guarded(call, events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                due, timer.call = timer.call, None
                self._guarded(due)

    def run(self) -> None:
        """Turn for ever."""
        while True:
            self.turn()

    @staticmethod
    def _guarded(call: Callable[..., object], *arguments: int) -> None:
        try:
            call(*arguments)
        except Exception as error:
            log_exception(error)


def log(text: str) -> None:
    """Write one line to standard error, which is the log file of the zygote and all its children."""
    with_time = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} [{os.getpid()}] {text}\n"
    try:
        if os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)
        os.write(2, with_time.encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def log_exception(error: BaseException) -> None:
    """Log an exception with the places it came through, without importing `traceback`."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    log(f"{type(error).__name__}: {error} at {' > '.join(places[-8:])}")
