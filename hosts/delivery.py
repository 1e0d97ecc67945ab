"""Hands what hosts report to the apps that own the ids, in batches, and says what may be acknowledged.

In charge of taking a batch of events apart by id prefix. The owners commit before they return (`hosts.registry`);
only what they return is acknowledged, so a lost commit is reported again by the host.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from django.db import InterfaceError, OperationalError

from hostd import messages
from hosts import registry
from hosts.client import index_records, outputs
from hosts.registry import BoxExitEvent, ExitEvent, HostedKind, NoticeEvent

log = logging.getLogger(__name__)

E = TypeVar("E")

KIND_MAX: Final = 40
DETAIL_MAX: Final = 1000
MEMORY: Final = ("limit_bytes", "usage_bytes", "peak_bytes")


def exit_event(host_id: str, wire: messages.ExitEvent) -> ExitEvent:
    """The event as owners see it."""
    found = outputs(wire)
    sizes = wire["sizes"]
    dropped = wire.get("dropped") or [0, 0]
    return ExitEvent(
        host_id=host_id,
        box=wire["box"],
        id=wire["id"],
        exit=wire["exit"],
        reason=told(wire.get("reason")),
        out_size=sizes[0],
        err_size=sizes[1],
        out_dropped=dropped[0],
        err_dropped=dropped[1],
        stdout=found[0] if found else None,
        stderr=found[1] if found else None,
        started_at_ms=wire.get("started_at_ms"),
        exited_at_ms=wire.get("exited_at_ms"),
        index=index_records(wire) if found else None,
        first_byte_at_ms=wire.get("first_byte_at_ms"),
        notes=notes(wire.get("notes")),
    )


def told(reason: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A reason as it is kept: the fields that the protocol knows, bounded. It was made next to somebody's box."""
    if reason is None:
        return None
    kept: dict[str, Any] = {"kind": _text(reason.get("kind"), KIND_MAX)}
    if reason.get("detail"):
        kept["detail"] = _text(reason["detail"], DETAIL_MAX)
    return kept | _numbers(reason, ("signal", "kills", *MEMORY))


def notes(given: object) -> tuple[str, ...]:
    """What a host says of a command's shell, bounded."""
    return tuple(_text(note, DETAIL_MAX) for note in given[: messages.NOTES_MAX]) if isinstance(given, list) else ()


def _text(value: object, most: int) -> str:
    return str(value)[:most].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _numbers(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    return {name: value for name in names if type(value := values.get(name)) is int and 0 <= value < 2**62}


def lost_event(host_id: str, box: str, execution_id: str, detail: str, silent_since_ms: int | None = None) -> ExitEvent:
    """An execution that is surely gone without an exit anyone saw; `silent_since_ms` when by its host's silence."""
    reason: dict[str, Any] = {"kind": "lost", "detail": detail}
    if silent_since_ms is not None:
        reason["silent_since_ms"] = silent_since_ms
    return ExitEvent(host_id, box, execution_id, -1, reason, 0, 0, 0, 0, None, None, None, None)


def box_exit_event(host_id: str, wire: messages.BoxExitEvent) -> BoxExitEvent:
    """The event as owners see it."""
    memory = wire.get("memory")
    figures = _numbers(memory, ("kills", *MEMORY)) if isinstance(memory, dict) else None
    return BoxExitEvent(
        host_id,
        wire["box"],
        wire.get("exit"),
        bool(wire.get("oom")),
        wire.get("at_ms"),
        rebooted=bool(wire.get("rebooted")),
        memory=figures,
    )


def notice_event(host_id: str, wire: messages.NoticeEvent) -> NoticeEvent:
    """The event as owners see it."""
    text = wire["message"].encode("utf-8", "replace").decode()
    return NoticeEvent(host_id, wire["box"], wire["id"], wire["source"], wire["level"], text, wire["at_ms"])


def deliver(host_id: str, events: Iterable[messages.Event | dict[str, Any]]) -> list[tuple[str, str]]:
    """Give a batch of wire events to their owners; returns the (box, id) pairs to acknowledge.

    An id whose prefix nobody registered is acknowledged too: nobody will ever want it. An owner that raises leaves
    its events unacknowledged and does not hold up the others'.
    """
    exits: list[ExitEvent] = []
    boxes: list[BoxExitEvent] = []
    notices: list[NoticeEvent] = []
    for event in events:
        if event["event"] == "exit":
            exits.append(exit_event(host_id, event))  # type: ignore[arg-type]
        elif event["event"] == "box_exit":
            boxes.append(box_exit_event(host_id, event))  # type: ignore[arg-type]
        elif event["event"] == "notice":
            notices.append(notice_event(host_id, event))  # type: ignore[arg-type]
    # Exits first: a command that ended with its box did end, and its box's end would call it lost.
    return deliver_exits(exits) + deliver_box_exits(boxes) + deliver_notices(notices)


def deliver_exits(events: Iterable[ExitEvent]) -> list[tuple[str, str]]:
    """As `deliver`, for exits of commands, reported or concluded."""
    by_kind: dict[HostedKind | None, list[ExitEvent]] = defaultdict(list)
    for event in events:
        by_kind[registry.kind_of(event.id)].append(event)
    acks: list[tuple[str, str]] = []
    for kind, batch in by_kind.items():
        if kind is None:
            log.warning("nobody owns the exits of %s", [event.id for event in batch][:10])
            acks += [(event.box, event.id) for event in batch]
            continue
        box_of = {event.id: event.box for event in batch}
        acks += [(box_of[done], done) for done in _taken(kind.on_exits, batch, "exits of commands") if done in box_of]
    return acks


def deliver_box_exits(events: Iterable[BoxExitEvent]) -> list[tuple[str, str]]:
    """As `deliver`, for ends of boxes, reported or concluded."""
    by_kind: dict[HostedKind | None, list[BoxExitEvent]] = defaultdict(list)
    for event in events:
        by_kind[registry.kind_of(event.box)].append(event)
    acks: list[tuple[str, str]] = []
    for kind, batch in by_kind.items():
        if kind is None:
            acks += [(event.box, messages.BOX_EXIT_ID) for event in batch]
            continue
        acks += [(box, messages.BOX_EXIT_ID) for box in _taken(kind.on_box_exits, batch, "ends of boxes")]
    return acks


def deliver_notices(events: Iterable[NoticeEvent]) -> list[tuple[str, str]]:
    """As `deliver`, for what ends nothing."""
    by_kind: dict[HostedKind | None, list[NoticeEvent]] = defaultdict(list)
    for event in events:
        by_kind[registry.kind_of(event.box)].append(event)
    acks: list[tuple[str, str]] = []
    for kind, batch in by_kind.items():
        box_of = {event.id: event.box for event in batch}
        taken = list(box_of) if kind is None else _taken(kind.on_notices, batch, "notices")
        acks += [(box_of[done], done) for done in taken if done in box_of]
    return acks


def _taken(take: Callable[[list[E]], list[str]], batch: list[E], what: str) -> list[str]:
    """What the owner took of a batch. One event that it cannot take, from whatever box, must not keep all others on
    the host from being taken, this time and every time again: a batch that breaks is offered in halves."""
    try:
        return list(take(batch))
    except (OperationalError, InterfaceError):
        log.exception("%d %s could not be taken; the host will report them again", len(batch), what)
        return []  # the database: halves would fare no better
    except Exception:
        if len(batch) == 1:
            log.exception("%s: one could not be taken; the host will report it again", what)
            return []
        middle = len(batch) // 2
        return _taken(take, batch[:middle], what) + _taken(take, batch[middle:], what)
