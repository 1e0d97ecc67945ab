"""The project's own source files, parsed once, for the house's rules."""

from __future__ import annotations

import ast
import functools
import pathlib
import subprocess

PROJECT = pathlib.Path(__file__).resolve().parents[2]
ROOMS = (
    "config", "executions", "files", "pty", "snapshots", "tunnels", "devboxes", "hosts", "accounts", "storage", "api",
    "flows",
    "hostd",
)  # fmt: skip


def sources(*rooms: str) -> list[pathlib.Path]:
    """Every Python file of these rooms, or of all of them."""
    return sorted(path for room in rooms or ROOMS for path in (PROJECT / room).rglob("*.py"))


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: pathlib.Path) -> set[str]:
    """The dotted names of all modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(PROJECT))


@functools.cache
def tracked() -> list[pathlib.Path]:
    """Every file git knows; where there is no git (an installed copy), every file that is not build output."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True).stdout
        files = [PROJECT / part.decode() for part in listed.split(b"\0") if part]
    except (OSError, subprocess.CalledProcessError):
        hidden = {".git", ".venv", "build", "node_modules", "__pycache__"}
        files = [path for path in PROJECT.rglob("*") if not hidden & set(path.relative_to(PROJECT).parts)]
    return [path for path in files if path.is_file()]
