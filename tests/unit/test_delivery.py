"""Handing a host's events to their owners: what one event may not do to the others."""

from __future__ import annotations

from django.db import DataError, OperationalError

from hosts import delivery, registry
from hosts.registry import BoxExitEvent, HostedKind


def ends(*ids):
    return [delivery.lost_event("hst_1", "dbx_1", id, "gone") for id in ids]


def test_an_event_that_cannot_be_taken_does_not_keep_the_others(monkeypatch):
    def take(events):
        if any(event.id == "exe_bad" for event in events):
            raise DataError("unsupported Unicode escape sequence")
        return [event.id for event in events]

    monkeypatch.setattr(registry, "_kinds", {"exe": HostedKind(on_exits=take)})
    acks = delivery.deliver_exits(ends("exe_1", "exe_2", "exe_bad", "exe_3", "exe_4"))
    assert [id for _, id in acks] == ["exe_1", "exe_2", "exe_3", "exe_4"]


def test_a_box_whose_end_cannot_be_taken_does_not_keep_the_others(monkeypatch):
    def take(events):
        if any(event.box == "dbx_2" for event in events):
            raise ValueError
        return [event.box for event in events]

    monkeypatch.setattr(registry, "_kinds", {"dbx": HostedKind(on_box_exits=take)})
    events = [BoxExitEvent("hst_1", f"dbx_{number}", 1, False, None) for number in range(1, 4)]
    assert [box for box, _ in delivery.deliver_box_exits(events)] == ["dbx_1", "dbx_3"]


def test_a_database_that_is_away_is_asked_once(monkeypatch):
    asked = []

    def take(events):
        asked.append(len(events))
        raise OperationalError("the connection is closed")

    monkeypatch.setattr(registry, "_kinds", {"exe": HostedKind(on_exits=take)})
    assert delivery.deliver_exits(ends("exe_1", "exe_2", "exe_3")) == []
    assert asked == [3]
