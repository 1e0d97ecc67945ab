"""The light publisher: Celery's own envelope, and a broker that is dead, frozen or restarted."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from flows import hints, nudge
from tests.servers import Redis


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[nudge.Broker]:
    made = nudge.Broker()
    monkeypatch.setattr(nudge, "broker", made)
    monkeypatch.setattr(hints, "broker", made)
    yield made
    made.reset()


def test_the_envelope_is_celery_s(settings: Any) -> None:
    """Whatever Celery itself puts into a message for that task, but for ids, is in ours."""
    from kombu import Connection, Exchange, Producer, Queue

    message = json.loads(nudge.envelope("devboxes", "devboxes.advance", "dbx_1"))
    assert json.loads(base64.b64decode(message["body"]))[0] == ["dbx_1"]
    with Connection("memory://") as connection:
        queue = Queue("devboxes", Exchange("devboxes"), "devboxes")
        Producer(connection).publish(
            [["dbx_1"], {}, {}], routing_key="devboxes", exchange="devboxes", declare=[queue], serializer="json"
        )
        theirs = connection.default_channel._get("devboxes")  # type: ignore[attr-defined]
    assert set(theirs) <= set(message)
    assert set(theirs["properties"]) - {"reply_to"} <= set(message["properties"])
    assert message["properties"]["delivery_info"]["routing_key"] == "devboxes"


def test_messages_and_hints_arrive(redis_url: str, broker: nudge.Broker) -> None:
    with redis.Redis.from_url(redis_url) as client:
        ear = client.pubsub(ignore_subscribe_messages=True)
        ear.subscribe(hints.CHANNEL)
        ear.get_message(timeout=1)
        assert nudge.publish("devboxes", "devboxes.advance", "dbx_1")
        assert client.llen("devboxes") == 1
        hints.publish("dbx_1", "exe_2")
        hints.publish()
        deadline, heard = time.monotonic() + 5, None
        while heard is None and time.monotonic() < deadline:
            heard = ear.get_message(timeout=0.5)
        assert heard is not None and heard["data"] == b"dbx_1 exe_2"
        assert ear.get_message(timeout=0.1) is None
        ear.close()


def test_a_dead_broker_costs_nothing(broker: nudge.Broker, settings: Any) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    began = time.monotonic()
    for _ in range(1000):
        assert not nudge.publish("devboxes", "devboxes.advance", "dbx_1")
        hints.publish("dbx_1")
    assert time.monotonic() - began < 1
    assert broker.down


def test_a_frozen_broker_costs_its_timeout_once(broker: nudge.Broker, settings: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings.REDIS_URL = f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
        began = time.monotonic()
        assert not nudge.publish("devboxes", "devboxes.advance", "dbx_1")
        once = time.monotonic() - began
        assert nudge.TIMEOUT_SECONDS * 0.9 <= once < 3
        for _ in range(100):
            assert not nudge.publish("devboxes", "devboxes.advance", "dbx_1")
        assert time.monotonic() - began < once + 0.2


def test_a_restarted_broker_is_used_again(
    redis_server: Redis, redis_url: str, broker: nudge.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nudge, "DOWN_FOR_SECONDS", 0.1)
    assert nudge.publish("devboxes", "devboxes.advance", "dbx_1")
    redis_server.stop()
    redis_server.start()
    assert nudge.publish("devboxes", "devboxes.advance", "dbx_1"), "the pooled connection is dead, a fresh one is not"
    redis_server.stop()
    assert not nudge.publish("devboxes", "devboxes.advance", "dbx_1")
    redis_server.start()
    time.sleep(0.15)
    assert nudge.publish("devboxes", "devboxes.advance", "dbx_1")
