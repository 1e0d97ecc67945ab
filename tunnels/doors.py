"""Who may come through which tunnel: keys recognised, tokens checked, guessing made slow.

In charge of what a key opens, remembered for a second per process: a key that was removed opens for at most so long.
Not in charge of what is done behind the door.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from django.conf import settings

from api.bodies import Scope
from api.errors import NotFound, TooManyRequests, Unauthorized
from api.prepared import fetch_one
from api.threads import in_database
from tunnels.services import digest

REMEMBERED_SECONDS: Final = 1.0
DOORS_MAX: Final = 10_000
GUESSES: Final = 20
"""Unknown keys or wrong tokens that one client's address may send at once, and how many a second after that."""
GUESSES_A_SECOND: Final = 0.5
ADDRESSES_MAX: Final = 10_000
WRONG_SECONDS: Final = 600.0
"""So long the same wrong key or token from the same address is no further guess: a page left open on a tunnel that has
gone must not lock out who shares its address."""
OWN_HEADER: Final = b"x-runloop-tunnel-authorization"

_FIND: Final = """
SELECT t.id, t.devbox_id, d.account_id, d.status, coalesce(d.host_id, ''), t.token_sha256, t.http_keep_alive,
       coalesce((d.launch_parameters #>> '{lifecycle,resume_triggers,http}')::boolean, t.wake_on_http),
       a.max_open_streams
  FROM tunnels_tunnel t JOIN devboxes_devbox d ON d.id = t.devbox_id JOIN accounts_account a ON a.id = d.account_id
 WHERE t.key_sha256 = %s AND d.ended_at IS NULL AND a.status = 'enabled'
"""


@dataclass(frozen=True, slots=True)
class Door:
    """What a key opens. `token_sha256`: None for who knows the key."""

    tunnel_id: str
    devbox_id: str
    account_id: str
    status: str
    host_id: str
    token_sha256: bytes | None
    http_keep_alive: bool
    wake_on_http: bool
    open_streams: int


def find(key: str) -> Door | None:
    """What the key opens now, None for an unknown key and for a devbox that has ended."""
    row = fetch_one(_FIND, [digest(key)])
    if row is None:
        return None
    cap = settings.BERTH.CAP_STREAMS if row[8] is None else row[8]
    token = None if row[5] is None else bytes(row[5])
    return Door(row[0], row[1], row[2], row[3], row[4], token, row[6], row[7], cap)


class Doors:
    """Those that were asked for lately. One per process; used from the loop only."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, Door]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[Door | None]] = {}

    async def find(self, key: str, *, fresh: bool = False) -> Door | None:
        """As `find`, at most REMEMBERED_SECONDS old; many who ask at once cost one query."""
        known = self._known.get(key)
        if known is not None and not fresh and time.monotonic() - known[0] < REMEMBERED_SECONDS:
            return known[1]
        asking = self._asked.get(key)
        if asking is None or asking.get_loop() is not asyncio.get_running_loop():
            asking = self._asked[key] = asyncio.ensure_future(self._ask(key))
        return await asyncio.shield(asking)

    async def _ask(self, key: str) -> Door | None:
        try:
            began = time.monotonic()
            door = await in_database(find, key)
            if door is None:
                self._known.pop(key, None)
            else:
                self._known[key] = began, door
                self._known.move_to_end(key)
                if len(self._known) > DOORS_MAX:
                    self._known.popitem(last=False)
            return door
        finally:
            self._asked.pop(key, None)

    def knows(self, key: str) -> bool:
        """Has it opened something, not so long ago?"""
        return key in self._known


class Guesses:
    """How many wrong keys and tokens came from where. A bounded table; the longest quiet address is forgotten first."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._told: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def told(self, address: str, secret: str) -> float:
        """How many seconds ago that address was told that this is wrong; infinitely many when it was not."""
        return time.monotonic() - self._told.get((address, digest(secret)), -math.inf)

    def check(self, address: str, secret: str) -> None:
        """Raises TooManyRequests when that address has to wait before it may be wrong again, in a new way."""
        left = self._now(address)
        if left < 1 and self.told(address, secret) > WRONG_SECONDS:
            raise TooManyRequests(
                f"too many unknown tunnels or wrong tokens from this address: {GUESSES} at once, then one in "
                f"{1 / GUESSES_A_SECOND:g} s",
                retry_after=(1 - left) / GUESSES_A_SECOND,
            )

    def count(self, address: str, secret: str) -> None:
        """That address was wrong."""
        is_new = self.told(address, secret) > WRONG_SECONDS
        self._told[address, digest(secret)] = time.monotonic()
        self._told.move_to_end((address, digest(secret)))
        if len(self._told) > ADDRESSES_MAX:
            self._told.popitem(last=False)
        if not is_new:
            return
        self._left[address] = self._now(address) - 1, time.monotonic()
        self._left.move_to_end(address)
        if len(self._left) > ADDRESSES_MAX:
            self._left.popitem(last=False)

    def _now(self, address: str) -> float:
        left, at = self._left.get(address, (GUESSES, 0.0))
        return min(GUESSES, left + (time.monotonic() - at) * GUESSES_A_SECOND)


doors = Doors()
guesses = Guesses()


def client_of(scope: Scope) -> str:
    """The address that a request came from: what a proxy of ours says, where it is one of those."""
    peer = str((scope.get("client") or ("",))[0])
    if peer in settings.BERTH.PROXIES:
        for name, value in reversed(scope["headers"]):
            if name == b"x-forwarded-for":
                return str(value.rpartition(b",")[2].strip().decode("latin-1"))
    return peer


def _subscriber(address: str) -> str:
    """What counts as one guesser: an IPv4 address, or the 64 bits of an IPv6 network that one subscriber gets."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


async def enter(key: str, offered: Sequence[str], client: str) -> Door:
    """The door that the key opens to who offers these tokens, from that address.

    Raises NotFound for an unknown key, Unauthorized when a token is needed and none of these is it, TooManyRequests
    for who was wrong too often; keys that others use go on being opened to that address.
    """
    address = _subscriber(client)
    if not doors.knows(key):
        if guesses.told(address, key) < REMEMBERED_SECONDS:
            raise NotFound("there is no such tunnel")
        guesses.check(address, key)
    door = await doors.find(key)
    if door is None:
        guesses.count(address, key)
        raise NotFound("there is no such tunnel")
    if door.token_sha256 is not None and not any(is_token(door, token) for token in offered):
        if offered:
            wrong = " ".join((key, *offered))
            guesses.check(address, wrong)
            guesses.count(address, wrong)
        raise Unauthorized("this tunnel needs its token: X-Runloop-Tunnel-Authorization: Bearer …")
    return door


def is_token(door: Door, token: str) -> bool:
    """Is that the tunnel's token?"""
    return door.token_sha256 is not None and hmac.compare_digest(digest(token), door.token_sha256)


def bearer(value: bytes) -> str | None:
    """The token of a bearer header's value."""
    scheme, _, token = value.decode("latin-1").partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token else None


def tokens_of(headers: Sequence[tuple[bytes, bytes]], subprotocols: Sequence[str] = ()) -> list[str]:
    """What a request offers as the tunnel's token: either header, or a WebSocket's subprotocol."""
    found = [bearer(value) for name, value in headers if name in (OWN_HEADER, b"authorization")]
    return [token for token in found if token is not None][:8] + list(subprotocols)[:8]
