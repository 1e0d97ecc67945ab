"""rtnetlink in a few messages: links, addresses, routes, neighbours.

In charge of: packing requests and reading their answers. Not in charge of: which link gets which address (`network`).
A socket stays in the network namespace it was made in, whatever its owner enters later.

By raw netlink because nine `ip` commands take 12 ms and this takes one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Final

_REQUEST, _ACK, _EXCL, _CREATE, _REPLACE = 1, 4, 0x200, 0x400, 0x100
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR = 20, 21
_NEWROUTE = 24
_NEWNEIGH = 28
_ERROR: Final = 2
_NESTED: Final = 0x8000

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_AF_SPEC, _IFLA_NET_NS_FD = 1, 3, 18, 26, 28
_IFLA_INET6_ADDR_GEN_MODE: Final = 8
_ADDR_GEN_MODE_NONE: Final = 1
_UP: Final = 1
_PERMANENT: Final = 0x80
_SECONDS: Final = 5.0

SCOPE_LINK: Final = 253
SCOPE_UNIVERSE: Final = 0


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + b"\0" * (-length % 4)


def _link_header(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, flags, change)


def _name(name: str) -> bytes:
    return _attribute(_IFLA_IFNAME, name.encode() + b"\0")


class Netlink:
    """A socket to the kernel's routing tables. Methods raise OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.bind((0, 0))
            self._socket.settimeout(_SECONDS)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def do(self, *messages: tuple[int, int, bytes]) -> None:
        """Send (type, flags, body) messages at once and wait until each is acknowledged."""
        packed = b""
        first = self._sequence + 1
        for kind, flags, body in messages:
            self._sequence += 1
            header = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, self._sequence, 0)
            packed += header + body + b"\0" * (-len(body) % 4)
        self._socket.send(packed)
        waiting = set(range(first, self._sequence + 1))
        failed = 0
        while waiting:
            data = self._socket.recv(65_536)
            position = 0
            while position < len(data):
                length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, position)
                if kind == _ERROR and sequence in waiting:
                    waiting.discard(sequence)
                    failed = failed or -struct.unpack_from("=i", data, position + 16)[0]
                position += (length + 3) & ~3
        if failed:
            raise OSError(failed, os.strerror(failed))

    def index(self, name: str) -> int:
        """The index of a link. Raises OSError ENODEV."""
        self._sequence += 1
        body = _link_header() + _name(name)
        self._socket.send(struct.pack("=IHHII", 16 + len(body), _GETLINK, _REQUEST, self._sequence, 0) + body)
        while True:
            data = self._socket.recv(65_536)
            _, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
            if sequence != self._sequence:
                continue
            if kind == _ERROR:
                number = -struct.unpack_from("=i", data, 16)[0]
                raise OSError(number, os.strerror(number), name)
            found: int = struct.unpack_from("=i", data, 20)[0]
            return found

    def add_veth(self, name: str, mac: bytes, peer: str, peer_mac: bytes, peer_namespace: int) -> None:
        """Make a pair, its first end here and up, the other in ``peer_namespace`` (a descriptor)."""
        other = _link_header() + _name(peer)
        other += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace)) + _attribute(_IFLA_ADDRESS, peer_mac)
        data = _attribute(2, _attribute(1 | _NESTED, other))  # IFLA_INFO_DATA { VETH_INFO_PEER }
        info = _attribute(_IFLA_LINKINFO, _attribute(1, b"veth") + data)
        # No link-local IPv6 address for our end, hence no router solicitations into the box either.
        mode = _attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_ADDR_GEN_MODE_NONE]))
        quiet = _attribute(_IFLA_AF_SPEC | _NESTED, _attribute(socket.AF_INET6 | _NESTED, mode))
        body = _link_header(0, _UP, _UP) + _name(name) + _attribute(_IFLA_ADDRESS, mac) + info
        try:
            self.do((_NEWLINK, _CREATE | _EXCL, body + quiet))
        except OSError as error:
            if error.errno not in (22, 95, 97):  # a kernel without IPv6 knows no AF_SPEC of it
                raise
            self.do((_NEWLINK, _CREATE | _EXCL, body))

    def delete_link(self, name: str) -> None:
        """Remove a link; none of that name is fine. Slow (25 ms): a link goes by itself with its namespace."""
        with contextlib.suppress(OSError):
            index = self.index(name)
            self.do((_DELLINK, 0, _link_header(index)))

    def set_up(self, *indexes: int) -> None:
        self.do(*((_NEWLINK, 0, _link_header(index, _UP, _UP)) for index in indexes))

    def add_address(self, index: int, address: str, prefix: int) -> None:
        self.do(address_message(index, address, prefix))

    def delete_address(self, index: int, address: str, prefix: int) -> None:
        """Remove an address; none there is fine."""
        kind, _, body = address_message(index, address, prefix)
        assert kind == _NEWADDR
        try:
            self.do((_DELADDR, 0, body))
        except OSError as error:
            if error.errno != 99:  # EADDRNOTAVAIL
                raise


def link_up_message(index: int) -> tuple[int, int, bytes]:
    return _NEWLINK, 0, _link_header(index, _UP, _UP)


def address_message(index: int, address: str, prefix: int) -> tuple[int, int, bytes]:
    packed = socket.inet_aton(address)
    body = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, index)
    return _NEWADDR, _CREATE | _REPLACE, body + _attribute(1, packed) + _attribute(2, packed)


def neighbour_message(index: int, address: str, mac: bytes) -> tuple[int, int, bytes]:
    """A permanent neighbour: no ARP is spoken on the link."""
    body = struct.pack("=BxxxiHBB", socket.AF_INET, index, _PERMANENT, 0, 0)
    return _NEWNEIGH, _CREATE | _REPLACE, body + _attribute(1, socket.inet_aton(address)) + _attribute(2, mac)


def route_message(index: int, to: str | None, *, via: str | None = None, scope: int) -> tuple[int, int, bytes]:
    """A route to one address, or the default route when ``to`` is None."""
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 32 if to else 0, 0, 0, 254, 3, scope, 1, 0)
    if to:
        body += _attribute(1, socket.inet_aton(to))
    if via:
        body += _attribute(5, socket.inet_aton(via))
    return _NEWROUTE, _CREATE | _REPLACE, body + _attribute(4, struct.pack("=I", index))
