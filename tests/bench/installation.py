"""The installation that is measured: a throwaway one, started by the code behind ``make up``."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from config import first, roles, traces
from config.state import CHECKOUT, free_port
from config.up import interrupts
from hostd.config import HostConfig
from tests.bench import shares
from tests.bench.wire import Server
from tests.live.conftest import Up, environment

#: Fifty of the smallest devboxes promise more than a small machine has; only the promise is in the way.
ROOM = {
    "BERTH_POOL_GB": "8",
    "BERTH_OVERCOMMIT_CPU": "32",
    "BERTH_OVERCOMMIT_MEMORY": "8",
    "BERTH_OVERCOMMIT_DISK": "32",
    # More at once than an account may have by default, and an output of 1 GiB kept whole.
    "BERTH_CAP_EXECUTIONS": "5000",
    "BERTH_CAP_STREAMS": "5000",
    "BERTH_OUTPUT_CAP": str(2 << 30),
}


def answered(answer: httpx.Response) -> dict[str, object]:
    """What an answer says. Raises RuntimeError with the words of one that says no."""
    if answer.status_code >= 400:
        raise RuntimeError(f"{answer.request.url.path}: status {answer.status_code}: {answer.text[:300]}")
    return dict(answer.json())


@dataclass
class Target:
    """What a measure gets. ``quick``: smaller numbers are wanted."""

    up: Up
    base_url: str
    key: str
    client: httpx.Client
    quick: bool = False

    @property
    def server(self) -> Server:
        """The web tier for raw requests."""
        return Server(self.base_url, self.key)

    @property
    def host(self) -> HostConfig:
        """The settings of the VM host."""
        host = traces.Marks.of(self.up.state).host
        assert host is not None
        return host

    def get(self, path: str, **query: object) -> dict[str, object]:
        answer = self.client.get(path, params={name: str(value) for name, value in query.items()})
        return answered(answer)

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the installation's settings spelt out."""
        return {**environment(self.up.state), **ROOM, **self.up.state.read_env()}

    def post(self, path: str, body: object = None) -> dict[str, object]:
        return answered(self.client.post(path, json={} if body is None else body))

    def create(self, **body: object) -> str:
        """A running devbox's id."""
        box = self.post("/v1/devboxes/create_and_await_running", body)
        if box["status"] != "running":
            raise RuntimeError(f"{box['id']} is {box['status']}: {box.get('failure_reason')}")
        return str(box["id"])

    def shutdown(self, *boxes: str) -> None:
        for box in boxes:
            self.post(f"/v1/devboxes/{box}/shutdown")

    @contextlib.contextmanager
    def boxes(self, count: int, cores: int = 1) -> Iterator[list[str]]:
        """Running devboxes with so many processors each, for the length of a ``with``."""
        size = {"custom_cpu_cores": cores, "custom_gb_memory": 2 * cores, "custom_disk_size": 4}
        made: list[str] = []
        try:
            for _ in range(count):
                made.append(self.create(launch_parameters={"resource_size_request": "CUSTOM_SIZE", **size}))
            yield made
        finally:
            self.shutdown(*made)

    def run(self, box: str, command: str) -> str:
        """What a command prints. Raises RuntimeError unless it ends with 0."""
        done = self.post(f"/v1/devboxes/{box}/execute_sync", {"command": command})
        if done["exit_status"] != 0:
            raise RuntimeError(f"{command[:80]}: {str(done)[:500]}")
        return str(done["stdout"])

    def start(self, box: str, command: str) -> str:
        """Start a command; the path of its execution."""
        begun = self.post(f"/v1/devboxes/{box}/execute_async", {"command": command})
        return f"/v1/devboxes/{box}/executions/{begun['execution_id']}"

    def clear(self) -> None:
        """Shut down every devbox that a measure left running."""
        for status in ("running", "provisioning", "initializing"):
            listed = self.client.get("/v1/devboxes", params={"limit": 500, "status": status})
            if listed.status_code == 200:
                self.shutdown(*(str(box["id"]) for box in listed.json()["devboxes"]))

    def python(self, program: str) -> str:
        """Run a program inside Django with the installation's settings; what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", program],
            cwd=CHECKOUT, env=self.environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return done.stdout


@dataclass(frozen=True)
class OneWeb:
    """A web server with a single process. ``pid``: that process's."""

    base_url: str
    pid: int


@contextlib.contextmanager
def one_web(target: Target) -> Iterator[OneWeb]:
    """One more web server of the installation, of one process, for what is promised per process."""
    port = free_port()
    settings = {**target.environment, **roles.web_settings(f"127.0.0.1:{port}", workers=1)}
    log = target.up.state.logs / "one-web.log"
    argv = [sys.executable, *roles.ROLES["web"][1:]]
    with open(log, "ab") as said:
        server = subprocess.Popen(
            argv, cwd=CHECKOUT, env=settings, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            preexec_fn=raise_open_files,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        base_url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{base_url}/healthz", timeout=2, trust_env=False).status_code == 200:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the single web process did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)
        (pid,) = (one.pid for one in shares.processes().values() if one.parent == server.pid)
        yield OneWeb(base_url, pid)
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(5)


def raise_open_files() -> None:
    """Let this process have as many open files as the machine lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def throwaway(quick: bool = False, **settings: str) -> Iterator[Target]:
    """A running installation, with these settings besides; nothing is left of it afterwards."""
    raise_open_files()
    with tempfile.TemporaryDirectory(prefix="berth-bench-") as name, interrupts():
        folder = Path(name)
        folder.chmod(0o755)  # sockets and boxes are below it
        up = Up(folder / "s", BERTH_BIND=f"127.0.0.1:{free_port()}", **(ROOM | settings))
        up.state.create()
        marks = traces.Marks.of(up.state)
        try:
            up.start()
            marks = traces.Marks.of(up.state)
            facts = first.running(up.state)
            assert facts is not None
            key = up.state.api_key_file.read_text().strip()
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=facts["base_url"], headers=headers, timeout=60.0, trust_env=False) as client:
                yield Target(up, facts["base_url"], key, client, quick)
            up.interrupt()
        finally:
            up.remove()
        deadline = time.monotonic() + 10
        while (left := traces.find(marks)) and time.monotonic() < deadline:
            time.sleep(0.2)  # the kernel takes apart network and mounts some moments later
        if left:
            raise RuntimeError(f"left behind: {left}")
