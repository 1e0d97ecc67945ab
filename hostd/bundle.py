"""The file that is shipped to hosts: this package as one zip that Python runs, the same bytes wherever it is built.

In charge of building it and of naming it by its digest. Not in charge of sending it (the server side does) nor of
receiving it (`serve.py` does).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass

_MAIN = b"""\
import sys

from hostd.__main__ import main

sys.exit(main())
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip can tell; a real one would change the digest


@dataclass(frozen=True)
class Bundle:
    """``data`` is the whole file, ``digest`` its sha256 in hexadecimal."""

    data: bytes
    digest: str


def build(source: str | None = None) -> Bundle:
    """Pack every module of the package (``source``: its folder, ours when None). Raises OSError."""
    folder = source or os.path.dirname(os.path.abspath(__file__))
    found = io.BytesIO()
    # Stored, not deflated: another zlib would give other bytes, hence another digest, for the same code.
    with zipfile.ZipFile(found, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "__main__.py", _MAIN)
        for name in sorted(os.listdir(folder)):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as file:
                    _add(archive, f"hostd/{name}", file.read())
    data = found.getvalue()
    return Bundle(data, hashlib.sha256(data).hexdigest())


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def running_path() -> str | None:
    """The bundle this process was started from; None when it runs from a source tree."""
    # …/<digest>.pyz/hostd/bundle.py
    path = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return path if os.path.isfile(path) else None


def digest_of(path: str) -> str:
    """The sha256 of a file in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
