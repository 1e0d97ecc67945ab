"""Files in real boxes through the API: exact, atomic, with the user's rights, in flat memory, nobody else's."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.live

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox for all of them."""
    box = berth.owner.create(name="files")
    yield box
    berth.owner.shutdown(box)


def ask(key, box: str, operation: str, body: Any = None, **more: Any) -> httpx.Response:
    answer: httpx.Response = key.client.post(f"/v1/devboxes/{box}/{operation}", json=body, timeout=120, **more)
    return answer


def written(key, box: str, path: str, contents: str) -> None:
    answer = ask(key, box, "write_file_contents", {"file_path": path, "contents": contents})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["devbox_id"], told["exit_status"], told["stdout"], told["stderr"]) == (box, 0, "", "")


def test_text_goes_in_and_comes_out(berth, shared) -> None:
    text = 'grüße 你好 🙂\n"quotes" and \\ and \t\r\n'
    for path in ("notes.txt", "~/deep/er/notes.txt", "/home/user/x y/'z'.txt"):
        written(berth.owner, shared, path, text)
        answer = ask(berth.owner, shared, "read_file_contents", {"file_path": path})
        assert answer.text == text
        assert answer.headers["content-type"].startswith("text/plain")
    stdout = berth.owner.run(shared, "stat -c '%U %a' notes.txt; cat deep/er/notes.txt")[0]
    assert stdout == "user 644\n" + text
    written(berth.owner, shared, "empty", "")
    assert ask(berth.owner, shared, "read_file_contents", {"file_path": "empty"}).text == ""
    alias = ask(berth.owner, shared, "write_file", {"file_path": "alias", "contents": "x"})
    assert alias.status_code == 200


@pytest.mark.parametrize("order", [("path", "file"), ("file", "path")])
def test_any_bytes_go_up_and_come_down(berth, shared, order: tuple[str, str]) -> None:
    data = os.urandom(3 * MIB + 17)
    name = f"up/{order[0]}.bin"
    parts = {"path": (None, name), "file": ("ignored.name", data, "application/octet-stream")}
    form = [(part, parts[part]) for part in order]
    answer = berth.owner.client.post(f"/v1/devboxes/{shared}/upload_file", files=form)
    assert (answer.status_code, answer.json()) == (200, {}), answer.text
    down = ask(berth.owner, shared, "download_file", {"path": name})
    assert down.content == data
    assert down.headers["content-type"] == "application/octet-stream"
    assert down.headers["content-disposition"] == f'attachment; filename="{order[0]}.bin"'
    assert berth.owner.run(shared, f"sha256sum {name} | cut -c1-64")[0].strip() == hashlib.sha256(data).hexdigest()


def test_an_upload_without_a_file_is_an_empty_file(berth, shared) -> None:
    answer = berth.owner.client.post(f"/v1/devboxes/{shared}/upload_file", files=[("path", (None, "nothing"))])
    assert answer.status_code == 200
    assert berth.owner.run(shared, "stat -c %s nothing")[0] == "0\n"


