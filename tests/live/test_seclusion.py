"""The roles are nobody's root, wherever the checkout and the interpreter lie."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from config import roles, seclusion
from config.seclusion import view_of
from config.state import Owner, State
from config.supervisor import Progress, Service, Supervisor
from tests.live.conftest import Berth

pytestmark = pytest.mark.live


def test_what_is_needed_of_a_closed_folder_is_seen_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = Owner.named("nobody")
    assert nobody is not None
    closed, wanted = tmp_path / "closed", tmp_path / "closed" / "a" / "wanted"
    wanted.mkdir(parents=True)
    (wanted / "file").write_text("seen\n")
    (closed / "secret").write_text("not seen\n")
    closed.chmod(0o700)
    monkeypatch.setattr(seclusion, "CHECKOUT", wanted)
    view = view_of({wanted, Path("/usr")}, nobody)
    assert list(view.opened.values()) == [(wanted,)]

    state = State(tmp_path / "s")
    state.create()
    supervisor = Supervisor(state, Progress(quiet=True))
    script = f"cat file; pwd; id -u; cat {closed}/secret {closed}/a/../secret; ls {closed}; touch {closed}/x; echo all"
    log = supervisor.log_of("seen")
    service = Service(
        "seen",
        ["/bin/sh", "-c", f"{script}; exec sleep 60"],
        lambda: None,
        env={"PATH": os.environ["PATH"]},
        cwd=wanted,
        user=nobody,
        view=view,
    )
    try:
        supervisor.start([service])
        deadline = time.monotonic() + 10
        while not log.read_text().endswith("all\n") and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        supervisor.stop()
    said = log.read_text()
    assert f"seen\n{wanted}\n{nobody.uid}\n" in said and "not seen" not in said
    assert "\na\n" in said and "Permission denied" in said
    assert not (closed / "x").exists()
    assert str(closed) not in Path("/proc/self/mountinfo").read_text()


def test_a_view_keeps_no_pool_of_the_machine_busy(berth: Berth, tmp_path: Path) -> None:
    """What a role started beside a running installation would else do, for as long as it lives."""
    pool = str(berth.state.path / "host" / "pool")
    assert f" {pool} " in Path("/proc/self/mountinfo").read_text()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            seclusion.View({tmp_path: ()}).enter()
            os.write(write, Path("/proc/self/mountinfo").read_bytes())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        seen = file.read()
    os.waitpid(child, 0)
    assert f" {tmp_path} " in seen and pool not in seen


def test_no_role_is_root(berth: Berth) -> None:
    user = Owner.named(berth.state.user_name())
    assert user is not None
    pids = berth.pids()
    for role in roles.ROLES:
        status = Path(f"/proc/{pids[role]}/status").read_text()
        fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in status.splitlines())}
        assert fields["Uid"] == [str(user.uid)] * 4 and fields["Gid"] == [str(user.gid)] * 4, role
        assert fields["Groups"] == [] and int(fields["CapEff"][0], 16) == 0, role
