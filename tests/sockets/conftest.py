"""A real Granian with the real application, on a free port, over the test database."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from django.conf import settings

from tests.conftest import Party, make_party

PROJECT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Granian:
    port: int
    process: subprocess.Popen[bytes]
    folder: pathlib.Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def seen(self, name: str, at_least: int = 1, within: float = 5.0) -> Any:
        """What the application recorded, waited for."""
        deadline = time.monotonic() + within
        while True:
            try:
                value = json.loads((self.folder / "seen").read_text()).get(name, 0)
            except FileNotFoundError:
                value = 0
            if value >= at_least:
                return value
            assert time.monotonic() < deadline, f"{name} stayed {value}\n{self.log}"
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(5)


def process_environment(redis_url: str, **more: str) -> dict[str, str]:
    """The environment of a process of ours that uses the test database."""
    database = settings.DATABASES["default"]
    password = f"&password={database['PASSWORD']}" if database["PASSWORD"] else ""
    port = f"&port={database['PORT']}" if database["PORT"] else ""
    return {
        **os.environ,
        "DATABASE_URL": f"postgresql:///{database['NAME']}?host={database['HOST']}&user={database['USER']}{port}{password}",
        "REDIS_URL": redis_url,
        "BERTH_SECRET_KEY": "for this test only, and long enough to pass",
        "BERTH_CLUSTER": settings.BERTH.cluster,
        "BERTH_SEAL_KEYS": settings.SEAL_KEYS[0],
        **more,
    }


def start_granian(folder: pathlib.Path, redis_url: str, **environment: str) -> Granian:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = process_environment(redis_url, SEEN=str(folder), **environment)
    argv = [sys.executable, "-m", "granian", "--interface", "asgi", "--http", "auto", "--loop", "uvloop"]
    argv += ["--workers", "1", "--host", "127.0.0.1", "--port", str(port), "--http2-max-concurrent-streams", "256"]
    argv += ["--http2-max-headers-size", "262144"]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            [*argv, "tests.sockets.app:application"],
            cwd=PROJECT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    served = Granian(port, process, folder)
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx.get(f"{served.url}/v1/accounts/me", timeout=5)
            return served
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, served.log
            time.sleep(0.05)


@pytest.fixture(scope="session")
def served_session(django_db_setup: None, redis_server: Any, tmp_path_factory: Any) -> Iterator[Granian]:
    served = start_granian(tmp_path_factory.mktemp("granian"), redis_server.url)
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture
def served(served_session: Granian, transactional_db: None) -> Granian:
    return served_session


@pytest.fixture
def key(transactional_db: None) -> Party:
    """A caller whose key is committed, so that another process knows it."""
    from accounts.services import create_account

    return make_party(create_account("Sockets").pk, "dora")
