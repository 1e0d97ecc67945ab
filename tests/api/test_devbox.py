"""`/v1/devboxes`: create, list, get, update, shutdown, keep_alive, metadata, through HTTP and as three callers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from api.ids import new_id
from devboxes.models import Devbox
from hosts.client import use_fake
from tests.conftest import Party
from tests.devbox_world import make_host, row, statuses, work, working
from tests.fake_host import FakeHost

VIEW_KEYS = {
    "id",
    "name",
    "status",
    "create_time_ms",
    "end_time_ms",
    "initiator_type",
    "initiator_id",
    "blueprint_id",
    "snapshot_id",
    "metadata",
    "failure_reason",
    "shutdown_reason",
    "launch_parameters",
    "capabilities",
    "state_transitions",
    "tunnel",
    "gateway_specs",
    "mcp_specs",
}


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    host = make_host()
    yield host
    use_fake(host.host_id, None)


def created(party: Party, body: Any = None, **headers: str) -> dict[str, Any]:
    answer = party.post(
        "/v1/devboxes", body, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- create ---


@pytest.mark.parametrize("body", [None, {}, {"mounts": [], "name": None, "launch_parameters": None, "secrets": {}}])
def test_nothing_need_be_said(alice: Party, fake: FakeHost, body: Any) -> None:
    view = created(alice, body)
    assert set(view) >= VIEW_KEYS
    assert (view["status"], view["name"], view["metadata"], view["capabilities"]) == ("provisioning", None, {}, [])
    assert view["launch_parameters"] == {
        "resource_size_request": "SMALL",
        "keep_alive_time_seconds": 3600,
        "architecture": "x86_64",
    }
    assert view["end_time_ms"] is None and view["tunnel"] is None
    assert [state["status"] for state in view["state_transitions"]] == ["provisioning"]
    assert (view["initiator_type"], view["initiator_id"]) == ("api", alice.key_id)
    assert abs(view["state_transitions"][0]["transition_time_ms"] - view["create_time_ms"]) < 5000


def test_everything_may_be_said(alice: Party, fake: FakeHost) -> None:
    body: dict[str, Any] = {
        "name": "mine",
        "environment_variables": {"A": "1", "_b": ""},
        "secrets": None,
        "file_mounts": {"/etc/a": "x", "~/b": "", "c/d": "ü"},
        "entrypoint": "serve",
        "metadata": {"team": "a/b", "env": "prod"},
        "code_mounts": [{"repo_name": "r", "repo_owner": "o"}],
        "mounts": [
            {"type": "file_mount", "target": "/x", "content": "y"},
            {"type": "code_mount", "repo_name": "s", "repo_owner": "o", "git_ref": "v1.0", "install_command": "make"},
        ],
        "launch_parameters": {
            "launch_commands": ["one", "two"],
            "resource_size_request": "CUSTOM_SIZE",
            "custom_cpu_cores": 0.5,
            "custom_gb_memory": 4,
            "custom_disk_size": 10,
            "available_ports": [80],
            "keep_alive_time_seconds": 172800,
            "architecture": "x86_64",
            "user_parameters": {"username": "root", "uid": 0},
            "required_services": [],
            "provisioning_tier": "flex",
            "after_idle": None,
            "lifecycle": None,
            "network_policy_id": None,
        },
        "tunnel": None,
        "gateways": None,
        "mcp": {},
    }
    view = created(alice, body)
    given = {key: value for key, value in body["launch_parameters"].items() if value is not None}
    given.pop("required_services")
    assert view["launch_parameters"] == given
    assert view["metadata"] == body["metadata"] and view["name"] == "mine"
    devbox = row(view["id"])
    assert (devbox.cpu_millis, devbox.memory_mb, devbox.disk_mb) == (500, 4096, 10240)
    assert (devbox.user_name, devbox.user_uid, devbox.user_home) == ("root", 0, "/root")
    assert devbox.launch_total == 10


UNBUILT: dict[str, Any] = {
    "secrets": {"A": "b"},
    "blueprint_id": "bpt_1",
    "blueprint_name": "b",
    "repo_connection_id": "r",
    "gateways": {"A": {"gateway": "g", "secret": "s"}},
    "mcp": {"A": {"mcp_config": "m", "secret": "s"}},
    "launch_parameters.network_policy_id": "np_1",
    "launch_parameters.required_services": ["db"],
    "launch_parameters.lifecycle": {"resume_triggers": {"axon_event": True}},
}

LAUNCH = "launch_parameters"

INVALID: list[tuple[str, Any]] = [
    ("name", 5),
    ("name", "x" * 256),
    ("environment_variables", []),
    ("environment_variables", {"A": 1}),
    ("environment_variables", {"A-B": "x"}),
    ("environment_variables", {"1A": "x"}),
    ("environment_variables", {"": "x"}),
    ("environment_variables", {"A": "x" * 131_072}),
    ("environment_variables", {f"A{n}": "x" * 100_000 for n in range(11)}),
    ("file_mounts", {"": "x"}),
    ("file_mounts", {"/a/": "x"}),
    ("file_mounts", {"/a/../b": "x"}),
    ("file_mounts", {"/a": None}),
    ("file_mounts", {"/a": "x" * (2 * 1024 * 1024 + 1)}),
    ("entrypoint", ["a"]),
    ("entrypoint", "x" * (1024 * 1024 + 1)),
    ("metadata", {"a b": "x"}),
    ("metadata", {"a": 1}),
    ("metadata", {"a": "x" * 1025}),
    ("metadata", {f"k{n}": "" for n in range(65)}),
    ("metadata", {"k" * 129: ""}),
    ("code_mounts", {}),
    ("code_mounts", [{"repo_name": "a"}]),
    ("code_mounts", [{"repo_name": "..", "repo_owner": "a"}]),
    ("code_mounts", [{"repo_name": "a/b", "repo_owner": "a"}]),
    ("code_mounts", [{"repo_name": "a", "repo_owner": "a", "git_ref": "--upload-pack=x"}]),
    ("code_mounts", [{"repo_name": "a", "repo_owner": "a", "token": "a\nb"}]),
    ("code_mounts", [{"repo_name": "a", "repo_owner": "a"}, {"repo_name": "a", "repo_owner": "b"}]),
    ("code_mounts", [{"repo_name": "a", "repo_owner": "a", "branch": "x"}]),
    ("mounts", [{"target": "/a", "content": "x"}]),
    ("mounts", [{"type": "volume"}]),
    ("mounts", ["x"]),
    ("mounts", [{"type": "object_mount", "object_id": "obj_1", "object_path": "/a"}]),
    ("mounts", [{"type": "agent_mount", "agent_id": "agt_1", "agent_name": "a"}]),
    ("mounts", [{"type": "broker_mount", "axon_id": "axn_1"}]),
    ("mounts", [{"type": "file_mount", "target": "/a"}]),
    ("mounts", [{"type": "file_mount", "target": "/a", "content": "x", "mode": 7}]),
    (LAUNCH, []),
    (f"{LAUNCH}.launch_commands", "make"),
    (f"{LAUNCH}.launch_commands", [1]),
    (f"{LAUNCH}.launch_commands", ["x"] * 257),
    (f"{LAUNCH}.resource_size_request", "HUGE"),
    (f"{LAUNCH}.resource_size_request", "CUSTOM_SIZE"),
    (f"{LAUNCH}.custom_cpu_cores", 2),
    (f"{LAUNCH}.available_ports", ["a"]),
    (f"{LAUNCH}.keep_alive_time_seconds", 0),
    (f"{LAUNCH}.keep_alive_time_seconds", 172_801),
    (f"{LAUNCH}.keep_alive_time_seconds", "60"),
    (f"{LAUNCH}.keep_alive_time_seconds", 1.5),
    (f"{LAUNCH}.architecture", "riscv"),
    (f"{LAUNCH}.user_parameters", {"username": "a"}),
    (f"{LAUNCH}.user_parameters", {"username": "Bob", "uid": 1}),
    (f"{LAUNCH}.user_parameters", {"username": "a;b", "uid": 1}),
    (f"{LAUNCH}.user_parameters", {"username": "a", "uid": -1}),
    (f"{LAUNCH}.user_parameters", {"username": "a", "uid": 65533}),
    (f"{LAUNCH}.user_parameters", {"username": "root", "uid": 5}),
    (f"{LAUNCH}.provisioning_tier", "cheap"),
    (f"{LAUNCH}.gpu", 1),
    ("colour", "blue"),
]


@pytest.mark.parametrize(("field", "value"), [*UNBUILT.items(), *INVALID], ids=lambda part: str(part)[:40])
def test_what_is_wrong_or_not_built_is_refused_by_name(alice: Party, fake: FakeHost, field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    answer = alice.post("/v1/devboxes", {outer: {inner: value} if inner else value})
    assert answer.status_code == 400, answer.text
    said = answer.json()
    assert said["code"] == "bad_request"
    names = {"resource_size_request": "custom_cpu_cores"} if value == "CUSTOM_SIZE" else {}
    assert names.get(inner, inner or outer) in said["message"], said["message"]
    if field in UNBUILT:
        assert "not available yet" in said["message"]
    assert not Devbox.objects.exists()


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'"x"', b'{"name": "a\\u0000b"}', b'{"name": "\\ud800"}', b'{"name": NaN}', b"\xff"],
)
def test_bodies_that_are_no_json_object_are_refused(alice: Party, fake: FakeHost, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/devboxes", "/v1/devboxes/create_and_await_running"):
        answer = alice.post(path, content=body, headers=headers)
        assert answer.status_code == 400, (path, answer.text)


SIZES: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({}, (1000, 2, 4)),
    ({"resource_size_request": "X_SMALL"}, (500, 1, 4)),
    ({"resource_size_request": "MEDIUM"}, (2000, 4, 8)),
    ({"resource_size_request": "LARGE"}, (2000, 8, 16)),
    ({"resource_size_request": "X_LARGE"}, (4000, 16, 16)),
    ({"resource_size_request": "XX_LARGE"}, (8000, 32, 16)),
    ({"resource_size_request": "CUSTOM_SIZE", "custom_cpu_cores": 1, "custom_gb_memory": 2}, (1000, 2, 4)),
    ({"resource_size_request": "CUSTOM_SIZE", "custom_cpu_cores": 99, "custom_gb_memory": 64}, (16000, 64, 16)),
]


@pytest.mark.parametrize(("parameters", "size"), SIZES)
def test_sizes(alice: Party, fake: FakeHost, parameters: dict[str, Any], size: tuple[int, int, int]) -> None:
    devbox = row(created(alice, {"launch_parameters": parameters})["id"])
    assert (devbox.cpu_millis, devbox.memory_mb // 1024, devbox.disk_mb // 1024) == size


def test_a_size_or_architecture_that_no_host_has(alice: Party, fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET memory_mb = 4096")
    answer = alice.post("/v1/devboxes", {"launch_parameters": {"resource_size_request": "LARGE"}})
    assert answer.status_code == 400 and "no host is large enough" in answer.json()["message"]
    answer = alice.post("/v1/devboxes", {"launch_parameters": {"architecture": "arm64"}})
    assert answer.status_code == 400 and "no host is arm64" in answer.json()["message"]
    created(alice, {"launch_parameters": {"resource_size_request": "MEDIUM"}})


def test_no_host_at_all(alice: Party) -> None:
    answer = alice.post("/v1/devboxes", {})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "enrol" in answer.json()["message"]


def test_while_the_first_host_is_being_enrolled(alice: Party, fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET state = 'enrolling', cpu_millis = 0, memory_mb = 0, disk_mb = 0")
    answer = alice.post("/v1/devboxes", {})
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_the_cap_counts_what_is_not_over(alice: Party, bob: Party, charlie: Party, fake: FakeHost) -> None:
    from accounts.models import Account

    Account.objects.filter(pk=alice.account_id).update(max_running_devboxes=2)
    first, _ = created(alice), created(bob)
    answer = alice.post("/v1/devboxes", {})
    assert answer.status_code == 429 and answer.headers["retry-after"] and answer.json()["code"] == "too_many_requests"
    created(charlie)
    alice.post(f"/v1/devboxes/{first['id']}/shutdown")
    created(alice)


def test_the_same_request_makes_one_devbox(alice: Party, charlie: Party, fake: FakeHost) -> None:
    one = created(alice, {"name": "a"}, x_request_id="r-1")
    assert created(alice, {"name": "a"}, x_request_id="r-1")["id"] == one["id"]
    assert created(charlie, {"name": "a"}, x_request_id="r-1")["id"] != one["id"]
    assert created(alice, {"name": "a"}, x_request_id="r-2")["id"] != one["id"]
    answer = alice.post("/v1/devboxes", {"name": "b"}, headers={"x-request-id": "r-1"})
    assert answer.status_code == 400 and "x-request-id" in answer.json()["message"]
    assert Devbox.objects.filter(account_id=alice.account_id).count() == 2
    work()
    assert created(alice, {"name": "a"}, x_request_id="r-1")["status"] == "running"


def test_a_refused_request_may_be_repeated(alice: Party, fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET memory_mb = 1")
    assert alice.post("/v1/devboxes", {}, headers={"x-request-id": "r"}).status_code == 400
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET memory_mb = 100000")
    created(alice, {}, x_request_id="r")


def test_without_a_key_or_with_one_that_may_only_read(alice: Party, web: Any, fake: FakeHost) -> None:
    from tests.conftest import make_party

    devbox_id = created(alice)["id"]
    for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{devbox_id}"), ("POST", f"/{devbox_id}/shutdown")):
        assert web.request(method, f"/v1/devboxes{path}").status_code == 401
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    assert reader.get(f"/v1/devboxes/{devbox_id}").status_code == 200
    for path in (
        "",
        "/create_and_await_running",
        f"/{devbox_id}",
        f"/{devbox_id}/shutdown",
        f"/{devbox_id}/keep_alive",
    ):
        assert reader.post(f"/v1/devboxes{path}", {}).status_code == 403
    assert row(devbox_id).status == "provisioning"


# --- get ---


def test_the_owner_and_her_colleague_see_it_a_stranger_does_not(
    alice: Party, bob: Party, charlie: Party, fake: FakeHost
) -> None:
    devbox_id = created(alice, {"name": "mine"})["id"]
    work()
    view = alice.get(f"/v1/devboxes/{devbox_id}").json()
    assert bob.get(f"/v1/devboxes/{devbox_id}").json() == view
    assert [state["status"] for state in view["state_transitions"]] == ["provisioning", "initializing", "running"]
    times = [state["transition_time_ms"] for state in view["state_transitions"]]
    assert times == sorted(times)
    assert view["keep_alive_end_time_ms"] > view["last_activity_time_ms"]
    unknown = alice.get(f"/v1/devboxes/{new_id('dbx')}")
    strangers = charlie.get(f"/v1/devboxes/{devbox_id}")
    assert unknown.status_code == strangers.status_code == 400
    assert strangers.json()["message"] == f"there is no devbox {devbox_id}"
    for other in ("dbx_1", "x" * 3000, "%00", "dbx_%27--"):
        assert alice.get(f"/v1/devboxes/{other}").status_code == 400


def test_the_view_tells_what_it_was_last_used_as_and_when(alice: Party, fake: FakeHost) -> None:
    devbox_id = created(alice)["id"]
    work()
    started = alice.get(f"/v1/devboxes/{devbox_id}").json()
    assert started["last_activity_kind"] is None
    seen = started["last_activity_time_ms"]
    for kind, path, body in (
        ("call", "", {"name": "used"}),
        ("command", "/execute_async", {"command": "true"}),
        ("terminal", "/create_pty_tunnel", {}),
        ("keep_alive", "/keep_alive", {}),
    ):
        assert alice.post(f"/v1/devboxes/{devbox_id}{path}", body).status_code == 200
        view = alice.get(f"/v1/devboxes/{devbox_id}").json()
        assert view["last_activity_kind"] == kind
        assert view["last_activity_time_ms"] >= seen
        seen = view["last_activity_time_ms"]
    # Who only looks leaves no trace: whoever waits for it to fall asleep would else keep it awake.
    alice.post(f"/v1/devboxes/{devbox_id}/wait_for_status", {"statuses": ["running"]})
    alice.get(f"/v1/devboxes/{devbox_id}/logs")
    view = alice.get(f"/v1/devboxes/{devbox_id}").json()
    assert (view["last_activity_kind"], view["last_activity_time_ms"]) == ("keep_alive", seen)


@pytest.mark.parametrize(
    "tail", ["", "/shutdown", "/keep_alive", "/create_gateway_token", "/create_mcp_token", "/wait_for_status"]
)
def test_unknown_and_strangers_devboxes_are_404(alice: Party, charlie: Party, fake: FakeHost, tail: str) -> None:
    devbox_id = created(alice)["id"]
    body = {"statuses": ["running"]} if tail == "/wait_for_status" else {}
    assert charlie.post(f"/v1/devboxes/{devbox_id}{tail}", body).status_code == 404
    assert alice.post(f"/v1/devboxes/{new_id('dbx')}{tail}", body).status_code == 404
    assert alice.post(f"/v1/devboxes/nonsense{tail}", body).status_code == 404
    assert row(devbox_id).status == "provisioning"


def test_get_is_two_statements(alice: Party, fake: FakeHost) -> None:
    devbox_id = created(alice)["id"]
    with CaptureQueriesContext(connection) as captured:
        assert alice.get(f"/v1/devboxes/{devbox_id}").status_code == 200
    # The key and the devbox are prepared statements below Django's own cursors: nothing else may be there.
    assert len(captured) == 0, [query["sql"] for query in captured]


def test_a_failure_says_why(alice: Party, fake: FakeHost) -> None:
    fake.script("break", exit=9, stderr=b"no such thing\n")
    devbox_id = created(alice, {"launch_parameters": {"launch_commands": ["break"]}})["id"]
    work()
    view = alice.get(f"/v1/devboxes/{devbox_id}").json()
    assert (view["status"], view["failure_reason"], view["shutdown_reason"]) == ("failure", "execution_failed", None)
    assert view["why"].endswith("ended with 9:\nno such thing")
    assert view["state_transitions"][-1] == {
        "status": "failure",
        "transition_time_ms": view["state_transitions"][-1]["transition_time_ms"],
        "failure_reason": "execution_failed",
    }
    assert view["end_time_ms"] >= view["create_time_ms"]


# --- update ---


def test_update_changes_what_is_given(alice: Party, bob: Party, fake: FakeHost) -> None:
    devbox_id = created(alice, {"name": "a", "metadata": {"x": "1"}})["id"]

    def update(body: Any) -> tuple[Any, Any]:
        answer = bob.post(f"/v1/devboxes/{devbox_id}", body)
        assert answer.status_code == 200, answer.text
        view = answer.json()
        assert view == alice.get(f"/v1/devboxes/{devbox_id}").json()
        return view["name"], view["metadata"]

    assert update({"name": "b"}) == ("b", {"x": "1"})
    assert update({"metadata": {"y": "2"}}) == ("b", {"y": "2"})
    assert update({}) == update(None) == update({"name": None, "metadata": None}) == ("b", {"y": "2"})
    assert update({"name": "", "metadata": {}}) == (None, {})
    for bad in ({"metadata": {"a b": "c"}}, {"name": 1}, {"status": "running"}):
        assert bob.post(f"/v1/devboxes/{devbox_id}", bad).status_code == 400


def test_a_repeated_update_does_not_undo_a_later_one(alice: Party, fake: FakeHost) -> None:
    path = f"/v1/devboxes/{created(alice)['id']}"
    alice.post(path, {"name": "first"}, headers={"x-request-id": "r"})
    alice.post(path, {"name": "second"})
    assert alice.post(path, {"name": "first"}, headers={"x-request-id": "r"}).json()["name"] == "second"


# --- shutdown and keep_alive ---


@pytest.mark.parametrize("ran", [False, True], ids=["while provisioning", "while running"])
@pytest.mark.parametrize("query", ["", "?force=true", "?force=false", "?force="])
def test_shutdown_answers_shutdown_at_once(alice: Party, bob: Party, fake: FakeHost, ran: bool, query: str) -> None:
    devbox_id = created(alice)["id"]
    if ran:
        work()
    view = bob.post(f"/v1/devboxes/{devbox_id}/shutdown{query}").json()
    assert (view["status"], view["shutdown_reason"]) == ("shutdown", "api_shutdown")
    assert view["end_time_ms"] >= view["create_time_ms"]
    again = alice.post(f"/v1/devboxes/{devbox_id}/shutdown")
    assert again.status_code == 200 and again.json() == view
    work()
    assert alice.post(f"/v1/devboxes/{devbox_id}/shutdown").json() == view
    assert fake.boxes == {} and statuses(devbox_id)[-1] == "shutdown"


def test_shutdown_of_a_failed_devbox_is_its_failure(alice: Party, fake: FakeHost) -> None:
    fake.script("break", exit=1)
    devbox_id = created(alice, {"launch_parameters": {"launch_commands": ["break"]}})["id"]
    work()
    answer = alice.post(f"/v1/devboxes/{devbox_id}/shutdown")
    assert answer.status_code == 200 and answer.json()["status"] == "failure"


def test_force_must_be_a_flag(alice: Party, fake: FakeHost) -> None:
    devbox_id = created(alice)["id"]
    assert alice.post(f"/v1/devboxes/{devbox_id}/shutdown?force=maybe").status_code == 400
    assert row(devbox_id).status == "provisioning"


def test_keep_alive(alice: Party, bob: Party, fake: FakeHost) -> None:
    devbox_id = created(alice)["id"]
    work()
    end = row(devbox_id).end_at
    answer = bob.post(f"/v1/devboxes/{devbox_id}/keep_alive")
    assert (answer.status_code, answer.json()) == (200, {})
    assert row(devbox_id).end_at == end, "it is the idle clock, not the keep-alive time"
    alice.post(f"/v1/devboxes/{devbox_id}/shutdown")
    assert alice.post(f"/v1/devboxes/{devbox_id}/keep_alive").status_code == 400


@pytest.mark.parametrize("what", ["create_gateway_token", "create_mcp_token"])
def test_tokens_are_not_available(alice: Party, fake: FakeHost, what: str) -> None:
    answer = alice.post(f"/v1/devboxes/{created(alice)['id']}/{what}", {"gateway": "g", "secret": "s"})
    assert answer.status_code == 400 and "not available" in answer.json()["message"]


# --- create and wait ---


def test_create_and_await_running_answers_once_it_runs(alice: Party, web: Any, fake: FakeHost) -> None:
    with working(web, fake):
        answer = alice.post("/v1/devboxes/create_and_await_running", {"name": "x"}, headers={"x-request-id": "r"})
    assert answer.status_code == 200 and answer.json()["status"] == "running" and answer.json()["name"] == "x"
    again = alice.post("/v1/devboxes/create_and_await_running", {"name": "x"}, headers={"x-request-id": "r"})
    assert again.json()["id"] == answer.json()["id"] and Devbox.objects.count() == 1


def test_create_and_await_running_answers_with_the_failure(alice: Party, web: Any, fake: FakeHost) -> None:
    fake.script("break", exit=1)
    with working(web, fake):
        answer = alice.post(
            "/v1/devboxes/create_and_await_running", {"launch_parameters": {"launch_commands": ["break"]}}
        )
    assert answer.status_code == 200 and answer.json()["status"] == "failure"


def test_create_and_await_running_holds_for_a_while_only(
    alice: Party, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devboxes.api.CREATE_HOLD_SECONDS", 0.2)
    answer = alice.post("/v1/devboxes/create_and_await_running", {})
    assert answer.status_code == 200 and answer.json()["status"] == "provisioning"


def test_create_and_await_running_refuses_like_create(alice: Party, fake: FakeHost) -> None:
    for body in ({"colour": 1}, {"snapshot_id": "snp_1"}):
        assert alice.post("/v1/devboxes/create_and_await_running", body).status_code == 400
    assert not Devbox.objects.exists()
