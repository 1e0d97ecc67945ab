"""What upper apps bring to the hosts app, found by id prefix.

In charge of the seam between `hosts`, which hears hosts, and the apps whose rows live on them. Each app registers
one `HostedKind` from its `apps.py`; nothing here imports them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hostd.messages import ReportedSnapshot


@dataclasses.dataclass(frozen=True, slots=True)
class ExitEvent:
    """One end of a command as a host reported it. Sizes in bytes, times in milliseconds since the epoch."""

    host_id: str
    box: str
    id: str
    exit: int
    """0..255; 128+N after signal N; -1 when nothing can be proven (reason kind `lost`)."""
    reason: dict[str, Any] | None
    out_size: int
    err_size: int
    out_dropped: int
    err_dropped: int
    stdout: bytes | None
    """Both streams whole when together they are <= 64 KiB, else None."""
    stderr: bytes | None
    started_at_ms: int | None
    exited_at_ms: int | None
    index: bytes | None = None
    """When the outputs came, as `hostd.messages.INDEX_RECORD` describes it; None when nobody can tell."""
    first_byte_at_ms: int | None = None
    """When the first byte of output came; None when there was none, or nobody can tell."""
    notes: tuple[str, ...] = ()
    """What the devbox's log should say of the shell it ran in."""


@dataclasses.dataclass(frozen=True, slots=True)
class BoxExitEvent:
    """The end of a box that nobody asked for: its PID 1 died, memory ran out, or its host came back without it."""

    host_id: str
    box: str
    exit: int | None
    oom: bool
    at_ms: int | None
    lost: str | None = None
    """Why it is gone when no host reported its exit (host rebooted, silent for too long); None: reported."""
    silent_since_ms: int | None = None
    """When its host was last heard, when it is lost by silence."""
    rebooted: bool = False
    """Its host was restarted under it: its disk is as it was."""
    memory: dict[str, int] | None = None
    """With `oom`: kills, limit_bytes, usage_bytes, peak_bytes, as far as its host could tell."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoticeEvent:
    """Something that happened to a box and ends nothing."""

    host_id: str
    box: str
    id: str
    source: Literal["stats", "kmsg", "exec"]
    level: Literal["info", "warning", "error"]
    message: str
    at_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class ExpectedBox:
    """What a row says should be on a host now. Only rows placed on that host are expected."""

    box: str
    up: bool
    """The row says its processes run; False: it may be between steps, suspended or on its way down."""
    fence: int
    settled: bool = True
    """No step is in flight; a correction may be made from a single report."""
    asleep: bool = False
    """The row says that its disk is there, and nothing else of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExpectedExecution:
    """An execution whose row says that it runs on a host: its spawn has been acknowledged and no exit came."""

    id: str
    box: str
    fence: int


def _no_exits(events: Sequence[ExitEvent]) -> list[str]:
    return []


def _no_box_exits(events: Sequence[BoxExitEvent]) -> list[str]:
    return []


def _no_notices(events: Sequence[NoticeEvent]) -> list[str]:
    return [event.id for event in events]


def _nothing_expected(host_id: str) -> Sequence[ExpectedBox | ExpectedExecution]:
    return ()


def _none_over(ids: Sequence[str]) -> Mapping[str, int]:
    return {}


def _nothing_against(devbox_id: str) -> str | None:
    return None


def _none_superfluous(host_id: str, kept: Sequence[ReportedSnapshot]) -> Sequence[tuple[str, int]]:
    return ()


def _nobody_waits(host_id: str) -> None:
    return None


def _nothing_done(devbox_id: str) -> str | None:
    return None


def _ready(devbox_id: str) -> bool:
    return True


