"""Accounts through HTTP: who am I, keys."""


def test_me(alice, bob, charlie, web):
    mine = alice.get("/v1/accounts/me")
    assert mine.status_code == 200, mine.text
    assert mine.json()["id"] == alice.account_id == bob.get("/v1/accounts/me").json()["id"]
    assert charlie.get("/v1/accounts/me").json()["id"] == charlie.account_id != alice.account_id
    assert web.get("/v1/accounts/me").status_code == 401