def test_ranges(berth, shared) -> None:
    written(berth.owner, shared, "digits", "0123456789")

    def part(value: str, **headers: str) -> tuple[int, bytes, str | None]:
        answer = ask(berth.owner, shared, "download_file", {"path": "digits"}, headers={"range": value, **headers})
        return answer.status_code, answer.content, answer.headers.get("content-range")

    assert part("bytes=2-4") == (206, b"234", "bytes 2-4/10")
    assert part("bytes=8-99") == (206, b"89", "bytes 8-9/10")
    assert part("bytes=7-") == (206, b"789", "bytes 7-9/10")
    assert part("bytes=-2") == (206, b"89", "bytes 8-9/10")
    status, _, told = part("bytes=10-12")
    assert (status, told) == (416, "bytes */10")
    for ignored in ("bytes=4-2", "bytes=0-1,3-4", "lines=1-2", "bytes=-"):
        assert part(ignored) == (200, b"0123456789", None)
    tag = ask(berth.owner, shared, "download_file", {"path": "digits"}).headers["etag"]
    assert part("bytes=0-0", **{"if-range": tag})[0] == 206
    assert part("bytes=0-0", **{"if-range": '"another"'})[0] == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("missing", 404, "no_such_file"),
        ("/home/user", 400, "not_a_file"),
        ("/dev/zero", 400, "not_a_file"),
        ("pipe", 400, "not_a_file"),
        ("/etc/shadow", 400, "denied"),
        ("/proc/1/environ", 400, "denied"),
        ("around", 400, "bad_path"),
        ("x" * 300, 400, "bad_path"),
        ("binary", 400, "not_text"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_read_says_so(berth, shared, path: str, status: int, code: str) -> None:
    berth.owner.run(shared, "test -p pipe || mkfifo pipe; ln -sf around around; printf '\\377' > binary")
    answer = ask(berth.owner, shared, "read_file_contents", {"file_path": path})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    if code != "not_text":
        answer = ask(berth.owner, shared, "download_file", {"path": path})
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("folder/", "not_a_file"),
        ("/", "not_a_file"),
        ("pipe", "not_a_file"),
        ("/dev/null", "not_a_file"),
        ("/etc/passwd", "denied"),
        ("/sys/kernel/x", "denied"),
        ("/proc/sys/kernel/hostname", "denied"),
        ("notes/below", "bad_path"),
    ],
)
def test_what_cannot_be_written_says_so(berth, shared, path: str, code: str) -> None:
    berth.owner.run(shared, "test -p pipe || mkfifo pipe; touch notes")
    answer = ask(berth.owner, shared, "write_file_contents", {"file_path": path, "contents": "x"})
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("read_file_contents", {}),
        ("read_file_contents", {"file_path": ""}),
        ("read_file_contents", {"file_path": 7}),
        ("read_file_contents", {"path": "x"}),
        ("write_file_contents", {"file_path": "x"}),
        ("write_file_contents", {"file_path": "x", "contents": None}),
        ("write_file_contents", {"file_path": "a\0b", "contents": ""}),
        ("download_file", {"file_path": "x"}),
    ],
)
def test_a_body_that_is_wrong(berth, shared, operation: str, body: dict[str, Any]) -> None:
    answer = ask(berth.owner, shared, operation, body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"code", "message"}


def test_forms_that_are_wrong(berth, shared) -> None:
    url = f"/v1/devboxes/{shared}/upload_file"
    for form in (
        [("file", ("f", b"x"))],
        [("path", (None, "a")), ("path", (None, "b"))],
        [("path", (None, "a")), ("mode", (None, "b"))],
        [("path", (None, "")), ("file", ("f", b"x"))],
        [("path", (None, "x" * 5000))],
        [("file", ("f", b"x")), ("path", (None, "/etc/nope"))],
    ):
        answer = berth.owner.client.post(url, files=form)
        assert answer.status_code == 400, (form, answer.text)
    for content_type, body in (
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf'),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 5000),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--\r\n"),
    ):
        answer = berth.owner.client.post(url, content=body, headers={"content-type": content_type})
        assert answer.status_code == 400, (content_type, body[:40], answer.text)


def test_a_strangers_files_are_not_there(berth, shared) -> None:
    written(berth.owner, shared, "mine", "secret")
    for operation, body in (
        ("read_file_contents", {"file_path": "mine"}),
        ("write_file_contents", {"file_path": "mine", "contents": "theirs"}),
        ("download_file", {"path": "mine"}),
    ):
        theirs = ask(berth.stranger, shared, operation, body)
        nobodys = ask(berth.stranger, "dbx_" + "0" * 26, operation, body)
        assert (theirs.status_code, nobodys.status_code) == (404, 404)
        assert theirs.json()["message"].replace(shared, "ID") == nobodys.json()["message"].replace(
            "dbx_" + "0" * 26, "ID"
        )
        assert httpx.post(f"{berth.base_url}/v1/devboxes/{shared}/{operation}", json=body).status_code == 401
    form = [("path", (None, "mine")), ("file", ("f", b"theirs"))]
    assert berth.stranger.client.post(f"/v1/devboxes/{shared}/upload_file", files=form).status_code == 404
    assert ask(berth.colleague, shared, "read_file_contents", {"file_path": "mine"}).text == "secret"


