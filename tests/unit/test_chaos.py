"""A run of chaos is worth what it can see: its plan is its seed's, and whatever is untrue is found."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from tests.chaos import check, plan
from tests.chaos.drive import Command

JOB = plan.Job("w1.1", 0, 20, 40, 0.0, 2, False, "exit", 3, "follow")


class Run:
    """What the checks of one command need of a run."""

    def __init__(self, *blows: float) -> None:
        self.found: list[str] = []
        self.find = self.found.append
        self.striker = self
        self.on_boxes = [(at, "") for at in blows]
        self.commands: list[Command] = []

    def say(self, text: str) -> None:
        pass


def told(job: plan.Job, **changes: Any) -> Command:
    """A command whose clients have seen exactly what it wrote."""
    whole = {name: job.output(name) for name in ("stdout", "stderr")}
    seen = {name: (data.decode(errors="replace"), len(data)) for name, data in whole.items()}
    answer: dict[str, Any] = {name: text for name, (text, _) in seen.items()}
    answer |= {"status": "completed", "exit_status": job.exit_status, "why": None}
    command = Command(job, "dbx_x", 0.0, "exe_x", dict(seen), answer=answer, stored=dict(seen), final=dict(answer))
    for name, value in changes.items():
        setattr(command, name, value)
    return command


def found(command: Command, *blows: float) -> list[str]:
    run = Run(*blows)
    check._command(run, command)  # type: ignore[arg-type]
    return run.found


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan.digest(plan.Plan(7)) == plan.digest(plan.Plan(7)) != plan.digest(plan.Plan(8))
    assert {fault.kind for fault in plan.faults(plan.Plan(7, only=("kill web",)))} == {"kill web"}


def test_long_plans_have_every_kind_of_fault_and_every_ending() -> None:
    assert {fault.kind for fault in plan.faults(plan.Plan(1, 2000))} == plan.KINDS.keys()
    jobs = [job for slot in range(30) for job in itertools.islice(plan.jobs(plan.Plan(1), slot), 10)]
    assert {job.ending for job in jobs} == {"exit", "signal", "child", "stay", "echo", "hog"}
    assert {job.how for job in jobs} == {"follow", "poll", "sync", "execute"}
    assert any(job.binary for job in jobs) and any(len(job.output("stdout")) > 1 << 20 for job in jobs)


@pytest.mark.parametrize("binary", [False, True])
def test_nothing_is_found_where_all_is_true(binary: bool) -> None:
    assert found(told(dataclasses.replace(JOB, binary=binary))) == []


def lines(edit: Any) -> tuple[str, int]:
    whole = JOB.output("stdout").decode().splitlines(keepends=True)
    edit(whole)
    return "".join(whole), len("".join(whole).encode())


EDITS = {
    "lost": lambda whole: whole.pop(7),
    "repeated": lambda whole: whole.insert(7, whole[7]),
    "swapped": lambda whole: whole.insert(8, whole.pop(7)),
    "cut": lambda whole: whole.append(whole.pop()[:-9]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("where", ["live", "stored"])
def test_a_line_that_is_not_there_exactly_once_is_found(edit: str, where: str) -> None:
    command = told(JOB)
    getattr(command, where)["stdout"] = lines(EDITS[edit])
    assert found(command)


def test_an_untrue_exit_status_is_found() -> None:
    command = told(JOB)
    assert command.final is not None and command.answer is not None
    command.final["exit_status"] = command.answer["exit_status"] = 0
    assert found(command)


def test_a_lost_command_is_believed_only_after_a_blow_at_its_box() -> None:
    command = told(JOB)
    assert command.final is not None and command.answer is not None
    command.final["exit_status"] = command.answer["exit_status"] = -1
    assert found(command)
    assert found(command, 1.0) == []
    assert found(command, 500.0)


def test_a_killed_command_may_have_written_less_but_nothing_else() -> None:
    job = dataclasses.replace(JOB, ending="stay", code=0)
    command = told(job, killed=True)
    assert command.final is not None and command.answer is not None
    for answer in (command.final, command.answer):
        answer |= {"exit_status": 137, "why": "it was killed on request"}
    whole = job.output("stdout")[:333]
    for stream, data in (("stdout", whole), ("stderr", b"")):
        command.live[stream] = command.stored[stream] = (data.decode(errors="replace"), len(data))
        command.final[stream] = command.answer[stream] = data.decode(errors="replace")
    assert found(command) == []
    command.live["stdout"] = command.stored["stdout"] = ("something else", 14)
    command.final["stdout"] = command.answer["stdout"] = "something else"
    assert found(command)


def test_input_is_there_once_and_in_order() -> None:
    job = dataclasses.replace(JOB, ending="echo", count=3, every=0, code=0)
    given = [("a\n", True), ("b\n", True), ("c\n", True)]

    def echo(text: str) -> list[str]:
        command = told(job, given=given)
        assert command.final is not None and command.answer is not None
        command.live["stdout"] = command.stored["stdout"] = (text, len(text))
        command.final["stdout"] = command.answer["stdout"] = text
        return found(command)

    assert echo("w1.1 o a\nw1.1 o b\nw1.1 o c\n") == []
    assert echo("w1.1 o a\nw1.1 o c\n")
    assert echo("w1.1 o a\nw1.1 o b\nw1.1 o b\nw1.1 o c\n")
    assert echo("w1.1 o b\nw1.1 o a\nw1.1 o c\n")
