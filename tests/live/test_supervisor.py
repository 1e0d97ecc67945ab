"""The supervisor: starting, failing, restarting and stopping real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config.state import State, StateError, free_port, port_is_free
from config.supervisor import (
    NotReady,
    Progress,
    Service,
    StepFailed,
    Supervisor,
    end_leftovers,
    is_same_process,
    start_time,
)


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "s")
    made.create()
    return made


@pytest.fixture
def supervisor(state: State):
    running = Supervisor(state, Progress(quiet=True))
    yield running
    running.stop()


def shell(name: str, script: str, ready=lambda: None, **more) -> Service:
    return Service(name, ["/bin/sh", "-c", script], ready, env={"PATH": os.environ["PATH"]}, **more)


def file_there(path: Path):
    def ready() -> None:
        if not path.exists():
            raise NotReady(f"{path.name} is not there")

    return ready


def test_a_service_is_waited_for_until_it_is_ready(supervisor: Supervisor, tmp_path: Path) -> None:
    sign = tmp_path / "ready"
    supervisor.start([shell("slow", f"sleep 0.3; touch {sign}; sleep 60", file_there(sign))])
    assert sign.exists()


def test_a_service_that_ends_before_it_is_ready_names_itself_and_its_log(supervisor: Supervisor, state: State) -> None:
    with pytest.raises(StepFailed) as failed:
        supervisor.start([shell("broken", "echo the reason >&2; exit 3", file_there(Path("/nonexistent")))])
    assert failed.value.step == "broken"
    assert "exit status 3" in failed.value.why
    assert failed.value.log == state.logs / "broken.log"
    assert "the reason" in failed.value.log.read_text()


def test_a_service_that_is_never_ready_says_what_it_still_waits_for(supervisor: Supervisor) -> None:
    with pytest.raises(StepFailed, match=r"not ready within 0.3 s: nonexistent is not there"):
        supervisor.start([shell("mute", "sleep 60", file_there(Path("/nonexistent")), ready_within=0.3)])


def test_a_program_that_is_not_there_is_a_failed_step(supervisor: Supervisor) -> None:
    with pytest.raises(StepFailed, match="could not be started"):
        supervisor.start([Service("absent", ["/no/such/program"], lambda: None)])


def test_what_ended_is_started_again_with_growing_delays(supervisor: Supervisor, state: State) -> None:
    supervisor.start([shell("mortal", "sleep 60")])
    first = supervisor.pids()["mortal"]
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while supervisor.pids().get("mortal", first) == first and time.monotonic() < deadline:
        supervisor._look()
        time.sleep(0.02)
    second = supervisor.pids()["mortal"]
    assert second != first
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    while supervisor.pids().get("mortal", second) == second and time.monotonic() < began + 5:
        supervisor._look()
        time.sleep(0.02)
    assert time.monotonic() - began > 0.45  # the second restart waits twice the first one's quarter of a second


def test_what_worked_for_longer_than_its_pause_is_started_again_at_once(supervisor: Supervisor) -> None:
    supervisor.start([shell("mortal", "sleep 60")])
    (running,) = supervisor._running
    running.failures, running.started = 4, time.monotonic() - 6.0  # its next start may be 4 s after this one
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(5)
    supervisor._look()
    assert running.again_at is not None and running.again_at - time.monotonic() < 0.3
    assert running.failures == 5


def test_stop_goes_backwards_and_forces_who_does_not_listen(supervisor: Supervisor, tmp_path: Path) -> None:
    order = tmp_path / "order"
    for name in ("first", "second"):
        script = f"trap 'echo {name} >> {order}; exit 0' TERM; touch {tmp_path}/{name}; while :; do sleep 0.05; done"
        supervisor.start([shell(name, script, file_there(tmp_path / name))])
    deaf = tmp_path / "deaf"
    script = f"trap '' TERM; touch {deaf}; while :; do sleep 0.05; done"
    supervisor.start([shell("deaf", script, file_there(deaf), stop_within=0.3)])
    pids = supervisor.pids()
    supervisor.stop()
    assert order.read_text().split() == ["second", "first"]
    assert not any(start_time(pid) for pid in pids.values())
    assert not supervisor.state.supervisor_file.exists()


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_members_of_a_services_session_do_not_outlive_it(supervisor: Supervisor, tmp_path: Path, end: str) -> None:
    child_file = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child_file}.new; mv {child_file}.new {child_file}; wait"
    supervisor.start([shell("parent", script, file_there(child_file))])
    child = int(child_file.read_text())
    if end == "stopped":
        supervisor.stop()
    else:
        os.kill(supervisor.pids()["parent"], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while start_time(child) and time.monotonic() < deadline:
        supervisor._look()
        time.sleep(0.02)
    assert not start_time(child)


def test_a_step_returns_its_lines_and_shows_those_marked_as_progress(supervisor: Supervisor, capsys) -> None:
    supervisor.say = Progress()
    lines = supervisor.run_step("step", ["/bin/sh", "-c", "echo '# half way'; echo result"], {}, within=5)
    assert lines == ["result"]
    assert "half way" in capsys.readouterr().out


def test_a_failed_step_ends_with_its_last_words(supervisor: Supervisor) -> None:
    with pytest.raises(StepFailed, match="step: no room") as failed:
        supervisor.run_step("step", ["/bin/sh", "-c", "echo 'no room' >&2; exit 1"], {}, within=5)
    assert failed.value.log is not None and failed.value.log.name == "step.log"


def test_a_step_is_bounded(supervisor: Supervisor) -> None:
    began = time.monotonic()
    with pytest.raises(StepFailed, match=r"not done within 0.3 s"):
        supervisor.run_step("step", ["/bin/sh", "-c", "sleep 60"], {}, within=0.3)
    assert time.monotonic() - began < 8


def test_a_step_fails_when_a_service_it_may_need_has_ended(supervisor: Supervisor) -> None:
    supervisor.start([shell("needed", "sleep 0.2; exit 4")])
    with pytest.raises(StepFailed, match="needed: ended with exit status 4"):
        supervisor.run_step("step", ["/bin/sh", "-c", "sleep 20"], {}, within=10)


KILLED = """
import sys, time
from pathlib import Path
from config.state import State
from config.supervisor import Progress, Service, Supervisor
supervisor = Supervisor(State(Path(sys.argv[1])), Progress(quiet=True))
supervisor.start([Service("child", ["/bin/sh", "-c", sys.argv[2]], lambda: None, env={"PATH": "/bin:/usr/bin"})])
while len(sys.argv) > 3 and not Path(sys.argv[3]).exists():
    time.sleep(0.02)
