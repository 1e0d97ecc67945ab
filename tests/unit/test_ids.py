"""Identifiers: unique, sortable by creation, recognised by their prefix."""

import threading
import time

from api.ids import is_id, new_id


def test_ids_say_what_they_are():
    made = new_id("dbx")
    assert made.startswith("dbx_") and len(made) == 30
    assert is_id("dbx", made) and not is_id("exe", made)


def test_ids_sort_by_creation_across_threads():
    made: list[str] = []
    lock = threading.Lock()

    def make() -> None:
        mine = [new_id("exe") for _ in range(2000)]
        assert mine == sorted(mine)
        with lock:
            made.extend(mine)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8000
    time.sleep(0.002)
    assert new_id("exe") > max(made)


def test_a_clock_set_back_keeps_the_order(monkeypatch):
    before = new_id("dbx")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    assert new_id("dbx") > before


def test_what_is_no_id():
    good = new_id("dbx")
    wrong = [
        "",
        "dbx_",
        good[:-1],
        good + "0",
        good.upper(),
        "dbx_" + "u" * 26,
        "dbx_8" + good[5:],
        f" {good}",
        f"{good}\n",
    ]
    for bad in [*wrong, None, 7]:
        assert not is_id("dbx", bad), bad
