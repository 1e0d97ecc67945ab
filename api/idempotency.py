"""Doing a request once: the same ``x-request-id`` from the same account on the same route answers with the same object.

Clients repeat a request with its id after a lost answer. The record is written in the transaction that makes the
object, so there is never one without the other. A second request that arrives while the first is still running waits
for it on the unique index. Waits, answers other than a success and requests without an id are not recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from django.db import connection

from api.callers import Caller
from api.errors import BadRequest

KEPT_HOURS = 24
REQUEST_ID_MAX = 255

_INSERT = f"""
INSERT INTO api_idempotencyrecord AS r (account_id, route_key, request_id, body_sha256, object_id, created_at)
VALUES (%s, %s, %s, %s, %s, now())
ON CONFLICT (account_id, route_key, request_id) DO UPDATE
   SET body_sha256 = EXCLUDED.body_sha256, object_id = EXCLUDED.object_id, created_at = now()
 WHERE r.created_at < now() - interval '{KEPT_HOURS} hours'
RETURNING 1
"""
_SELECT = """
SELECT body_sha256, object_id FROM api_idempotencyrecord WHERE account_id = %s AND route_key = %s AND request_id = %s
"""
_UPDATE = """
UPDATE api_idempotencyrecord SET object_id = %s WHERE account_id = %s AND route_key = %s AND request_id = %s
"""


def body_digest(body: bytes) -> bytes:
    """What is compared to tell a repetition from another request under the same id."""
    return hashlib.sha256(body).digest()


def idempotent(
    caller: Caller,
    request_id: str | None,
    route_key: str,
    body_sha256: bytes,
    create: Callable[[], str],
    object_id: str = "",
) -> tuple[str, bool]:
    """Run ``create`` unless this request id has been honoured; the object's id, and whether it is a replay.

    Call it inside the transaction that ``create`` writes in. ``route_key`` names the operation and the ids in its path.
    ``object_id``, where the caller chose the id beforehand, saves one statement. Raises BadRequest when the id was used
    with another body, or is not 1 to 255 characters.
    """
    if request_id is None:
        return create(), False
    if not 0 < len(request_id) <= REQUEST_ID_MAX or "\0" in request_id:
        raise BadRequest(f"x-request-id must be 1 to {REQUEST_ID_MAX} characters")
    if not connection.in_atomic_block:
        raise RuntimeError("idempotent() must run in the transaction that makes the object")
    key = (caller.account_id, route_key, request_id)
    with connection.cursor() as cursor:
        cursor.execute(_INSERT, [*key, body_sha256, object_id])
        if cursor.fetchone() is None:
            cursor.execute(_SELECT, key)
            row = cursor.fetchone()
            if row is None:  # purged between the two statements
                raise BadRequest("x-request-id: this id has just expired; use a new one")
            if bytes(row[0]) != body_sha256:
                raise BadRequest("x-request-id: this id was used for another request; use a new one")
            return str(row[1]), True
    made = create()
    if made != object_id:
        with connection.cursor() as cursor:
            cursor.execute(_UPDATE, [made, *key])
    return made, False
