"""What every test may ask for: a real database and Redis, callers, a client. See tests/web.py and tests/servers.py."""

from __future__ import annotations

import config  # noqa: F401  isort: skip  (settles the name ``pty``)

import dataclasses
import os
import uuid
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from django.conf import settings as django_settings

from tests.servers import Postgres, Redis


def pytest_configure() -> None:
    from cryptography.fernet import Fernet

    if not django_settings.SEAL_KEYS:
        django_settings.SEAL_KEYS = [Fernet.generate_key().decode()]
    if django_settings.SECRET_KEY == django_settings.INSECURE_KEY:
        django_settings.SECRET_KEY = "for tests only, and long enough to be one"
    if not django_settings.BERTH.cluster:
        django_settings.BERTH = dataclasses.replace(django_settings.BERTH, cluster=str(uuid.uuid4()))
    # Real hashing of passwords is slow on purpose.
    django_settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    # Whoever does not ask for a Redis gets one that refuses at once.
    django_settings.REDIS_URL = "redis://127.0.0.1:1/0"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Where CI is set, a live test that cannot run has failed: a skipped one would show nothing and look well."""
    report = yield
    if os.environ.get("CI") and report.skipped and call.when == "setup" and item.get_closest_marker("live"):
        report.outcome = "failed"
        report.longrepr = f"this must run in continuous integration, but: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a server where a test database may be made: DATABASE_URL, or a private one for this session."""
    if os.environ.get("DATABASE_URL"):
        yield os.environ["DATABASE_URL"]
        return
    server = Postgres()
    try:
        server.start()
        yield server.url("berth")
    finally:
        server.remove()


@pytest.fixture(scope="session")
def django_db_modify_db_settings(postgres_url: str) -> None:
    """Called by pytest-django before it makes the test database."""
    from config.settings import _database

    django_settings.DATABASES["default"].update(_database(postgres_url))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A private Redis; a test that stops it starts it again."""
    server = Redis()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def redis_url(redis_server: Redis, settings: Any) -> str:
    """An empty Redis, and the settings point at it."""
    import redis

    if redis_server.process is None:
        redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    settings.REDIS_URL = redis_server.url
    return redis_server.url


@pytest.fixture
def web(db: None) -> Iterator[Any]:
    """The whole application in this process, in the test's transaction."""
    from tests.web import SharedConnection, Web

    with SharedConnection():
        client = Web()
        try:
            yield client
        finally:
            client.close()


@dataclasses.dataclass
class Party:
    """Someone with a key: ``alice.get("/v1/…")`` calls the application as her."""

    account_id: str
    member_id: str
    key_id: str
    secret: str
    web: Any = None

    @property
    def caller(self) -> Any:
        from api.callers import Caller

        return Caller(account_id=self.account_id, key_id=self.key_id, member_id=self.member_id)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    def get(self, path: str, **rest: Any) -> Any:
        return self.web.get(path, key=self.secret, **rest)

    def post(self, path: str, json: Any = None, **rest: Any) -> Any:
        return self.web.post(path, json=json, key=self.secret, **rest)


def make_party(account_id: str, name: str, web: Any = None, **key: Any) -> Party:
    from accounts.services import create_key, create_member

    member = create_member(account_id, name)
    row, secret = create_key(account_id, f"{name}'s key", member=member.pk, **key)
    return Party(account_id, member.pk, row.pk, secret, web)


@pytest.fixture
def alice(web: Any) -> Party:
    """The owner of what a test makes."""
    from accounts.services import create_account

    return make_party(create_account("Alice's company").pk, "alice", web)


@pytest.fixture
def bob(alice: Party, web: Any) -> Party:
    """Her colleague: another member of the same account."""
    return make_party(alice.account_id, "bob", web)


@pytest.fixture
def charlie(web: Any) -> Party:
    """A stranger: another account."""
    from accounts.services import create_account

    return make_party(create_account("Charlie's company").pk, "charlie", web)
