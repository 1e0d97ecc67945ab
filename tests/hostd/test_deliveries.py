"""An image's stream that is sent: whole or not at all, cut and gone on with, wrong and thrown away. Needs no root."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from hostd import config, deliveries
from hostd.config import HostConfig
from hostd.messages import Refused

IMAGE = "img_0123456789ab"
DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cfg(tmp_path: Path) -> HostConfig:
    given = {
        "cluster": "c",
        "host": "hst_1",
        "install": 3,
        "root": str(tmp_path / "root"),
        "run": str(tmp_path / "run"),
    }
    return config.from_dict({**given, "image_cache": str(tmp_path / "cache")})


@pytest.fixture
def source(tmp_path: Path) -> Iterator[BinaryIO]:
    (tmp_path / "source").write_bytes(DATA)
    with open(tmp_path / "source", "rb", buffering=0) as file:
        yield file


def refusal(cfg: HostConfig, source: BinaryIO, **more: object) -> Refused:
    given = {"image": IMAGE, "offset": 0, "size": len(DATA), "sha256": SHA256, **more}
    with pytest.raises(Refused) as caught:
        deliveries.take(cfg, source=source, **given)  # type: ignore[arg-type]
    return caught.value


def test_a_cut_transfer_goes_on_where_it_ended(cfg: HostConfig, source: BinaryIO) -> None:
    assert deliveries.look(cfg, IMAGE)["offset"] == 0 and not deliveries.look(cfg, IMAGE)["have"]
    source.seek(len(DATA) - 1_000_000)
    assert "2000000 bytes before its end" in str(refusal(cfg, source))
    assert deliveries.look(cfg, IMAGE)["offset"] == 1_000_000 and not deliveries.look(cfg, IMAGE)["have"]
    assert refusal(cfg, source, offset=1_000_001).code == "bad_request"

    # What came first were other bytes than these: found out at the end, and nothing of it is kept.
    source.seek(1_000_000)
    assert "another sha256" in str(refusal(cfg, source, offset=1_000_000))
    assert os.listdir(cfg.image_cache) == []

    source.seek(0)
    refusal(cfg, source, size=len(DATA) + 5)
    assert deliveries.look(cfg, IMAGE)["offset"] == len(DATA)
    source.seek(500_000)
    assert deliveries.take(cfg, IMAGE, 500_000, len(DATA), SHA256, source) == {"have": "cache"}
    assert Path(deliveries.look(cfg, IMAGE)["stream"]).read_bytes() == DATA
    assert deliveries.take(cfg, IMAGE, 0, len(DATA), SHA256, source) == {"have": "cache"}  # again: nothing is read
    assert os.listdir(cfg.image_cache) == [f"{IMAGE}.btrfs.zst"]


def test_one_transfer_at_a_time_within_bounds(
    cfg: HostConfig, source: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(cfg, source, size=deliveries.STREAM_MAX_BYTES + 1).code == "too_large"
    assert refusal(cfg, source, image="../../etc/passwd").code == "unknown_image"
    os.makedirs(cfg.image_cache)
    with open(f"{cfg.image_cache}/{IMAGE}.btrfs.zst.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refusal(cfg, source).code == "busy"
    monkeypatch.setattr(deliveries, "_SILENT_SECONDS", 0.1)
    read, write = os.pipe()
    os.write(write, DATA[:1000])
    with open(read, "rb", buffering=0) as silent:
        assert "nothing more came" in str(refusal(cfg, silent))
    os.close(write)
    assert deliveries.look(cfg, IMAGE)["offset"] == 1000


def test_the_command(cfg: HostConfig) -> None:
    os.makedirs(cfg.root)
    cfg.save()

    def ask(*options: str, body: bytes = b"") -> dict[str, object]:
        argv = [sys.executable, "-m", "hostd", "image", "--config", cfg.path, "--id", IMAGE, *options]
        done = subprocess.run(argv, input=body, capture_output=True, timeout=30)
        answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return answer

    whole = ("--size", str(len(DATA)), "--sha256", SHA256)
    assert ask()["have"] == ""
    assert "before its end" in str(ask(*whole, body=DATA[:1234])["error"])
    assert ask()["offset"] == 1234
    assert ask("--offset", "1234", *whole, body=DATA[1234:]) == {"done": True, "have": "cache"}
    assert ask()["have"] == "cache"