print(supervisor.pids()["child"], flush=True)
time.sleep(60)
"""


def _killed_supervisor(state: State, script: str, *mark: Path) -> int:
    """Start a supervisor in a process of its own, kill it (once there is ``mark``), and return its child's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(state.path), script, *map(str, mark)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    return child


def test_children_end_when_their_supervisor_is_killed(state: State) -> None:
    child = _killed_supervisor(state, "exec sleep 60")
    deadline = time.monotonic() + 5
    while start_time(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not start_time(child)


def test_the_next_start_ends_who_ignored_that(state: State, tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    child = _killed_supervisor(state, f"trap '' TERM; touch {deaf}; while :; do sleep 0.05; done", deaf)
    assert start_time(child)
    assert end_leftovers(state, Progress(quiet=True), patience=0.2) == 1
    assert not start_time(child)


def test_a_pid_that_names_another_process_by_now_is_left_alone() -> None:
    mine = os.getpid()
    assert is_same_process(mine, start_time(mine))
    assert not is_same_process(mine, start_time(mine) - 1)


def test_one_supervisor_per_state_folder(state: State) -> None:
    with state.locked(), pytest.raises(StateError, match="already runs the installation"), state.locked():
        pass


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(StateError, match="not Berth's"):
        State(tmp_path).create()


def test_a_path_too_long_for_sockets_is_refused_with_its_limit() -> None:
    with pytest.raises(StateError, match="sockets below it allow"):
        State(Path("/tmp") / ("x" * 100))


def test_settings_survive_a_round_trip_and_are_closed_to_others(state: State) -> None:
    from config.state import Owner

    state.write_env({"A": "1=2", "B": "x y"}, Owner("root", 0, 0))
    assert state.read_env() == {"A": "1=2", "B": "x y"}
    assert state.env_file.stat().st_mode & 0o777 == 0o640
    with pytest.raises(StateError, match="line break"):
        state.write_env({"A": "1\nB=2"}, Owner("root", 0, 0))


def test_a_port_somebody_listens_on_is_not_taken() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not port_is_free(port)
        assert free_port(port) != port
