"""GET /v1/accounts/me and POST /v1/apikeys, and everything a key may or may not do."""

import datetime
import io
import time

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from accounts.access import access_key
from accounts.caps import limits
from accounts.models import Account, ApiKey
from accounts.services import create_account, create_key, revoke_key
from api.errors import NotFound
from api.models import IdempotencyRecord
from tests.conftest import make_party


def test_me_is_the_account_of_the_key(alice, bob, charlie):
    mine = alice.get("/v1/accounts/me")
    assert mine.status_code == 200, mine.text
    body = mine.json()
    assert body["id"] == alice.account_id
    assert body["name"] == "Alice's company"
    assert body["account_status"] == "ACCOUNT_STATUS_ENABLED"
    assert datetime.datetime.fromisoformat(body["created_at"]).tzinfo is not None
    assert bob.get("/v1/accounts/me").json() == body
    assert charlie.get("/v1/accounts/me").json()["id"] == charlie.account_id != alice.account_id


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic abc",
        "ak_x",
        "Bearer ak_" + "a" * 32,
        "Bearer ak_é",
        "Bearer " + "a" * 5000,
    ],
    ids=lambda value: str(value)[:14],
)
def test_without_a_good_key_401(web, header):
    headers = {} if header is None else {"authorization": header.encode()}
    answer = web.get("/v1/accounts/me", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["code"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_scheme_is_read_in_any_case(web, alice):
    for scheme in ("bearer", "BEARER", "Bearer "):
        assert web.get("/v1/accounts/me", headers={"authorization": f"{scheme} {alice.secret}"}).status_code == 200


def test_a_revoked_key_ends_at_once(alice, bob):
    assert revoke_key(alice.key_id) and not revoke_key(alice.key_id)
    assert alice.get("/v1/accounts/me").status_code == 401
    assert bob.get("/v1/accounts/me").status_code == 200


def test_an_expired_key_is_refused(web, alice):
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    _, secret = create_key(alice.account_id, "old", expires_at=past)
    answer = web.get("/v1/accounts/me", key=secret)
    assert answer.status_code == 401 and "expired" in answer.json()["message"]


def test_a_disabled_account_is_403(alice, charlie):
    Account.objects.filter(pk=alice.account_id).update(status=Account.Status.DISABLED)
    answer = alice.get("/v1/accounts/me")
    assert answer.status_code == 403 and answer.json()["code"] == "forbidden"
    assert charlie.get("/v1/accounts/me").status_code == 200


def test_a_read_only_key_reads_only(web, alice):
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    assert reader.get("/v1/accounts/me").status_code == 200
    answer = reader.post("/v1/apikeys", {})
    assert answer.status_code == 403 and "may only read" in answer.json()["message"]


def test_a_made_key_works_and_its_secret_is_kept_nowhere(web, alice):
    expires_at_ms = int(time.time() * 1000) + 3_600_000
    made = alice.post("/v1/apikeys", {"name": "ci", "expires_at_ms": expires_at_ms})
    assert made.status_code == 200, made.text
    body = made.json()
    assert set(body) == {"id", "name", "key_secret", "expires_at_ms"}
    assert (body["name"], body["expires_at_ms"]) == ("ci", expires_at_ms)
    assert body["key_secret"].startswith("ak_") and len(body["key_secret"]) == 35
    assert web.get("/v1/accounts/me", key=body["key_secret"]).json()["id"] == alice.account_id
    with connection.cursor() as cursor:
        cursor.execute("SELECT k::text FROM accounts_apikey k WHERE id = %s", [body["id"]])
        assert body["key_secret"] not in cursor.fetchone()[0]
    row = ApiKey.objects.get(pk=body["id"])
    assert (row.account_id, row.member_id) == (alice.account_id, alice.member_id)


def test_a_key_makes_none_that_outlives_it(alice):
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    _, secret = create_key(alice.account_id, "short", expires_at=ends)
    last = int(ends.timestamp() * 1000)

    def ask(body):
        return alice.post("/v1/apikeys", body, headers={"authorization": f"Bearer {secret}"})

    assert ask({}).json()["expires_at_ms"] == last
    assert ApiKey.objects.order_by("-created_at").first().expires_at <= ends
    assert ask({"expires_at_ms": last - 1000}).json()["expires_at_ms"] == last - 1000
    refused = ask({"expires_at_ms": last + 1000})
    assert refused.status_code == 403 and str(last) in refused.json()["message"]


@pytest.mark.parametrize("body", [None, {}, {"name": None, "expires_at_ms": None}])
def test_a_key_needs_no_body(alice, body):
    made = alice.post("/v1/apikeys", body)
    assert made.status_code == 200, made.text
    assert made.json()["expires_at_ms"] is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"name": 5}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"expires_at_ms": "soon"}, "expires_at_ms"),
        ({"expires_at_ms": 1000}, "expires_at_ms"),
        ({"expires_at_ms": -5}, "expires_at_ms"),
        ({"expires_at_ms": 2**62}, "expires_at_ms"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_body_names_its_field(alice, body, field):
    answer = alice.post("/v1/apikeys", body)
    assert answer.status_code == 400 and answer.json()["message"].startswith(field), answer.text


def test_a_repeated_request_makes_one_key_and_gives_the_same_secret(alice, bob, charlie):
    headers = {"x-request-id": "stainless-python-retry-1"}
    first = alice.post("/v1/apikeys", {"name": "once"}, headers=headers).json()
    assert alice.post("/v1/apikeys", {"name": "once"}, headers=headers).json() == first
    assert ApiKey.objects.filter(name="once").count() == 1
    assert alice.post("/v1/apikeys", {"name": "other"}, headers=headers).status_code == 400
    stranger = charlie.post("/v1/apikeys", {"name": "once"}, headers=headers).json()
    assert stranger["id"] != first["id"] and stranger["key_secret"] != first["key_secret"]


def _expire_request(request_id):
    day = datetime.timedelta(hours=24, minutes=1)
    changed = IdempotencyRecord.objects.filter(request_id=request_id).update(
        created_at=datetime.datetime.now(datetime.UTC) - day
    )
    assert changed == 1


def test_a_request_id_of_the_day_before_makes_another_key_with_another_secret(web, alice):
    headers = {"x-request-id": "again"}
    first = alice.post("/v1/apikeys", {"name": "a"}, headers=headers).json()
    _expire_request("again")
    second = alice.post("/v1/apikeys", {"name": "a"}, headers=headers)
    assert second.status_code == 200, second.text
    assert second.json()["id"] != first["id"] and second.json()["key_secret"] != first["key_secret"]
    for made in (first, second.json()):
        assert web.get("/v1/accounts/me", key=made["key_secret"]).status_code == 200
    assert alice.post("/v1/apikeys", {"name": "a"}, headers=headers).json() == second.json()


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_repetition_never_tells_the_secret_of_a_dead_key(alice, end):
    headers = {"x-request-id": "dead"}
    first = alice.post("/v1/apikeys", {}, headers=headers).json()
    if end == "revoked":
        revoke_key(first["id"])
    else:
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        ApiKey.objects.filter(pk=first["id"]).update(expires_at=past)
    again = alice.post("/v1/apikeys", {}, headers=headers)
    assert again.status_code == 409 and end in again.json()["message"], again.text
    assert again.headers["x-should-retry"] == "false" and first["key_secret"] not in again.text


def test_a_repetition_answers_what_was_made_and_to_its_maker_only(alice, bob):
    headers = {"x-request-id": "mine"}
    ends = int(time.time() * 1000) + 3_600_000
    first = alice.post("/v1/apikeys", {"name": "n", "expires_at_ms": ends}, headers=headers).json()
    ApiKey.objects.filter(pk=first["id"]).update(name="renamed")
    assert alice.post("/v1/apikeys", {"name": "n", "expires_at_ms": ends}, headers=headers).json() == {
        **first,
        "name": "renamed",
    }
    theirs = bob.post("/v1/apikeys", {"name": "n", "expires_at_ms": ends}, headers=headers)
    assert theirs.status_code == 409 and first["key_secret"] not in theirs.text


def test_access_is_within_the_account(alice, bob, charlie):
    assert access_key(bob.caller, alice.key_id).pk == alice.key_id
    with pytest.raises(NotFound):
        access_key(charlie.caller, alice.key_id)


def test_recognising_a_caller_is_one_query_and_use_is_written_once_a_minute(alice):
    alice.get("/v1/accounts/me")
    first = ApiKey.objects.get(pk=alice.key_id).last_used_at
    assert first is not None
    with CaptureQueriesContext(
        connection,
    ) as queries:
        alice.get("/v1/accounts/me")
    # The key's own SELECT is prepared on the server and not seen here; what is left is the account.
    assert len(queries) == 1, queries.captured_queries
    assert ApiKey.objects.get(pk=alice.key_id).last_used_at == first
    ApiKey.objects.filter(pk=alice.key_id).update(last_used_at=first - datetime.timedelta(seconds=61))
    alice.get("/v1/accounts/me")
    assert ApiKey.objects.get(pk=alice.key_id).last_used_at >= first


def test_caps_are_settings_unless_the_account_has_its_own(db, settings):
    account = create_account("Small")
    assert limits(account.pk).running_devboxes == settings.BERTH.CAP_RUNNING_DEVBOXES
    Account.objects.filter(pk=account.pk).update(max_running_devboxes=0, max_open_streams=3)
    own = limits(account.pk)
    assert (own.running_devboxes, own.open_streams) == (0, 3)
    assert own.executions_at_once == settings.BERTH.CAP_EXECUTIONS


def run(*arguments, **options):
    out = io.StringIO()
    call_command(*arguments, stdout=out, **options)
    return out.getvalue().strip()


def test_the_commands(web, tmp_path):
    account = run("create_account", "Made by hand")
    secret = run("create_key", account, name="k", read_only=True, expires_in_days=1.0)
    assert web.get("/v1/accounts/me", key=secret).json()["name"] == "Made by hand"
    assert web.post("/v1/apikeys", {}, key=secret).status_code == 403
    file = tmp_path / "key"
    key_id = run("create_key", account, secret_file=str(file))
    assert key_id.startswith("key_") and file.stat().st_mode & 0o777 == 0o600
    assert web.get("/v1/accounts/me", key=file.read_text().strip()).status_code == 200
    assert run("revoke_key", key_id) == "revoked"
    assert run("revoke_key", file.read_text()[:9]) == "it was revoked already"
    assert web.get("/v1/accounts/me", key=file.read_text().strip()).status_code == 401
    for wrong in (["create_key", "acc_none"], ["create_key", account, "--member", "mem_x"], ["revoke_key", "key_none"]):
        with pytest.raises(CommandError):
            run(*wrong)
    with pytest.raises(CommandError, match="--secret-file"):
        run("create_key", account, secret_file=str(file))


def test_rotating_the_seals(alice, settings):
    from accounts.sealing import SealBroken, new_seal_key, seal, unseal
    from devboxes import states
    from devboxes.models import Devbox

    old, new = new_seal_key(), new_seal_key()
    settings.SEAL_KEYS = [old]
    size = {"cpu_millis": 1000, "memory_mb": 1024, "disk_mb": 1024, "keep_alive_seconds": 60}
    for number, secret in enumerate((b"", seal({"TOKEN": "x"}), None)):
        Devbox.objects.create(
            id=f"dbx_{number}", account_id=alice.account_id, step=states.PLACE, environment_sealed=secret, **size
        )
    settings.SEAL_KEYS = [new, old]
    assert run("rotate_seals") == "1 secrets resealed"
    settings.SEAL_KEYS = [new]
    assert unseal(Devbox.objects.get(pk="dbx_1").environment_sealed) == {"TOKEN": "x"}
    settings.SEAL_KEYS = [new_seal_key()]
    with pytest.raises(CommandError, match="dbx_1"):
        run("rotate_seals")
    with pytest.raises(SealBroken):
        unseal(Devbox.objects.get(pk="dbx_1").environment_sealed)
