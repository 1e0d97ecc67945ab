"""Taking the stream of an image that the servers send, so that a new host has the very image the others have.

In charge of: the cache's side of a transfer. It arrives whole or not at all, and one that was cut goes on where it
ended. Not in charge of: receiving the stream into the pool (`images`), nor of who sends what.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
from typing import Any, BinaryIO, Final

from hostd import images
from hostd.config import HostConfig
from hostd.messages import Refused

_CHUNK: Final = 1 << 20
_SILENT_SECONDS: Final = 60.0  # a sender that is gone without a word is waited for so long
STREAM_MAX_BYTES: Final = 64 << 30


def look(cfg: HostConfig, image: str) -> dict[str, Any]:
    """What this host has of an image: ``have`` is "cache" or "", ``stream`` its path there, ``offset`` how much of a
    cut transfer is here, ``received_uuid`` what the pool says, "" when it is not there.

    Raises Refused unknown_image for what is no image id.
    """
    stream = images.stream_path(cfg, image)
    part = f"{stream}.part"
    return {
        "have": "cache" if os.path.exists(stream) else "",
        "stream": stream,
        "offset": os.path.getsize(part) if os.path.exists(part) else 0,
        "received_uuid": images.received_uuid(cfg, image) if images.has_image(cfg, image) else "",
    }


def take(cfg: HostConfig, image: str, offset: int, size: int, sha256: str, source: BinaryIO) -> dict[str, Any]:
    """Append ``source`` to what is here from byte ``offset`` on, until there are ``size`` bytes, which must have that
    sha256.

    A source that ends early leaves what came, for the next try; a whole that is wrong is thrown away. Raises Refused
    (busy while another transfer of it runs, bad_request, too_large, internal) or OSError.
    """
    stream = images.stream_path(cfg, image)
    if os.path.exists(stream):
        return {"have": "cache"}
    if size > STREAM_MAX_BYTES:
        raise Refused("too_large", f"an image's stream has at most {STREAM_MAX_BYTES} bytes, not {size}")
    os.makedirs(cfg.image_cache, mode=0o755, exist_ok=True)
    part = os.open(f"{stream}.part", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with open(part, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("busy", f"another transfer of {image} is under way") from None
        if offset > os.fstat(part).st_size:
            raise Refused("bad_request", f"only {os.fstat(part).st_size} bytes of {image} are here, not {offset}")
        file.seek(offset)
        file.truncate()
        try:
            _copy(source, file, size - offset)
        finally:
            file.flush()
            os.fsync(part)
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            os.unlink(f"{stream}.part")
            raise Refused("internal", f"what came of {image} has another sha256 than it should: thrown away")
        os.rename(f"{stream}.part", stream)
    return {"have": "cache"}


def _copy(source: BinaryIO, file: BinaryIO, left: int) -> None:
    descriptor = source.fileno()
    while left:
        if not select.select([descriptor], [], [], _SILENT_SECONDS)[0]:
            raise Refused("internal", f"nothing more came for {_SILENT_SECONDS:g} s, {left} bytes before the end")
        piece = os.read(descriptor, min(left, _CHUNK))
        if not piece:
            raise Refused("internal", f"the stream ended {left} bytes before its end")
        file.write(piece)
        left -= len(piece)