def test_a_full_disk_says_so_and_spares_what_was_there(berth, shared) -> None:
    size = {"custom_cpu_cores": 1, "custom_gb_memory": 2, "custom_disk_size": 2}
    box = berth.owner.create(launch_parameters={"resource_size_request": "CUSTOM_SIZE", **size})
    written(berth.owner, box, "kept", "as it was")

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\nkept\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        piece = os.urandom(MIB)
        for _ in range(4 * 1024):
            yield piece
        yield b"\r\n--x--\r\n"

    try:
        answer = berth.owner.client.post(
            f"/v1/devboxes/{box}/upload_file", content=body(), timeout=180,
            headers={"content-type": "multipart/form-data; boundary=x"},
        )  # fmt: skip
        assert (answer.status_code, answer.json()["code"]) == (400, "no_space"), answer.text
    except (httpx.WriteError, httpx.ReadError):
        pass  # it was answered, and the connection closed, while we were still sending
    assert berth.owner.run(box, "cat kept; ls -A | grep -c berth")[0] == "as it was0\n"
    deadline = time.monotonic() + 20
    while (
        "no_space" in (answer := ask(berth.owner, box, "write_file_contents", {"file_path": "b", "contents": "c"})).text
    ):
        assert time.monotonic() < deadline, "what did not fit gives its space back"
        time.sleep(0.5)
    assert answer.status_code == 200
    berth.owner.shutdown(box)


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024


def web_processes(berth) -> list[int]:
    """Granian's own and its workers'."""
    found = [berth.pids()["web"]]
    for pid in found:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def test_a_gibibyte_each_way_in_flat_memory(berth, shared) -> None:
    size = 1024 * MIB
    piece = os.urandom(MIB)
    digest = hashlib.sha256()
    pids = web_processes(berth)
    before = {pid: rss(pid) for pid in pids}
    highest = dict(before)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            for pid in pids:
                highest[pid] = max(highest[pid], rss(pid))

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\nlarge\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(size // MIB):
            digest.update(piece)
            yield piece
        yield b"\r\n--x--\r\n"

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        answer = berth.owner.client.post(
            f"/v1/devboxes/{shared}/upload_file", content=body(), timeout=300,
            headers={"content-type": "multipart/form-data; boundary=x"},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        came = hashlib.sha256()
        with berth.owner.client.stream(
            "POST", f"/v1/devboxes/{shared}/download_file", json={"path": "large"}, timeout=300
        ) as stream:
            assert stream.headers["content-length"] == str(size)
            for data in stream.iter_raw():
                came.update(data)
    finally:
        done.set()
        watcher.join()
    assert came.digest() == digest.digest()
    assert max(highest[pid] - before[pid] for pid in pids) < 100 * MIB, (before, highest)
    berth.owner.run(shared, "rm large")


def test_uploads_and_downloads_count_as_open_streams(berth, shared) -> None:
    written(berth.owner, shared, "counted", "x")
    put = "UPDATE accounts_account SET max_open_streams = %s WHERE name = 'local' RETURNING 1"
    form = [("path", (None, "counted")), ("file", ("f", b"y", "application/octet-stream"))]
    try:
        berth.rows(put, 0)
        up = berth.owner.client.post(f"/v1/devboxes/{shared}/upload_file", files=form)
        down = ask(berth.owner, shared, "download_file", {"path": "counted"})
        assert (up.status_code, down.status_code) == (429, 429)
    finally:
        berth.rows(put, None)
    assert ask(berth.owner, shared, "download_file", {"path": "counted"}).content == b"x", "nothing was written"
    assert berth.owner.client.post(f"/v1/devboxes/{shared}/upload_file", files=form).status_code == 200


def test_a_reader_that_leaves_and_one_that_is_slow(berth, shared) -> None:
    berth.owner.run(shared, "head -c 300000000 /dev/zero > zeros")
    path = f"/v1/devboxes/{shared}/download_file"
    for _ in range(70):  # more than a box has places for: each one is given back
        with berth.owner.client.stream("POST", path, json={"path": "zeros"}) as stream:
            assert stream.status_code == 200, stream.read()
            next(stream.iter_raw())
    with berth.owner.client.stream("POST", path, json={"path": "zeros"}) as stream:
        time.sleep(3)
        assert sum(len(data) for data in stream.iter_raw()) == 300_000_000
    # Some processes wait a few seconds for the next file; then there is only the one that starts commands.
    deadline = time.monotonic() + 60
    while (left := berth.owner.run(shared, "pgrep -c boxd || true")[0].strip()) not in ("1", "0"):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
