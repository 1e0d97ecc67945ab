"""One request id makes one object: replays, other bodies, other callers, expiry, and two at the same time."""

import datetime
import threading

import pytest
from django.db import connection, transaction

from api.callers import Caller
from api.errors import BadRequest
from api.idempotency import body_digest, idempotent
from api.ids import new_id
from api.models import IdempotencyRecord
from api.tasks import purge_requests

ALICE, CHARLIE = Caller(account_id="acc_a"), Caller(account_id="acc_c")


class Maker:
    def __init__(self):
        self.made = []

    def __call__(self):
        self.made.append(new_id("dbx"))
        return self.made[-1]


def ask(maker, caller=ALICE, request_id="r1", route="create", body=b"{}", **rest):
    with transaction.atomic():
        return idempotent(caller, request_id, route, body_digest(body), maker, **rest)


@pytest.mark.django_db
def test_a_repetition_answers_with_the_first_object():
    maker = Maker()
    first, replayed = ask(maker)
    assert not replayed
    assert ask(maker) == (first, True)
    assert maker.made == [first]


@pytest.mark.django_db
def test_what_is_no_repetition():
    maker = Maker()
    ids = [
        ask(maker)[0],
        ask(maker, caller=CHARLIE)[0],
        ask(maker, route="create:dbx_1")[0],
        ask(maker, request_id="r2")[0],
        ask(maker, request_id=None)[0],
        ask(maker, request_id=None)[0],
    ]
    assert len(set(ids)) == 6


@pytest.mark.django_db
def test_another_body_under_the_same_id_is_refused():
    maker = Maker()
    ask(maker)
    with pytest.raises(BadRequest, match="x-request-id"):
        ask(maker, body=b'{"name": "x"}')
    assert len(maker.made) == 1


@pytest.mark.django_db
@pytest.mark.parametrize("request_id", ["", "x" * 256, "a\0b"])
def test_an_id_that_is_none(request_id):
    with pytest.raises(BadRequest):
        ask(Maker(), request_id=request_id)


@pytest.mark.django_db
def test_an_id_chosen_beforehand_is_kept():
    chosen = new_id("dbx")
    assert ask(lambda: chosen, object_id=chosen) == (chosen, False)
    assert ask(lambda: "never called", object_id=new_id("dbx")) == (chosen, True)


@pytest.mark.django_db(transaction=True)
def test_a_failure_leaves_nothing_behind():
    def broken():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ask(broken)
    assert ask(Maker())[1] is False


@pytest.mark.django_db
def test_it_is_good_for_a_day():
    maker = Maker()
    first, _ = ask(maker)
    day = datetime.timedelta(hours=24)
    IdempotencyRecord.objects.update(
        created_at=datetime.datetime.now(datetime.UTC) - day + datetime.timedelta(minutes=1)
    )
    assert purge_requests() == 0
    assert ask(maker) == (first, True)
    IdempotencyRecord.objects.update(
        created_at=datetime.datetime.now(datetime.UTC) - day - datetime.timedelta(minutes=1)
    )
    second, replayed = ask(maker, body=b"other")
    assert second != first and not replayed
    IdempotencyRecord.objects.update(
        created_at=datetime.datetime.now(datetime.UTC) - day - datetime.timedelta(minutes=1)
    )
    assert purge_requests() == 1


@pytest.mark.django_db(transaction=True)
def test_two_at_the_same_time_make_one_object():
    maker = Maker()
    inside, finish = threading.Event(), threading.Event()
    results = []

    def slow():
        inside.set()
        finish.wait(5)
        return maker()

    def run(create):
        try:
            results.append(ask(create))
        finally:
            connection.close()

    first = threading.Thread(target=run, args=[slow])
    first.start()
    assert inside.wait(5)
    second = threading.Thread(target=run, args=[maker])
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the second must wait for the first"
    finish.set()
    first.join(5)
    second.join(5)
    assert len(maker.made) == 1
    assert sorted(results) == [(maker.made[0], False), (maker.made[0], True)]


@pytest.mark.django_db(transaction=True)
def test_outside_of_a_transaction_it_refuses():
    with pytest.raises(RuntimeError, match="transaction"):
        idempotent(ALICE, "r", "x", b"", Maker())
