"""Keys to devboxes: made, recognised, deleted when they are over; and the service's own host key."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.conf import settings
from django.db import connection

from accounts.sealing import seal, unseal
from api.callers import Caller
from api.errors import BadRequest, TooManyRequests
from api.ids import new_id
from api.prepared import fetch_one
from devboxes import selectors as devboxes
from ssh_access.names import host_name

KEYS_MAX: Final = 1000
"""Valid keys of one devbox: clients make one for each command."""
BATCH: Final = 1000
OVER: Final = ("failure", "shutdown")


@dataclasses.dataclass(frozen=True, slots=True)
class NewKey:
    """What is told once about a new key."""

    devbox_id: str
    url: str
    private_key: str
    user: str


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """What a recognised key stands for."""

    key_id: str
    devbox_id: str
    caller: Caller
    user: str


def create_key(caller: Caller, devbox_id: str) -> NewKey:
    """A fresh key pair for the devbox. Raises NotFound, BadRequest when it is over, TooManyRequests."""
    context = devboxes.execution_context(caller, devbox_id)
    if context.status in OVER:
        raise BadRequest(f"devbox {context.devbox_id} is over ({context.status}): nobody can reach it any more")
    key = Ed25519PrivateKey.generate()
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO ssh_access_sshkey (id, devbox_id, account_id, key_id, public_sha256, expires_at) "
            "SELECT %s, %s, %s, %s, %s, now() + make_interval(secs => %s) WHERE "
            "(SELECT count(*) FROM ssh_access_sshkey WHERE devbox_id = %s AND expires_at > now()) < %s",
            [
                new_id("ssk"),
                context.devbox_id,
                context.account_id,
                caller.key_id or "",
                _hash(_blob(key)),
                settings.BERTH.SSH_KEY_TTL,
                context.devbox_id,
                KEYS_MAX,
            ],
        )
        if cursor.rowcount != 1:
            raise TooManyRequests(f"devbox {context.devbox_id} has {KEYS_MAX} valid SSH keys, as many as it may")
    url = host_name(context.devbox_id, settings.BERTH.domain)
    return NewKey(context.devbox_id, url, _pem(key), context.user_name)


def _pem(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _blob(key: Ed25519PrivateKey) -> bytes:
    return base64.b64decode(_public(key).split()[1])


def _hash(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()


_FIND: Final = """
SELECT s.id, s.devbox_id, s.account_id, s.key_id, d.user_name
  FROM ssh_access_sshkey s JOIN devboxes_devbox d ON d.id = s.devbox_id
  JOIN accounts_account a ON a.id = s.account_id JOIN accounts_apikey k ON k.id = s.key_id
 WHERE s.devbox_id = %s AND s.public_sha256 = %s AND s.expires_at > now() AND d.ended_at IS NULL
   AND a.status = 'enabled' AND k.revoked_at IS NULL AND coalesce(k.expires_at > now(), true)
"""


def authorize(devbox_id: str | None, user: str | None, blob: bytes) -> Access | None:
    """What that public key opens; None for every reason why it opens nothing, which nobody can tell apart.

    One SELECT, also for a devbox that cannot be: so the time it takes tells nothing either.
    """
    row = fetch_one(_FIND, [devbox_id or "", _hash(blob)])
    if row is None or (user is not None and user != row[4]):
        return None
    return Access(row[0], row[1], Caller(account_id=row[2], key_id=row[3]), row[4])


def delete_expired_keys() -> int:
    """Delete in batches what nobody can use any more; how many."""
    gone = 0
    while True:
        with connection.cursor() as cursor:
            cursor.execute(
                "DELETE FROM ssh_access_sshkey WHERE id IN (SELECT s.id FROM ssh_access_sshkey s "
                "JOIN devboxes_devbox d ON d.id = s.devbox_id "
                f"WHERE s.expires_at < now() OR d.ended_at IS NOT NULL LIMIT {BATCH})"
            )
            deleted = int(cursor.rowcount)
        gone += deleted
        if deleted < BATCH:
            return gone


def host_key() -> tuple[str, str]:
    """(private, public) key of the SSH service, made by the first who asks. The private one as PEM, the public one as
    it stands in a known_hosts file."""
    read = "SELECT private_sealed, public FROM ssh_access_hostkey WHERE id = 1"
    row = fetch_one(read, [])
    if row is None:
        key = Ed25519PrivateKey.generate()
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO ssh_access_hostkey (id, private_sealed, public) VALUES (1, %s, %s) ON CONFLICT DO NOTHING",
                [seal(_pem(key)), _public(key)],
            )
        row = fetch_one(read, [])
        assert row is not None
    return str(unseal(bytes(row[0]))), str(row[1])
