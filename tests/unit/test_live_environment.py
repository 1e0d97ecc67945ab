"""What a live test's subprocess is told: its own installation, whatever the shell points at."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.state import State
from tests.live.conftest import environment


def test_nothing_of_another_installation_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "S3_ENDPOINT_URL", "S3_BUCKET", "BERTH_BIND", "BERTH_SECRET_KEY"):
        monkeypatch.setenv(name, "another's")
    monkeypatch.setenv("BERTH_STATE", "/elsewhere")
    monkeypatch.setenv("LANG", "C.UTF-8")
    told = environment(State(tmp_path))
    assert "another's" not in told.values()
    assert told["BERTH_STATE"] == str(tmp_path) and told["LANG"] == "C.UTF-8"
