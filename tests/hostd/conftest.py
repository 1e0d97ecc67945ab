"""Fixtures for tests with real boxes: one set-up install for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostd.trial import Trial, why_not


@pytest.fixture(scope="session")
def trial() -> Iterator[Trial]:
    """An install that is set up; skipped where the machine cannot carry boxes."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Trial()
    try:
        yield made.set_up()
    finally:
        made.tear_down()
