"""A short run of `make chaos` on the session's installation: always the same plan."""

from __future__ import annotations

import asyncio
import logging

import pytest

from config.state import CHECKOUT
from tests.chaos import check, evidence
from tests.chaos.drive import Run
from tests.chaos.plan import Plan
from tests.chaos.site import Site

pytestmark = pytest.mark.live

PLAN = Plan(seed=674, seconds=24.0, commands=40, boxes=3)


def test_everything_is_killed_at_random_and_nothing_is_lost(berth, caplog) -> None:
    caplog.set_level(logging.WARNING, "httpx")  # a line for each of thousands of requests
    run = Run(Site(berth.up, berth.base_url, berth.owner.secret), PLAN)
    asyncio.run(check.torment(run))
    if run.findings:
        evidence.keep(run, CHECKOUT / "build" / "chaos" / "test")
    assert not run.findings, f"{PLAN}; evidence below build/chaos/test"
    assert len(run.striker.done) > 10
