"""Named shells: what lives from command to command, what ends a shell, and that nothing blocks the next command."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hostd.bare_box import USER, Box, Host, text

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(71)


class Runner:
    """Runs commands in one shell of a box."""

    def __init__(self, box: Box, shell: str) -> None:
        self.box, self.shell, self.count = box, shell, 0

    def id(self) -> str:
        self.count += 1
        return f"exe_{self.shell}{self.count}"

    def __call__(self, command: str, **body: Any) -> tuple[int, str, str]:
        answer = self.answer(command, **body)
        return answer["exit"], text(answer), text(answer, "stderr")

    def answer(self, command: str, **body: Any) -> dict[str, Any]:
        return self.box.run(self.id(), command, shell=self.shell, **body)

    def start(self, command: str, **body: Any) -> str:
        name = self.id()
        answer = self.box.spawn(name, command, shell=self.shell, **body)
        assert answer.get("state") == "running", answer
        return name


@pytest.fixture
def run(box: Box, request: pytest.FixtureRequest) -> Runner:
    name = "".join(c for c in request.node.name.lower() if c.isalnum())[-40:]
    return Runner(box, name)


def test_directory_environment_functions_aliases_and_options_survive(run: Runner) -> None:
    assert (
        run("cd /usr; x=5; export Y=6; f() { echo f$x; }; alias hh='echo al'; set -o pipefail; shopt -s extglob")[0]
        == 0
    )
    assert run("pwd; f; hh; echo $x $(printenv Y)\nfalse | true; echo $?; [[ ab == a@(b|c) ]] && echo glob") == (
        0,
        "/usr\nf5\nal\n5 6\n1\nglob\n",
        "",
    )


def test_it_is_a_login_shell_with_the_command_s_environment(run: Runner) -> None:
    code, out, _ = run("echo $0 $- $HOME $USER $FOO; shopt login_shell; pwd; echo $(id -u)", env={"FOO": "bar"})
    assert (code, out.split("\n")[0]) == (0, "bash hB /tmp tester bar")
    assert out.split("\n")[1:] == ["login_shell    \ton", "/tmp", "1000", ""]
    assert run("echo $FOO", env={"FOO": "other"}) == (0, "bar\n", ""), "a shell keeps what it was born with"


TABLE: list[tuple[str, int, str]] = [
    ("false", 1, ""),
    ("echo $?", 0, "1\n"),
    ("(exit 77)", 77, ""),
    ("! true", 1, ""),
    ('echo "unbalanced', 2, ""),
    ("echo it's", 2, ""),
    ("echo next", 0, "next\n"),
    ("if true; then", 2, ""),
    ("}", 2, ""),
    ("`", 2, ""),
    ("cat <<EOF\nunterminated", 0, "unterminated\n"),
    ("cat <<X\nheld $HOME\nX\n", 0, "held /tmp\n"),
    ("", 0, ""),
    ("# only a comment", 0, ""),
    ("echo a \\", 0, "a \\\n"),
    ("declare v=7; typeset -i w=3", 0, ""),
    ("echo $v$w", 0, "73\n"),
    ("break; echo b", 0, "b\n"),
    ("while :; do break 5; done; echo d", 0, "d\n"),
    ("return 4", 4, ""),
    ("f() { return 9; }; f", 9, ""),
    ("set -- a b", 0, ""),
    ("echo $# $2", 0, "2 b\n"),
    ("set -x", 0, ""),
    ("set +x; echo quiet", 0, "quiet\n"),
    ("set -u", 0, ""),
    ("set +u", 0, ""),
    ("set -v; set +v", 0, ""),
    ("echo junk >&8", 1, ""),
    ("read -u 9 z", 1, ""),
    ("exec 8>&-; exec 9<&-; exec 1>/dev/null; echo lost", 0, ""),
    ("echo back", 0, "back\n"),
    ("exec 5>/tmp/five; echo five >&5", 0, ""),
    ("echo six >&5; cat /tmp/five", 0, "five\nsix\n"),
    ("alias builtin=false; alias printf=false", 0, ""),
    ("unalias builtin printf", 0, ""),
    ("printf() { :; }; echo() { command echo mine; }", 0, ""),
    ("echo x; unset -f printf echo", 0, "mine\n"),
    ("trap 'echo traced' DEBUG; trap - DEBUG", 0, "traced\n"),
    ("trap 'echo ERR' ERR; false", 1, "ERR\n"),
    ("trap - ERR; set -o posix; echo p; set +o posix", 0, "p\n"),
    ("cat; echo $?", 0, "0\n"),
    ("x=$(seq 200000 | tail -1); echo $x", 0, "200000\n"),
    ("sleep 5 & p=$!; kill $p; wait $p", 143, ""),
    ("nosuchcommand", 127, ""),
    ("/etc/passwd", 126, ""),
    ("BASH_ENV=/tmp/none; PATH=/nowhere; PS4=; IFS=x", 0, ""),
    ("/bin/echo $(/bin/echo still)", 0, "still\n"),
    ("kill -INT $$; echo after", 130, ""),
    ("readonly UID HOME; echo ro", 0, "ro\n"),
    ("/bin/cat /proc/self/fd/8", 1, ""),
    ("echo the end", 0, "the end\n"),
]


def test_awkward_texts_one_after_the_other(run: Runner) -> None:
    pid = run("echo $$")[1]
    wrong = []
    for command, code, out in TABLE:
        got = run(command)
        if got[:2] != (code, out):
            wrong.append((command, got))
    assert not wrong
    assert run("/bin/echo $$")[1] == pid, "all of that in one shell"


@pytest.mark.parametrize("open_end", ["echo $(", "$(", 'echo "$(', "x=$(echo", "cat <(echo"])
def test_a_substitution_that_is_not_closed_does_not_break_the_shell(run: Runner, open_end: str) -> None:
    assert run("kept=1")[0] == 0
    for _ in range(6):
        code, _, err = run(open_end)
        assert code != 0 and "unexpected EOF" in err
    assert run("x=; y=$(echo a b c); z=${y/ /-}; echo $z $kept") == (0, "a-b c 1\n", "")


ENDS: list[tuple[str, int, str, str]] = [
    ("echo before; exit 3", 3, "before\n", "exited with status 3"),
    ("exec /bin/sh -c 'echo replaced; exit 9'", 9, "replaced\n", "exited with status 9"),
    ("exec /nowhere", 127, "", "exited with status 127"),
    ("set -e; true; echo still; false; echo no", 1, "still\n", "exited with status 1"),
    ("set -e; x=$(false); echo no", 1, "", "exited with status 1"),
    ("set -u; echo $nope; echo x", 1, "", "exited with status 1"),
    ("echo half; kill -9 $$", 137, "half\n", "was killed by signal 9"),
    ("kill -TERM $BASHPID", 143, "", "was killed by signal 15"),
    ("trap 'echo bye' EXIT; exit 2", 2, "bye\n", "exited with status 2"),
    ("set -n; echo never", 137, "", "carried out nothing any more"),
    ("builtin() { :; }", 137, "", "carried out nothing any more"),
    ("shopt -s extdebug; trap false DEBUG; echo x", 137, "", "carried out nothing any more"),
]


@pytest.mark.parametrize("command", [entry[0] for entry in ENDS])
def test_what_ends_a_shell_is_said_and_the_next_command_gets_a_fresh_one(run: Runner, command: str) -> None:
    _, code, out, note = next(entry for entry in ENDS if entry[0] == command)
    assert run("cd /usr; x=1")[0] == 0
    answer = run.answer(command)
    assert (answer["exit"], text(answer)) == (code, out)
    assert len(answer["notes"]) == 1 and note in answer["notes"][0], answer["notes"]
    after = run.answer("pwd; echo $x")
    assert (after["exit"], text(after)) == (0, "/tmp\n\n")
    assert "notes" not in after


def test_a_set_e_shell_outlives_what_does_not_fail_under_it(run: Runner) -> None:
    assert run("set -e; x=1")[0] == 0
    assert run("[ -f /nowhere ] && echo x") == (1, "", "")
    assert run("! true") == (1, "", "")
    assert run("if false; then :; fi; echo $x") == (0, "1\n", "")


def test_one_megabyte_of_text_and_binary_output(run: Runner, box: Box) -> None:
    assert run("x='" + "q" * 1_000_000 + "'; echo ${#x}") == (0, "1000000\n", "")
    name = run.start("head -c 3000000 /dev/zero | tr '\\0' '\\377'; printf 'a\\0b' >&2")
    assert box.wait(name)["exit"] == 0
    assert box.file(name) == b"\xff" * 3_000_000
    assert box.file(name, 2) == b"a\0b"


def test_the_streams_can_be_opened_again(run: Runner) -> None:
    assert run("echo x > /dev/stderr; echo y > /dev/stdout; cat /dev/stdin; echo z | tee /dev/fd/2") == (
        0,
        "y\nz\n",
        "x\nz\n",
    )


def test_late_writers_write_nothing_into_the_next_command(run: Runner, box: Box) -> None:
    wrong = []
    for i in range(100):
        command = f"(sleep 0.1{i % 10}; echo late{i}; echo elate{i} >&2) & echo out{i}; echo err{i} >&2"
        got = run(command)
        if got != (0, f"out{i}\n", f"err{i}\n"):
            wrong.append((i, got))
    assert not wrong
    time.sleep(0.5)
    assert box.file(f"exe_{run.shell}7", "1.late") == b"late6\n"
    assert run("wait; echo done") == (0, "done\n", "")


def test_one_command_at_a_time_and_shells_apart(run: Runner, box: Box) -> None:
    first = run.start("sleep 0.7; echo one")
    refused = box.spawn("exe_second", "echo two", shell=run.shell)
    assert refused["error"]["code"] == "busy" and first in refused["error"]["message"]
    other = Runner(box, run.shell + "b")
    assert other("echo three") == (0, "three\n", "")
    assert box.run("exe_plain", "echo four")["exit"] == 0
    assert box.ask(verb="state", id=first)["state"] == "running"
    assert box.wait(first)["exit"] == 0
    again = box.run("exe_second", "echo two", shell=run.shell)
    assert text(again) == "two\n"


def test_standard_input_of_a_command(run: Runner, box: Box) -> None:
    name = run.start("read a; echo got $a; cat; echo eof", stdin="pipe")
    assert box.ask(verb="stdin", id=name, request="r1", eof=False, raw=b"in put\n")["accepted"]
    assert box.ask(verb="stdin", id=name, request="r2", eof=True, raw=b"rest\n")["accepted"]
    answer = box.wait(name)
    assert (answer["exit"], text(answer)) == (0, "got in put\nrest\neof\n")
    assert run("cat") == (0, "", ""), "without stdin there is none"
    name = run.start("sleep 0.2; cat", stdin="pipe")
    assert box.ask(verb="stdin", id=name, request="r", eof=True, raw=b"x" * 30_000)["accepted"]
    assert text(box.wait(name)) == "x" * 30_000


def test_an_interrupt_ends_the_command_and_not_the_shell(run: Runner, box: Box) -> None:
    assert run("kept=1")[0] == 0
    for command in ("sleep 60; echo after", "while :; do :; done", "cat <(sleep 60)"):
        name = run.start(command)
        time.sleep(0.2)
        assert "error" not in box.ask(verb="kill", id=name, fence=1, signal=2, group=True)
        answer = box.wait(name)
        assert (answer["exit"], text(answer)) == (130, "")
        assert "notes" not in answer
    assert run("echo $kept $?") == (0, "1 130\n", "")


@pytest.mark.parametrize("group", [False, True])
def test_a_kill_ends_the_shell_with_its_command(run: Runner, box: Box, group: bool) -> None:
    assert run("sleep 61 & echo $! > /tmp/left; x=1")[0] == 0
    name = run.start("echo begun; sleep 60; echo no")
    time.sleep(0.2)
    box.ask(verb="kill", id=name, fence=1, signal=9, group=group)
    answer = box.wait(name)
    assert (answer["exit"], text(answer)) == (137, "begun\n")
    assert answer["reason"] == {"kind": "killed", "detail": "signal 9 by request", "signal": 9}
    assert "on request" in answer["notes"][0]
    assert run("kill -0 $(cat /tmp/left) 2>/dev/null; echo $?$x")[1] == ("1\n" if group else "0\n")
    run("pkill sleep")


def test_a_shell_killed_while_it_is_idle(run: Runner, box: Box) -> None:
    pid = run("x=1; echo $$")[1].strip()
    assert box.run("exe_killer" + run.shell, f"kill -9 {pid}", user={"name": "root", "uid": 0, "gid": 0, "home": "/"})
    time.sleep(0.1)
    answer = run.answer("echo x$x")
    assert (answer["exit"], text(answer)) == (0, "x\n")
    assert "was killed by signal 9 while it was idle" in answer["notes"][0]
    # At the very moment: the command has been handed over, or not; it runs once all the same.
    for i in range(20):
        pid = run("echo $$")[1].strip()
        box.run(f"exe_killer{run.shell}{i}", f"(sleep 0.00{i % 10}; kill -9 {pid}) & exit 0")
        answer = run.answer(f"echo {i} >> /tmp/{run.shell}; sleep 0.02")
        assert answer["exit"] in (0, 137), answer
    lines = run(f"cat /tmp/{run.shell}")[1].split()
    assert len(lines) == len(set(lines))


def test_memory_exhaustion_ends_what_it_must(run: Runner) -> None:
    hog = "python3 -c \"x = 'a' * 10**9\""
    code = run(f"x=1; {hog}; echo $? $x")
    assert code[:2] == (0, "137 1\n")
    answer = run.answer("y=a; while :; do y=$y$y; done")
    assert answer["exit"] in (2, 137)
    assert answer["notes"] and (answer["exit"] == 2 or answer["reason"]["kind"] == "oom")
    assert run("echo fine") == (0, "fine\n", "")


def test_a_keeper_killed_in_the_middle_of_shell_commands(host: Host) -> None:
    box = host.box(72)
    shells = [Runner(box, f"s{i}") for i in range(5)]
    for run in shells:
        assert run(f"x={run.shell}; cd /usr")[0] == 0
    names = [
        run.start(f"for i in $(seq 60); do echo $x $i; sleep 0.01; done; (exit {i})") for i, run in enumerate(shells)
    ]
    for _ in range(4):
        time.sleep(0.15)
        box.kill_keeper()
    for i, (run, name) in enumerate(zip(shells, names, strict=True)):
        answer = box.wait(name)
        assert (answer["exit"], answer["reason"]) == (i, None)
        assert text(answer) == "".join(f"{run.shell} {n}\n" for n in range(1, 61))
        assert run("echo $x $?; pwd") == (0, f"{run.shell} {i}\n/usr\n", "")
    # Idle shells, too, and a command that ends while nobody keeps it.
    last = shells[0].start("sleep 0.3; exit 7")
    os.kill(box.pid, 9)
    time.sleep(0.5)
    box.restart()
    answer = box.wait(last)
    assert answer["exit"] == 7 and "exited with status 7" in answer["notes"][0]
    assert shells[0]("echo y$x") == (0, "y\n", "")
    assert shells[1]("echo y$x") == (0, "ys1\n", "")
    box.close()


def test_commands_handed_over_under_keeper_and_spawner_kills(host: Host) -> None:
    """Every command runs once or is called lost, and the shell goes on after each."""
    box = host.box(73)
    run, lost = Runner(box, "storm"), 0
    assert run("true")[0] == 0
    for i in range(40):
        name = run.id()
        body: dict[str, Any] = {"command": f"echo {i} >> /tmp/storm; echo {i}", "shell": "storm", "user": USER}
        with box.open(verb="spawn", id=name, fence=1, raw=json.dumps(body).encode()) as client:
            time.sleep(0.0004 * (i % 12))
            if i % 4 == 3:
                os.kill(box.spawner(), 9)
            else:
                box.kill_keeper()
            client.sock.close()
        deadline = time.monotonic() + 15
        while True:
            answer = box.spawn(name, **body, hold_ms=2000)
            if answer.get("state") == "exited":
                break
            assert time.monotonic() < deadline, answer
            time.sleep(0.02)
        if (answer["reason"] or {}).get("kind") == "lost":
            lost += 1
        else:
            assert (answer["exit"], base64.b64decode(answer["stdout"])) == (0, b"%d\n" % i)
    written = box.run("exe_read", "cat /tmp/storm")
    seen = text(written).split()
    assert len(seen) == len(set(seen)) and len(seen) >= 40 - lost
    box.close()


def test_names_and_bodies_that_are_refused(box: Box) -> None:
    for shell, more in (
        ("", {}),
        ("x" * 129, {}),
        ("a\nb", {}),
        (7, {}),
        ("ok", {"input": ""}),
        ("ok", {"login": False}),
    ):
        answer = box.spawn("exe_refused", "echo", shell=shell, **more)
        assert answer["error"]["code"] == "bad_request", (shell, more, answer)
    assert box.spawn("exe_refused", argv=["/bin/true"], shell="ok")["error"]["code"] == "bad_request"
    assert text(box.run("exe_name", "echo fine", shell="any name: ünïcode / \"'$(")) == "fine\n"


def test_the_box_s_root_breaks_its_own_shells_only(run: Runner, box: Box) -> None:
    root = {"name": "root", "uid": 0, "gid": 0, "home": "/"}
    assert run("x=1")[0] == 0
    box.run("exe_rm" + run.shell, "rm -rf /dev/shm/.shell-*", user=root)
    assert run("echo $x") == (0, "1\n", ""), "the directory is made again"
    fill = "umount /dev/shm 2>/dev/null; mount -t tmpfs -o size=4k,mode=700 none /dev/shm; echo $?"
    box.run("exe_fill" + run.shell, fill, user=root)
    deadline = time.monotonic() + 10
    while True:
        name = run.id()
        answer = box.spawn(name, "echo $x", shell=run.shell, hold_ms=3000)
        if answer.get("state") == "exited":
            break
        assert time.monotonic() < deadline, answer
    assert text(answer) == "1\n"
    junk = run(
        "for fd in /proc/$$/fd/*; do [ -S $fd ] && for i in $(seq 9); do echo 'x y z' >&${fd##*/}; done; done; echo ok"
    )
    assert junk[0] == 0
    assert run("echo $x")[0] == 0
