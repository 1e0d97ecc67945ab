"""A snapshot on its way to S3: `btrfs send | zstd`, cut into parts, each put to a URL of its own.

In charge of one run of it in a mover process. After a kill of anything the next run makes the stream again: a part
whose sha256 is as it was uploaded before is not uploaded twice, one that differs replaces what is there. Not in charge
of which URLs there are (`snapshot_verbs`, from the server's side) nor of completing the upload.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from hostd import images, moves, snapshots
from hostd.config import HostConfig
from hostd.messages import Refused
from hostd.snapshot_messages import PARTS_MAX

AT_ONCE: Final = 3
"""Parts on their way at the same time, each held in memory."""
URL_SECONDS: Final = 120.0
"""How long a URL is waited for: then nobody is there who wants this."""
_LOOK_SECONDS: Final = 0.02
_ASK_SECONDS: Final = 0.5
_PIECE: Final = 1 << 20
_SAVED_EACH: Final = 256
"""So many parts are noted one by one as they are uploaded, those of larger disks some at a time."""

Part = tuple[int, str, str]


def send(cfg: HostConfig, snapshot: str, upload: str, part_bytes: int) -> dict[str, Any]:
    """Send it. Returns the seal.

    Raises Refused: unknown_id, unknown_image, storage, too_large, not_ready when no URL came.
    """
    source = snapshots.source(cfg, snapshot)
    known = snapshots.about(cfg, snapshot) or {}
    done = _Done(cfg, snapshot, upload)
    urls = _Urls(cfg, snapshot, upload)
    pending: deque[concurrent.futures.Future[None]] = deque()
    count = 0
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for data in _parts(source, cfg.image_path(known["image"]), part_bytes):
            count += 1
            if count > PARTS_MAX:
                raise Refused("too_large", f"the snapshot has more than {PARTS_MAX} parts of {part_bytes} bytes")
            urls.check()
            while len(pending) >= AT_ONCE or (pending and pending[0].done()):
                pending.popleft().result()
            digest = hashlib.sha256(data).hexdigest()
            if not done.has(count, len(data), digest):
                pending.append(pool.submit(_put, urls, done, count, urls.of(count), data, digest))
        while pending:
            pending.popleft().result()
    return done.seal(count)


def _put(urls: _Urls, done: _Done, number: int, url: str, data: bytes, digest: str) -> None:
    for _ in range(3):
        try:
            done.add(number, (len(data), digest, moves.put(url, data)))
            return
        except moves.Expired:
            url = urls.of(number, instead_of=url)
    raise moves.refused("denied", "S3 calls every URL expired: are the clocks right?")


class _Done:
    """The parts that are uploaded, on disk, so that the next run knows them."""

    def __init__(self, cfg: HostConfig, snapshot: str, upload: str) -> None:
        self._cfg, self._snapshot, self._upload = cfg, snapshot, upload
        self._lock = threading.Lock()
        before = moves.read(cfg, snapshot, "parts")
        mine = before.get("upload") == upload
        self._parts: dict[str, Part] = before["parts"] if mine else {}
        self._sent = 0

    def has(self, number: int, size: int, digest: str) -> bool:
        """Whether this very part is there already."""
        with self._lock:
            there = self._parts.get(str(number), ("", "", ""))[:2]
            if [*there] != [size, digest]:
                return False
            self._tell(size)
            return True

    def add(self, number: int, part: Part) -> None:
        with self._lock:
            self._parts[str(number)] = part
            if len(self._parts) <= _SAVED_EACH or number % 16 == 0:
                self._save({})
            self._tell(part[0])

    def seal(self, count: int) -> dict[str, Any]:
        """What the whole is."""
        parts = [self._parts[str(number)] for number in range(1, count + 1)]
        digest = hashlib.sha256(b"".join(bytes.fromhex(part[1]) for part in parts)).hexdigest()
        sealed = {"size": sum(part[0] for part in parts), "sha256": digest, "sealed": parts}
        self._save(sealed)
        return {"upload": self._upload, **sealed}

    def _save(self, more: dict[str, Any]) -> None:
        moves.write(self._cfg, self._snapshot, "parts", {"upload": self._upload, "parts": self._parts, **more})

    def _tell(self, size: int) -> None:
        self._sent += size
        told = {"upload": self._upload, "sent_bytes": self._sent, "want": None}
        moves.write(self._cfg, self._snapshot, "now", told)


class _Urls:
    """Where to put which part, as hostd has been told so far."""

    def __init__(self, cfg: HostConfig, snapshot: str, upload: str) -> None:
        self._cfg, self._snapshot, self._upload = cfg, snapshot, upload

    def check(self) -> dict[str, str]:
        given = moves.read(self._cfg, self._snapshot, "given")
        if given.get("upload") != self._upload:
            raise Refused("not_ready", "this upload was given up")
        found: dict[str, str] = given["urls"]
        return found

    def of(self, number: int, instead_of: str | None = None) -> str:
        """Wait for the part's URL, another than `instead_of`. Raises Refused not_ready."""
        deadline = time.monotonic() + URL_SECONDS
        asked = -_ASK_SECONDS
        while True:
            url = self.check().get(str(number))
            if url is not None and url != instead_of:
                return url
            if time.monotonic() - asked > _ASK_SECONDS:  # again and again: news of other parts are written over it
                now = moves.read(self._cfg, self._snapshot, "now")
                moves.write(self._cfg, self._snapshot, "now", {**now, "upload": self._upload, "want": number})
                asked = time.monotonic()
            if time.monotonic() > deadline:
                raise Refused("not_ready", f"no URL for part {number} came within {URL_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)


def _parts(source: str, image: str, part_bytes: int) -> Iterator[bytes]:
    """The packed stream of what differs from the image, in parts."""
    held = bytearray()
    with images.pipe(["btrfs", "-q", "send", "-p", image, source], stdout=subprocess.PIPE) as stream:
        assert stream.stdout
        with images.pipe(["zstd", "-q", "-1", "-T2", "-c"], stdin=stream.stdout, stdout=subprocess.PIPE) as pack:
            assert pack.stdout
            stream.stdout.close()  # zstd's alone from here: it ends when btrfs does
            for piece in iter(lambda: pack.stdout.read(_PIECE), b""):  # type: ignore[union-attr]
                held += piece
                while len(held) >= part_bytes:
                    yield bytes(held[:part_bytes])
                    del held[:part_bytes]
    if held:
        yield bytes(held)  # after both have ended well: what is cut short is never sealed
