"""The browser's half of the web terminal: xterm.js from npm, in the versions and with the checksums of its lock file.

In charge of having its files below ``build/web`` of the checkout, from where the web role serves them. Not in charge of
the page (``pty``). An installation without them works all the same; the page then says what is missing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from config import packages
from config.state import CHECKOUT, State, process_environment
from config.supervisor import Progress, StepFailed, last_words

LOCKED = CHECKOUT / "pty" / "npm"
FOLDER = CHECKOUT / "build" / "web"
FILES = (
    "@xterm/xterm/lib/xterm.js",
    "@xterm/xterm/css/xterm.css",
    "@xterm/addon-fit/lib/addon-fit.js",
)
WITHIN = 120.0


def ensure(state: State, say: Progress) -> None:
    """Have the files of the lock file's versions. Never fails: says what is missing."""
    wanted = hashlib.sha256((LOCKED / "package-lock.json").read_bytes()).hexdigest()
    known = FOLDER / "lock"
    if known.is_file() and known.read_text() == wanted:
        return
    try:
        packages.ensure_one(state, say, "npm", "fetching what the web terminal shows in browsers")
        _fetch(wanted, state.logs / "npm.log")
        say("web terminal xterm.js is in build/web")
    except (StepFailed, OSError) as error:
        say(f"web terminal not available: {error}")


def _fetch(wanted: str, log: Path) -> None:
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".web-") as name:
        folder = Path(name)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(LOCKED / file, folder)
        # No script of a package runs, and each one's checksum is compared.
        argv = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--cache", str(folder / "cache")]
        # A machine without a network shall start all the same, and soon; a hiccup of one that has it is got over.
        argv += ["--fetch-retries", "2", "--fetch-retry-mintimeout", "1000", "--fetch-retry-maxtimeout", "5000"]
        with open(log, "ab") as out:
            try:
                done = subprocess.run(
                    argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=WITHIN, check=False,
                    env=process_environment(),
                )  # fmt: skip
            except (FileNotFoundError, subprocess.TimeoutExpired) as error:
                raise StepFailed("web terminal", f"npm: {error}", log) from None
        if done.returncode != 0:
            raise StepFailed("web terminal", f"npm ci ended with exit status {done.returncode}: {last_words(log)}", log)
        ready = folder / "ready"
        ready.mkdir()
        for file in FILES:
            shutil.copy(folder / "node_modules" / file, ready)
        (ready / "lock").write_text(wanted)
        for path in (ready, *ready.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if FOLDER.exists():
            FOLDER.rename(folder / "before")
        ready.rename(FOLDER)
