"""The daemon becomes another bundle: nothing is cut, and one that would not serve never takes over. Needs no root."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import bundle, messages
from hostd.messages import Refused
from tests.hostd.client import new_id
from tests.hostd.stub_daemon import STUB, Host, code, until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    try:
        yield found
    finally:
        found.remove()


def stub_bundle(extra: str = "") -> bundle.Bundle:
    """A bundle of the real tree that starts the stubs."""
    main = f"import sys\nsys.path.append({str(STUB.parent)!r})\nimport stub_host\n{extra}\n"
    main += "sys.exit(stub_host.main(sys.argv[1:]))\n"
    with zipfile.ZipFile(io.BytesIO(bundle.build().data)) as real:
        found = io.BytesIO()
        with zipfile.ZipFile(found, "w") as archive:
            for name in real.namelist():
                archive.writestr(name, main if name == "__main__.py" else real.read(name))
    return bundle.Bundle(found.getvalue(), hashlib.sha256(found.getvalue()).hexdigest())


def test_a_shipped_bundle_takes_over_and_nothing_is_cut(host: Host):
    host.start()
    assert host.process is not None
    box, exe = new_id("dbx"), new_id("exe")
    up = host.create(box, 4)
    host.client.spawn(box, exe, "sleep 2 9")
    shipped = stub_bundle()
    for _ in range(2):
        host.client.call("ship", shipped.data, digest=shipped.digest)
    errors: list[BaseException] = []
    served = [0]
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                host.client.call("hello")
                served[0] += 1
            except BaseException as error:
                errors.append(error)

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    with host.client.connect() as kept:
        kept.call("state", box=box, id=exe)
        host.client.call("restart", digest=shipped.digest)
        until(lambda: host.client.call("hello")["digest"] == shipped.digest)
        assert kept.call("state", box=box, id=exe)["id"] == exe
    stop.set()
    for asker in askers:
        asker.join()
    assert served[0] > 20 and not errors
    assert host.process.poll() is None  # the same process, so whoever supervises it sees no end
    assert host.create(box, 4) == up
    with host.client.watch() as watch:
        assert (event := watch.next())["id"] == exe and event["exit"] == 9
    assert os.path.realpath(host.folder / "bundles" / "current.pyz").endswith(f"{shipped.digest}.pyz")
    host.client.call("restart", digest=shipped.digest)  # again, into itself
    until(lambda: host.client.call("hello")["digest"] == shipped.digest)
    assert host.report()[box]["state"] == "up"


def edited_bundle(name: str, text: str) -> bundle.Bundle:
    """The real tree with more at the end of one module."""
    with zipfile.ZipFile(io.BytesIO(bundle.build().data)) as real:
        found = io.BytesIO()
        with zipfile.ZipFile(found, "w") as archive:
            for entry in real.namelist():
                archive.writestr(entry, real.read(entry) + (text.encode() if entry == name else b""))
    return bundle.Bundle(found.getvalue(), hashlib.sha256(found.getvalue()).hexdigest())


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("hostd/serve.py", "\nimport no_such_module\n", "no_such_module"),  # only the daemon itself loads this one
        ("hostd/spawner.py", "\n)\n", "SyntaxError"),
        (
            "hostd/config.py",
            "\nload = lambda path: _need(False, 'root', 'elsewhere', path)\n",
            "root must be elsewhere",
        ),
        ("__main__.py", "", "was not shipped"),
    ],
)
def test_a_bundle_that_would_not_serve_never_takes_over(host: Host, name: str, text: str, why: str):
    host.start()
    assert host.process is not None
    box = new_id("dbx")
    up = host.create(box)
    broken = edited_bundle(name, text)
    if text:
        host.client.call("ship", broken.data, digest=broken.digest)
    with pytest.raises(Refused, match=why):
        host.client.call("restart", digest=broken.digest)
    assert host.process.poll() is None and host.create(box) == up
    assert host.client.call("hello")["digest"] != broken.digest


def test_bundles_that_must_not_run(host: Host):
    host.start()
    shipped, broken = stub_bundle(), stub_bundle("raise SystemExit('broken')")
    assert code(lambda: host.client.call("ship", shipped.data + b"x", digest=shipped.digest)) == "bad_request"
    assert code(lambda: host.client.call("restart", digest=shipped.digest)) == "bad_request"
    host.client.call("ship", broken.data, digest=broken.digest)
    assert code(lambda: host.client.call("restart", digest=broken.digest)) == "bad_request"
    with host.client.connect() as connection:  # a body that is cut leaves nothing
        connection.socket.sendall(messages.request("ship", digest=shipped.digest, body=100) + b"x")
    assert host.answers()
    assert [path.name for path in (host.folder / "bundles").iterdir()] == [f"{broken.digest}.pyz"]
