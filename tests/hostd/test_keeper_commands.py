"""Commands in a box: how they start, what they are given, how they end, who may ask."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterator

import pytest

from hostd import keeper_spec, packets, requests
from tests.hostd.bare_box import ROOT, USER, Box, Host, text

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(1)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "exe_" + "".join(c for c in request.node.name.lower() if c.isalnum())[-60:]


def test_exit_code_and_streams_apart(box: Box, name: str) -> None:
    answer = box.run(name, "echo out; echo err >&2; exit 3")
    assert (answer["exit"], answer["reason"], answer["sizes"]) == (3, None, [4, 4])
    assert (text(answer), text(answer, "stderr")) == ("out\n", "err\n")
    event = box.exit_event(name)
    assert {k: event[k] for k in ("box", "exit", "reason", "sizes", "dropped")} == {
        "box": "dbx_test",
        "exit": 3,
        "reason": None,
        "sizes": [4, 4],
        "dropped": [0, 0],
    }
    assert base64.b64decode(event["stdout"]) == b"out\n"
    assert event["started_at_ms"] <= event["exited_at_ms"]


def test_a_known_id_starts_nothing(box: Box, name: str) -> None:
    path = f"/tmp/{name}"
    first = box.run(name, f"echo x >> {path}; cat {path}")
    again = box.spawn(name, f"echo x >> {path}; cat {path}")
    assert first == again
    assert text(box.run(name + "b", f"cat {path}")) == "x\n"


def test_the_user_s_own_world(box: Box, name: str) -> None:
    answer = box.run(
        name,
        "id -u; id -g; pwd; umask; echo $HOME $USER $LOGNAME $SHELL $LANG $FOO; ps -o pid=,pgid=,sid= -p $$;"
        " grep -E 'Sig(Ign|Blk)|CapEff|NoNewPrivs' /proc/self/status; ulimit -n; shopt login_shell",
        env={"FOO": "b a r"},
    )
    lines = text(answer).splitlines()
    assert lines[:5] == ["1000", "1000", "/tmp", "0022", "/tmp tester tester /bin/bash C.UTF-8 b a r"]
    assert len(set(lines[5].split())) == 1, "its own session and process group"
    assert [line.split()[1] for line in lines[6:10]] == ["0" * 16, "0" * 16, "0" * 16, "0"]
    assert lines[10] == "1024"
    assert lines[11].split() == ["login_shell", "on"]


def test_root_and_any_other_user(box: Box, name: str) -> None:
    answer = box.run(name, "id -u; grep CapEff /proc/self/status; mkdir -p /tmp/r && chown 4321 /tmp/r", user=ROOT)
    assert text(answer).split() == ["0", "CapEff:", f"{keeper_spec.CAPABILITIES:016x}"]
    other = {"name": "other", "uid": 4321, "gid": 4322, "home": "/tmp/r"}
    answer = box.run(name + "o", "id -u; id -g; touch x && stat -c %u:%g x; echo $HOME", user=other)
    assert text(answer).split() == ["4321", "4322", "4321:4322", "/tmp/r"]


def test_supplementary_groups_of_the_box(box: Box, name: str) -> None:
    with open("/etc/group") as file:
        rows = [line.strip().split(":") for line in file]
    member = next((m for row in rows for m in row[3].split(",") if m), None)
    if member is None:
        pytest.skip("no user of this machine has a supplementary group")
    wanted = {row[2] for row in rows if member in row[3].split(",")} | {"1000"}
    answer = box.run(name, "id -G", user={**USER, "name": member})
    assert set(text(answer).split()) == wanted


@pytest.mark.parametrize(
    ("body", "code", "detail"),
    [
        ({"argv": ["/nonexistent"]}, 127, "/nonexistent: No such file or directory"),
        ({"argv": ["no-such-program"]}, 127, "no-such-program: No such file or directory"),
        ({"argv": ["/etc/passwd"]}, 126, "/etc/passwd: Permission denied"),
        ({"argv": ["/bin/true"], "cwd": "/nowhere"}, 126, "/nowhere: No such file or directory"),
    ],
)
def test_what_cannot_be_run(box: Box, name: str, body: dict, code: int, detail: str) -> None:
    answer = box.run(name, **body)
    assert answer["exit"] == code
    assert answer["reason"] == {"kind": "exec_failed", "detail": detail}
    assert detail in text(answer, "stderr")


def test_a_shell_s_own_127_is_no_exec_failure(box: Box, name: str) -> None:
    answer = box.run(name, "no-such-program")
    assert (answer["exit"], answer["reason"]) == (127, None)


def test_a_home_that_is_not_there(box: Box, name: str) -> None:
    assert text(box.run(name, "pwd", user={**USER, "home": "/gone"})) == "/\n"


def test_program_found_by_its_path(box: Box, name: str) -> None:
    assert text(box.run(name, argv=["printf", "%s|", "a b", "c"])) == "a b|c|"


def test_streams_can_be_opened_again(box: Box, name: str) -> None:
    answer = box.run(
        name,
        "echo 1; echo a > /dev/stderr; echo 2 > /dev/stdout; echo b >> /dev/stderr;"
        " echo 3 | tee /dev/fd/1; echo 4 > /dev/fd/1",
    )
    assert (text(answer), text(answer, "stderr")) == ("1\n2\n3\n3\n4\n", "a\nb\n")


def test_stdin_is_empty_by_default(box: Box, name: str) -> None:
    assert text(box.run(name, "cat; echo end; readlink /proc/self/fd/0")) == "end\n/dev/null\n"


def test_input_given_at_once(box: Box, name: str) -> None:
    data = os.urandom(700_000)
    answer = box.run(name, "sha256sum; cat /dev/stdin | wc -c", input=base64.b64encode(data).decode())
    import hashlib

    assert text(answer).split()[0] == hashlib.sha256(data).hexdigest()
    assert text(answer).split()[2] == "700000"  # opened again, it is read from its start
    assert text(box.run(name + "e", "cat; echo end", input="")) == "end\n"


def test_input_cannot_be_changed(box: Box, name: str) -> None:
    command = "echo x 2>/dev/null >> /dev/stdin || echo refused"
    assert text(box.run(name, command, input="YWJj")) == "refused\n"


def test_stdin_by_pieces(box: Box, name: str) -> None:
    box.spawn(name, "cat; echo end", stdin="pipe")

    def piece(request: str, data: bytes, eof: bool = False) -> dict:
        return box.ask(verb="stdin", id=name, request=request, eof=eof, raw=data)

    assert piece("r1", b"one\n") == {"ok": True, "accepted": True}
    assert piece("r1", b"one\n") == {"ok": True, "accepted": True}, "repeated, and not written twice"
    assert piece("r2", b"two\n")["accepted"]
    assert box.ask(verb="stdin", id=name, request="r3", eof=True) == {"ok": True, "accepted": True}
    assert text(box.wait(name)) == "one\ntwo\nend\n"
    assert piece("r4", b"x") == {"ok": True, "accepted": False}
    assert piece("r2", b"two\n") == {"ok": True, "accepted": True}, "it was, when it was asked first"


def test_stdin_up_to_a_mebibyte_waits_for_its_reader(box: Box, name: str) -> None:
    """It is accepted at once and whole, or not at all; what was accepted outlives the keeper."""
    box.spawn(name, "while [ ! -e /tmp/" + name + " ]; do sleep 0.05; done; wc -c", stdin="pipe")

    def piece(request: str, size: int, eof: bool = False) -> dict:
        return box.ask(verb="stdin", id=name, request=request, eof=eof, raw=b"x" * size)

    assert piece("a", 700_000)["accepted"]
    assert not piece("b", 400_000)["accepted"], "its buffer has no room for that"
    assert not piece("b", 400_000)["accepted"]
    assert piece("c", 300_000)["accepted"]
    assert piece("a", 700_000)["accepted"], "the same again is the same"
    box.kill_keeper()
    assert piece("end", 0, eof=True)["accepted"]
    assert not piece("late", 1)["accepted"]
    box.run(f"{name}go", "touch /tmp/" + name)
    assert text(box.wait(name)) == "1000000\n"


def test_an_interrupt_comes_once_and_after_the_input_before_it(box: Box, name: str) -> None:
    script = "trap 'echo interrupted' INT; while read -r line; do echo \"$line\"; done; echo end"
    box.spawn(name, script, stdin="pipe")
    time.sleep(0.2)

    def interrupt(request: str) -> dict:
        return box.ask(verb="kill", id=name, fence=1, signal=2, group=True, request=request)

    box.ask(verb="stdin", id=name, request="r1", raw=b"one\n")
    time.sleep(0.2)
    assert [interrupt("i1")["sent"] for _ in range(2)] == [True, True]
    box.kill_keeper()
    assert interrupt("i1")["sent"], "a successor knows it too"
    time.sleep(0.2)
    box.ask(verb="stdin", id=name, request="r2", eof=True, raw=b"two\n")
    assert text(box.wait(name)) == "one\ninterrupted\ntwo\nend\n"
    assert interrupt("i1")["sent"] and not interrupt("i2")["sent"], "it has ended"


def test_stdin_nobody_reads(box: Box, name: str) -> None:
    box.spawn(name, "exec <&-; sleep 5", stdin="pipe")
    time.sleep(0.1)
    assert box.ask(verb="stdin", id=name, request="a", raw=b"x") == {"ok": True, "accepted": False}
    assert box.ask(verb="kill", id=name, fence=1, signal=9, group=True)["id"] == name


AWKWARD = [
    "echo a; exit 3",
    'echo "unbalanced',
    "echo $(",
    "kill -9 $$",
    "set -e; false; echo no",
    "exec echo x",
    'echo "$0|$#|$*|$BASH_SOURCE"',
    "cat <<X\na\nX\n",
    "",
    'trap "echo bye" EXIT',
    "set -u; echo $z",
    "echo é ∀",
    'while read l; do echo "$l"; break; done </etc/passwd',
    "echo $LINENO\nnosuchcmd 2>/dev/null\necho $?",
]


@pytest.mark.parametrize("number", range(len(AWKWARD)))
def test_a_long_command_is_like_a_short_one(box: Box, name: str, number: int) -> None:
    command = AWKWARD[number]
    short = box.run(name + "s", command)
    long = box.run(name + "l", command + "\n" + "# é filler\n" * 20_000)
    assert (short["exit"], short["stdout"]) == (long["exit"], long["stdout"])


def test_a_command_of_a_mebibyte(box: Box, name: str) -> None:
    command = "echo start;" + "true\n" * ((requests.COMMAND_BYTES - 40) // 5) + "echo end"
    assert text(box.run(name, command)) == "start\nend\n"
    refused = box.spawn(name + "x", "x" * (requests.COMMAND_BYTES + 1))
    assert refused["error"]["code"] == "too_large"


def test_background_server_lives_on(box: Box, name: str) -> None:
    path = f"/tmp/{name}"
    command = f"(for i in $(seq 40); do echo tick $i; sleep 0.05; done; echo done > {path}) & echo started"
    started = time.monotonic()
    answer = box.run(name, command)
    assert time.monotonic() - started < 1, "the shell's exit is the command's"
    assert text(answer).startswith("started\n") or "started\n" in text(answer)
    size = answer["sizes"][0]
    for _ in range(100):
        if text(box.run(f"{name}{_}", f"cat {path} 2>/dev/null; true")) == "done\n":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the server was killed by its own output")
    assert box.ask(verb="state", id=name)["sizes"][0] == size, "the output is sealed at the exit"
    with open(f"{box.out}/{name}.1.late", "rb") as file:
        assert file.read().endswith(b"tick 40\n")


def test_sigpipe_is_deadly(box: Box, name: str) -> None:
    answer = box.run(name, "set -o pipefail; yes | head -1; echo $?")
    assert text(answer) == "y\n141\n"


@pytest.mark.parametrize(("signal", "code"), [(15, 143), (9, 137), (2, 130)])
def test_kill(box: Box, name: str, signal: int, code: int) -> None:
    box.spawn(name, argv=["/bin/sleep", "60"])
    assert box.ask(verb="kill", id=name, fence=1, signal=signal, group=False)["state"] in ("running", "exited")
    answer = box.wait(name)
    assert answer["exit"] == code
    assert answer["reason"] == {"kind": "killed", "detail": f"signal {signal} by request", "signal": signal}
    again = box.ask(verb="kill", id=name, fence=1, signal=signal, group=False)
    assert (again["state"], again["exit"]) == ("exited", code)


def test_kill_of_the_group(box: Box, name: str) -> None:
    box.spawn(name, "sleep 61 & sleep 61 & wait")
    time.sleep(0.1)
    box.ask(verb="kill", id=name, fence=1, signal=9, group=True)
    assert box.wait(name)["exit"] == 137
    assert text(box.run(name + "p", "ps -eo args | grep -c '[s]leep 61'; true")) == "0\n"


def test_kill_before_spawn_leaves_a_tombstone(box: Box, name: str) -> None:
    answer = box.ask(verb="kill", id=name, fence=3, signal=15, group=False)
    assert (answer["state"], answer["exit"], answer["reason"]["kind"]) == ("exited", 137, "killed_before_start")
    late = box.spawn(name, f"touch /tmp/{name}", fence=3)
    assert (late["exit"], late["reason"]["kind"]) == (137, "killed_before_start")
    assert box.run(name + "c", f"test -e /tmp/{name}")["exit"] == 1
    assert box.exit_event(name)["exit"] == 137


def test_an_older_fence_is_refused(box: Box, name: str) -> None:
    box.run(name, "true", fence=5)
    for answer in (box.spawn(name, "true", fence=4), box.ask(verb="kill", id=name, fence=4, signal=9)):
        assert (answer["error"]["code"], answer["error"]["fence"]) == ("stale_fence", 5)
    assert box.spawn(name, "true", fence=6)["exit"] == 0
    assert box.ask(verb="kill", id=name, fence=5, signal=9)["error"]["fence"] == 6


def test_hold_ends_early_or_on_time(box: Box, name: str) -> None:
    started = time.monotonic()
    answer = box.spawn(name, "sleep 1", hold_ms=200)
    assert answer["state"] == "running"
    assert answer["pid"] > 0
    assert 0.2 <= time.monotonic() - started < 0.8


def test_the_end_of_a_hold_answers_nobody_else(box: Box, name: str) -> None:
    """The exit comes after the answer, while another request of the same connection is busy."""
    raw = json.dumps({"command": "sleep 0.3", "user": USER}).encode()
    box.spawn(name + "f", "sleep 0.6; echo end")
    with box.open(verb="spawn", id=name, fence=1, hold_ms=100, raw=raw) as client:
        assert client.line()["state"] == "running"
        follow = client.more(verb="follow", box=box.name, id=name + "f", stream="stdout", offset=0)
        assert follow == {"ok": True, "offset": 0}
        data, trailer = client.frames()
        assert (data, trailer["complete"], trailer["exit"]) == (b"end\n", True, 0)


def test_a_command_that_never_ran_ends_its_followers(host: Host, name: str) -> None:
    box = host.box(11, name="dbx_never")
    box.run(name + "first", "true")
    os.kill(box.spawner(), 19)
    with box.open(verb="spawn", id=name, fence=1, raw=json.dumps({"command": "true", "user": USER}).encode()) as spawn:
        # The two requests travel on connections of their own: only an answer tells that the first one has been read.
        deadline = time.monotonic() + 10
        while box.ask(verb="state", id=name).get("error", {}).get("code") == "unknown_id":
            assert time.monotonic() < deadline, "the spawn was not taken up within 10 s"
            time.sleep(0.01)
        with box.open(verb="follow", id=name, stream="stdout") as client:
            assert client.line()["ok"]
            assert box.ask(verb="stdin", id=name, request="a", raw=b"x")["error"]["code"] == "busy"
            os.kill(box.bare.init_pid, 9)
            assert spawn.line()["error"]["code"] == "not_ready"
            data, trailer = client.frames()
            assert (data, trailer["complete"], trailer["exit"]) == (b"", False, None)
    box.close()


def test_out_of_memory_has_its_reason(host: Host, name: str) -> None:
    box = host.box(7, name="dbx_small", memory_bytes=64 << 20)
    answer = box.run(name, argv=["/usr/bin/python3", "-S", "-c", "x=b'x'*(200<<20)"])
    assert answer["exit"] == 137
    reason = answer["reason"]
    assert reason["kind"] == "oom" and reason["kills"] >= 1
    assert reason["limit_bytes"] == 64 << 20
    assert 0 <= reason["usage_bytes"] <= reason["peak_bytes"] <= reason["limit_bytes"]
    assert reason["peak_bytes"] > 32 << 20
    assert box.run(name + "b", "echo alive")["exit"] == 0
    box.close()


def test_end_of_the_box(host: Host, name: str) -> None:
    box = host.box(8, name="dbx_brief")
    box.spawn(name, "echo said; sleep 60")
    for _ in range(100):
        if box.file(name):
            break
        time.sleep(0.01)
    os.kill(box.bare.init_pid, 9)
    answer = box.wait(name)
    assert (answer["exit"], answer["reason"]) == (137, {"kind": "killed", "detail": "the box stopped"})
    assert text(answer) == "said\n"
    assert box.spawn(name + "b", "true")["error"]["code"] == "not_ready"
    gone = next(e for e in iter(box.event, None) if e["event"] == "box_exit")
    assert (gone["box"], gone["exit"], gone["oom"]) == ("dbx_brief", -1, False)
    box.kill_keeper()
    assert "box_exit" in [box.event()["event"] for _ in range(3)], "told again"
    box.ack("box", name)
    time.sleep(0.1)
    box.kill_keeper()
    assert box.event()["event"] == "hello"
    assert box.ask(verb="state", id=name)["exit"] == 137
    box.close()


def test_a_box_without_a_name_starts_nothing(host: Host, name: str) -> None:
    box = host.box(9, name=None)
    assert box.spawn(name, "true")["error"]["code"] == "not_ready"
    packets.send(box.link, {"box": "dbx_late"})
    box.name = "dbx_late"
    assert box.run(name, "true")["exit"] == 0
    packets.send(box.link, {"box": "dbx_other"})
    box.kill_keeper()
    assert box.ask(verb="state", id=name)["exit"] == 0
    box.name = "dbx_other"
    assert box.ask(verb="state", id=name)["error"]["code"] == "unknown_box"
    box.close()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"user": None}, "bad_request"),
        ({"user": {"name": "x", "uid": -1, "gid": 0, "home": "/"}}, "bad_request"),
        ({"user": {"name": "x", "uid": 65533, "gid": 0, "home": "/"}}, "bad_request"),
        ({"user": {"name": "x", "uid": True, "gid": 0, "home": "/"}}, "bad_request"),
        ({"argv": ["a"]}, "bad_request"),
        ({"command": 5}, "bad_request"),
        ({"command": "a\0b"}, "bad_request"),
        ({"command": "\ud800"}, "bad_request"),
        ({"env": {"A=B": "x"}}, "bad_request"),
        ({"env": {"A": 1}}, "bad_request"),
        ({"env": {"A": "x" * 131_000}}, "too_large"),
        ({"cwd": "relative"}, "bad_request"),
        ({"stdin": "tty"}, "bad_request"),
        ({"input": "!!"}, "bad_request"),
        ({"surprise": 1}, "bad_request"),
    ],
)
def test_strict_requests(box: Box, name: str, change: dict, code: str) -> None:
    body = {"command": "true", "user": USER, **change}
    raw = json.dumps(body).encode()
    answer = box.ask(verb="spawn", id=name, fence=1, raw=raw)
    assert answer["error"]["code"] == code
    assert box.ask(verb="state", id=name)["error"]["code"] == "unknown_id"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"verb": "dance"}, "unknown_verb"),
        ({"verb": None}, "unknown_verb"),
        ({"verb": "state", "id": "../../etc/passwd"}, "bad_request"),
        ({"verb": "state", "id": "exe_none"}, "unknown_id"),
        ({"verb": "kill", "id": "exe_none", "fence": "1"}, "bad_request"),
        ({"verb": "kill", "id": "exe_none", "fence": 1, "signal": 99}, "bad_request"),
        ({"verb": "follow", "id": "exe_none", "stream": "stdout"}, "unknown_id"),
        ({"verb": "state", "id": "exe_none", "body": 10}, "too_large"),
        ({"verb": "spawn", "id": "exe_none", "fence": 1, "body": 1 << 30}, "too_large"),
        ({"verb": "ack", "ids": "exe_none"}, "bad_request"),
    ],
)
def test_strict_lines(box: Box, request_: dict, code: str) -> None:
    assert box.ask(**request_)["error"]["code"] == code


def test_several_requests_on_one_connection(box: Box, name: str) -> None:
    box.run(name, "echo 12345")
    with box.open(verb="state", id=name) as client:
        assert client.line()["exit"] == 0
        assert client.more(verb="state", box=box.name, id="exe_none")["error"]["code"] == "unknown_id"
        client.sock.sendall(b'{"verb":"state","box":"dbx_test","id":"%s"}\n' % name.encode() * 3)
        assert [client.line()["exit"] for _ in range(3)] == [0, 0, 0]
        client.sock.sendall(b"nonsense\n")
        assert client.line()["error"]["code"] == "bad_request"
        assert client.file.read() == b"", "after nonsense nobody knows where the next request begins"


def test_garbage_does_not_disturb_the_others(box: Box, name: str) -> None:
    packets.send(box.link, {"connection": "x"}, [box.link.fileno()])
    packets.send(box.link, {"connection": {}})
    packets.send(box.link, {"ack": 5})
    packets.send(box.link, {"box": 7})
    packets.send(box.link, {"zygote": 7})
    box.link.send(b"\xff\xfe")
    with box.open(verb="spawn", id=name, fence=1, body=100):
        pass  # gone in the middle of its body
    assert box.run(name, "echo fine")["exit"] == 0
    assert box.connect().recv(1000)


def test_list_ack_and_forget(box: Box, name: str) -> None:
    box.run(name, "echo kept; head -c 100000 /dev/zero")
    listed = {e["id"]: e["state"] for e in box.ask(verb="list")["executions"]}
    assert listed[name] == "exited"
    assert box.ask(verb="forget", ids=[name])["ok"]
    assert len(box.file(name)) == 100_005, "not acknowledged yet, so not removed"
    box.ack(name)
    assert box.ask(verb="ack", ids=[name, "exe_none"])["ok"]
    assert name not in {e["id"] for e in box.ask(verb="list")["executions"]}
    assert box.spawn(name, "echo again")["sizes"] == [100_005, 0], "still known"
    assert box.ask(verb="kill", id=name, fence=5, signal=9)["state"] == "exited"
    assert box.ask(verb="forget", ids=[name], fence=4)["error"]["code"] == "stale_fence"
    assert len(box.file(name)) == 100_005
    assert box.ask(verb="forget", ids=[name])["ok"]
    assert not os.path.exists(f"{box.out}/{name}.1")
    assert box.ask(verb="follow", id=name, stream="stdout")["error"]["code"] == "unknown_id"


def test_at_once(box: Box, name: str) -> None:
    """Two hundred commands, eight at a time, each stream exact."""
    script = "import os,sys\nfor i in range(50):\n os.write(1,b'o%05d\\n'%i)\n os.write(2,b'e%05d\\n'%i)\nsys.exit(7)"
    wrong = []

    def some(worker: int) -> None:
        for i in range(25):
            answer = box.run(f"{name}{worker}x{i}", argv=["/usr/bin/python3", "-S", "-c", script])
            out = "".join(f"o{j:05d}\n" for j in range(50))
            if answer["exit"] != 7 or text(answer) != out or text(answer, "stderr") != out.replace("o", "e"):
                wrong.append(answer)

    threads = [threading.Thread(target=some, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_traced_command(box: Box, name: str) -> None:
    """Its tracer hears of the exit first; then we do, and do not spin meanwhile."""
    script = (
        "import ctypes,sys,time\nlibc=ctypes.CDLL(None)\nlibc.ptrace.argtypes=[ctypes.c_long]*4\npid=int(sys.argv[1])\n"
        "assert libc.ptrace(0x4206,pid,0,0)==0\nprint('traced',flush=True)\ntime.sleep(0.6)"
    )
    box.spawn(name, "sleep 0.3; exit 4")
    inside = text(box.run(name + "p", "pgrep -f 'sleep 0.3; exit 4' | head -1")).strip()
    box.spawn(name + "t", argv=["/usr/bin/python3", "-c", script, inside])
    answer = box.wait(name)
    assert answer["exit"] == 4
    assert box.wait(name + "t")["exit"] == 0


def test_nothing_of_the_machine_leaks_into_a_command(box: Box, name: str) -> None:
    answer = box.run(name, argv=["/bin/ls", "-l", "/proc/self/fd"])
    descriptors = [line.split()[8] for line in text(answer).splitlines() if "->" in line]
    assert descriptors == ["0", "1", "2", "3"], "3 is ls's own"
