"""Drives an installation with the published Python SDK, through every operation there is so far.

Runs in the SDK's own environment, not in Berth's, so it imports nothing of ours: ``python config/proof.py URL KEY``.
Prints what it did with times; the exit status is the number of operations that went wrong (at most 100).
"""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import runloop_api_client  # type: ignore[import-not-found]  # this runs in the client's own environment
from runloop_api_client import Runloop

Check = Callable[[], None]


class Proof:
    """Runs checks one after another; a failed one is told and does not stop the rest."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, name: str, work: Check) -> None:
        began = time.monotonic()
        try:
            work()
            verdict = "ok"
        except Exception as error:
            self.failed += 1
            verdict = f"FAILED  {type(error).__name__}: {str(error)[:400]}"
        sys.stdout.write(f"# {name:<58} {1000 * (time.monotonic() - began):8.1f} ms  {verdict}\n")
        sys.stdout.flush()


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"found {found!r}, wanted {wanted!r}")


def refused(status: int, work: Callable[[], object]) -> None:
    try:
        work()
    except runloop_api_client.APIStatusError as error:
        expect(error.status_code, status)
    else:
        raise AssertionError(f"was not refused with {status}")


def operations(url: str) -> set[tuple[str, str]]:
    """(method, path template) of every operation that the installation says it has, in its own description."""
    with urllib.request.urlopen(f"{url}/openapi.yaml", timeout=30) as answer:  # noqa: S310 - the installation's own
        text = answer.read().decode()
    found = set()
    path = method = ""
    for line in text[text.index("\npaths:") :].splitlines():
        if match := re.fullmatch(r"  (/\S+):", line):
            path = match[1]
        elif match := re.fullmatch(r"    (get|post|put|patch|delete):", line):
            method = match[1].upper()
        elif line.startswith("      summary: ") and line != "      summary: Not available":
            found.add((method, path))
        elif line.startswith("components:"):
            break
    return found


def never_asked_for(offered: set[tuple[str, str]], asked: set[tuple[str, str]]) -> list[str]:
    """The operations that no request was for. A path without a placeholder goes before one with."""
    left = set(offered)
    for method, path in asked:
        fitting = [
            one for one in offered
            if one[0] == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", one[1]), path)
        ]  # fmt: skip
        left -= {min(fitting, key=lambda one: one[1].count("{"))} if fitting else set()
    return sorted(f"{method} {path}" for method, path in left)


def prove(url: str, key: str) -> int:
    asked: set[tuple[str, str]] = set()

    class Recorded(Runloop):  # type: ignore[misc]
        """The client as it is published; it keeps in mind what it was asked for."""

        def _prepare_request(self, request: Any) -> None:
            asked.add((request.method, request.url.path))

    client = Recorded(base_url=url, bearer_token=key, max_retries=1)
    devboxes, executions = client.devboxes, client.devboxes.executions
    proof = Proof()
    check = proof.check
    boxes: dict[str, str] = {}

    def create() -> None:
        box = devboxes.create_and_await_running(
            name="proof",
            metadata={"made-by": "proof", "run": "1"},
            environment_variables={"GREETING": "good day"},
            file_mounts={"/home/user/note.txt": "kept"},
            launch_parameters={
                "launch_commands": ["echo launched > /tmp/launched"],
                "resource_size_request": "X_SMALL",
                "keep_alive_time_seconds": 600,
            },
        )
        expect(box.status, "running")
        boxes["main"] = box.id

    check("create_and_await_running", create)
    if "main" not in boxes:
        sys.stdout.write("# without a devbox nothing else can be tried\n")
        return proof.failed
    main = boxes["main"]

    def output(command: str, stdout: str, stderr: str = "", status: int = 0) -> None:
        done = devboxes.execute_sync(main, command=command)
        expect((done.stdout, done.stderr, done.exit_status), (stdout, stderr, status))

    def view() -> None:
        box = devboxes.retrieve(main)
        expect((box.name, box.status, (box.metadata or {})["made-by"]), ("proof", "running", "proof"))
        expect([move.status for move in box.state_transitions or []], ["provisioning", "initializing", "running"])

    def listing() -> None:
        expect(next(iter(devboxes.list(status="running", limit=1))).id, main)

    def update() -> None:
        expect(devboxes.update(main, name="renamed").name, "renamed")
        expect(devboxes.retrieve(main).name, "renamed")

    def execute() -> None:
        done = devboxes.execute(main, command="echo at once; exit 5", command_id="proof-1", optimistic_timeout=10)
        expect((done.status, done.stdout, done.exit_status), ("completed", "at once\n", 5))
        again = devboxes.execute(main, command="echo at once; exit 5", command_id="proof-1", optimistic_timeout=10)
        expect(again.execution_id, done.execution_id)

    def execute_async() -> None:
        begun = devboxes.execute_async(main, command="sleep 0.3; echo later")
        done = executions.await_completed(begun.execution_id, devbox_id=main)
        expect((done.status, done.stdout), ("completed", "later\n"))
        expect(executions.retrieve(begun.execution_id, devbox_id=main).stdout, "later\n")

    def streamed() -> None:
        begun = devboxes.execute_async(main, command="for i in 1 2 3; do echo line $i; sleep 0.1; done; echo odd >&2")
        with executions.stream_stdout_updates(begun.execution_id, devbox_id=main) as stream:
            expect("".join(part.output for part in stream), "line 1\nline 2\nline 3\n")
        with executions.stream_stderr_updates(begun.execution_id, devbox_id=main) as stream:
            expect("".join(part.output for part in stream), "odd\n")

    def stdin() -> None:
        begun = devboxes.execute_async(main, command="read line; echo heard $line", attach_stdin=True)
        executions.send_std_in(begun.execution_id, devbox_id=main, text="this\n")
        done = executions.await_completed(begun.execution_id, devbox_id=main)
        expect((done.stdout, done.exit_status), ("heard this\n", 0))

    def named_shell() -> None:
        # Not every published client has the field.
        named = {"shell_name": "proof"}
        expect(
            devboxes.execute_sync(main, command="cd /usr; said=hello; f() { echo $said; }", extra_body=named).stdout, ""
        )
        done = devboxes.execute_sync(main, command="pwd; f; exit 3", extra_body=named)
        expect((done.stdout, done.exit_status), ("/usr\nhello\n", 3))
        expect(devboxes.execute_sync(main, command="pwd", extra_body=named).stdout, "/home/user\n")

    def account() -> None:
        mine = client.accounts.me()
        other = client.apikeys.create(name="from the proof")
        expect(Runloop(base_url=url, bearer_token=other.key_secret, max_retries=0).accounts.me().id, mine.id)

    def metadata() -> None:
        keys: Any = client.get("/v1/devboxes/metadata/keys", cast_to=object)
        values: Any = client.get("/v1/devboxes/metadata/keys/made-by/values", cast_to=object)
        expect(("made-by" in str(keys), "proof" in str(values)), (True, True))

    def created() -> None:
        box = devboxes.create(name="second")
        expect(devboxes.await_running(box.id).status, "running")
        expect(devboxes.shutdown(box.id).status, "shutdown")

    def created_at_once() -> None:
        # Older clients make and wait in two requests; the operation is asked for by its path, so that all try it.
        box: Any = client.post("/v1/devboxes/create_and_await_running", cast_to=object, body={"name": "third"})
        expect(box["status"], "running")
        expect(devboxes.shutdown(box["id"]).status, "shutdown")

    def evictions() -> None:
        with devboxes.watch_evictions() as events:
            expect(events.response.status_code, 200)

    def files() -> None:
        devboxes.write_file_contents(main, file_path="~/made/here.txt", contents="grüße\n")
        expect(devboxes.read_file_contents(main, file_path="made/here.txt"), "grüße\n")
        data = bytes(range(256)) * 5000
        devboxes.upload_file(main, path="made/bytes", file=data)
        expect(devboxes.download_file(main, path="/home/user/made/bytes").read() == data, True)
        refused(404, lambda: devboxes.read_file_contents(main, file_path="missing"))
        older = {"file_path": "made/here.txt", "contents": "again"}
        client.post(f"/v1/devboxes/{main}/write_file", cast_to=object, body=older)
        expect(devboxes.read_file_contents(main, file_path="made/here.txt"), "again")

    def terminal() -> None:
        # Older clients have no pty resource, so the operations are asked for by their paths, as on the API's host.
        made: Any = client.post(f"/v1/devboxes/{main}/create_pty_tunnel", cast_to=object)
        expect((len(made["tunnel_key"]), bool(made["auth_token"])), (26, True))
        session: Any = client.get(f"/pty/proof?devbox_id={main}&cols=100&rows=40", cast_to=object)
        expect((session["created"], session["attached"], session["cols"]), (True, False, 100))
        control = f"/pty/proof/control?devbox_id={main}"
        client.post(control, cast_to=object, body={"action": "resize", "cols": 90, "rows": 30})
        again: Any = client.get(f"/pty/proof?devbox_id={main}", cast_to=object)
        expect((again["created"], again["cols"], again["rows"]), (False, 90, 30))
        closed: Any = client.post(control, cast_to=object, body={"action": "close"})
        expect(closed["status"], "closed")
        refused(404, lambda: client.post(control, cast_to=object, body={"action": "close"}))

    def tunnel() -> None:
        made = devboxes.enable_tunnel(main, auth_mode="authenticated")
        expect(devboxes.enable_tunnel(main).tunnel_key, made.tunnel_key)
        expect(devboxes.retrieve(main).tunnel.auth_token, made.auth_token)
        output("mkdir -p site && echo through > site/page && (cd site && setsid python3 -m http.server 8123 "
               "--bind 127.0.0.1 > /dev/null 2>&1 &)", "")  # fmt: skip

        def page(token: str) -> int:
            named = {"Host": f"8123-{made.tunnel_key}.tunnel.berth.test", "Authorization": f"Bearer {token}"}
            asking = urllib.request.Request(f"{url}/page", headers=named)  # noqa: S310 - the installation's own
            try:
                with urllib.request.urlopen(asking, timeout=30) as answer:  # noqa: S310
                    expect(answer.read(), b"through\n")
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        expect(page("another"), 401)
        deadline = time.monotonic() + 20
        while page(made.auth_token) == 502 and time.monotonic() < deadline:
            time.sleep(0.1)  # it does not listen yet
        expect(page(made.auth_token), 200)
        devboxes.remove_tunnel(main)
        expect(devboxes.retrieve(main).tunnel, None)
        time.sleep(1.5)
        expect(page(made.auth_token), 404)

    def ssh_key() -> None:
        first, second = (devboxes.create_ssh_key(main) for _ in range(2))
        expect((first.id, first.url, first.url.endswith(".")), (main, second.url, False))
        expect(first.ssh_private_key.startswith("-----BEGIN OPENSSH PRIVATE KEY-----\n"), True)
        expect(first.ssh_private_key != second.ssh_private_key, True)

    def killed() -> None:
        begun = devboxes.execute_async(main, command="sleep 300")
        executions.kill(begun.execution_id, devbox_id=main)
        done = executions.await_completed(begun.execution_id, devbox_id=main)
        expect(done.status, "completed")
        if done.exit_status not in (137, 143):
            raise AssertionError(f"exit status {done.exit_status}")

    def interrupted() -> None:
        begun = devboxes.execute_async(main, command="trap 'echo heard; exit 9' INT; while :; do sleep 0.1; done")
        time.sleep(0.5)
        executions.send_std_in(begun.execution_id, devbox_id=main, signal="INTERRUPT")
        done = executions.await_completed(begun.execution_id, devbox_id=main)
        expect((done.stdout, done.exit_status), ("heard\n", 9))

    def listed_and_explained() -> None:
        # Ours beyond the clients' own methods: asked for by path.
        done = devboxes.execute(main, command="kill -9 $$", command_id="proof-2", optimistic_timeout=10)
        expect(done.exit_status, 137)
        page: Any = client.get(f"/v1/devboxes/{main}/executions?limit=1", cast_to=object)
        expect([(one["execution_id"], one["exit_status"]) for one in page["executions"]], [(done.execution_id, 137)])
        why: Any = client.get(f"/v1/devboxes/{main}/executions/{done.execution_id}/why", cast_to=object)
        expect((why["cause"]["kind"], why["cause"]["signal"], why["exit_status"]), ("signal", 9, 137))
        waited = executions.await_completed(done.execution_id, devbox_id=main)
        expect((waited.exit_status, waited.why), (137, why["cause"]["message"]))
        box: Any = client.get(f"/v1/devboxes/{main}/why", cast_to=object)
        expect((box["status"], box["cause"], box["phases"][-1]["phase"]), ("running", None, "running"))
        expect([item["exit_status"] for item in box["launch"]], [0] * box["launch_total"])

    def big() -> None:
        begun = devboxes.execute_async(main, command="seq 1 400000")
        with executions.stream_stdout_updates(begun.execution_id, devbox_id=main) as stream:
            lines = "".join(part.output for part in stream).splitlines()
        expect((len(lines), lines[-1]), (400_000, "400000"))

    def logged() -> None:
        begun = devboxes.execute_async(main, command="echo written down; sleep 300")
        with executions.stream_stdout_updates(begun.execution_id, devbox_id=main) as stream:
            expect(next(iter(stream)).output, "written down\n")
        told = devboxes.logs.list(main, execution_id=begun.execution_id).logs
        expect([entry.message for entry in told if entry.message], ["written down"])
        executions.kill(begun.execution_id, devbox_id=main)
        executions.await_completed(begun.execution_id, devbox_id=main)
        boxes["logged"] = begun.execution_id
        sources = [entry.source for entry in devboxes.logs.list(main).logs]
        expect(("setup_commands" in sources, "exec" in sources), (True, True))

    def log_after_the_end() -> None:
        # No published client follows a log; after the devbox's end what it tells is whole, and the answer ends.
        path = f"/v1/devboxes/{main}/logs/tail"
        asked.add(("GET", path))
        wanted = f"{url}{path}?execution_id={boxes['logged']}"
        tail = urllib.request.Request(wanted, headers={"authorization": f"Bearer {key}"})  # noqa: S310
        with urllib.request.urlopen(tail, timeout=60) as answer:  # noqa: S310 - the installation's own
            text = answer.read().decode()
        told = [line for line in text.splitlines() if line.startswith("data: ")]
        expect((len(told), "written down" in text, "event: error" in text), (3, True, False))

    def background() -> None:
        output("python3 -m http.server 8123 >/dev/null 2>&1 & sleep 0.7; echo started", "started\n")
        output("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8123/", "200")

    def without_key() -> None:
        stranger = Runloop(base_url=url, bearer_token=key[:-1] + "_", max_retries=0)
        refused(401, lambda: stranger.devboxes.retrieve(main))

    def asleep() -> None:
        devboxes.write_file_contents(main, file_path="asleep.txt", contents="kept over night\n")
        begun = devboxes.execute_async(main, command="sleep 300")
        machine = devboxes.execute_sync(main, command="cat /etc/machine-id").stdout
        expect(devboxes.suspend(main).status, "suspending")
        reached(["suspended", "failure", "shutdown"], "suspended")
        done = executions.retrieve(begun.execution_id, devbox_id=main)
        expect((done.status, done.exit_status), ("completed", 137))
        refused(400, lambda: devboxes.suspend(main))
        expect(devboxes.resume(main).status, "provisioning")
        expect(devboxes.await_running(main).status, "running")
        expect(devboxes.read_file_contents(main, file_path="asleep.txt"), "kept over night\n")
        expect(devboxes.execute_sync(main, command="cat /etc/machine-id").stdout, machine)
        output("pgrep -x sleep || echo none", "none\n")

    def kept() -> None:
        devboxes.write_file_contents(main, file_path="kept.txt", contents="of the first\n")
        shot = devboxes.snapshot_disk(main, name="proof", metadata={"made-by": "proof"})
        snapshots = devboxes.disk_snapshots
        expect(snapshots.query_status(shot.id).status, "complete")
        expect(
            [one.id for one in snapshots.list(devbox_id=main, extra_query={"metadata[made-by]": "proof"})], [shot.id]
        )
        expect(snapshots.update(shot.id, name="renamed").name, "renamed")
        for path, wanted in (
            ("list_public", {"snapshots": [], "has_more": False, "total_count": 0}),
            ("metadata/keys", {"keys": ["made-by"]}),
            ("metadata/keys/made-by/values", {"key": "made-by", "values": ["proof"]}),
            ("public/metadata/keys", {"keys": []}),
            ("public/metadata/keys/made-by/values", {"key": "made-by", "values": []}),
        ):
            expect(client.get(f"/v1/devboxes/disk_snapshots/{path}", cast_to=object), wanted)
        copy = devboxes.create_and_await_running(snapshot_id=shot.id)
        expect((copy.status, copy.snapshot_id), ("running", shot.id))
        expect(devboxes.read_file_contents(copy.id, file_path="kept.txt"), "of the first\n")
        devboxes.shutdown(copy.id)
        for _ in range(2):
            snapshots.delete(shot.id)
        expect(snapshots.query_status(shot.id).status, "deleted")
        later = devboxes.snapshot_disk_async(main)
        deadline = time.monotonic() + 60
        while snapshots.query_status(later.id).status == "in_progress" and time.monotonic() < deadline:
            time.sleep(0.1)
        expect(snapshots.query_status(later.id).status, "complete")
        snapshots.delete(later.id)

    def used() -> None:
        view: Any = client.get(f"/v1/devboxes/{main}/usage", cast_to=object)
        expect((view["id"], view["status"]), (main, "running"))
        expect(0 <= view["total_active_seconds"] <= view["total_elapsed_seconds"], True)
        expect(view["disk_gb_seconds"], 4 * view["total_elapsed_seconds"])

    def reached(statuses: list[str], wanted: str) -> None:
        # Older clients have no `await_suspended`, so it is waited for by path.
        body = {"statuses": statuses, "timeout_seconds": 30}
        box: Any = client.post(f"/v1/devboxes/{main}/wait_for_status", cast_to=object, body=body)
        expect(box["status"], wanted)

    def shutdown() -> None:
        expect(devboxes.shutdown(main).status, "shutdown")
        expect(devboxes.shutdown(main).status, "shutdown")
        expect(devboxes.retrieve(main).shutdown_reason, "api_shutdown")

    check("account, API key", account)
    check("retrieve", view)
    check("list", listing)
    check("metadata keys and values", metadata)
    check("update", update)
    check("keep_alive", lambda: expect(devboxes.keep_alive(main) is not None, True))
    check(
        "execute_sync: output, errors, exit status",
        lambda: output("echo out; echo err >&2; exit 3", "out\n", "err\n", 3),
    )
    check(
        "execute_sync: user, home, environment",
        lambda: output('echo "$(whoami) $PWD $GREETING"', "user /home/user good day\n"),
    )
    check("execute_sync: mounts and launch commands", lambda: output("cat note.txt /tmp/launched", "keptlaunched\n"))
    check("execute_sync: root by sudo", lambda: output("sudo id -u", "0\n"))
    check("execute: hold, exit status, command_id", execute)
    check("execute_async, wait_for_status, retrieve", execute_async)
    check("stream_stdout_updates, stream_stderr_updates", streamed)
    check("logs", logged)
    check("stream of 2.6 MB", big)
    check("send_std_in", stdin)
    check("named shell: directory, variables, exit", named_shell)
    check("files: write, read, upload, download", files)
    check("terminal: key, session, resize, close", terminal)
    check("tunnel: enable, a request through it, remove", tunnel)
    check("create_ssh_key", ssh_key)
    check("snapshots: take, list, update, create from, delete", kept)
    check("kill", killed)
    check("send_std_in: interrupt", interrupted)
    check("executions listed; why of a command and of a devbox", listed_and_explained)
    check("background server", background)
    check("wrong key: 401", without_key)
    check(
        "unknown execution: 404", lambda: refused(404, lambda: executions.retrieve("exe_" + "0" * 26, devbox_id=main))
    )
    check("unknown snapshot: 400", lambda: refused(400, lambda: devboxes.create(snapshot_id="snp_" + "0" * 26)))
    check("create, await_running", created)
    check("create_and_await_running, by its path", created_at_once)
    check("evictions", evictions)
    check("suspend, resume", asleep)
    check("usage", used)
    check("shutdown, twice", shutdown)
    check("logs/tail of a devbox that is over", log_after_the_end)
    check("every operation was asked for", lambda: expect(never_asked_for(operations(url), asked), []))
    return proof.failed


if __name__ == "__main__":
    sys.exit(min(100, prove(sys.argv[1], sys.argv[2])))
