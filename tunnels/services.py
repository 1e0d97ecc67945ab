"""A devbox's tunnel: enabled, shown, removed.

In charge of rows, keys and tokens, and of what a repeated call means. Not in charge of what goes through one
(`tunnels.doors`, `tunnels.proxy`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from django.db import connection

from accounts.sealing import seal, unseal
from api.callers import Caller
from api.errors import BadRequest
from api.ids import new_id
from api.prepared import fetch_one
from devboxes import selectors as devboxes
from devboxes.extensions import Extension
from devboxes.services import touch
from flows import hints

KEY_CHARACTERS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
KEY_LENGTH: Final = 26
"""130 random bits; with a port in front it fits into a label of a host name."""
DEFAULTS: Final[Mapping[str, Any]] = {"auth_mode": "open", "http_keep_alive": True, "wake_on_http": False}
BATCH: Final = 1000

_SHOWN: Final = """(
SELECT json_build_object(
    'sealed', convert_from(t.sealed, 'UTF8'), 'http_keep_alive', t.http_keep_alive, 'wake_on_http', t.wake_on_http,
    'auth_mode', CASE WHEN t.token_sha256 IS NULL THEN 'open' ELSE 'authenticated' END,
    'create_time_ms', (extract(epoch from t.created_at) * 1000)::bigint
) FROM tunnels_tunnel t WHERE t.devbox_id = d.id AND d.ended_at IS NULL)"""


def digest(secret: str) -> bytes:
    """How a key or a token is found."""
    return hashlib.sha256(secret.encode()).digest()


def enable_tunnel(caller: Caller, devbox_id: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tunnel of a running devbox, made unless it has one: its view.

    Raises NotFound, BadRequest when it does not run or has a tunnel that is not what `config` asks for.
    """
    context = devboxes.execution_context(caller, devbox_id)
    if context.status != "running":
        raise BadRequest(f"devbox {devbox_id} is {context.status}; a tunnel is enabled while it is running")
    made = _insert(devbox_id, config)
    view = view_of(devbox_id)
    if view is None:
        raise BadRequest(f"the tunnel of devbox {devbox_id} was removed at the same time; ask again")
    other = {name for name, wanted in config.items() if wanted is not None and view[name] != wanted}
    if other and not made:
        told = ", ".join(f"{name} {view[name]}" for name in sorted(other))
        raise BadRequest(f"devbox {devbox_id} has a tunnel already, with {told}; remove it first")
    touch(devbox_id, "call")
    return view


def create_with_devbox(devbox_id: str, config: Mapping[str, Any]) -> None:
    """The tunnel of a devbox that is being made; call it inside that transaction."""
    _insert(devbox_id, config)


def _insert(devbox_id: str, config: Mapping[str, Any]) -> bool:
    wanted = {**DEFAULTS} | {name: value for name, value in config.items() if value is not None}
    key = "".join(secrets.choice(KEY_CHARACTERS) for _ in range(KEY_LENGTH))
    token = secrets.token_hex(32) if wanted["auth_mode"] == "authenticated" else None
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO tunnels_tunnel"
            " (id, devbox_id, sealed, key_sha256, token_sha256, http_keep_alive, wake_on_http)"
            " SELECT %s, id, %s, %s, %s, %s, %s FROM devboxes_devbox WHERE id = %s AND ended_at IS NULL"
            " ON CONFLICT (devbox_id) DO NOTHING",
            [
                new_id("tun"),
                seal({"key": key, "token": token}),
                digest(key),
                digest(token) if token else None,
                wanted["http_keep_alive"],
                wanted["wake_on_http"],
                devbox_id,
            ],
        )
        return bool(cursor.rowcount)


def view_of(devbox_id: str) -> dict[str, Any] | None:
    """The contract's TunnelView of a living devbox, None when it has no tunnel."""
    row = fetch_one(f"SELECT {_SHOWN} FROM devboxes_devbox d WHERE d.id = %s", [devbox_id])
    return show(row[0]) if row is not None and row[0] is not None else None


def show(found: Mapping[str, Any]) -> dict[str, Any]:
    """The contract's TunnelView, of what the database told."""
    key, token = _opened(found["sealed"])
    view = {name: found[name] for name in ("auth_mode", "create_time_ms", "http_keep_alive", "wake_on_http")}
    return {"tunnel_key": key, **view, **({"auth_token": token} if token else {})}


@lru_cache(maxsize=4096)
def _opened(sealed: str) -> tuple[str, str | None]:
    """Kept, since lists show many."""
    secret = unseal(sealed.encode())
    return secret["key"], secret["token"]


def remove_tunnel(caller: Caller, devbox_id: str) -> None:
    """Close a devbox's tunnel; harmless when there is none. Raises NotFound."""
    devboxes.execution_context(caller, devbox_id)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM tunnels_tunnel WHERE devbox_id = %s RETURNING id", [devbox_id])
        gone = [row[0] for row in cursor.fetchall()]
    hints.publish(*gone)
    touch(devbox_id, "call")


def delete_of_ended() -> int:
    """Delete in batches the tunnels of devboxes that have ended, which lead nowhere; how many."""
    gone = 0
    while True:
        with connection.cursor() as cursor:
            cursor.execute(
                "DELETE FROM tunnels_tunnel WHERE id IN (SELECT t.id FROM tunnels_tunnel t"
                f" JOIN devboxes_devbox d ON d.id = t.devbox_id WHERE d.ended_at IS NOT NULL LIMIT {BATCH})"
            )
            deleted = int(cursor.rowcount)
        gone += deleted
        if deleted < BATCH:
            return gone


FIELD: Final = Extension("tunnel", _SHOWN, show, create_with_devbox)
