"""Fences: older requests are refused, also after a restart and after the end; one request at a time."""

from __future__ import annotations

import asyncio

import pytest

from hostd.fences import WAITERS_MAX, Fences
from hostd.messages import TOMBSTONE_SECONDS, Refused

A, B = "dbx_a", "dbx_b"


def enter(fences: Fences, box: str, fence: int, *, ending: bool = False, bury: bool = False) -> None:
    async def once() -> None:
        async with fences.held(box, fence, ending=ending):
            if bury:
                fences.bury(box, fence)

    asyncio.run(once())


def refused(fences: Fences, box: str, fence: int, **how: bool) -> Refused:
    with pytest.raises(Refused) as caught:
        enter(fences, box, fence, **how)
    return caught.value


def test_older_is_refused_with_the_fence_that_was_seen(tmp_path):
    fences = Fences(str(tmp_path / "fences"))
    enter(fences, A, 5)
    enter(fences, A, 5)
    enter(fences, B, 1)
    error = refused(fences, A, 4)
    assert (error.code, error.extra) == ("stale_fence", {"fence": 5})
    enter(fences, A, 6)


def test_fences_outlive_the_process(tmp_path):
    path = str(tmp_path / "fences")
    enter(Fences(path), A, 5)
    assert refused(Fences(path), A, 4).code == "stale_fence"


def test_the_fence_is_on_disk_before_the_effect(tmp_path):
    path = str(tmp_path / "fences")

    async def effect() -> None:
        async with Fences(path).held(A, 9):
            assert Fences(path).of(A) == 9

    asyncio.run(effect())


def test_a_failed_effect_keeps_the_fence(tmp_path):
    fences = Fences(str(tmp_path / "fences"))

    async def effect() -> None:
        async with fences.held(A, 9):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asyncio.run(effect())
    assert refused(fences, A, 8).code == "stale_fence"


def test_the_dead_stay_dead(tmp_path):
    path = str(tmp_path / "fences")
    fences = Fences(path)
    enter(fences, A, 3)
    enter(fences, A, 4, ending=True, bury=True)
    for known in (fences, Fences(path)):
        assert refused(known, A, 3).code == "stale_fence"
        assert refused(known, A, 4).code == "stale_fence"
        enter(known, A, 4, ending=True, bury=True)  # a destroy may be repeated
    enter(fences, A, 5)
    enter(fences, A, 5)  # a newer fence has brought it back: it may be repeated


def test_an_unknown_devbox_gets_a_tombstone(tmp_path):
    fences = Fences(str(tmp_path / "fences"))
    enter(fences, A, 2, ending=True, bury=True)
    assert refused(fences, A, 1).code == "stale_fence"


def test_tombstones_are_kept_a_day(tmp_path):
    now = [1000.0]
    fences = Fences(str(tmp_path / "fences"), lambda: now[0])
    enter(fences, A, 2, ending=True, bury=True)
    enter(fences, B, 2)
    now[0] += TOMBSTONE_SECONDS - 1
    fences.forget_old()
    assert fences.of(A) == 2
    now[0] += 2
    fences.forget_old()
    assert fences.of(A) == 0 and fences.of(B) == 2


def test_a_line_cut_short_by_a_kill_spoils_nothing(tmp_path):
    path = tmp_path / "fences"
    enter(Fences(str(path)), A, 5)
    with path.open("ab") as file:
        file.write(b'\n["dbx_b",')
    fences = Fences(str(path))
    assert fences.of(A) == 5
    with path.open("ab") as file:
        file.write(b'\n["dbx_b"')
    enter(fences, B, 7)
    assert Fences(str(path)).of(B) == 7


def test_the_file_stays_small(tmp_path):
    path = tmp_path / "fences"
    fences = Fences(str(path))
    for fence in range(1, 3000):
        enter(fences, A, fence)
    fences.forget_old()
    assert path.stat().st_size < 200
    assert Fences(str(path)).of(A) == 2999


def test_one_at_a_time_and_the_newer_wins(tmp_path):
    fences = Fences(str(tmp_path / "fences"))
    trace: list[str] = []

    async def work(name: str, fence: int) -> None:
        async with fences.held(A, fence):
            trace.append(f"{name} in")
            await asyncio.sleep(0.01)
            trace.append(f"{name} out")

    async def both() -> None:
        results = await asyncio.gather(work("new", 2), work("old", 1), work("again", 2), return_exceptions=True)
        assert isinstance(results[1], Refused) and results[1].code == "stale_fence"

    asyncio.run(both())
    assert trace == ["new in", "new out", "again in", "again out"]
    assert not fences.is_held(A)


def test_the_queue_is_bounded(tmp_path):
    fences = Fences(str(tmp_path / "fences"))

    async def work() -> None:
        async with fences.held(A, 1):
            await asyncio.sleep(0.01)

    async def many() -> list[object]:
        return await asyncio.gather(*(work() for _ in range(WAITERS_MAX + 3)), return_exceptions=True)

    codes = [result.code for result in asyncio.run(many()) if isinstance(result, Refused)]
    assert codes == ["busy"] * 3
