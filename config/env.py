"""The process environment, typed. The only reader of ``os.environ``; everything else reads Django's settings.

Values come from the real environment first, then from the ``KEY=VALUE`` lines of ``<BERTH_STATE>/env``, which is what
``make up`` writes. An empty value counts as absent. Nothing is validated beyond its type here: ``config.checks`` says
which combinations make no sense.
"""

from __future__ import annotations

import os
import pathlib
from typing import overload


class BadEnvironment(Exception):
    """A variable is set to something that cannot be what it is for."""


def _read_state_file() -> dict[str, str]:
    state = os.environ.get("BERTH_STATE", "")
    if not state:
        return {}
    values: dict[str, str] = {}
    try:
        lines = pathlib.Path(state, "env").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadEnvironment(f"BERTH_STATE: cannot read {state}/env: {error}") from error
    for line in lines:
        key, mark, value = line.partition("=")
        if mark and not key.lstrip().startswith("#"):
            values[key.strip()] = value.strip()
    return values


_file = _read_state_file()


def _raw(name: str) -> str:
    return os.environ.get(name) or _file.get(name, "")


@overload
def text(name: str, default: str = "") -> str: ...
@overload
def text(name: str, default: None) -> str | None: ...
def text(name: str, default: str | None = "") -> str | None:
    """The value of ``name``, or ``default`` when it is unset or empty."""
    return _raw(name) or default


def words(name: str, default: tuple[str, ...] = ()) -> list[str]:
    """A comma-separated list without its empty parts."""
    parts = [part.strip() for part in _raw(name).split(",")]
    return [part for part in parts if part] or list(default)


def whole(name: str, default: int) -> int:
    """A whole number. Raises BadEnvironment for anything else."""
    value = _raw(name)
    if not value:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise BadEnvironment(f"{name}={value!r} is not a whole number") from error


def number(name: str, default: float) -> float:
    """A number. Raises BadEnvironment for anything else."""
    value = _raw(name)
    if not value:
        return default
    try:
        return float(value)
    except ValueError as error:
        raise BadEnvironment(f"{name}={value!r} is not a number") from error


def flag(name: str, default: bool = False) -> bool:
    """true/false, yes/no, on/off, 1/0. Raises BadEnvironment for anything else."""
    value = _raw(name).lower()
    if not value:
        return default
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise BadEnvironment(f"{name}={value!r} is neither true nor false")
