"""Hands what hosts report to the apps that own the ids, in batches, and says what may be acknowledged.

In charge of taking a batch of events apart by id prefix. The owners commit before they return (`hosts.registry`);
only what they return is acknowledged, so a lost commit is reported again by the host.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from django.db import InterfaceError, OperationalError

from hostd import messages
from hosts import registry
from hosts.client import index_records, outputs
from hosts.registry import BoxExitEvent, ExitEvent, HostedKind

log = logging.getLogger(__name__)

E = TypeVar("E")


def exit_event(host_id: str, wire: messages.ExitEvent) -> ExitEvent:
    """The event as owners see it."""
    found = outputs(wire)
    sizes = wire["sizes"]
    dropped = wire.get("dropped") or [0, 0]
    reason = wire.get("reason")
    return ExitEvent(
        host_id=host_id,
        box=wire["box"],
        id=wire["id"],
        exit=wire["exit"],
        reason=dict(reason) if reason is not None else None,
        out_size=sizes[0],
        err_size=sizes[1],
        out_dropped=dropped[0],
        err_dropped=dropped[1],
        stdout=found[0] if found else None,
        stderr=found[1] if found else None,
        started_at_ms=wire.get("started_at_ms"),
        exited_at_ms=wire.get("exited_at_ms"),
        index=index_records(wire) if found else None,
    )


def lost_event(host_id: str, box: str, execution_id: str, detail: str) -> ExitEvent:
    """An execution that is surely gone without an exit anyone saw."""
    reason = {"kind": "lost", "detail": detail}
    return ExitEvent(host_id, box, execution_id, -1, reason, 0, 0, 0, 0, None, None, None, None)


def box_exit_event(host_id: str, wire: messages.BoxExitEvent) -> BoxExitEvent:
    """The event as owners see it."""
    return BoxExitEvent(host_id, wire["box"], wire.get("exit"), bool(wire.get("oom")), wire.get("at_ms"))


def deliver(host_id: str, events: Iterable[messages.Event | dict[str, Any]]) -> list[tuple[str, str]]:
    """Give a batch of wire events to their owners; returns the (box, id) pairs to acknowledge.

    An id whose prefix nobody registered is acknowledged too: nobody will ever want it. An owner that raises leaves
    its events unacknowledged and does not hold up the others'.
    """
    exits: list[ExitEvent] = []
    boxes: list[BoxExitEvent] = []
    for event in events:
        if event["event"] == "exit":
            exits.append(exit_event(host_id, event))  # type: ignore[arg-type]
        elif event["event"] == "box_exit":
            boxes.append(box_exit_event(host_id, event))  # type: ignore[arg-type]
    # Exits first: a command that ended with its box did end, and its box's end would call it lost.
    return deliver_exits(exits) + deliver_box_exits(boxes)


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
