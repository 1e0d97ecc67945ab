"""``make uninstall``: take an installation off this machine, so that nothing of it is left but Debian's packages.

In charge of everything that ``make up`` made here: processes, boxes, the pool, the firewall table, users, sysctls,
files.  Not in charge of servers named by ``DATABASE_URL`` and its siblings, which are somebody else's, nor of other
VM hosts (``retire_host``). Works on any half-made installation, and may be repeated.
"""

from __future__ import annotations

import contextlib
import json
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

from config.down import stop
from config.state import CHECKOUT, State, StateError
from config.supervisor import Progress, StepFailed, last_words
from config.up import host_config, host_root

_RUN_SSHD = Path("/run/sshd")
#: How long killed processes may take to be gone, in seconds.
_ENDED_WITHIN = 5.0


def uninstall(state: State, say: Progress) -> list[str]:
    """Remove every trace.  Returns the Debian packages that were installed for it.  Raises StepFailed or StateError."""
    if not state.path.is_dir():
        say(f"no installation in {state.path}")
        return []
    traces = state.traces()
    if not traces and any(state.path.iterdir()):
        raise StateError(f"{state.path} is not a folder of Berth's; nothing was removed")
    stop(state, say)
    _host(state, say)
    # The login that hosts are reached by has its home below the folder; the servers' user is on the list.
    below = [entry.pw_name for entry in pwd.getpwall() if entry.pw_dir.startswith(f"{state.path}/")]
    for user in [*below, *filter(None, [traces.get("user")])]:
        _remove_user(user, say)
    if traces.get("run_sshd") and not _running("sshd"):
        with contextlib.suppress(OSError):
            _RUN_SSHD.rmdir()
    shutil.rmtree(state.path)
    say(f"files        {state.path} removed")
    given = sorted(name for name in ("DATABASE_URL", "REDIS_URL", "S3_ENDPOINT_URL") if name in traces.get("given", []))
    if given:
        say(f"left alone   the servers named by {', '.join(given)}, with what is in them")
    packages: list[str] = traces.get("packages", [])
    return packages


def _host(state: State, say: Progress) -> None:
    """This machine as VM host: boxes, pool, network, firewall, sysctls, and the image cache when no other install
    needs it."""
    from hostd.config import DEFAULT_IMAGE_CACHE, installs_on_machine

    config = host_config(state)
    cache = Path(DEFAULT_IMAGE_CACHE)
    if config.exists():
        cache = Path(json.loads(config.read_text()).get("image_cache") or cache)
        log = state.logs / "teardown.log"
        with open(log, "ab") as out:
            done = subprocess.run(
                [sys.executable, "-m", "hostd", "teardown", "--config", str(config)],
                cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            raise StepFailed("host", f"the VM host could not be taken away: {last_words(log)}", log)
        say("host         boxes, pool, network, firewall table and sysctls taken away")
    shutil.rmtree(host_root(state), ignore_errors=True)
    if cache == Path(DEFAULT_IMAGE_CACHE) and not installs_on_machine():
        shutil.rmtree(cache, ignore_errors=True)
        with contextlib.suppress(OSError):
            cache.parent.rmdir()


def _remove_user(name: str, say: Progress) -> None:
    """Remove a user made by this installation, with its group and home."""
    # SSH connections outlive an sshd that was killed, and userdel refuses while one is open.
    subprocess.run(["pkill", "-KILL", "-u", name], capture_output=True, timeout=10, check=False)
    deadline = time.monotonic() + _ENDED_WITHIN
    while _has_processes(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    done = subprocess.run(["userdel", "--remove", name], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode not in (0, 6, 12):  # 6: there is none; 12: it had no home to remove
        raise StepFailed("users", f"userdel {name}: {done.stderr.strip()}", None)
    if done.returncode != 6:
        say(f"user         {name} removed")


def _has_processes(user: str) -> bool:
    return subprocess.run(["pgrep", "-u", user], capture_output=True, timeout=10, check=False).returncode == 0


def _running(name: str) -> bool:
    return subprocess.run(["pgrep", "-x", name], capture_output=True, timeout=10, check=False).returncode == 0


def main() -> int:
    """Exit status 0 when nothing is left."""
    state, say = State.from_environment(), Progress()
    try:
        packages = uninstall(state, say)
    except (StepFailed, StateError, OSError) as failure:
        sys.stderr.write(f"make uninstall: {failure}\n")
        return 1
    say("nothing is left on this machine but the checkout")
    if packages:
        sys.stdout.write(
            "\nThese Debian packages were installed by `make up` and are still there; if nothing else needs them:\n"
            f"    apt-get purge {' '.join(packages)}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
