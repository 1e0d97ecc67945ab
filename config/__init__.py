"""Wiring. Imported first by every launcher: whichever ``pty`` Python finds or found, ``pty.models`` and its siblings
are importable afterwards."""

import pathlib

import pty

if not hasattr(pty, "__path__"):  # the standard module came first: give it our folder
    pty.__path__ = [str(pathlib.Path(__file__).resolve().parent.parent / "pty")]
