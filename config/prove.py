"""``make prove``: a throwaway copy of everything, beside whatever runs, driven by the published SDK and removed again.

Exit status 0 only when every operation did what it should and nothing was left behind.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from config import sdk, traces
from config.state import CHECKOUT, State, StateError, free_port, process_environment
from config.supervisor import Progress, StepFailed
from config.uninstall import uninstall
from config.up import Installation, Options, interrupts

#: The pool of a throwaway copy, in GB: some boxes' worth.
_POOL_GB = 8


def prove(say: Progress) -> list[str]:
    """Run the proof; returns what was wrong, nothing when all was right."""
    wrong: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="berth-prove-"))
    folder.chmod(0o755)
    state = State(folder / "s")
    state.create()
    # Its own servers, whatever this shell points at: a copy that shared a database would be no copy.
    given = {name: value for name, value in process_environment().items() if name in ("BERTH_WARM", "PATH")}
    given["BERTH_BIND"] = f"127.0.0.1:{free_port()}"
    installation = Installation(state, given, Options(first_devbox=False, pool_gb=_POOL_GB), say)
    marks = traces.Marks.of(state)
    with state.locked():
        try:
            installation.start()
            marks = traces.Marks.of(state)
            say(f"prove        a copy of everything is up on {installation.base_url}, in {state.path}")
            client = sdk.python(sdk.PYTHON_VERSIONS[0])
            key = state.api_key_file.read_text().strip()
            argv = [str(client), str(CHECKOUT / "config" / "proof.py"), installation.base_url, key]
            installation.supervisor.run_step("prove", argv, {"PATH": "/usr/bin:/bin"}, within=600.0)
        except (StepFailed, StateError) as failure:
            wrong.append(str(failure))
        finally:
            installation.stop()
    if wrong:
        kept = folder.with_name(folder.name + "-logs")
        shutil.copytree(state.logs, kept)
        say(f"prove        the logs are kept in {kept}")
    try:
        uninstall(state, say)
    except (StepFailed, StateError) as failure:
        wrong.append(str(failure))
    deadline = time.monotonic() + 10
    while (left := traces.find(marks)) and time.monotonic() < deadline:
        time.sleep(0.2)  # the kernel takes apart network and mounts some moments later
    wrong += [f"left behind: {trace}" for trace in left]
    if not left:
        folder.rmdir()
        say("prove        nothing was left behind")
    return wrong


def main() -> int:
    """Exit status 0 when all was right."""
    say = Progress()
    with interrupts():
        try:
            wrong = prove(say)
        except KeyboardInterrupt:
            wrong = ["interrupted; what was started is stopped"]
        except (StepFailed, StateError, OSError) as failure:
            wrong = [str(failure)]
    for line in wrong:
        sys.stderr.write(f"WRONG  {line}\n")
    say("proven" if not wrong else f"not proven: {len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
