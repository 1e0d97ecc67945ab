"""The published client libraries, each in a folder of its own: what users hold Berth against, so what it is proven
with.

In charge of installing them once, from the package registries, below ``build/sdk`` of the checkout.  They never share
an environment with Berth: their dependencies are theirs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from config.state import CHECKOUT, process_environment
from config.supervisor import StepFailed

FOLDER = CHECKOUT / "build" / "sdk"
PYTHON_VERSIONS = ("3.0.0", "1.29.0")
TYPESCRIPT_VERSION = "1.32.0"
WS_VERSION = "8.23.0"
PLAYWRIGHT_VERSION = "1.65.1"


def is_there(version: str) -> bool:
    """Whether this version of the Python client was installed before."""
    return (FOLDER / f"python-{version}" / "installed").exists()


def python(version: str) -> Path:
    """The interpreter of an environment that holds ``runloop_api_client`` in this version."""
    home = FOLDER / f"python-{version}"
    if not is_there(version):
        shutil.rmtree(home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(home)])
        _run(
            [
                f"{home}/bin/python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                f"runloop_api_client=={version}",
            ]
        )
        (home / "installed").touch()
    return home / "bin" / "python"


def typescript() -> Path:
    """A folder with ``node_modules/@runloop/api-client``.  Raises StepFailed where there is no npm."""
    return _from_npm(f"typescript-{TYPESCRIPT_VERSION}", f"@runloop/api-client@{TYPESCRIPT_VERSION}")


def browser_driver() -> Path:
    """A folder with ``node_modules/playwright-core``, which drives Debian's Chromium.  Raises StepFailed likewise."""
    return _from_npm(f"playwright-{PLAYWRIGHT_VERSION}", f"playwright-core@{PLAYWRIGHT_VERSION}")


def websocket_client() -> Path:
    """A folder with ``node_modules/ws``, by which the published command line reaches terminals.  Raises likewise."""
    return _from_npm(f"ws-{WS_VERSION}", f"ws@{WS_VERSION}")


def _from_npm(name: str, package: str) -> Path:
    home = FOLDER / name
    if not (home / "installed").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "package.json").write_text('{"private": true, "type": "module"}\n')
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", package], home)
        (home / "installed").touch()
    return home


def _run(argv: list[str], cwd: Path | None = None) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "install.log"
    environment = {name: value for name, value in process_environment().items() if not name.startswith("PYTHON")}
    try:
        with open(log, "ab") as out:
            done = subprocess.run(
                argv,
                cwd=cwd or FOLDER,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=300,
                check=False,
                env=environment,
            )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise StepFailed("sdk", f"{' '.join(argv[:3])}: {error}", log) from None
    if done.returncode != 0:
        raise StepFailed("sdk", f"{' '.join(argv)} ended with exit status {done.returncode}", log)
