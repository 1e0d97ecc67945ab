"""The two Transports against a real sshd: what paramiko gets wrong, what the key may do, what trouble looks like."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hosts import ssh
from tests.ssh.conftest import ask, ask_to_the_end, soon
from tests.ssh.loopback import Sshd, StubHostd, started

MIB = 1 << 20


def eventually(check, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


def in_loop(sshd: Sshd, work, **login):
    """Run `work(transport)` in a fresh loop with a loop Transport."""

    async def main():
        with ThreadPoolExecutor(1) as executor:
            transport = await ssh.dial_for_loop(sshd.login(**login), executor)
            try:
                return await work(transport)
            finally:
                transport.close()

    return asyncio.run(main())


# --- threads ---


def test_a_request_is_answered_and_leaves_no_channel(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    for _ in range(20):
        assert ask(transport, stub.path, verb="state") == {"ok": True}
    eventually(lambda: transport.channels == 0 and stub.open == 0)
    transport.close()


def test_ciphers_are_gcm(sshd: Sshd) -> None:
    transport = ssh.dial(sshd.login())
    assert transport.remote_cipher.endswith("gcm@openssh.com") and transport.local_cipher.endswith("gcm@openssh.com")
    transport.close()


def test_an_answer_followed_by_the_end_is_not_held_back_by_nagle(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    stub.answers["state"] = b'{"ok":true}\n'  # and closes
    times = []
    for _ in range(60):
        started_at = time.monotonic()
        ask_to_the_end(transport, stub.path, verb="state")
        times.append(time.monotonic() - started_at)
    assert sorted(times)[len(times) // 2] < 0.03, times  # Nagle against a delayed acknowledgement takes 0.04
    transport.close()


def test_hosts_that_close_first_survive_rekeys(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    transport.packetizer.REKEY_PACKETS = 40
    stub.answers["state"] = b'{"ok":true}\n'  # the host closes first: stock paramiko's reader then waits for itself
    failures: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(60):
                ask_to_the_end(transport, stub.path, verb="state")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and transport.rekeys > 5
    transport.close()


def test_channels_seen_stays_small(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    for _ in range(50):
        ask(transport, stub.path, verb="state")
    assert not isinstance(transport.channels_seen, dict) and 49 in transport.channels_seen
    transport.close()


def test_a_refusal_belongs_to_its_own_open(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    wrong = []

    def refused() -> None:
        for _ in range(40):
            try:
                transport.open_stream("/nowhere.sock", soon())
                wrong.append("opened")
            except ssh.SocketRefused as error:
                if "/nowhere.sock" not in str(error):
                    wrong.append(str(error))

    thread = threading.Thread(target=refused)
    thread.start()
    for _ in range(40):
        ask(transport, stub.path, verb="state")  # raises if it is given the other's refusal
    thread.join(20)
    assert wrong == []
    transport.close()


def test_a_refused_socket_is_told_at_once(sshd: Sshd, stub: StubHostd, folder: pathlib.Path) -> None:
    transport = ssh.dial(sshd.login())
    stub.stop()
    started_at = time.monotonic()
    with pytest.raises(ssh.SocketRefused):
        transport.open_stream(str(stub.path), soon())
    assert time.monotonic() - started_at < 1
    assert transport.active and transport.channels == 0
    transport.close()


def test_a_late_success_is_closed_and_leaks_nothing(sshd: Sshd, stub: StubHostd) -> None:
    others = set(sshd.sessions())  # of connections that have just ended, perhaps
    transport = ssh.dial(sshd.login())
    # What sshd has for this connection once its login is over: the processes named [net] and [accepted] are gone then.
    eventually(lambda: (new := set(sshd.sessions()) - others) and not any(b"[" in told(pid) for pid in new))
    sessions = set(sshd.sessions()) - others
    send(sessions, signal.SIGSTOP)
    try:
        with pytest.raises(ssh.TimedOut):
            transport.open_stream(str(stub.path), soon(0.3))
    finally:
        send(sessions, signal.SIGCONT)
    eventually(lambda: stub.accepted == 1)  # late as it is, sshd has opened it
    eventually(lambda: transport.channels == 0 and stub.open == 0)
    assert ask(transport, stub.path, verb="state") == {"ok": True}
    transport.close()


def send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def told(pid: int) -> bytes:
    """What a process says it is doing; of one that is gone: that it is none of ours."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"[priv]", b"") or b"[gone]"
    except OSError:
        return b"[gone]"


