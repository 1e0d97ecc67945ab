"""Snapshots: how long a devbox stands still, how long until one is complete, and devboxes made of it.

The baseline is what anybody would do by hand on the same machine: `tar | zstd`, uploaded to the same S3 server.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from config.state import CHECKOUT
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target

MB = 1_000_000
CHANGED_MB = 100

_UPLOAD = """
import subprocess, sys
from storage import objects
tar = subprocess.Popen(["tar", "-c", sys.stdin.readline().strip()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
pack = subprocess.Popen(["zstd", "-q", "-1", "-T2", "-c"], stdin=tar.stdout, stdout=subprocess.PIPE)
import time
began = time.perf_counter()
objects.put_stream("bench/by-hand", iter(lambda: pack.stdout.read(1 << 20), b""))
print(time.perf_counter() - began)
"""
_DROP = """
import sys
from hosts.client import client_for
host, snapshot, fence = sys.stdin.read().split()
client_for(host).delete_snapshot(snapshot=snapshot, fence=int(fence))
"""


def snapshots(target: Target) -> Iterator[Figure]:
    """Of 100 MB of changed data that does not compress, and devboxes made of the last one."""
    rounds = 3 if target.quick else 8
    freezes: list[float] = []
    taken: list[float] = []
    whole: list[float] = []
    snapshot = ""
    with target.boxes(1) as (box,):
        for _ in range(rounds):
            target.run(box, f"head -c {CHANGED_MB * MB} /dev/urandom > large; sync")
            if snapshot:
                target.post(f"/v1/devboxes/disk_snapshots/{snapshot}/delete")
            began = time.perf_counter()
            view = target.post(f"/v1/devboxes/{box}/snapshot_disk")
            whole.append(time.perf_counter() - began)
            snapshot = str(view["id"])
            freezes.append(float(str(view["freeze_ms"])))
            sql = "SELECT extract(epoch FROM taken_at - created_at) * 1000 FROM snapshots_disksnapshot WHERE id = %s"
            taken.append(float(str(_row(target, sql, snapshot)[0])))
        by_hand = _by_hand(target)
        yield figure("snapshot_freeze_ms", "ms", freezes)
        yield figure("snapshot_taken_ms", "ms", taken)
        yield figure("snapshot_complete_100mb_s", "s", whole, by_hand)
        yield figure("create_from_snapshot_ms", "ms", [_made_of(target, snapshot) for _ in range(3 * rounds)])
        received = []
        for _ in range(2 if target.quick else 5):
            sql = "UPDATE snapshots_disksnapshot SET fence = fence + 1 WHERE id = %s RETURNING host_id, fence - 1"
            host, fence = _row(target, sql, snapshot)
            _manage(target, _DROP, f"{host} {snapshot} {fence}")
            received.append(_made_of(target, snapshot))
        yield figure("create_from_s3_100mb_ms", "ms", received)
        target.post(f"/v1/devboxes/disk_snapshots/{snapshot}/delete")


def _made_of(target: Target, snapshot: str) -> float:
    began = time.perf_counter()
    copy = target.create(snapshot_id=snapshot)
    took = (time.perf_counter() - began) * 1000
    target.shutdown(copy)
    return took


def _by_hand(target: Target) -> float:
    with tempfile.TemporaryDirectory(prefix="berth-bench-by-hand-") as folder:
        with open(Path(folder, "large"), "wb") as file:
            subprocess.run(["head", "-c", str(CHANGED_MB * MB), "/dev/urandom"], stdout=file, check=True, timeout=60)
        return float(_manage(target, _UPLOAD, folder).splitlines()[-1])


def _manage(target: Target, script: str, given: str) -> str:
    done = subprocess.run(
        [sys.executable, "manage.py", "shell", "--no-imports", "-c", script],
        cwd=CHECKOUT, env=target.environment, input=given, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return done.stdout


def _row(target: Target, sql: str, *parameters: object) -> tuple[object, ...]:
    with psycopg.connect(target.environment["DATABASE_URL"], autocommit=True) as connection:
        found = connection.execute(sql, parameters).fetchone()
    assert found is not None
    return found
