"""Host names of tunnels: `{port}-{key}.tunnel.<domain>`, told from the names that the API answers to.

In charge of the one place where such a name is read. What is behind it is others': port 13 is no port, but the
terminals' service (`pty`); any other is a port of a devbox (`tunnels`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from api.bodies import Scope

TERMINALS: Final = 13

_NAME = re.compile(rb"([0-9]+)-([^.]*)\.tunnel\.([^:]*)(?::[0-9]{1,5})?", re.IGNORECASE)
_KEY = re.compile(rb"[0-9a-z]{26}")
_DOMAIN = re.compile(rb"[0-9a-z.-]{1,200}")


@dataclasses.dataclass(frozen=True, slots=True)
class TunnelName:
    """What a name says. Port 0: it has the form of one, and cannot be any."""

    port: int
    key: str


NOBODYS: Final = TunnelName(0, "")


def tunnel_name(host: bytes) -> TunnelName | None:
    """What a host name (with or without a port behind it) says; None when it is not a tunnel's."""
    match = _NAME.fullmatch(host)
    if match is None:
        return None
    port, key, domain = match[1], match[2].lower(), match[3].lower()
    if (
        len(port) > 5
        or port[:1] == b"0"
        or int(port) > 65535
        or not _KEY.fullmatch(key)
        or not _DOMAIN.fullmatch(domain)
    ):
        return NOBODYS
    return TunnelName(int(port), key.decode())


def tunnel_of(scope: Scope) -> TunnelName | None:
    """The tunnel that a request or WebSocket came to. Quick: it is asked of every request."""
    found: TunnelName | None = None
    hosts = 0
    for name, value in scope["headers"]:
        if name == b"host":
            hosts += 1
            if b"-" in value and (told := tunnel_name(value)) is not None:
                found = told
    return NOBODYS if found is not None and hosts > 1 else found
