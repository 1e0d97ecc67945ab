"""What `podman run` takes here, where it is installed: something that people know, to hold a devbox's creation against.

Its storage is a temporary folder of its own, and it gets neither network nor cgroups, which spares it work and leaves
nothing of it on the machine.  Podman is never installed for this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.creating import last_json
from tests.bench.figures import Figure, absent, figure
from tests.bench.installation import Target

# Arguments: folder, the root file system to take `true` from, how many runs. In a mount namespace of its own, without
# the unified hierarchy of a hybrid machine, which Debian 12's crun refuses.
_RUNS = """
import glob, json, os, subprocess, sys, time
folder, image, count = sys.argv[1:]
subprocess.run(["umount", "/sys/fs/cgroup/unified"], stderr=subprocess.DEVNULL)
podman = ["podman", "--root", folder + "/root", "--runroot", folder + "/run", "--tmpdir", folder + "/tmp"]
podman += ["--cgroup-manager", "cgroupfs", "--events-backend", "none"]
os.chdir(image)
names = [name for name in ("bin", "lib", "lib64") if os.path.islink(name)] + ["usr/bin/true"]
for pattern in ("usr/lib/*/libc.so.6", "usr/lib/*/ld-linux*", "usr/lib/ld-linux*", "usr/lib64/*"):
    names += glob.glob(pattern)
tar = subprocess.Popen(["tar", "-c", *names], stdout=subprocess.PIPE)
subprocess.run([*podman, "import", "--quiet", "-", "tiny"], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
run = [*podman, "run", "--rm", "--network", "none", "--cgroups", "disabled", "--log-driver", "none", "tiny", "true"]
took = []
for _ in range(int(count) + 1):
    began = time.perf_counter()
    subprocess.run(run, check=True, stdin=subprocess.DEVNULL)
    took.append((time.perf_counter() - began) * 1000)
print(json.dumps(took[1:]))
"""


def podman_run(target: Target) -> Iterator[Figure]:
    """`podman run --rm` of `true`, from a tiny image made of the devboxes' own."""
    if shutil.which("podman") is None:
        yield absent("podman_run", "ms", "podman is not installed on this machine")
        return
    image = next(Path(target.host.pool, "images").iterdir())
    with tempfile.TemporaryDirectory(prefix="berth-bench-podman-") as folder:
        argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", _RUNS, folder, str(image)]
        argv.append("5" if target.quick else "20")
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "TMPDIR": folder}
        )
        if done.returncode:
            yield absent("podman_run", "ms", f"podman does not run here: {done.stderr.strip()[-300:]}")
            return
        yield figure("podman_run", "ms", last_json(done.stdout))