def _ignore(devbox_id: str, reason: str) -> None:
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostedKind:
    """What the owner of an id prefix does when something happens to its ids on a host.

    Every function writes by guarded UPDATEs, commits before it returns and may be called twice with the same things.
    """

    on_exits: Callable[[list[ExitEvent]], list[str]] = _no_exits
    """Complete these; returns the ids to acknowledge to the host (unknown and already completed ones too).

    Executions that are surely lost come the same way: exit -1, reason `{"kind": "lost", "detail": …}`."""
    on_box_exits: Callable[[list[BoxExitEvent]], list[str]] = _no_box_exits
    """Returns the box ids to acknowledge."""
    on_notices: Callable[[list[NoticeEvent]], list[str]] = _no_notices
    """Of boxes with this prefix; returns the notices' ids to acknowledge."""
    expected_on_host: Callable[[str], Sequence[ExpectedBox | ExpectedExecution]] = _nothing_expected
    over: Callable[[Sequence[str]], Mapping[str, int]] = _none_over
    """Those of the ids whose rows are completed (or never were), each with a fence newer than any of its row's: running
    on a host, they are to be killed."""
    on_heard: Callable[[str], None] = _nobody_waits
    """(host id): it is heard, perhaps again; wake what has been refused by its absence."""
    before_destroy: Callable[[str], bool] = _ready
    """(devbox id): True when nothing of the devbox on its host is needed any more."""
    after_destroy: Callable[[str, str], None] = _ignore
    """(devbox id, reason): the box is gone; close what still hangs on it."""
    why_not_shut_down: Callable[[str], str | None] = _nothing_against
    """(devbox id): why its user should not shut it down just now; None: nothing is against it."""
    superfluous: Callable[[str, Sequence[ReportedSnapshot]], Sequence[tuple[str, int]]] = _none_superfluous
    """(host id, the kept disks of this prefix that it reports): those it is to delete, each with a fence."""
    before_suspend: Callable[[str], bool] = _ready
    """(devbox id): end what runs in it; True when nothing but its disk is needed any more."""
    doing: Callable[[str], str | None] = _nothing_done
    """(devbox id): as what it is in use (a kind of activity) by what is accepted and has no end yet; None: not."""
    after_suspend: Callable[[str, str], None] = _ignore
    """(devbox id, why): of the box only the disk is left; close what still hangs on it. `suspended`, or in words what
    else ended it."""


_kinds: dict[str, HostedKind] = {}


def register(prefix: str, kind: HostedKind) -> None:
    """Say who answers for ids that start with `<prefix>_`. Called once per app from `AppConfig.ready`."""
    if prefix in _kinds and _kinds[prefix] != kind:
        raise ValueError(f"the prefix {prefix!r} is registered already")
    _kinds[prefix] = kind


def kind_of(some_id: str) -> HostedKind | None:
    """The kind an id belongs to, by what stands before its first `_`; None when nobody registered it."""
    return _kinds.get(some_id.partition("_")[0])


def kinds() -> dict[str, HostedKind]:
    """All registered kinds by prefix, in the order of registration."""
    return dict(_kinds)


def heard(host_id: str) -> None:
    """Tell every registered kind that the host is heard."""
    for kind in _kinds.values():
        kind.on_heard(host_id)


def before_destroy(devbox_id: str) -> bool:
    """True when every registered kind is done with the devbox's box on its host."""
    return all(kind.before_destroy(devbox_id) for kind in _kinds.values())


def why_not_shut_down(devbox_id: str) -> str | None:
    """Why the devbox's user should not shut it down just now, from the first registered kind that has a reason."""
    return next((why for kind in _kinds.values() if (why := kind.why_not_shut_down(devbox_id))), None)


def before_suspend(devbox_id: str) -> bool:
    """True when every registered kind needs nothing of the devbox but its disk."""
    return all(kind.before_suspend(devbox_id) for kind in _kinds.values())


def doing(devbox_id: str) -> str | None:
    """As what the devbox is in use, by any registered kind; None: it is not."""
    found = (kind.doing(devbox_id) for kind in _kinds.values())
    return next((what for what in found if what is not None), None)


def after_suspend(devbox_id: str, why: str = "suspended") -> None:
    """Tell every registered kind that only the devbox's disk is left."""
    for kind in _kinds.values():
        kind.after_suspend(devbox_id, why)


def after_destroy(devbox_id: str, reason: str) -> None:
    """Tell every registered kind that the devbox's box is gone."""
    for kind in _kinds.values():
        kind.after_destroy(devbox_id, reason)
