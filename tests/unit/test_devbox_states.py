"""The tables of a devbox's life hang together."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from devboxes import states
from devboxes.devbox_flow import devbox_flow


def reachable(step: str) -> set[str]:
    found, todo = {step}, [step]
    while todo:
        for move in states.MOVES[todo.pop()] - found:
            found.add(move)
            todo.append(move)
    return found


def test_every_step_has_a_row_in_every_table() -> None:
    steps = set(states.STATUS)
    assert steps == set(states.MOVES)
    assert {to for moves in states.MOVES.values() for to in moves} <= steps
    assert set(states.STATUS.values()) <= set(states.STATUSES)
    for step in steps:
        seconds = states.seconds_for(step)
        assert seconds is None or seconds > 0


def test_every_step_that_is_not_an_end_has_a_method() -> None:
    assert set(devbox_flow.steps) == set(states.STATUS) - {states.GONE, states.FAILED}


def test_there_is_a_way_out_of_everything() -> None:
    for step in states.STATUS:
        assert reachable(step) & {states.GONE, states.FAILED}, step
    for step in set(states.STATUS) - {states.TEARDOWN, states.CLEAN_UP, states.GONE, states.FAILED}:
        assert {states.TEARDOWN, states.CLEAN_UP} <= states.MOVES[step]


def test_what_is_over_stays_over() -> None:
    for step, status in states.STATUS.items():
        if status in states.OVER:
            assert {states.STATUS[to] for to in reachable(step)} == {status}


def test_the_picture_names_every_step() -> None:
    assert states.__doc__ is not None
    for step in states.STATUS:
        assert re.search(rf"\b{step}\b", states.__doc__), step


def _pairs() -> Iterator[tuple[str, str]]:
    yield from ((step, to) for step in states.STATUS for to in states.STATUS)


@pytest.mark.parametrize(("step", "to"), _pairs())
def test_may_move_is_the_table(step: str, to: str) -> None:
    assert states.may_move(step, to) == (step == to or to in states.MOVES[step])
