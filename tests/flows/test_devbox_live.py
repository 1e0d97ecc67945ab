"""A devbox's launch work in a real box: the flow asks a real hostd, and what it made is looked at from inside."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from api.callers import Caller
from api.ids import new_id
from devboxes import launch, services
from hostd import messages
from hosts import delivery
from hosts.client import HostClient, HostRefused, ReadResult, use_fake
from tests.devbox_world import create, logged, make_host, promised, row, sleep_over, statuses, work
from tests.hostd.client import Watch
from tests.hostd.live_host import LiveHost, why_not

pytestmark = [pytest.mark.live, pytest.mark.django_db, pytest.mark.timeout(600)]


# What does not compress; the disk has 2 GiB.
FILL = 'python3 -c \'import os; b = os.urandom(1 << 20); f = open("big", "wb"); [f.write(b) for _ in range(2200)]\''
LOOK = "id -un; id -u; stat -c '%U %a %n' /etc/app/app.conf notes notes/today.txt empty; cat second /etc/app/app.conf"


class Local(HostClient):
    """The real client's verbs over hostd's own socket instead of SSH."""

    def __init__(self, host_id: str, live: LiveHost) -> None:
        self.host_id = host_id
        self.live = live

    def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> Any:
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return self.live.client.call(verb, body, **given)
        except messages.Refused as error:
            raise HostRefused(error.code, error.message, error.extra, host_id=self.host_id) from error

    def read(self, **fields: Any) -> ReadResult:
        with self.live.client.connect() as connection:
            reply = connection.call("read", **{name: value for name, value in fields.items() if value is not None})
            return ReadResult(reply["size"], reply["offset"], connection.take(reply["body"]))


@pytest.fixture(scope="module")
def live() -> Iterator[LiveHost]:
    if reason := why_not():
        pytest.skip(reason)
    host = LiveHost()
    try:
        host.set_up()
        host.start()
        yield host
    finally:
        host.remove()


@pytest.fixture
def host(db: None, live: LiveHost) -> Iterator[Local]:
    host_id = make_host("live").host_id
    from hosts.models import Host

    Host.objects.filter(pk=host_id).update(image_id=live.image)
    client = Local(host_id, live)
    use_fake(host_id, client)
    yield client
    use_fake(host_id, None)
    for box in live.report():
        live.client.destroy(box, fence=2**60)
    assert live.traces() == []


@pytest.fixture
def caller(db: None) -> Caller:
    from accounts.services import create_account

    return Caller(account_id=create_account("A").pk)


def events(watch: Watch, host: Local, devbox_id: str, within: float = 60) -> None:
    """Be the watcher and the worker until the devbox is neither provisioning nor initializing."""
    deadline = time.monotonic() + within
    while row(devbox_id).status in ("provisioning", "initializing"):
        assert time.monotonic() < deadline, (row(devbox_id).step, row(devbox_id).error_detail)
        work()
        if row(devbox_id).status == "initializing":
            watch.ack(*delivery.deliver(host.host_id, [cast(Any, watch.next(30))]))


def inside(host: Local, devbox_id: str, command: str, **user: Any) -> str:
    """What a command prints that is run as executions are."""
    pk = new_id("exe")
    devbox = row(devbox_id)
    who = launch.user_of(devbox.user_name, devbox.user_uid, devbox.user_home)
    body: Any = {"command": command, "env": {}, "cwd": devbox.user_home, "user": who, "stdin": "none", "login": True}
    reply = host.spawn(box=devbox_id, id=pk, fence=2**55, body=body, hold_ms=4000)
    assert reply.get("exit") == 0, reply
    return base64.b64decode(reply["stdout"]).decode()


def test_everything_that_launch_work_can_be(caller: Caller, host: Local) -> None:
    devbox_id = create(
        caller,
        environment_variables={"COLOUR": "blue and green"},
        file_mounts={"/etc/app/app.conf": "a=1\n", "notes/today.txt": "ü\n", "~/empty": ""},
        entrypoint='echo "started as $USER in $COLOUR" > started; exec sleep 1000',
        launch_parameters={
            "launch_commands": [
                'echo "$COLOUR|$HOME|$(whoami)|$(pwd)" > first',
                "sudo -n true && sleep 0.6 && cat first notes/today.txt > second && echo seen >&2",
            ],
            "user_parameters": {"username": "dev", "uid": 1234},
            "resource_size_request": "X_SMALL",
        },
    )
    with host.live.client.watch() as watch:
        events(watch, host, devbox_id)
    devbox = row(devbox_id)
    assert devbox.status == "running", devbox.why
    assert statuses(devbox_id) == ["provisioning", "initializing", "running"]
    assert inside(host, devbox_id, LOOK).splitlines() == [
        "dev",
        "1234",
        "dev 644 /etc/app/app.conf",
        "dev 755 notes",
        "dev 644 notes/today.txt",
        "dev 644 empty",
        "blue and green|/home/dev|dev|/home/dev",
        "ü",
        "a=1",
    ]
    assert inside(host, devbox_id, "cat started") == "started as dev in blue and green\n"
    assert ("seen" in [message for _, message, _ in logged(devbox_id)]) and logged(devbox_id)[-1][0] is not None
    # The entrypoint's end is the devbox's.
    with host.live.client.watch() as watch:
        inside(host, devbox_id, "pkill -x sleep")
        while row(devbox_id).status == "running":
            watch.ack(*delivery.deliver(host.host_id, [cast(Any, watch.next(10))]))
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.shutdown_reason, devbox.why) == (
        "gone",
        "entrypoint_exit",
        "its entrypoint ended with 143",
    )
    assert promised(host.host_id) == (0, 0, 0) and devbox_id not in host.live.report()


def test_the_root_user_needs_no_making(caller: Caller, host: Local) -> None:
    devbox_id = create(
        caller,
        file_mounts={"mine": "x"},
        launch_parameters={"user_parameters": {"username": "root", "uid": 0}, "launch_commands": ["pwd > where"]},
    )
    with host.live.client.watch() as watch:
        events(watch, host, devbox_id)
    assert inside(host, devbox_id, "id -u; cat where mine; stat -c %U mine").split() == ["0", "/root", "xroot"]


@pytest.mark.parametrize(
    ("parameters", "failure", "words"),
    [
        ({"launch_parameters": {"launch_commands": ["echo no >&2; exit 7"]}}, "execution_failed", "ended with 7:\nno"),
        (
            {"code_mounts": [{"repo_owner": "acme", "repo_name": "site", "token": "t0ps3cret"}]},
            "execution_failed",
            "fatal: unable to access 'https://github.com/acme/site.git/'",
        ),
        (
            {"file_mounts": {"/proc/1/nothing": "x"}},
            "execution_failed",
            "/proc/1/nothing",
        ),
        (
            {
                "launch_parameters": {
                    "launch_commands": [FILL],
                    "resource_size_request": "CUSTOM_SIZE",
                    "custom_cpu_cores": 1,
                    "custom_gb_memory": 2,
                    "custom_disk_size": 2,
                }
            },
            "out_of_disk",
            "because the disk is full",
        ),
        (
            {
                "launch_parameters": {
                    "launch_commands": ["python3 -c 'x = bytearray(2 << 30)'"],
                    "resource_size_request": "X_SMALL",
                }
            },
            "out_of_memory",
            "memory was used up",
        ),
    ],
    ids=["a command", "a code mount without the network", "a file mount", "the disk", "the memory"],
)
def test_what_fails_says_why(caller: Caller, host: Local, parameters: dict[str, Any], failure: str, words: str) -> None:
    devbox_id = create(caller, **parameters)
    with host.live.client.watch() as watch:
        events(watch, host, devbox_id, within=120)
    work()
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.failure_reason) == ("failure", failure), devbox.why
    assert words in devbox.why and "t0ps3cret" not in devbox.why + str(logged(devbox_id))
    assert devbox.step == "failed" and devbox_id not in host.live.report()


def test_shutdown_in_the_middle_of_launch_work(caller: Caller, host: Local) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["sleep 1000"]})
    work()
    assert row(devbox_id).status == "initializing" and devbox_id in host.live.report()
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and devbox_id not in host.live.report()
