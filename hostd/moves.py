"""What the mover of a disk and hostd tell one another: small files in a folder per snapshot.

In charge of the files: `now.json` (how far it is, by the mover), `given.json` (where to put or get the bytes, by
hostd), `parts.json` (what was uploaded already: it outlives both). Not in charge of moving anything (`sending`,
`receiving`). A mover that finds other work given, or none, ends.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import ssl
import threading
import time
import urllib.parse
from typing import Any, Final

from hostd.config import HostConfig, write_file
from hostd.messages import Refused, is_work_id

TRIES: Final = 6
"""Of one part, the pauses between them growing: some twenty seconds of a server that is away or restarts."""
TIMEOUT_SECONDS: Final = 30.0
_PAUSE_SECONDS: Final = 0.5
_PAUSE_MAX_SECONDS: Final = 8.0

_writing = threading.Lock()


class Expired(Exception):
    """The URL is not valid any more: another one is wanted."""


def folder(cfg: HostConfig, snapshot: str) -> str:
    if not is_work_id(snapshot):
        raise Refused("bad_request", f"{snapshot!r} is not the id of a snapshot")
    return f"{cfg.moves}/{snapshot}"


def read(cfg: HostConfig, snapshot: str, name: str) -> dict[str, Any]:
    """A file of the snapshot's; empty when there is none."""
    try:
        with open(f"{folder(cfg, snapshot)}/{name}.json", "rb") as file:
            found: dict[str, Any] = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def write(cfg: HostConfig, snapshot: str, name: str, what: dict[str, Any]) -> None:
    path = folder(cfg, snapshot)
    with _writing:  # uploads have threads
        os.makedirs(path, mode=0o700, exist_ok=True)
        write_file(f"{path}/{name}.json", json.dumps(what).encode(), mode=0o600)


def forget(cfg: HostConfig, snapshot: str) -> None:
    """Remove all of them; a mover at work ends by that."""
    shutil.rmtree(folder(cfg, snapshot), ignore_errors=True)


def put(url: str, data: bytes) -> str:
    """Upload a part; its ETag. Raises Expired, Refused storage."""
    return str(_ask("PUT", url, data, {})[1])


def get(url: str, start: int, length: int) -> bytes:
    """Download a range. Raises Expired, Refused storage (kind corrupt: the object is not as long)."""
    data, _ = _ask("GET", url, None, {"Range": f"bytes={start}-{start + length - 1}"}, length)
    return data


def _ask(method: str, url: str, body: bytes | None, headers: dict[str, str], length: int = 0) -> tuple[bytes, str]:
    words = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(min(_PAUSE_MAX_SECONDS, _PAUSE_SECONDS * 2 ** (attempt - 1)))
        try:
            return _once(method, url, body, headers, length)
        except (OSError, http.client.HTTPException, _TryAgain) as error:
            words = str(error) or type(error).__name__
    raise refused("unreachable", f"S3 did not take or give a part in {TRIES} tries: {words}")


class _TryAgain(Exception):
    pass


def _once(method: str, url: str, body: bytes | None, headers: dict[str, str], length: int) -> tuple[bytes, str]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused("bad_request", "a URL must be of http or https")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", body=body, headers=headers)
        answer = connection.getresponse()
        if answer.status in (200, 206):
            if method == "PUT":
                answer.read(65536)
                tag = answer.headers.get("ETag", "")
                if not tag:
                    raise refused("refused", "S3 gave no ETag for a part")
                return b"", tag
            if answer.status == 200 and not headers["Range"].startswith("bytes=0-"):
                raise refused("refused", "the S3 server does not serve ranges")
            data = answer.read(length)
            if len(data) < length:
                raise refused("corrupt", f"the object ends {length - len(data)} bytes too early")
            return data, ""
        words = answer.read(4096).decode(errors="replace")
        raise _error(answer.status, words)
    finally:
        connection.close()


def _error(status: int, words: str) -> Exception:
    found = re.search(r"<Code>([A-Za-z]{1,60})</Code>", words)
    code = found[1] if found else ""
    message = re.search(r"<Message>([^<]{1,300})</Message>", words)
    told = f"S3 answered {status} {code} {message[1] if message else ''}".strip()
    if "expired" in words.lower() or code in ("ExpiredToken", "RequestTimeTooSkewed"):
        return Expired(told)
    if status == 416:
        return refused("corrupt", told)
    if status == 404:
        return refused("missing", told)
    if status in (401, 403):
        return refused("denied", told)
    if status == 507 or code in ("XMinioStorageFull", "QuotaExceeded", "EntityTooLarge", "InsufficientStorage"):
        return refused("full", told)
    if status >= 500 or status in (408, 429):
        return _TryAgain(told)
    return refused("refused", told)


def refused(kind: str, message: str) -> Refused:
    """What is answered about S3."""
    return Refused("storage", message, kind=kind)
