"""``make prove``: a throwaway copy of everything, beside whatever runs, driven by the published SDK and removed again.

Exit status 0 only when every operation did what it should and nothing was left behind.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from config import sdk, traces
from config.state import CHECKOUT, State, StateError, free_port, process_environment
from config.supervisor import Progress, StepFailed
from config.uninstall import uninstall
from config.up import Installation, Options, interrupts

#: The pool of a throwaway copy: some boxes' worth, one box's where the disk is nearly full; and what else it takes.
_POOL_GB, _SMALLEST_POOL_GB, _SPARE_GB = 8, 5, 2


def prove(say: Progress, ignore_further: Callable[[], None]) -> list[str]:
    """Run the proof; returns what was wrong, nothing when all was right.

    Whatever ends it, an interruption too, what it made is removed and looked for; ``ignore_further`` is called before.
    Raises StepFailed when it cannot begin.
    """
    wrong: list[str] = []
    if not sdk.is_there(sdk.PYTHON_VERSIONS[0]):
        say(f"prove        installing the published Python SDK {sdk.PYTHON_VERSIONS[0]} below {sdk.FOLDER}")
    client = sdk.python(sdk.PYTHON_VERSIONS[0])
    folder = Path(tempfile.mkdtemp(prefix="berth-prove-"))
    try:
        pool_gb = _pool_gb(folder)
    except BaseException:
        folder.rmdir()
        raise
    folder.chmod(0o755)
    state = State(folder / "s")
    state.create()
    # Its own servers, whatever this shell points at: a copy that shared a database would be no copy.
    given = {name: value for name, value in process_environment().items() if name in ("BERTH_WARM", "PATH")}
    given["BERTH_BIND"] = f"127.0.0.1:{free_port()}"
    installation = Installation(state, given, Options(first_devbox=False, pool_gb=pool_gb), say)
    with state.locked():
        try:
            installation.start()
            say(f"prove        a copy of everything is up on {installation.base_url}, in {state.path}")
            key = state.api_key_file.read_text().strip()
            argv = [str(client), str(CHECKOUT / "config" / "proof.py"), installation.base_url, key]
            installation.supervisor.run_step("prove", argv, {"PATH": "/usr/bin:/bin"}, within=600.0)
        except KeyboardInterrupt:
            wrong.append("it was interrupted")
        except Exception as failure:
            wrong.append(f"{failure}" if isinstance(failure, StepFailed | StateError) else f"{failure!r}")
        finally:
            ignore_further()
            installation.stop()
    return wrong + _remove(state, say, keep_logs=bool(wrong))


def _pool_gb(folder: Path) -> int:
    """As much of a pool as there is room for.  Raises StepFailed when that is too little."""
    free_gb = shutil.disk_usage(folder).free >> 30
    if free_gb < _SMALLEST_POOL_GB + _SPARE_GB:
        need = f"needs {_SMALLEST_POOL_GB + _SPARE_GB} GiB in {folder.parent}, and {free_gb} are free"
        raise StepFailed("prove", f"a throwaway copy {need}; set TMPDIR to a folder with more room", None)
    return min(_POOL_GB, free_gb - _SPARE_GB)


def _remove(state: State, say: Progress, keep_logs: bool) -> list[str]:
    """Take the copy away; what could not be, and what is still there."""
    wrong: list[str] = []
    marks = traces.Marks.of(state)
    if keep_logs:
        kept = state.path.parent.with_name(state.path.parent.name + "-logs")
        shutil.copytree(state.logs, kept)
        say(f"prove        the logs are kept in {kept}")
    try:
        if packages := uninstall(state, say):
            say(f"prove        Debian packages that it installed, which stay: {' '.join(packages)}")
    except (StepFailed, StateError, OSError) as failure:
        wrong.append(str(failure))
    deadline = time.monotonic() + 10
    while (left := traces.find(marks)) and time.monotonic() < deadline:
        time.sleep(0.2)  # the kernel takes apart network and mounts some moments later
    if not left:
        state.path.parent.rmdir()
        say("prove        nothing was left behind")
    return wrong + [f"left behind: {trace}" for trace in left]


def main() -> int:
    """Exit status 0 when all was right."""
    say = Progress()
    with interrupts() as ignore_further:
        try:
            wrong = prove(say, ignore_further)
        except KeyboardInterrupt:
            wrong = ["it was interrupted before it began"]
        except (StepFailed, StateError, OSError) as failure:
            wrong = [str(failure)]
    for line in wrong:
        sys.stderr.write(f"WRONG  {line}\n")
    say("proven" if not wrong else f"not proven: {len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
