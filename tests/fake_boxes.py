"""What a fake host is made of: boxes, executions, scripted failures, and what makes a method one of its verbs.

Not in charge of what the verbs do (`tests.fake_host`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hosts.errors import HostUnreachable

if TYPE_CHECKING:
    from tests.fake_host import FakeHost


@dataclasses.dataclass
class Execution:
    """A command in a fake box."""

    id: str
    fence: int
    body: dict[str, Any]
    state: str = "running"
    exit: int | None = None
    reason: dict[str, Any] | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    dropped: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    stdin: bytes = b""
    stdin_eof: bool = False
    requests: set[str] = dataclasses.field(default_factory=set)
    cap: int | None = None
    moved: bool = False
    started_at_ms: int = 0
    exited_at_ms: int | None = None
    acked: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    late: list[bytes] = dataclasses.field(default_factory=lambda: [b"", b""])
    records: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Of its index: time in ms, stream (1 or 2), bytes by then. Without any, all came at its start."""
    late_records: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Box:
    """A fake box. `state`: disk, up or down."""

    box: str
    slot: str
    fence: int
    image: str
    disk_bytes: int
    state: str = "disk"
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    executions: dict[str, Execution] = dataclasses.field(default_factory=dict)
    booted_at_ms: int = 0
    machine_id: str = ""


@dataclasses.dataclass
class Failure:
    error: BaseException
    times: int
    after: bool
    when: Callable[..., bool] | None


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Record the call, apply scripted failures before or after the effect, one call at a time."""
    name = function.__name__
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(self: FakeHost, /, **kwargs: Any) -> Any:
        signature.bind(self, **kwargs)
        with self.lock:
            self.calls.append((name, dict(kwargs)))
            if self.unreachable:
                raise HostUnreachable(self.host_id, "scripted: nothing answers")
            failure = self._failure(name, kwargs)
            if failure is not None and not failure.after:
                raise failure.error
            answer = function(self, **kwargs)
            if failure is not None:
                raise failure.error
        hook = self.hooks.get(name)
        if hook is not None:
            hook(**kwargs)
        return answer

    return call
