"""Which headers go through a tunnel, and how they are changed: pure functions, both ways.

In charge of hop-by-hop headers, `X-Forwarded-*`, what is ours and must not reach the devbox, and cookies that must not
leave their host name. Not in charge of framing: lengths and encodings of bodies are h11's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from api.errors import ApiError, BadRequest
from tunnels.doors import OWN_HEADER, Door, bearer, is_token

Headers = list[tuple[bytes, bytes]]

HEADERS_MAX: Final = 200
HEADER_BYTES_MAX: Final = 64 * 1024
TARGET_BYTES_MAX: Final = 16 * 1024

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
FORWARDED: Final = frozenset({b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port"})
OURS: Final = frozenset({OWN_HEADER, b"host", b"content-length", b"expect", b"forwarded", b"x-real-ip"})
WEBSOCKET: Final = frozenset(
    {
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"sec-websocket-extensions",
        b"sec-websocket-accept",
        b"sec-websocket-protocol",
    }
)

_NAME = re.compile(rb"[!#$%&'*+.^`|~0-9a-z-]+")
_DOMAIN = re.compile(rb";\s*domain\s*(=[^;]*)?(?=;|\Z)", re.IGNORECASE)


class HeadersTooLarge(ApiError):
    status = 431
    code = "headers_too_large"


class TargetTooLong(ApiError):
    status = 414
    code = "target_too_long"


def check_size(headers: Sequence[tuple[bytes, bytes]], target: bytes) -> None:
    """Raises HeadersTooLarge or TargetTooLong, which name the limit, and BadRequest for a target that is not ASCII."""
    if not target.isascii():
        raise BadRequest("the request's target has bytes that are not ASCII; percent-encode them")
    if len(target) > TARGET_BYTES_MAX:
        raise TargetTooLong(f"the request's target has {len(target)} bytes, a tunnel takes {TARGET_BYTES_MAX}")
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    if len(headers) > HEADERS_MAX or size > HEADER_BYTES_MAX:
        raise HeadersTooLarge(
            f"the request has {len(headers)} headers of {size} bytes, a tunnel takes {HEADERS_MAX} of "
            f"{HEADER_BYTES_MAX} bytes"
        )


def _named(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """What the Connection headers declare to be for this hop only."""
    return {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
        if token
    }


def to_server(
    headers: Sequence[tuple[bytes, bytes]],
    door: Door,
    *,
    address: str,
    scheme: str,
    host: bytes,
    websocket: bool = False,
) -> Headers:
    """What the server in the devbox gets of a request's headers, framing apart.

    Names with underscores are dropped, since many servers take them for dashed ones: they could pass for ours.
    """
    dropped = HOP_BY_HOP | OURS | FORWARDED | _named(headers)
    if websocket:
        dropped |= WEBSOCKET
    kept: Headers = []
    came_by: list[bytes] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            came_by.append(value)
        if name in dropped or _NAME.fullmatch(name) is None:
            continue
        if name == b"authorization" and door.token_sha256 is not None:
            token = bearer(value)
            if token is not None and is_token(door, token):
                continue
        kept.append((name, value))
    came_by.append(address.encode() or b"unknown")
    return [
        (b"host", host),
        *kept,
        (b"x-forwarded-for", b", ".join(came_by)),
        (b"x-forwarded-proto", scheme.encode()),
        (b"x-forwarded-host", host),
    ]


def to_client(headers: Iterable[tuple[bytes, bytes]], *, websocket: bool = False) -> Headers:
    """What the client gets of a response's headers. A length stays unless the body was chunked, which wins over it."""
    given = list(headers)
    dropped = HOP_BY_HOP | _named(given)
    if websocket:
        dropped |= WEBSOCKET | {b"content-length"}
    if any(name == b"transfer-encoding" for name, _ in given):
        dropped |= {b"content-length"}
    return [
        (name, without_domain(value) if name == b"set-cookie" else value)
        for name, value in given
        if name not in dropped
    ]


def without_domain(cookie: bytes) -> bytes:
    """A Set-Cookie for the host name that it comes from, and for none beside or above it: those are others', and the
    admin's."""
    return _DOMAIN.sub(b"", cookie)


def body_length(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """The announced length of a request's body, None when it announces none. Raises BadRequest when it is no length, or
    announced in two ways: such a request means one thing here and another there."""
    lengths = {value.strip() for name, value in headers if name == b"content-length"}
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or chunked or not length.isdigit() or len(length) > 18:
        raise BadRequest("the request announces its body's length in more than one way, or not as a number")
    return int(length)
