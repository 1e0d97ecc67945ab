"""kill -9 of any part at any moment: what ran is reported exactly, what cannot be proven is called lost, nothing runs
twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hostd import keeper_spec, packets, procs
from tests.hostd.bare_box import ROOT, USER, Box, Host, text

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")

WRITERS = 20
WRITER = """import os,sys,time
k=int(sys.argv[1])
for i in range(int(sys.argv[2])):
    os.write(1,b'o%d %07d\\n'%(k,i)); os.write(2,b'e%d %07d\\n'%(k,i)); time.sleep(0.004)
sys.exit(k+40)"""


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def box(host: Host) -> Box:
    return host.box(41)


def start_writers(box: Box, lines: int = 200) -> None:
    for k in range(WRITERS):
        answer = box.spawn(f"exe_w{k}", argv=["/usr/bin/python3", "-S", "-c", WRITER, str(k), str(lines)])
        assert answer["state"] == "running", answer


def check_writers(box: Box, lines: int = 200) -> None:
    for k in range(WRITERS):
        answer = box.wait(f"exe_w{k}")
        assert (answer["exit"], answer["reason"]) == (k + 40, None)
        assert box.file(f"exe_w{k}") == b"".join(b"o%d %07d\n" % (k, i) for i in range(lines))
        assert box.file(f"exe_w{k}", 2) == b"".join(b"e%d %07d\n" % (k, i) for i in range(lines))


def test_keeper_killed_under_twenty_writers(box: Box) -> None:
    start_writers(box)
    for _ in range(5):
        time.sleep(0.1)
        box.kill_keeper()
    check_writers(box)
    assert box.run("exe_after", "echo fine")["exit"] == 0


def test_exits_while_no_keeper_lives(host: Host, box: Box) -> None:
    for i in range(5):
        box.spawn(f"exe_d{i}", f"sleep 0.3; echo {i}; exit {i}")
    os.kill(host.zygote_pid(), signal.SIGSTOP)
    os.kill(box.pid, signal.SIGKILL)
    time.sleep(0.6)
    os.kill(host_pid(host), signal.SIGCONT)
    box.restart()
    for i in range(5):
        answer = box.wait(f"exe_d{i}")
        assert (answer["exit"], text(answer)) == (i, f"{i}\n")


def host_pid(host: Host) -> int:
    """Find the zygote without asking it."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and cmdline(int(entry)).startswith(b"zygote"):
                links = [os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")]
                if any(link.startswith(host.directory) for link in links):
                    return int(entry)
    raise AssertionError("no zygote")


@pytest.mark.parametrize("killer", ["machine", "the box's root"])
def test_spawner_killed_under_twenty_writers(box: Box, killer: str) -> None:
    start_writers(box)
    for i in range(5):
        time.sleep(0.1)
        if killer == "machine":
            os.kill(box.spawner(), signal.SIGKILL)
        else:
            assert box.run(f"exe_k{i}", "pkill -9 boxd", user=ROOT)["exit"] == 0
        assert box.run(f"exe_next{i}", "echo fine")["exit"] == 0
    check_writers(box)


@pytest.mark.parametrize(
    "attack",
    [
        "kill -9 -1",
        "kill -STOP -1",
        "pkill -9 -f python",
        "killall -9 python3",
        "pkill -9 -u $(id -u)",
        "pkill -9 -f 'boxd|keeper|zygote'",
    ],
)
def test_the_user_cannot_reach_the_spawner(box: Box, attack: str) -> None:
    box.run("exe_first", "true")
    before = box.spawner()
    with box.open(verb="spawn", id="exe_attack", fence=1, raw=body(attack)) as client:
        client.line()
    box.wait("exe_attack")
    assert text(box.run("exe_after", "echo alive")) == "alive\n"
    assert box.spawner() == before


def body(command: str) -> bytes:
    return json.dumps({"command": command, "user": USER}).encode()


def test_root_of_the_box_cannot_look_into_the_spawner(box: Box) -> None:
    command = (
        "p=$(pgrep -x boxd); for f in exe cwd root; do readlink /proc/$p/$f && echo LEAK; done;"
        " for f in maps environ mem auxv; do head -c1 /proc/$p/$f && echo LEAK; done; ls /proc/$p/fd && echo LEAK; true"
    )
    answer = box.run("exe_peep", command, user=ROOT)
    assert "LEAK" not in text(answer)
    assert text(answer, "stderr").count("ermission denied") >= 5


def test_a_stopped_spawner_is_replaced(box: Box) -> None:
    box.run("exe_first", "true")
    os.kill(box.spawner(), signal.SIGSTOP)
    started = time.monotonic()
    early = box.spawn("exe_second", "echo again")
    assert early["error"]["code"] == "not_ready", "answered in time; it stays asked for"
    assert 2 < time.monotonic() - started < 4
    answer = box.run("exe_second", "echo another")
    assert text(answer) == "again\n"
    assert 4 < time.monotonic() - started < 9


def test_sixty_kills_against_one_fast_writer(host: Host, box: Box) -> None:
    """Not a byte: a kill cannot fall between taking it from the pipe and keeping it."""
    blocks = 30_000
    script = (
        "import os\nb=b''.join(b'%07d\\n'%j for j in range(1000))\n"
        f"for i in range({blocks}):\n x=b'%07d'%i+b[7:]\n while x: x=x[os.write(1,x):]"
    )
    box.spawn("exe_fast", argv=["/usr/bin/python3", "-S", "-c", script])
    kills = 0
    while kills < 60 and box.ask(verb="state", id="exe_fast")["state"] == "running":
        time.sleep(random.uniform(0.001, 0.02))
        box.kill_keeper()
        kills += 1
    answer = box.wait("exe_fast", 40)
    assert answer["exit"] == 0
    assert answer["sizes"][0] == blocks * 8000
    block = b"".join(b"%07d\n" % j for j in range(1000))[7:]
    with open(f"{box.out}/exe_fast.1", "rb") as file:
        for i in range(blocks):
            if file.read(8000) != b"%07d" % i + block:
                raise AssertionError(f"block {i} is wrong after {kills} kills")


def storm(box: Box, tag: str, count: int, kill: Callable[[], None]) -> None:
    """Spawn while something is killed again and again; every request is repeated by its id until it is answered."""
    done = threading.Event()
    lock = threading.Lock()
    results: dict[int, tuple[object, str]] = {}

    def killer() -> None:
        while not done.wait(random.uniform(0.03, 0.12)):
            with lock:
                kill()

    def one(worker: int) -> None:
        for i in range(worker, count, 4):
            name = f"exe_{tag}{i}"
            deadline = time.monotonic() + 30
            while True:
                assert time.monotonic() < deadline, f"{name} was never answered"
                try:
                    with lock:
                        client = box.open(
                            verb="spawn", id=name, fence=1, hold_ms=2000, raw=body(f"echo {i}; echo {i} >> /tmp/{tag}")
                        )
                    with client:
                        answer = client.line()
                except (OSError, AssertionError):
                    time.sleep(0.005)
                    continue
                if answer.get("state") == "exited":
                    results[i] = (answer["exit"], answer.get("stdout", ""))
                    break

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    assassin = threading.Thread(target=killer)
    for thread in (assassin, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    assassin.join()
    assert len(results) == count
    ran = [int(line) for line in text(box.run(f"exe_{tag}end", f"cat /tmp/{tag}")).split()]
    assert len(ran) == len(set(ran)), "something ran twice"
    good = {i for i, (code, _) in results.items() if code == 0}
    lost = {i for i, (code, _) in results.items() if code == -1}
    assert good | lost == set(results), [r for r in results.values() if r[0] not in (0, -1)]
    assert good <= set(ran), "reported as run, but did not"
    for i in good:
        assert text({"stdout": results[i][1]}) == f"{i}\n"
    assert len(lost) < count / 4


def test_spawn_storm_with_keeper_kills(box: Box) -> None:
    storm(box, "kk", 150, box.kill_keeper)


def test_spawn_storm_with_spawner_kills(box: Box) -> None:
    def kill() -> None:
        with contextlib.suppress(AssertionError, OSError):
            os.kill(box.spawner(), signal.SIGKILL)

    storm(box, "ks", 150, kill)


def test_exit_events_until_acknowledged(box: Box) -> None:
    box.run("exe_a", "echo a")
    assert box.exit_event("exe_a")["exit"] == 0
    second = box.connect()
    messages = [packets.receive(second)[0] for _ in range(2)]
    assert [m["event"] for m in messages if m] == ["hello", "exit"], "told again on a new connection"
    box.kill_keeper()
    assert box.exit_event("exe_a")["stdout"] == "YQo="
    box.ack("exe_a")
    box.run("exe_b", "true")
    box.kill_keeper()
    assert box.exit_event("exe_b")["exit"] == 0
    third = box.connect()
    hello, event = packets.receive(third)[0], packets.receive(third)[0]
    assert hello and hello["exited"] == 1
    assert event and event["id"] == "exe_b"


def test_a_command_started_but_never_reported_is_killed(host: Host, box: Box) -> None:
    """The keeper is stopped while its spawner works, and killed: what the spawner had started must not live on."""
    box.run("exe_first", "true")
    path = f"{box.out}/journal"
    os.kill(box.spawner(), signal.SIGSTOP)
    with box.open(verb="spawn", id="exe_orphan", fence=1, raw=body("echo ran >> /tmp/orphan; exec sleep 300")):
        wait_for(lambda: b"exe_orphan" in content(path))
        os.kill(box.pid, signal.SIGSTOP)
        os.kill(box.spawner(), signal.SIGCONT)
        wait_for(lambda: any(b"sleep\x00300" in cmdline(p) for p in box.bare.pids()))
        os.kill(box.pid, signal.SIGKILL)
        box.restart()
    answer = box.ask(verb="state", id="exe_orphan")
    assert (answer["exit"], answer["reason"]["kind"]) == (-1, "lost")
    assert not any(b"sleep\x00300" in cmdline(p) for p in box.bare.pids())
    assert text(box.run("exe_check", "cat /tmp/orphan")) == "ran\n"


def test_a_command_that_was_never_begun_may_be_asked_again(host: Host, box: Box) -> None:
    box.run("exe_first", "true")
    path = f"{box.out}/journal"
    os.kill(box.spawner(), signal.SIGSTOP)
    with box.open(verb="spawn", id="exe_never", fence=1, raw=body("echo ran >> /tmp/never")):
        wait_for(lambda: b"exe_never" in content(path))
        os.kill(box.pid, signal.SIGKILL)
        box.restart()
    assert box.ask(verb="state", id="exe_never")["error"]["code"] == "unknown_id"
    assert box.run("exe_never", "echo ran >> /tmp/never; cat /tmp/never")["stdout"] == "cmFuCg=="


def cmdline(pid: int) -> bytes:
    try:
        return content(f"/proc/{pid}/cmdline")
    except OSError:
        return b""


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def test_background_pipes_survive_the_keeper(box: Box) -> None:
    box.run("exe_server", "(while :; do echo tick; sleep 0.02; done) & echo up")
    for _ in range(3):
        box.kill_keeper()
        time.sleep(0.1)
    assert text(box.run("exe_count", "pgrep -c -f 'while :' || true")).strip() != "0", "it was not killed by SIGPIPE"
    assert b"tick\n" in box.file("exe_server", "1.late")


def test_stdin_survives_the_keeper(box: Box) -> None:
    box.spawn("exe_cat", "cat; echo end", stdin="pipe")
    box.ask(verb="stdin", id="exe_cat", request="a", raw=b"one\n")
    box.kill_keeper()
    assert box.ask(verb="stdin", id="exe_cat", request="a", raw=b"one\n") == {"ok": True, "accepted": True}
    assert box.ask(verb="stdin", id="exe_cat", request="b", eof=True, raw=b"two\n")["accepted"]
    assert text(box.wait("exe_cat")) == "one\ntwo\nend\n"
    for i in range(10):
        box.spawn(f"exe_eof{i}", "sleep 0.1; cat; echo end", stdin="pipe")
        box.ask(verb="stdin", id=f"exe_eof{i}", request="a", eof=True)
        box.kill_keeper()
        assert text(box.wait(f"exe_eof{i}")) == "end\n", "a parked end would have kept it waiting for ever"


def test_killed_by_request_is_remembered_by_a_successor(box: Box) -> None:
    box.spawn("exe_trap", "trap 'sleep 0.3; exit 143' TERM; sleep 60 & wait")
    time.sleep(0.1)
    box.ask(verb="kill", id="exe_trap", fence=1, signal=15, group=False)
    box.kill_keeper()
    answer = box.wait("exe_trap")
    assert (answer["exit"], answer["reason"]["kind"]) == (143, "killed")


def test_zygote_killed_and_replaced(host: Host, box: Box) -> None:
    """Keepers live on without it; a new one takes them in, and they park everything again."""
    start_writers(box, 300)
    box.run("exe_server", "(while :; do echo tick; sleep 0.05; done) & echo up")
    os.kill(host.zygote_pid(), signal.SIGKILL)
    assert host.conn.recv(100) == b""
    assert box.run("exe_alone", "echo fine")["exit"] == 0
    host.conn.close()
    host.conn = keeper_spec.start_zygote(host.config)
    assert keeper_spec.report(host.conn) == {}
    with box.opened() as fds:
        keeper_spec.adopt_keeper(host.conn, box.spec, fds, box.pid, box.start, box.link)
    wait_for(lambda: keeper_spec.report(host.conn)[box.slot]["parked"] == WRITERS + 1)
    assert keeper_spec.restart_keeper(host.conn, box.slot) == (box.pid, box.start)
    first = box.pid
    box.kill_keeper()
    assert box.pid != first
    check_writers_after_adoption(box)
    assert box.run("exe_after", "echo fine")["exit"] == 0
    box.kill_keeper()
    assert box.run("exe_again", "echo fine")["exit"] == 0
    assert b"tick\n" in box.file("exe_server", "1.late")


def check_writers_after_adoption(box: Box) -> None:
    """Their parent is PID 1 now: their exits are known where the kernel keeps them with the pidfd."""
    for k in range(WRITERS):
        answer = box.wait(f"exe_w{k}")
        if (answer["reason"] or {}).get("kind") == "lost":
            assert "exit status" in answer["reason"]["detail"]
        else:
            assert answer["exit"] == k + 40
        assert box.file(f"exe_w{k}") == b"".join(b"o%d %07d\n" % (k, i) for i in range(300))


def test_keeper_and_zygote_killed_together(host: Host, box: Box) -> None:
    """Their pipes are gone: what ran is lost and killed, what had ended is known."""
    box.run("exe_done", "echo done; exit 5")
    box.spawn("exe_running", "exec sleep 300")
    os.kill(host.zygote_pid(), signal.SIGKILL)
    os.kill(box.pid, signal.SIGKILL)
    host.conn.close()
    host.conn = keeper_spec.start_zygote(host.config)
    listener = keeper_spec.listening_socket(host.config.run, box.slot)
    with listener, box.opened() as fds:
        fds.append((keeper_spec.LISTEN, listener.fileno()))
        box.pid, box.start = keeper_spec.start_keeper(host.conn, box.spec, fds)
    box.link.close()
    box.link = box.connect()
    done = box.ask(verb="state", id="exe_done")
    assert (done["exit"], text(done)) == (5, "done\n")
    lost = box.ask(verb="state", id="exe_running")
    assert (lost["exit"], lost["reason"]["kind"]) == (-1, "lost")
    wait_for(lambda: not any(b"sleep\x00300" in cmdline(p) for p in box.bare.pids()))
    assert box.run("exe_more", "echo on")["exit"] == 0


def test_children_a_box_forces_upon_its_keeper_are_buried(box: Box) -> None:
    """A process of the box may clone itself a sibling: the keeper's child."""
    script = (
        "import ctypes,os\nlibc=ctypes.PyDLL(None)\n"
        "for _ in range(5):\n if libc.syscall(56, 0x8000|17, 0, 0, 0, 0)==0: os._exit(0)"
    )
    assert box.run("exe_forge", argv=["/usr/bin/python3", "-S", "-c", script])["exit"] == 0
    assert len(children(box.pid)) >= 5
    wait_for(lambda: len(children(box.pid)) == 1, 15)  # the spawner
    assert box.run("exe_next", "echo fine")["exit"] == 0


def children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_forget_leaves_nothing(host: Host, box: Box) -> None:
    box.spawn("exe_x", "exec sleep 300")
    spawner = box.spawner()
    keeper_spec.forget(host.conn, box.slot)
    keeper_spec.forget(host.conn, box.slot)
    assert procs.start_time(box.pid) is None
    wait_for(lambda: procs.start_time(spawner) is None)
    assert keeper_spec.report(host.conn) == {}
    with pytest.raises(keeper_spec.ZygoteError, match="unknown_slot"):
        keeper_spec.restart_keeper(host.conn, box.slot)
    leaked = subprocess.run(
        ["ls", "-l", f"/proc/{host.zygote_pid()}/fd"], capture_output=True, text=True, check=True
    ).stdout
    assert box.out not in leaked
    assert "pidfd" not in leaked


def test_a_second_keeper_of_a_slot_is_refused(host: Host, box: Box) -> None:
    listener = keeper_spec.listening_socket(host.config.run, "other")
    with listener, box.opened() as fds:
        fds.append((keeper_spec.LISTEN, listener.fileno()))
        with pytest.raises(keeper_spec.ZygoteError, match="exists"):
            keeper_spec.start_keeper(host.conn, box.spec, fds)
        with pytest.raises(ValueError, match="role"):
            keeper_spec.start_keeper(host.conn, box.spec, [("banana", 0)])
    assert box.run("exe_x", "true")["exit"] == 0
