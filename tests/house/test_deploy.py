"""What ``deploy/`` starts is what ``make up`` starts: the same roles with the same commands."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from config import env as environment
from config.celery import QUEUES
from config.roles import QUEUES as ROLE_QUEUES
from config.roles import ROLES, web_settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def unit(name: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(DEPLOY / "systemd" / name)
    return parsed


@pytest.mark.parametrize("role", ROLES)
def test_compose_runs_each_role_with_its_command(role: str) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert tuple(services[role]["command"]) == ROLES[role]


@pytest.mark.parametrize("role", ROLES)
def test_systemd_runs_each_role_with_its_command(role: str) -> None:
    words = shlex.split(unit(f"berth-{role}.service")["Service"]["ExecStart"])
    assert words[0] == "/opt/berth/.venv/bin/python"
    assert ("python", *words[1:]) == ROLES[role]


def test_no_unit_and_no_service_runs_anything_else() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ours = {name for name, service in services.items() if service.get("image") == "berth"}
    assert ours == {*ROLES, "migrate"}
    units = {path.stem.removeprefix("berth-") for path in (DEPLOY / "systemd").glob("*.service")}
    assert units == {*ROLES, "migrate"}
    assert set(unit("berth.target")["Unit"]["Wants"].split()) == {f"berth-{role}.service" for role in ROLES}


def test_the_image_serves_the_web_by_default() -> None:
    command = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.M)
    assert command is not None
    assert tuple(json.loads(command[1])) == ROLES["web"]


def test_a_worker_of_every_queue_serves_every_queue_there_is() -> None:
    assert set(ROLE_QUEUES) == set(QUEUES)
    assert ",".join(ROLE_QUEUES) in ROLES["worker"]


def test_the_web_servers_settings_follow_the_bind_address() -> None:
    assert web_settings("127.0.0.1:9", workers=3) == {
        "GRANIAN_HOST": "127.0.0.1",
        "GRANIAN_PORT": "9",
        "GRANIAN_WORKERS": "3",
    }
    assert web_settings("[::1]:9", workers=1)["GRANIAN_HOST"] == "::1"


def test_the_example_names_only_settings_that_are_read() -> None:
    names = re.findall(r"^([A-Z0-9_]+)=", (DEPLOY / "berth.env.example").read_text(), re.M)
    source = (Path(environment.__file__).parent / "settings.py").read_text()
    assert [name for name in names if f'"{name}"' not in source] == []
