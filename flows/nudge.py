"""Nudges: "this row is due", as the very message that Celery would send, pushed over a connection kept open.

In charge of: the light publisher and its bounds. Not in charge of: consuming (plain Celery workers), nor of delivery:
the sweep finds a row whose nudge was lost.

Celery's own `send_task` costs seven times the CPU and can block for seconds on a dead broker; this fails within its
timeout once, and then remembers for a while that the broker is down.
"""

import base64
import logging
import threading
import time
import uuid

import orjson
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 0.3
DOWN_FOR_SECONDS = 1.0
COMPLAIN_EVERY_SECONDS = 60.0


class Broker:
    """One process's connection pool to Redis for nudges and hints. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._down_until = 0.0
        self._complained_at = -COMPLAIN_EVERY_SECONDS

    def _open(self) -> redis.Redis:
        with self._lock:
            if self._client is None:
                self._client = redis.Redis.from_url(
                    settings.REDIS_URL,
                    socket_timeout=TIMEOUT_SECONDS,
                    socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    retry=Retry(NoBackoff(), 0),
                )
            return self._client

    @property
    def down(self) -> bool:
        """Whether the last command failed a moment ago."""
        return time.monotonic() < self._down_until

    def command(self, *words: str | bytes) -> bool:
        """Send one command. False, and a quiet moment, when Redis does not take it in time."""
        if self.down:
            return False
        try:
            client = self._open()
            try:
                client.execute_command(*words)  # type: ignore[no-untyped-call]
            except redis.TimeoutError:
                raise
            except redis.ConnectionError:
                # A pooled connection from before a restart: one fresh try, which fails at once if nobody listens.
                client.execute_command(*words)  # type: ignore[no-untyped-call]
        except (redis.RedisError, OSError) as error:
            now = time.monotonic()
            self._down_until = now + DOWN_FOR_SECONDS
            if now - self._complained_at >= COMPLAIN_EVERY_SECONDS:
                self._complained_at = now
                log.warning("Redis does not take %s, the sweep and re-reads serve instead: %s", words[0], error)
            return False
        return True

    def reset(self) -> None:
        """Forget the connections and the bad memory: after a fork, or when the address changed."""
        with self._lock:
            client, self._client, self._down_until = self._client, None, 0.0
        if client is not None:
            client.close()


broker = Broker()


def envelope(queue: str, task: str, pk: str) -> bytes:
    """The message that Celery's Redis transport expects on the list `queue`, calling `task(pk)`."""
    body = orjson.dumps([[pk], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    task_id = str(uuid.uuid4())
    return orjson.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "argsrepr": "",
                "kwargsrepr": "",
                "timelimit": [None, None],
                "eta": None,
                "expires": None,
                "ignore_result": True,
            },
            "properties": {
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": task_id,
                "correlation_id": task_id,
                "reply_to": "",
            },
        }
    )


def publish(queue: str, task: str, pk: str) -> bool:
    """Nudge a worker of `queue` to run `task(pk)`. Never raises; False when the broker did not take it."""
    return broker.command("LPUSH", queue, envelope(queue, task, pk))
