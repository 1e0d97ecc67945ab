"""`make up` as its person meets it: stopped and started again, started twice, failing at a step, and taken away."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config import traces
from config.state import CHECKOUT, free_port
from tests.live.conftest import Berth, Up, environment, nothing_left

pytestmark = pytest.mark.live

#: What may be there while nothing runs: files, names, and the rules that belong to them.
AT_REST = ("folder ", "user ", "lock ", "firewall ", "address ")

ROWS = {
    "accounts_account": "id, name, status, created_at",
    "accounts_member": "id, name, created_at",
    "accounts_apikey": "id, prefix, created_at, revoked_at",
    "auth_user": "id, username, password",
    "hosts_host": "id, name, state, address, install, root, image_id, digest, host_key, cordoned",
    "devboxes_devbox": "id, status, name, shutdown_reason, completed_at",
    "executions_execution": "id, status, exit_status",
}


def kept(berth: Berth) -> dict[str, object]:
    """What must be the same after a second start: rows, keys, settings."""
    rows: dict[str, object] = {
        table: berth.rows(f"SELECT {columns} FROM {table} ORDER BY id") for table, columns in ROWS.items()
    }
    files = (
        berth.state.api_key_file,
        berth.state.admin_file,
        berth.state.path / "env",
        berth.state.path / "servers.json",
    )
    return rows | {str(path): path.read_bytes() for path in files}


def test_a_start_beside_a_running_one_says_so_and_changes_nothing(berth: Berth) -> None:
    pids = berth.pids()
    done = subprocess.run(
        [sys.executable, "-m", "config.up"],
        cwd=CHECKOUT, env=environment(berth.state),
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "already running" in done.stdout and berth.base_url in done.stdout
    assert berth.pids() == pids


def test_ctrl_c_leaves_nothing_running_and_a_second_start_changes_nothing(berth: Berth) -> None:
    box = berth.owner.create(name="to-be-ended")
    text = "".join(f"{n}\n" for n in range(1, 40_001))
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "seq 1 40000"})["execution_id"]
    path = f"/v1/devboxes/{box}/executions/{begun}"
    berth.owner.post(f"{path}/wait_for_status", {"statuses": ["completed"], "timeout_seconds": 25})
    running = berth.rows("SELECT count(*) FROM devboxes_devbox WHERE ended_at IS NULL")[0][0]
    marks = traces.Marks.of(berth.state)

    said = berth.up.interrupt()

    assert f"devboxes     {running} ended" in said, said
    assert "nothing is running" in said
    assert [trace for trace in traces.find(marks) if not trace.startswith(AT_REST)] == []
    assert not berth.state.supervisor_file.exists()

    took = berth.up.start()
    first = kept(berth)
    assert berth.owner.get(f"/v1/devboxes/{box}")["status"] == "shutdown"
    assert berth.owner.get(path)["exit_status"] == 0
    assert berth.owner.get(path, params={"last_n": "5"})["stdout"] in (text, "".join(text.splitlines(True)[-5:]))
    berth.up.interrupt()
    again = berth.up.start()
    assert kept(berth) == first
    print(f"started again in {took:.1f} s and {again:.1f} s")  # aimed at 15 s where nothing else runs
    other = berth.owner.create(name="after")
    assert berth.owner.run(other, "echo well") == ("well\n", "", 0)
    berth.owner.shutdown(other)


def test_a_step_that_fails_says_which_why_and_where_its_log_is(live_folder: Path) -> None:
    """A database that nobody serves; uninstall takes away what was made half-way, and says what it leaves."""
    up = Up(
        live_folder / "f",
        DATABASE_URL="postgresql://nobody@127.0.0.1:1/none",
        BERTH_BIND=f"127.0.0.1:{free_port()}",
    )
    up.state.create()
    marks = traces.Marks.of(up.state)
    try:
        with pytest.raises(AssertionError, match="make up ended with 1"):
            up.start(within=90)
        log = up.state.logs / "database.log"
        said = up.said()
        assert "FAILED  database: " in said and f"log: {log}" in said, said
        assert "127.0.0.1" in said.split("FAILED", 1)[1].split("log:")[0], said
        assert log.stat().st_size > 100
        assert [trace for trace in traces.find(marks) if not trace.startswith(AT_REST)] == []
        up.state.record(packages=["one-package", "another-package"])
        lingering = subprocess.Popen(["sleep", "60"], user=marks.user)  # as an SSH connection does
    finally:
        told = up.remove()
    assert lingering.wait(1) == -signal.SIGKILL
    nothing_left(marks)
    assert "apt-get purge one-package another-package" in told
    assert "DATABASE_URL" in told
    up.remove()  # there is nothing any more, which is no error


@pytest.mark.parametrize("bind", ["nonsense", "127.0.0.1:{busy}"])
def test_an_address_that_cannot_be_had_is_refused_by_name(berth: Berth, live_folder: Path, bind: str) -> None:
    up = Up(live_folder / "b", BERTH_BIND=bind.format(busy=berth.base_url.rsplit(":", 1)[1]))
    up.state.create()
    marks = traces.Marks.of(up.state)
    try:
        with pytest.raises(AssertionError, match="BERTH_BIND"):
            up.start(within=30)
        assert "FAILED  BERTH_BIND" in up.said()
    finally:
        up.remove()
    nothing_left(marks)
