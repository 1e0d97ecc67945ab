"""A snapshot on its way from S3: ranges of the object, `zstd -d`, `btrfs receive`, and the seal compared.

In charge of one run of it in a mover process, one at a time per snapshot and host. What cannot be compared with its
seal is deleted. `btrfs receive` cannot go on in the middle, so a run that was killed is begun again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import subprocess
import threading
import time
from typing import Any, Final

from hostd import btrfs, disks, images, moves, snapshots
from hostd.config import HostConfig
from hostd.messages import Refused

RAW_MAX: Final = 1 << 40
"""Bytes of the stream once it is unpacked."""
SECONDS_MAX: Final = 3600.0
POOL_KEPT_FREE: Final = 0.05
_AHEAD: Final = 2
_PIECE: Final = 1 << 20


def receive(
    cfg: HostConfig,
    snapshot: str,
    image: str,
    size: int,
    sha256: str,
    part_bytes: int,
    size_bytes: int,
) -> dict[str, Any]:
    """Have the snapshot here. Raises Refused: unknown_image, no_space, storage (kind corrupt: not what was sealed)."""
    if snapshots.about(cfg, snapshot) is not None:
        return {}
    if not images.has_image(cfg, image):
        raise Refused("unknown_image", f"image {image} is not on this host")
    whole, free = disks.space(cfg)
    if free - size_bytes < whole * POOL_KEPT_FREE:
        raise Refused("no_space", f"the pool has {free} bytes free, too few for a snapshot of {size_bytes}")
    into = snapshots.new_folder(cfg, snapshot)
    try:
        try:
            digest = _receive(cfg, snapshot, into, size, part_bytes)
        except Refused as error:
            if error.code == "internal":  # zstd or btrfs could make nothing of it
                raise moves.refused("corrupt", f"the object is damaged: {error.message}") from None
            raise
        if digest != sha256:
            raise moves.refused("corrupt", "the object is not the one that was sealed")
        if os.listdir(into) != [snapshots.NAME] or not btrfs.is_read_only(f"{into}/{snapshots.NAME}"):
            raise moves.refused("corrupt", "the object is no disk")
    except BaseException:
        snapshots.drop(cfg, snapshot)
        raise
    known = {"image": image, "size_bytes": size_bytes, "taken_at_ms": time.time_ns() // 1_000_000, "received": True}
    snapshots.keep(cfg, snapshot, known)
    return {}


def _receive(cfg: HostConfig, snapshot: str, into: str, size: int, part_bytes: int) -> str:
    digests: list[bytes] = []
    deadline = time.monotonic() + SECONDS_MAX
    ranges = [(start, min(part_bytes, size - start)) for start in range(0, size, part_bytes)]
    with (
        concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool,
        images.pipe(["zstd", "-q", "-dc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as unpack,
        images.pipe(["btrfs", "-q", "receive", "--chroot", into], stdin=subprocess.PIPE) as receiver,
    ):
        unpacked = _Unpacked(unpack, receiver, cfg)
        unpacked.start()
        coming = [pool.submit(_range, cfg, snapshot, *one) for one in ranges[:_AHEAD]]
        received = 0
        try:
            assert unpack.stdin
            for at in range(len(ranges)):
                data = coming.pop(0).result()
                if at + _AHEAD < len(ranges):
                    coming.append(pool.submit(_range, cfg, snapshot, *ranges[at + _AHEAD]))
                digests.append(hashlib.sha256(data).digest())
                if time.monotonic() > deadline:
                    raise Refused("no_space", f"receiving took longer than {SECONDS_MAX:g} s")
                unpack.stdin.write(data)
                received += len(data)
                moves.write(cfg, snapshot, "now", {"received_bytes": received})
        except BrokenPipeError:
            pass  # zstd or btrfs ended early, and tells why below
        finally:
            with contextlib.suppress(BrokenPipeError):
                assert unpack.stdin
                unpack.stdin.close()
            unpacked.join(SECONDS_MAX)
        if unpacked.refused is not None:
            raise unpacked.refused
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _range(cfg: HostConfig, snapshot: str, start: int, length: int) -> bytes:
    """A part, from the URL as it was last given."""
    tried = ""
    deadline = time.monotonic() + 120.0
    while True:
        url = str(moves.read(cfg, snapshot, "given").get("url", ""))
        if not url:
            raise Refused("not_ready", "this download was given up")
        if url != tried:
            try:
                return moves.get(url, start, length)
            except moves.Expired:
                tried = url
        if time.monotonic() > deadline:
            raise moves.refused("denied", "S3 calls the URL expired: are the clocks right?")
        time.sleep(0.1)


class _Unpacked(threading.Thread):
    """Carries the unpacked stream to btrfs, and counts it: a small object may unpack to a huge one."""

    def __init__(self, unpack: Any, receiver: Any, cfg: HostConfig) -> None:
        super().__init__(daemon=True)
        self._from, self._to, self._cfg = unpack.stdout, receiver.stdin, cfg
        self._unpack = unpack
        self.refused: Refused | None = None

    def run(self) -> None:
        total = 0
        try:
            for piece in iter(lambda: self._from.read(_PIECE), b""):
                total += len(piece)
                if total > RAW_MAX:
                    self.refused = Refused("too_large", f"the snapshot unpacks to more than {RAW_MAX} bytes")
                elif total % (256 << 20) < _PIECE:
                    whole, free = disks.space(self._cfg)
                    if free < whole * POOL_KEPT_FREE / 2:
                        self.refused = Refused("no_space", "the pool ran full while a snapshot was received")
                if self.refused is not None:
                    self._unpack.kill()
                    break
                self._to.write(piece)
        except (BrokenPipeError, OSError, ValueError):
            self._unpack.kill()  # btrfs has ended, and will say why
        finally:
            try:
                self._to.close()
            except OSError:
                pass
