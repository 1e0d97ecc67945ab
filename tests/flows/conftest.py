"""What the tests of the devboxes' flow begin with: an account's caller and a ready host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.callers import Caller
from hosts.client import use_fake
from tests.devbox_world import make_host
from tests.fake_host import FakeHost


@pytest.fixture
def caller(db: None) -> Caller:
    """Someone of account A."""
    from accounts.services import create_account

    return Caller(account_id=create_account("A").pk, key_id="key_x")


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    """A host with room, and its stand-in."""
    host = make_host()
    yield host
    use_fake(host.host_id, None)


@pytest.fixture
def other(db: None) -> Iterator[FakeHost]:
    """A second host, on which nothing is placed."""
    host = make_host("other", cordoned=True)
    yield host
    use_fake(host.host_id, None)
