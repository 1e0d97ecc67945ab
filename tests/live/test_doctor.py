"""`manage.py doctor` on a running installation: well when it is, and what is broken is named with its cure."""

from __future__ import annotations

import subprocess
import sys

import pytest

from config.state import CHECKOUT
from tests.live.conftest import Berth, environment
from tests.ssh.loopback import free_port

pytestmark = pytest.mark.live


def examined(berth: Berth, **settings: str) -> tuple[int, dict[str, list[str]]]:
    """Its exit status, and what it said of each verdict, cures included."""
    done = subprocess.run(
        [sys.executable, "manage.py", "doctor", "--no-color"],
        cwd=CHECKOUT, env={**environment(berth.state), **settings}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    said: dict[str, list[str]] = {"well": [], "warning": [], "bad": []}
    verdict = ""
    for line in done.stdout.splitlines():
        if line.lstrip().startswith("→"):
            said[verdict][-1] += f" {line.strip()}"
        else:
            verdict = line.split()[0]
            said[verdict].append(line)
    return done.returncode, said


def test_an_installation_that_is_well(berth: Berth) -> None:
    code, said = examined(berth)
    assert (code, said["bad"]) == (0, []), said
    looked_at = {line.split()[1] for line in said["well"]}
    assert looked_at == {"settings", "database", "clocks", "redis", "S3", "certificate", "watcher", "worker", "host"}
    assert any("host's" in line or "host local's" in line for line in said["well"]), said["well"]


@pytest.mark.parametrize(
    ("name", "value", "what", "words"),
    [
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:{dead}/none", "database", "DATABASE_URL"),
        ("REDIS_URL", "redis://127.0.0.1:{dead}/0", "redis", "REDIS_URL"),
        ("S3_ENDPOINT_URL", "http://127.0.0.1:{dead}", "S3", "S3_ENDPOINT_URL"),
        ("S3_BUCKET", "there-is-no-such-bucket", "S3", "S3_BUCKET"),
        ("S3_SECRET_ACCESS_KEY", "wrong", "S3", "S3_SECRET_ACCESS_KEY"),
    ],
)
def test_what_is_broken_is_named_with_its_cure(berth: Berth, name: str, value: str, what: str, words: str) -> None:
    code, said = examined(berth, **{name: value.format(dead=free_port())})
    assert code == 1
    assert [line.split()[1] for line in said["bad"]] == [what], said["bad"]
    assert words in said["bad"][0]
    if what != "database":
        assert any(" host " in line for line in said["well"]), "the rest is looked at all the same"
