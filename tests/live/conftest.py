"""A complete throwaway installation for the live tests: the same code as ``make up``, once per test session."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from config import first, sdk, traces
from config.state import CHECKOUT, State, free_port
from hostd.config import installs_on_machine
from tests.live.crashes import alive, wait_until

#: How long the first start may take where the image has to be built.
UP_WITHIN = 420.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything that needs an installation is skipped where one cannot be made."""
    reason = None if os.getuid() == 0 else "needs root"
    for item in items:
        if "berth" in getattr(item, "fixturenames", ()) or item.get_closest_marker("live"):
            item.add_marker("live")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))  # the first one waits for the whole start
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def environment(state: State) -> dict[str, str]:
    """This process's environment with that installation's state, and nothing of another installation: a test must
    never touch the servers that a shell happens to point at. Settings come from the state's own file."""
    foreign = ("BERTH_", "S3_", "DATABASE_URL", "REDIS_URL")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**own, "BERTH_STATE": str(state.path)}


class Up:
    """``make up`` in a folder of its own, as a process that can be looked at, interrupted and started again."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.state = State(folder)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.printed = ""
        self.output = folder.with_name(f"{folder.name}.printed")

    def start(self, within: float = UP_WITHIN) -> float:
        """Start and wait until it is ready; seconds it took."""
        began = time.monotonic()
        self.output.write_text("")
        with open(self.output, "a") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "config.up"],
                cwd=CHECKOUT,
                env={**environment(self.state), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        while "Ctrl-C ends" not in self.said():
            if self.process.poll() is not None:
                raise AssertionError(f"make up ended with {self.process.returncode}:\n{self.logs()}\n{self.said()}")
            if time.monotonic() - began > within:
                raise AssertionError(f"make up was not ready within {within} s:\n{self.logs()}\n{self.said()}")
            time.sleep(0.1)
        return time.monotonic() - began

    def said(self) -> str:
        return self.output.read_text()

    def logs(self, lines: int = 8) -> str:
        tails = []
        for path in sorted(self.state.logs.glob("*.log")):
            tails.append(f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
        return "\n".join(tails)

    def interrupt(self, within: float = 180.0) -> str:
        """Ctrl-C; returns what was printed from then on."""
        assert self.process is not None
        before = len(self.said())
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=within)
        assert code == 0, self.said()
        return self.said()[before:]

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.state.supervisor_file.read_text())
        return facts

    def remove(self) -> str:
        """Stop it however it stands, and take it off the machine; what was printed."""
        done = subprocess.run(
            [sys.executable, "-m", "config.uninstall"],
            cwd=CHECKOUT,
            env=environment(self.state),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def nothing_left(marks: traces.Marks) -> None:
    """The kernel takes network and mounts apart some moments later; after that there is no trace."""
    deadline = time.monotonic() + 10
    while (left := traces.find(marks)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


@pytest.fixture(scope="session")
def live_folder() -> Iterator[Path]:
    """A short path that everybody may pass through: sockets and boxes are below it."""
    folder = Path(tempfile.mkdtemp(prefix="berth-live-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass
class Key:
    """A caller: ``owner.post("/v1/devboxes", {...})``."""

    base_url: str
    secret: str
    account_id: str

    def __post_init__(self) -> None:
        self.client = httpx.Client(
            base_url=self.base_url, headers={"authorization": f"Bearer {self.secret}"}, timeout=60.0, trust_env=False
        )

    def get(self, path: str, **more: Any) -> Any:
        return self._answer(self.client.get(path, **more))

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        return self._answer(self.client.post(path, json={} if body is None else body, **more))

    def _answer(self, response: httpx.Response) -> Any:
        assert response.status_code < 400, f"{response.status_code} {response.text}"
        return response.json()

    def create(self, **body: Any) -> str:
        """A running devbox's id."""
        box = self.post("/v1/devboxes/create_and_await_running", body)
        assert box["status"] == "running", box
        return str(box["id"])

    def run(self, box: str, command: str, timeout: float = 60.0) -> tuple[str, str, int]:
        """(stdout, stderr, exit status) of a command."""
        done = self.post(f"/v1/devboxes/{box}/execute_sync", {"command": command}, timeout=timeout)
        return done["stdout"], done["stderr"], done["exit_status"]

    def shutdown(self, box: str) -> None:
        self.post(f"/v1/devboxes/{box}/shutdown")

    def wait(self, box: str, *statuses: str, within: float = 60.0) -> dict[str, Any]:
        """The view of a devbox once it has one of these statuses."""
        deadline = time.monotonic() + within
        while (view := self.get(f"/v1/devboxes/{box}"))["status"] not in statuses:
            assert time.monotonic() < deadline, view
            time.sleep(0.05)
        return dict(view)


