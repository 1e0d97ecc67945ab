"""The comparison of a report with the rows, a pure function: each line of its table, and what must change nothing."""

from __future__ import annotations

from typing import Any

from hosts.reconcile import Corrections, plan
from hosts.registry import ExpectedBox, ExpectedExecution

A, B = "dbx_a", "dbx_b"


def report(*boxes: dict) -> Any:
    return {"boxes": list(boxes), "warm": [], "at_ms": 0}


def box(id: str, state: str = "up", *executions: tuple[str, str], fence: int = 7, unasked: bool = False) -> dict:
    told = None if unasked else [{"id": one, "state": how} for one, how in executions]
    return {"box": id, "slot": "s1-abcdef", "fence": fence, "state": state, "image": "base", "executions": told}


def row(id: str, *, up: bool = True, settled: bool = True) -> ExpectedBox:
    return ExpectedBox(box=id, up=up, fence=5, settled=settled)


def running(id: str, box: str = A) -> ExpectedExecution:
    return ExpectedExecution(id=id, box=box, fence=5)


def test_what_agrees_needs_nothing() -> None:
    assert plan([row(A), running("exe_1")], report(box(A, "up", ("exe_1", "running")))) == Corrections()


def test_an_empty_report_and_no_rows_need_nothing() -> None:
    assert plan([], report()) == Corrections()


def test_a_box_that_is_gone_is_lost_at_once() -> None:
    assert plan([row(A), row(B)], report(box(B))).lost_boxes == ((A, "its host has it no more"),)


def test_a_box_that_is_down_is_lost_at_its_second_sight() -> None:
    rows: list[ExpectedBox | ExpectedExecution] = [row(A), running("exe_1")]
    for state in ("down", "disk"):
        first = plan(rows, report(box(A, state)))
        assert not first.lost_boxes and not first.lost_executions  # the event that tells why may be on its way
        second = plan(rows, report(box(A, state)), first.seen)
        assert second.lost_boxes == ((A, "it is not running on its host"),)
        assert second.lost_executions == ((A, "exe_1", "its host has it no more"),)


def test_a_box_that_was_down_and_is_up_again_is_not_lost() -> None:
    first = plan([row(A)], report(box(A, "down")))
    assert plan([row(A)], report(box(A)), first.seen) == Corrections()


def test_a_restart_of_the_host_is_told_as_the_reason() -> None:
    assert plan([row(A)], report(box(A, "down")), rebooted=True).lost_boxes == ((A, "its host was restarted"),)


def test_a_box_between_steps_is_its_flows_business() -> None:
    assert plan([row(A, settled=False)], report()) == Corrections()
    assert plan([row(A, up=False)], report()) == Corrections()
    first = plan([row(A, up=False)], report(box(A, "disk")))
    assert plan([row(A, up=False)], report(box(A, "disk")), first.seen).lost_boxes == ()


def test_a_command_its_box_does_not_know_is_lost() -> None:
    found = plan([row(A), running("exe_1")], report(box(A)))
    assert found.lost_executions == ((A, "exe_1", "its box does not know it"),) and not found.lost_boxes


def test_a_command_whose_box_is_gone_is_lost() -> None:
    found = plan([row(A), running("exe_1")], report())
    assert found.lost_executions == ((A, "exe_1", "its host has it no more"),)


def test_a_keeper_that_could_not_be_asked_says_nothing() -> None:
    assert plan([row(A), running("exe_1")], report(box(A, unasked=True))) == Corrections()


def test_an_exit_that_was_not_told_yet_is_no_loss() -> None:
    assert plan([row(A), running("exe_1")], report(box(A, "up", ("exe_1", "exited")))) == Corrections()


def test_an_unknown_box_is_destroyed_only_when_seen_twice() -> None:
    first = plan([], report(box(A)))
    assert first.unknown_boxes == () and first.seen == {A}
    second = plan([], report(box(A, fence=9), box(B)), first.seen)
    assert second.unknown_boxes == ((A, 9),) and second.seen == {A, B}


def test_a_box_that_got_its_row_in_between_is_left_alone() -> None:
    first = plan([], report(box(A)))
    assert plan([row(A, up=False)], report(box(A)), first.seen) == Corrections()


def test_a_box_seen_long_ago_starts_over() -> None:
    first = plan([], report(box(A)))
    second = plan([], report(), first.seen)
    assert plan([], report(box(A)), second.seen).unknown_boxes == ()


def test_an_unknown_command_is_named_only_when_seen_running_twice() -> None:
    there = report(box(A, "up", ("exe_1", "running"), ("exe_2", "exited")))
    first = plan([row(A)], there)
    assert first.unknown_executions == ()
    assert plan([row(A)], there, first.seen).unknown_executions == ((A, "exe_1"),)


def test_commands_of_an_unknown_box_go_with_it() -> None:
    there = report(box(A, "up", ("exe_1", "running")))
    assert plan([], there, plan([], there).seen).unknown_executions == ()
