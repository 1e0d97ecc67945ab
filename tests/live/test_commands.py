"""Commands in real boxes behave as on a real machine."""

from __future__ import annotations

import base64
import threading
import time

import pytest

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox for the commands that leave it as it was."""
    box = berth.owner.create(name="commands", environment_variables={"COLOUR": "sea green"})
    yield box
    berth.owner.shutdown(box)


@pytest.fixture
def run(berth, shared):
    return lambda command, **more: berth.owner.run(shared, command, **more)


def test_output_and_errors_are_apart_and_the_exit_status_is_the_commands(run) -> None:
    assert run("echo out; echo err >&2; exit 42") == ("out\n", "err\n", 42)


@pytest.mark.parametrize(
    ("command", "status"), [("true", 0), ("false", 1), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_exit_statuses(run, command: str, status: int) -> None:
    assert run(command)[2] == status


def test_it_is_a_login_shell_of_the_user_in_its_home(run) -> None:
    stdout, _, status = run('shopt -q login_shell && echo login; echo "$USER $HOME $PWD $(id -un) $COLOUR"')
    assert (stdout, status) == ("login\nuser /home/user /home/user user sea green\n", 0)


def test_redirects_to_the_standard_streams_by_name(run) -> None:
    assert run("echo a > /dev/stdout; echo b >> /dev/stdout; echo c > /dev/stderr") == ("a\nb\n", "c\n", 0)


def test_text_in_any_language_and_bytes_that_are_no_text(run) -> None:
    assert run("printf 'grüße 你好 🙂'")[0] == "grüße 你好 🙂"
    stdout, _, status = run(
        "head -c 4096 /dev/urandom > /tmp/bytes; base64 -w0 /tmp/bytes; echo; cat /tmp/bytes | base64 -w0"
    )
    first, second = stdout.split("\n")
    assert status == 0 and base64.b64decode(first) == base64.b64decode(second) and len(base64.b64decode(first)) == 4096
    raw = run(r"printf 'a\377\0b'")[0]
    assert raw.startswith("a") and raw.endswith("b")


def test_a_large_output_arrives_whole_through_the_stream(berth, shared) -> None:
    begun = berth.owner.post(f"/v1/devboxes/{shared}/execute_async", {"command": "seq 1 300000"})
    path = f"/v1/devboxes/{shared}/executions/{begun['execution_id']}"
    berth.owner.post(f"{path}/wait_for_status", {"statuses": ["completed"]})
    import json

    output = ""
    with berth.owner.client.stream("GET", f"{path}/stream_stdout_updates") as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                output += json.loads(line[5:]).get("output", "")
    assert output == "".join(f"{n}\n" for n in range(1, 300_001))


def test_a_long_command_arrives_whole(run) -> None:
    text = "x" * 300_000
    assert run(f"cat > /tmp/long <<'END'\n{text}\nEND\nwc -c < /tmp/long") == ("300001\n", "", 0)


def test_a_background_server_outlives_its_command_and_goes_on_writing(run) -> None:
    stdout, _, status = run("(while :; do echo tick; sleep 0.05; done) & echo started $!")
    assert status == 0
    pid = int(stdout.split("started ")[1].split()[0])
    time.sleep(0.5)
    assert run(f"kill -0 {pid} && echo alive")[0] == "alive\n"
    assert run(f"kill {pid}; sleep 0.1; kill -0 {pid} 2>/dev/null || echo gone")[0] == "gone\n"


def test_sudo_apt_and_a_low_port(run) -> None:
    assert run("sudo id -u")[0] == "0\n"
    assert run("sudo dpkg --audit && echo fine")[::2] == ("fine\n", 0)
    serve = "sudo python3 -m http.server 80 >/dev/null 2>&1 & sleep 0.7"
    served = run(f"{serve}; curl -s -o /dev/null -w '%{{http_code}}' localhost:80")
    assert served[0] == "200"
    run("sudo pkill -f 'http.server 80'")


def test_many_commands_at_once_each_get_their_own_output(berth, shared) -> None:
    results: dict[int, tuple[str, str, int]] = {}

    def one(n: int) -> None:
        results[n] = berth.owner.run(shared, f"echo {n}; echo e{n} >&2; exit {n}")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {n: (f"{n}\n", f"e{n}\n", n) for n in range(20)}


def test_the_same_command_id_runs_once(berth, shared) -> None:
    body = {"command": "echo ran >> /tmp/once; cat /tmp/once", "command_id": "once-1", "optimistic_timeout": 10}
    first = berth.owner.post(f"/v1/devboxes/{shared}/execute", body)
    again = berth.owner.post(f"/v1/devboxes/{shared}/execute", body)
    assert first["execution_id"] == again["execution_id"]
    assert first["stdout"] == again["stdout"] == "ran\n"


def test_what_tries_to_end_everything_ends_only_the_commands(berth, box: str) -> None:
    """The way into the box must survive what users type."""
    owner = berth.owner
    for command in (
        "pkill -f python",
        "killall python3 2>/dev/null",
        "kill -9 -1",
        "sudo kill -9 -1",
        "sudo kill -STOP -1",
    ):
        begun = owner.post(f"/v1/devboxes/{box}/execute_async", {"command": command})
        path = f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
        deadline = time.monotonic() + 20
        while owner.get(path)["status"] != "completed" and time.monotonic() < deadline:
            time.sleep(0.1)
            if "STOP" in command and time.monotonic() > deadline - 17:
                owner.post(f"{path}/kill", {"kill_process_group": True})
                break
        assert owner.run(box, "echo still here", timeout=40) == ("still here\n", "", 0), command