@dataclasses.dataclass
class Berth:
    """The session's installation."""

    up: Up
    base_url: str
    owner: Key
    colleague: Key
    stranger: Key
    env: dict[str, str]

    @property
    def state(self) -> State:
        return self.up.state

    def pids(self) -> dict[str, int]:
        """role or server -> pid, as the supervisor has them now."""
        return {name: entry["pid"] for name, entry in self.up.facts["services"].items()}

    def database(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.env["DATABASE_URL"], autocommit=True)

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self.database() as connection:
            return connection.execute(sql, parameters).fetchall()

    def manage(self, *arguments: str) -> str:
        """``manage.py`` with this installation's settings."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=CHECKOUT, env=environment(self.state),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def host_config(self) -> Any:
        marks = traces.Marks.of(self.state)
        assert marks.host is not None
        return marks.host


PARTIES = """
import json, sys
from accounts.models import Account
from accounts.services import create_account, create_key, create_member
def key(account, name):
    return create_key(account.pk, name, member=create_member(account.pk, name).pk)[1]
mine, theirs = Account.objects.get(name="local"), create_account("stranger")
parties = (("owner", mine), ("colleague", mine), ("stranger", theirs))
print(json.dumps([[key(account, name), account.pk] for name, account in parties]))
"""


@pytest.fixture(scope="session")
def berth(live_folder: Path) -> Iterator[Berth]:
    """A running installation with a first devbox, an owner, a colleague and a stranger.  Nothing is left of it
    afterwards, and where no other one came or went meanwhile, the kernel's settings are what they were."""
    others, settings = installs_on_machine(), traces.sysctls()
    faults = live_folder / "faults"
    faults.mkdir()
    faults.chmod(0o777)  # the worker, which is not root, takes the switch away
    fault = str(faults / "armed")
    up = Up(
        live_folder / "s",
        BERTH_POOL_GB="12",
        BERTH_STATS_SECONDS="5",
        BERTH_BIND=f"127.0.0.1:{free_port()}",
        # Not the usual ports: another installation of the machine may be about to take them.
        BERTH_SSH_BIND=f"127.0.0.1:{free_port()}",
        BERTH_SSH_TLS_BIND=f"127.0.0.1:{free_port()}",
        BERTH_FAULT_FILE=fault,
        BERTH_OUTPUT_CAP=str(64 << 20),
    )
    up.state.create()
    marks = traces.Marks.of(up.state)
    try:
        up.start()
        marks = traces.Marks.of(up.state)
        facts = first.running(up.state)
        assert facts is not None
        made = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", PARTIES],
            cwd=CHECKOUT, env=environment(up.state), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        keys = [Key(facts["base_url"], *pair) for pair in json.loads(made.stdout.splitlines()[-1])]
        owner, colleague, stranger = keys
        yield Berth(up, facts["base_url"], owner, colleague, stranger, env=up.state.read_env())
        up.interrupt()
    finally:
        up.remove()
        nothing_left(marks)
        if not others and not installs_on_machine():
            now = traces.sysctls()
            assert {name: (was, now.get(name)) for name, was in settings.items() if now.get(name) != was} == {}


@pytest.fixture
def owner(berth: Berth) -> Key:
    return berth.owner


@pytest.fixture
def box(berth: Berth) -> Iterator[str]:
    """A running devbox of the owner's, shut down afterwards."""
    made = berth.owner.create(name="test")
    yield made
    berth.owner.shutdown(made)


@pytest.fixture(scope="session")
def python_sdk() -> Callable[[str], Path]:
    """The interpreter with a version of the published Python SDK."""
    return sdk.python


@pytest.fixture(scope="session")
def typescript_sdk() -> Path:
    """A folder with the published TypeScript SDK."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm on this machine")
    return sdk.typescript()


@pytest.fixture
def fault(berth) -> Iterator[Any]:
    """Arm a point of a flow at which the worker that reaches it kills itself, once; says whether it did."""
    switch = Path(berth.up.environment["BERTH_FAULT_FILE"])

    class Fault:
        def arm(self, point: str) -> int:
            before = int(berth.pids()["worker"])
            switch.write_text(point)
            return before

        def struck(self) -> bool:
            return not switch.exists()

    yield Fault()
    switch.unlink(missing_ok=True)
    wait_until(lambda: "worker" in berth.pids() and alive(berth.pids()["worker"]), 30, "a worker again")


@pytest.fixture
def no_orphans(berth) -> Iterator[None]:
    """Afterwards the host has for each devbox that is not over exactly its own things, and nothing else."""
    yield
    from tests.chaos.site import Site  # which is made of what is here

    site = Site(berth.up, berth.base_url, berth.owner.secret)
    deadline = time.monotonic() + 30
    while (found := site.strangers()) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not found
