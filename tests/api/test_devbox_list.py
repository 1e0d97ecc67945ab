"""`GET /v1/devboxes` and the metadata lists: filters, pages, order, indexes."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from api.ids import new_id
from devboxes.models import Devbox
from tests.conftest import Party

SIZE = {"cpu_millis": 1, "memory_mb": 1, "disk_mb": 1, "keep_alive_seconds": 60}


def make(party: Party, count: int = 1, status: str = "running", **columns: Any) -> list[str]:
    """Devboxes of that party, oldest first."""
    over = status in ("shutdown", "failure")
    ids = []
    for _ in range(count):
        devbox = Devbox.objects.create(
            id=new_id("dbx"),
            account_id=party.account_id,
            step="running",
            status=status,
            wake_at=None,
            **SIZE,
            **columns,
        )
        ids.append(devbox.pk)
    if over:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE devboxes_devbox SET ended_at = now() WHERE id = ANY(%s)", [ids])
    return ids


def listed(party: Party, query: str = "") -> dict[str, Any]:
    answer = party.get(f"/v1/devboxes{query}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ids(party: Party, query: str = "") -> list[str]:
    return [devbox["id"] for devbox in listed(party, query)["devboxes"]]


def test_newest_first_own_account_only(alice: Party, bob: Party, charlie: Party) -> None:
    mine = make(alice, 3)
    theirs = make(charlie, 2)
    assert ids(alice) == ids(bob) == mine[::-1]
    assert ids(charlie) == theirs[::-1]
    answer = listed(alice)
    assert (answer["has_more"], answer["total_count"]) == (False, 3)
    assert answer["devboxes"][0] == alice.get(f"/v1/devboxes/{mine[-1]}").json()


def test_pages_are_stable_while_devboxes_come_and_end(alice: Party) -> None:
    first = make(alice, 5)
    with connection.cursor() as cursor:  # all made at the same moment: the id decides
        cursor.execute("UPDATE devboxes_devbox SET created_at = now()")
    seen, after = [], ""
    while True:
        page = listed(alice, f"?limit=2{after}")
        seen += [devbox["id"] for devbox in page["devboxes"]]
        make(alice)
        if not page["has_more"]:
            break
        after = f"&starting_after={seen[-1]}"
    assert seen == first[::-1]
    assert page["total_count"] == 7


@pytest.mark.parametrize(
    ("query", "count"), [("?limit=0", 1), ("?limit=-5", 1), ("?limit=&status=&name=", 20), ("", 20)]
)
def test_limit_is_clamped(alice: Party, query: str, count: int) -> None:
    make(alice, 21)
    answer = listed(alice, query)
    assert (len(answer["devboxes"]), answer["has_more"], answer["total_count"]) == (count, True, 21)
    assert len(ids(alice, "?limit=999999")) == 21


def test_the_count_may_be_left_out(alice: Party) -> None:
    make(alice)
    assert "total_count" not in listed(alice, "?include_total_count=false")
    assert listed(alice, "?include_total_count=")["total_count"] == 1


@pytest.mark.parametrize(
    "query", ["?limit=ten", "?status=happy", "?metadata%5Ba%20b%5D=x", "?include_total_count=maybe", "?name=%00"]
)
def test_filters_that_make_no_sense_are_refused(alice: Party, query: str) -> None:
    assert alice.get(f"/v1/devboxes{query}").status_code == 400


def test_starting_after_must_be_ones_own(alice: Party, charlie: Party) -> None:
    make(alice)
    theirs = make(charlie)[0]
    for after in (theirs, new_id("dbx"), "x", "%00"):
        assert alice.get(f"/v1/devboxes?starting_after={after}").status_code == 404


def test_by_status_and_name(alice: Party) -> None:
    running = make(alice, 2, name="a")
    over = make(alice, 1, "shutdown", name="b") + make(alice, 1, "failure", name="a")
    assert ids(alice, "?status=running") == running[::-1]
    assert ids(alice, "?status=shutdown") == over[:1]
    assert ids(alice, "?status=provisioning") == ids(alice, "?status=queued") == []
    assert ids(alice, "?name=a") == [over[1], *running[::-1]]
    assert listed(alice, "?name=a&status=running&limit=1")["total_count"] == 2


def test_by_metadata(alice: Party, charlie: Party) -> None:
    prod = make(alice, 1, metadata={"env": "prod", "team": "a"})[0]
    dev = make(alice, 1, metadata={"env": "dev", "team": "b,c"})[0]
    make(alice, 1, metadata={})
    make(charlie, 1, metadata={"env": "prod"})
    assert ids(alice, "?metadata[env]=prod") == ids(alice, "?metadata%5Benv%5D=prod") == [prod]
    assert ids(alice, "?metadata[env][in]=prod,dev") == [dev, prod]
    assert ids(alice, "?metadata[env][in]=prod&metadata[env][in]=dev") == [dev, prod]
    assert ids(alice, "?metadata[env]=prod&metadata[team]=b,c") == []
    assert ids(alice, "?metadata[team]=b,c") == [dev]
    assert ids(alice, "?metadata[env]=nothing&metadata[x]=") == []
    assert ids(alice, "?metadata[env]=&unknown=1&metadata[env][in]=") == ids(alice)


def test_values_are_data(alice: Party) -> None:
    odd = 'it\'s "odd" \\ %s ü'
    mine = make(alice, 1, metadata={"k": odd}, name=odd)
    answer = alice.get("/v1/devboxes", params={"metadata[k]": odd, "name": odd})
    assert [devbox["id"] for devbox in answer.json()["devboxes"]] == mine
    assert answer.json()["devboxes"][0]["metadata"] == {"k": odd}


def test_metadata_keys_and_values(alice: Party, charlie: Party) -> None:
    make(alice, 1, metadata={"env": "prod", "a/b": "1"})
    make(alice, 1, metadata={"env": "dev"})
    make(charlie, 1, metadata={"secret": "x"})
    assert alice.get("/v1/devboxes/metadata/keys").json() == {"keys": ["a/b", "env"]}
    assert alice.get("/v1/devboxes/metadata/keys/env/values").json() == {"key": "env", "values": ["dev", "prod"]}
    assert alice.get("/v1/devboxes/metadata/keys/a%2Fb/values").json() == {"key": "a/b", "values": ["1"]}
    assert alice.get("/v1/devboxes/metadata/keys/secret/values").json() == {"key": "secret", "values": []}
    assert alice.get("/v1/devboxes/metadata/keys/a%20b/values").status_code == 400


def test_a_list_costs_the_same_however_long(alice: Party) -> None:
    def count(size: int) -> int:
        make(alice, size)
        with CaptureQueriesContext(connection) as captured:
            assert len(ids(alice, "?limit=100")) >= size
        return len(captured)

    listed(alice)  # the first use of a key is noted
    assert count(1) == count(30) == 0, "prepared statements only"


def test_lists_are_served_by_indexes(alice: Party) -> None:
    made = make(alice, 100)
    with connection.cursor() as cursor:
        # Most are over, as in a real table: else both indexes hold the same rows, and the planner may take either.
        cursor.execute("UPDATE devboxes_devbox SET ended_at = now() WHERE id = ANY(%s)", [made[:80]])
        cursor.execute("ANALYZE devboxes_devbox")
        # In a table of this size anything is cheap; what counts is that the index gives rows and order.
        cursor.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")

        def plan(condition: str) -> str:
            cursor.execute(
                "EXPLAIN SELECT id FROM devboxes_devbox d WHERE account_id = %s AND "
                + condition
                + " ORDER BY created_at DESC, id DESC LIMIT 20",
                [alice.account_id],
            )
            return "\n".join(line for (line,) in cursor.fetchall())

        every = plan("(created_at, id) < (now(), 'x')")
        live = plan("status = 'running' AND ended_at IS NULL")
    assert "devboxes_devbox_list" in every and "Sort" not in every
    assert "devboxes_devbox_live" in live and "Sort" not in live