def test_two_mib_unread_stop_the_host_and_lose_nothing(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    stream = transport.open_stream(str(stub.path), soon())
    size = 24 * MIB
    stream.send(json.dumps({"verb": "source", "n": size}).encode() + b"\n", soon())
    time.sleep(0.5)
    sent = stub.sent
    time.sleep(0.3)
    assert stub.sent == sent < 12 * MIB  # one window here, the rest in the host's own buffers: it waits
    assert ask(transport, stub.path, verb="state") == {"ok": True}  # beside it
    total = 0
    while data := stream.recv(soon(), 1 << 18):
        total += len(data)
    assert total == size + len(b'{"ok":true,"offset":0}\n')
    transport.close()


def test_a_killed_server_is_noticed_at_once(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    stream = transport.open_stream(str(stub.path), soon())
    stream.send(b'{"verb":"silence"}\n', soon())
    threading.Timer(0.2, sshd.stop).start()
    started_at = time.monotonic()
    with pytest.raises(ssh.ConnectionCut):
        stream.recv(soon(5))
    assert time.monotonic() - started_at < 2
    assert not transport.active


def test_a_server_that_restarts_with_another_key_is_refused(sshd: Sshd, stub: StubHostd) -> None:
    pinned = sshd.login()
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(ssh.HostKeyChanged):
        ssh.dial(pinned)
    ssh.dial(sshd.login()).close()


def test_a_server_that_lost_the_pinned_type_is_refused(sshd: Sshd) -> None:
    import paramiko

    key = paramiko.ECDSAKey.generate()
    with pytest.raises(ssh.HostKeyChanged):
        ssh.dial(sshd.login(host_key=f"{key.get_name()} {key.get_base64()}"))


def test_a_wrong_key_of_ours_is_a_refused_login(sshd: Sshd) -> None:
    with pytest.raises(ssh.LoginRefused):
        ssh.dial(sshd.login(private_key=ssh.new_key("another")[0]))


def test_nobody_listening_is_a_failed_dial(sshd: Sshd) -> None:
    sshd.stop()
    with pytest.raises(ssh.DialFailed):
        ssh.dial(sshd.login())


def test_a_port_that_says_nothing_times_out(sshd: Sshd) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        started_at = time.monotonic()
        with pytest.raises(ssh.DialFailed):
            ssh.dial(sshd.login(port=mute.getsockname()[1]), timeout=1)
        assert time.monotonic() - started_at < 4


def test_a_stopped_server_shows_no_sign_of_life(sshd: Sshd, stub: StubHostd) -> None:
    transport = ssh.dial(sshd.login())
    ask(transport, stub.path, verb="state")
    before = transport.heard_at
    transport.probe()
    eventually(lambda: transport.heard_at > before)
    sshd.signal_all(signal.SIGSTOP)
    time.sleep(0.2)  # what it had sent before arrives
    before = transport.heard_at
    transport.probe()
    time.sleep(0.3)
    assert transport.heard_at == before
    sshd.signal_all(signal.SIGCONT)
    eventually(lambda: transport.heard_at > before)
    transport.close()


# --- what the key may do ---


@pytest.mark.parametrize("path", ["/run/other.sock", "/run/berth-0/hostd.sock"])
def test_the_link_reaches_no_other_socket(sshd: Sshd, stub: StubHostd, folder: pathlib.Path, path: str) -> None:
    transport = ssh.dial(sshd.login())
    with pytest.raises(ssh.SocketRefused):
        transport.open_stream(path, soon())
    transport.close()


def test_the_link_reaches_no_other_socket_that_listens(sshd: Sshd, stub: StubHostd, folder: pathlib.Path) -> None:
    transport = ssh.dial(sshd.login())
    with started(StubHostd(folder / "other.sock")) as other:
        with pytest.raises(ssh.SocketRefused):
            transport.open_stream(str(other.path), soon())
    transport.close()


def test_the_link_runs_no_command_and_forwards_nothing(sshd: Sshd, stub: StubHostd) -> None:
    import paramiko

    transport = ssh.dial(sshd.login())
    with pytest.raises(paramiko.SSHException):
        transport.open_session(timeout=3).exec_command("id")
    with pytest.raises(paramiko.ChannelException):
        transport.open_channel("direct-tcpip", ("127.0.0.1", sshd.port), ("127.0.0.1", 1), timeout=3)
    with pytest.raises(paramiko.SSHException):
        transport.request_port_forward("127.0.0.1", 0)
    transport.close()


# --- the loop ---


def test_the_loop_asks_and_leaves_no_channel(sshd: Sshd, stub: StubHostd) -> None:
    async def work(transport):
        before = threading.active_count()
        for _ in range(50):
            stream = await transport.open(str(stub.path), 5)
            await stream.write(b'{"verb":"state"}\n')
            assert json.loads(await stream.read()) == {"ok": True}
            stream.aclose()
        assert threading.active_count() < before + 10  # none per channel, whatever other tests left
        for _ in range(100):
            if transport.channels == 0 and stub.open == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{transport.channels} channels are left")

    in_loop(sshd, work)


@pytest.mark.parametrize("rekey_bytes", [None, 2 * MIB])
def test_the_loop_moves_bytes_both_ways_through_rekeys(sshd: Sshd, stub: StubHostd, rekey_bytes: int | None) -> None:
    async def work(transport):
        if rekey_bytes:
            transport.packetizer.REKEY_BYTES = rekey_bytes
        stream = await transport.open(str(stub.path), 5)
        await stream.write(b'{"verb":"echo"}\n')
        assert await stream.read(12) == b'{"ok":true}\n'
        sent = os.urandom(MIB) * 16
        writing = asyncio.create_task(stream.write(sent))
        got = bytearray()
        while len(got) < len(sent):
            got += await stream.read(1 << 18)
        await writing
        assert bytes(got) == sent
        if rekey_bytes:
            assert transport.rekeys > 4
        stream.aclose()

    in_loop(sshd, work)


def test_many_loops_streams_close_first_during_rekeys(sshd: Sshd, stub: StubHostd) -> None:
    stub.answers["state"] = b'{"ok":true}\n'

    async def work(transport):
        transport.packetizer.REKEY_PACKETS = 60

        async def many() -> None:
            for _ in range(30):
                stream = await transport.open(str(stub.path), 5)
                await stream.write(b'{"verb":"state"}\n')
                assert await stream.read() == b'{"ok":true}\n'
                assert await stream.read() == b""
                stream.aclose()

        await asyncio.gather(*[many() for _ in range(8)])
        assert transport.rekeys > 5

    in_loop(sshd, work)


def test_an_unread_stream_does_not_hold_up_the_loop(sshd: Sshd, stub: StubHostd) -> None:
    async def work(transport):
        stuck = await transport.open(str(stub.path), 5)
        await stuck.write(json.dumps({"verb": "source", "n": 16 * MIB}).encode() + b"\n")
        await asyncio.sleep(0.4)
        sent = stub.sent
        await asyncio.sleep(0.2)
        assert stub.sent == sent < 12 * MIB
        stream = await transport.open(str(stub.path), 5)
        await stream.write(b'{"verb":"state"}\n')
        assert await stream.read() == b'{"ok": true}\n'
        stream.aclose()
        stuck.aclose()

    in_loop(sshd, work)
    eventually(lambda: stub.open == 0)


def test_cancelled_opens_and_reads_leave_nothing(sshd: Sshd, stub: StubHostd) -> None:
    async def work(transport):
        async def one() -> None:
            stream = await transport.open(str(stub.path), 5)
            try:
                await stream.write(b'{"verb":"silence"}\n')
                await stream.read()
            finally:
                stream.aclose()

        tasks = [asyncio.create_task(one()) for _ in range(60)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(200):
            if transport.channels == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{transport.channels} channels are left")

    in_loop(sshd, work)


def test_a_killed_server_cuts_the_loops_streams_and_opens(sshd: Sshd, stub: StubHostd) -> None:
    async def work(transport):
        stream = await transport.open(str(stub.path), 5)
        await stream.write(b'{"verb":"silence"}\n')
        asyncio.get_running_loop().call_later(0.1, sshd.stop)
        with pytest.raises(ssh.ConnectionCut):
            await asyncio.wait_for(stream.read(), 3)
        with pytest.raises(ssh.ConnectionCut):
            await transport.open(str(stub.path), 1)

    in_loop(sshd, work)


def test_the_loop_refuses_a_socket_and_a_key(sshd: Sshd, stub: StubHostd) -> None:
    async def work(transport):
        with pytest.raises(ssh.SocketRefused):
            await transport.open("/nowhere.sock", 5)
        assert transport.channels == 0

    in_loop(sshd, work)
    with pytest.raises(ssh.HostKeyChanged):
        in_loop(sshd, work, host_key=" ".join(ssh.new_key("x")[1].split()[:2]))


def test_a_login_that_is_cancelled_is_closed(sshd: Sshd) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            dialling = asyncio.create_task(ssh.dial_for_loop(sshd.login(), executor))
            await asyncio.sleep(0.002)
            dialling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialling

    asyncio.run(main())
    eventually(lambda: sshd.sessions() == [])
