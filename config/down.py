"""``make down``: stop the installation that runs in another terminal, or what a killed one left behind."""

from __future__ import annotations

import os
import signal
import sys
import time

from config import first
from config.state import State, StateError
from config.supervisor import Progress, StepFailed, end_leftovers, is_same_process
from config.up import stop_host

#: Stopping is bounded step by step; together the steps take no longer than this many seconds.
_STOP_WITHIN = 300.0


def stop(state: State, say: Progress) -> bool:
    """Stop whatever runs for this state folder.  True when there was something.  Raises StepFailed after the bound."""
    facts = first.supervisor_facts(state)
    if facts is None:
        left = end_leftovers(state, say)
        return stop_host(state, say) or left > 0
    pid, started = facts["pid"], facts["started"]
    say(f"asking the supervisor (pid {pid}) to stop; it says more in its own terminal")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_WITHIN
    while is_same_process(pid, started):
        if time.monotonic() > deadline:
            raise StepFailed(
                "down", f"the supervisor (pid {pid}) has not stopped within {_STOP_WITHIN:g} s", state.logs
            )
        time.sleep(0.1)
    return True


def main() -> int:
    """Exit status 0 when nothing runs any more."""
    state, say = State.from_environment(), Progress()
    try:
        say("stopped" if state.path.is_dir() and stop(state, say) else "nothing was running")
    except (StepFailed, StateError, OSError) as failure:
        sys.stderr.write(f"make down: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
