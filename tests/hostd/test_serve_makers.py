"""Makers: real processes that are killed, time out, fail and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from hostd import makers as module
from hostd.makers import Makers
from hostd.messages import Refused


def run(name: str, args: dict[str, Any]) -> dict[str, Any]:
    if name == "echo":
        return args
    if name == "pid":
        return {"pid": os.getpid(), "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))}
    if name == "sleep":
        time.sleep(args["for"])
        return {}
    if name == "child":  # a command that is in the middle of its work when the maker dies
        pid = os.fork()
        if pid == 0:
            os.execv("/bin/sleep", ["sleep", "60"])
        with open(args["path"], "w") as file:
            file.write(str(pid))
        time.sleep(60)
    if name == "refuse":
        raise Refused("no_space", "the pool is full", free=0)
    raise RuntimeError("boom")


def with_makers(work, count: int = 2):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, reap)
        found.attach(loop)
        try:
            await asyncio.wait_for(work(found), 30)
        finally:
            await found.close(1.0)

    def reap() -> None:
        for pid in known:
            found.dying(pid)
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass
        known.update(found.pids)

    found = Makers(count, run)
    known = set(found.pids)
    asyncio.run(main())
    for pid in found.pids:
        assert not os.path.exists(f"/proc/{pid}")


def code_of(result: object) -> str:
    assert isinstance(result, Refused), result
    return result.code


def test_jobs_run_side_by_side():
    async def work(makers: Makers) -> None:
        began = time.monotonic()
        await asyncio.gather(*(makers.do("sleep", **{"for": 0.2}) for _ in range(4)))
        assert 0.35 < time.monotonic() - began < 0.75

    with_makers(work)


def test_results_and_refusals_come_back():
    async def work(makers: Makers) -> None:
        assert await makers.do("echo", a=1) == {"a": 1}
        with pytest.raises(Refused) as caught:
            await makers.do("refuse")
        assert (caught.value.code, caught.value.extra) == ("no_space", {"free": 0})
        with pytest.raises(Refused) as caught:
            await makers.do("explode")
        assert caught.value.code == "internal" and "boom" in caught.value.message

    with_makers(work)


def test_a_maker_keeps_no_descriptor_of_its_parent():
    async def work(makers: Makers) -> None:
        found = await makers.do("pid")
        assert len(found["fds"]) <= 5  # stdio, its socket, the directory that lists them

    keep = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    try:
        with_makers(work)
    finally:
        for fd in keep:
            os.close(fd)


def test_a_killed_maker_fails_its_job_and_is_replaced():
    async def work(makers: Makers) -> None:
        before = set(makers.pids)
        job = asyncio.ensure_future(makers.do("sleep", **{"for": 20}))
        other = asyncio.ensure_future(makers.do("sleep", **{"for": 20}))
        queued = asyncio.ensure_future(makers.do("echo", a=2))
        await asyncio.sleep(0.1)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert code_of((await asyncio.gather(job, return_exceptions=True))[0]) == "internal"
        assert code_of((await asyncio.gather(other, return_exceptions=True))[0]) == "internal"
        assert await queued == {"a": 2}
        await asyncio.sleep(0.5)
        assert len(makers.pids) == 2 and not before & set(makers.pids)

    with_makers(work)


def test_what_a_killed_maker_had_started_dies_with_it(tmp_path):
    async def work(makers: Makers) -> None:
        path = tmp_path / "pid"
        job = asyncio.ensure_future(makers.do("child", path=str(path)))
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
        child = int(path.read_text())
        for pid in makers.pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.gather(job, return_exceptions=True)
        for _ in range(100):
            if module_state(child) in (None, "Z"):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the command goes on behind the retry's back")

    with_makers(work)


def module_state(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def test_an_overdue_job_is_ended():
    async def work(makers: Makers) -> None:
        began = time.monotonic()
        with pytest.raises(Refused) as caught:
            await makers.do("sleep", seconds=0.2, **{"for": 20})
        assert caught.value.code == "internal" and time.monotonic() - began < 2
        assert await makers.do("echo", a=3) == {"a": 3}

    with_makers(work, 1)


def test_the_queue_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "QUEUE_MAX", 3)

    async def work(makers: Makers) -> None:
        jobs = [asyncio.ensure_future(makers.do("sleep", **{"for": 0.1})) for _ in range(6)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert [result.code for result in results if isinstance(result, Refused)] == ["busy", "busy"]

    with_makers(work, 1)


def test_the_job_goes_on_when_its_caller_leaves(tmp_path):
    async def work(makers: Makers) -> None:
        job = asyncio.ensure_future(makers.do("sleep", **{"for": 0.2}))
        await asyncio.sleep(0.05)
        job.cancel()
        pid = makers.pids
        assert await makers.do("echo", a=4) == {"a": 4}
        assert makers.pids == pid

    with_makers(work, 1)


def test_makers_end_with_their_parent():
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        found = Makers(2, run)
        with open(f"/tmp/.makers-{os.getpid()}", "w") as file:
            file.write(" ".join(map(str, found.pids)))
        time.sleep(60)
        os._exit(0)
    path = f"/tmp/.makers-{pid}"
    for _ in range(200):
        if os.path.exists(path) and os.path.getsize(path):
            break
        time.sleep(0.01)
    with open(path) as file:
        children = [int(word) for word in file.read().split()]
    os.unlink(path)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for _ in range(100):
        if all(module_state(child) in (None, "Z") for child in children):
            return
        time.sleep(0.01)
    raise AssertionError("a maker outlived hostd")
