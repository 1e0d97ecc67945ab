"""The scripts of launch work, run by a real bash on this machine, and the ids of its pieces."""

from __future__ import annotations

import base64
import http.server
import os
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from api.ids import is_id, new_id
from devboxes import launch

OWNER = f"{os.getuid()}:{os.getgid()}"


def run(script: str, *arguments: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    body = launch._script(script, *arguments, user=launch.ROOT, env={}, stdin=stdin)
    assert base64.b64decode(body.get("input", "")) == stdin
    return subprocess.run(
        body["argv"], input=stdin, capture_output=True, timeout=30, env={"PATH": os.environ["PATH"], **env}, check=False
    )


def test_ids_are_the_same_every_time_and_different_for_all() -> None:
    devboxes = [new_id("dbx") for _ in range(20)]
    ids = [launch.work_id(devbox, what) for devbox in devboxes for what in (*range(20), launch.ENTRYPOINT)]
    assert ids == [launch.work_id(devbox, what) for devbox in devboxes for what in (*range(20), launch.ENTRYPOINT)]
    assert len(set(ids)) == len(ids)
    assert all(is_id("set", one) for one in ids)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "-dash", "quo'te\"$(touch evil)`x`;&|\\", "deep/er/er", "ü", "new\nline"]
)
def test_a_file_is_written_wherever_it_is_to_be(tmp_path: pathlib.Path, name: str) -> None:
    content = b"\xff\x00binary\nno newline at the end"
    target = tmp_path / "made" / name
    done = run(launch._WRITE_FILE, str(target), OWNER, stdin=content)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == content
    assert target.stat().st_mode & 0o777 == 0o644
    assert [str(path) for path in tmp_path.rglob("evil")] == []


def test_an_empty_file_and_one_that_is_there(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "f"
    assert run(launch._WRITE_FILE, str(target), OWNER).returncode == 0 and target.read_bytes() == b""
    target.chmod(0o600)
    assert run(launch._WRITE_FILE, str(target), OWNER, stdin=b"new").returncode == 0
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_fails_with_the_reason(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    done = run(launch._WRITE_FILE, str(tmp_path / "file" / "below"), OWNER, stdin=b"x")
    assert done.returncode != 0 and done.stderr


TOKEN = "t0p$ecret'\"`"


class _Git(http.server.SimpleHTTPRequestHandler):
    """A repository over plain HTTP that wants the token as a password."""

    def do_GET(self) -> None:
        wanted = base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {wanted}":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Its URL, and the name of its first commit. Branches: main, other."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    work, served = tmp_path / "work", tmp_path / "served"
    served.mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    for key in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{key}_NAME": "a", f"GIT_{key}_EMAIL": "a@example.org"}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, env=env).stdout.strip()

    git("init", "-q", "-b", "main", str(work))
    (work / "file").write_text("one")
    git("-C", str(work), "add", ".")
    git("-C", str(work), "commit", "-q", "-m", "one")
    first = git("-C", str(work), "rev-parse", "HEAD")
    (work / "file").write_text("two")
    git("-C", str(work), "commit", "-q", "-a", "-m", "two")
    git("-C", str(work), "branch", "other", first)
    git("clone", "-q", "--bare", str(work), str(served / "r.git"))
    git("-C", str(served / "r.git"), "update-server-info")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *rest: _Git(*rest, directory=str(served)),
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/r.git", first
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("ref", "content"), [("", "two"), ("main", "two"), ("other", "one"), ("COMMIT", "one")])
def test_a_code_mount_is_cloned_and_the_token_is_nowhere(
    tmp_path: pathlib.Path, repository: tuple[str, str], ref: str, content: str
) -> None:
    url, first = repository
    home = tmp_path / "home"
    folder = home / "a" / "r"
    ref = first if ref == "COMMIT" else ref
    done = run(launch._CLONE, url, str(folder), ref, stdin=f"{TOKEN}\n".encode(), HOME=str(home), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (folder / "file").read_text() == content
    left = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert left == [] and TOKEN.encode() not in done.stdout + done.stderr
    assert not list(tmp_path.glob("tmp.*")), "the script that git asks is gone"


def test_a_clone_without_the_right_token_fails_and_asks_nobody(
    tmp_path: pathlib.Path, repository: tuple[str, str]
) -> None:
    done = run(launch._CLONE, repository[0], str(tmp_path / "r"), "", stdin=b"wrong\n", HOME=str(tmp_path))
    assert done.returncode != 0 and b"fatal" in done.stderr


def test_an_unknown_ref_fails_with_the_reason(tmp_path: pathlib.Path, repository: tuple[str, str]) -> None:
    stdin = f"{TOKEN}\n".encode()
    done = run(launch._CLONE, repository[0], str(tmp_path / "r"), "nope", stdin=stdin, HOME=str(tmp_path))
    assert done.returncode != 0 and b"nope" in done.stderr


def test_paths_are_the_home_s_unless_they_are_absolute() -> None:
    home = "/home/user"
    cases = {"a": f"{home}/a", "~/a": f"{home}/a", "/a": "/a", "~a": f"{home}/~a", "a/~/b": f"{home}/a/~/b"}
    assert {path: launch._absolute(path, home) for path in cases} == cases
