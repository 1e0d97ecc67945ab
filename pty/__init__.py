"""Terminals. This folder also answers as the standard library's ``pty``, which it hides from the project root: what we
lack comes from there. Nothing else lives in this file, and no submodule takes the name of a standard attribute."""

import importlib.machinery as _machinery
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys
import types as _types


def _standard() -> _types.ModuleType:
    root = _pathlib.Path(__file__).resolve().parent.parent
    elsewhere = [entry for entry in _sys.path if _pathlib.Path(entry or ".").resolve() != root]
    spec = _machinery.PathFinder.find_spec("pty", elsewhere)
    if spec is None or spec.loader is None:
        raise AttributeError("this Python has no standard module pty")
    module = _util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_std: _types.ModuleType | None = None


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    global _std
    if _std is None:
        _std = _standard()
    return getattr(_std, name)
