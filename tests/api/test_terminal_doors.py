"""The terminals' doors: who is let in before a host is asked. What is behind them is tried live."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Party, make_party

HOSTED = {"host": f"13-{'0' * 26}.tunnel.example.com"}


def test_a_read_only_key_starts_no_shell(web: Any, alice: Party) -> None:
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    answer = reader.get("/pty/mine?devbox_id=dbx_00000000000000000000000000")
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize("headers", [{}, HOSTED], ids=["api", "tunnel"])
def test_a_query_of_too_many_fields_is_refused(alice: Party, headers: dict[str, str]) -> None:
    answer = alice.get("/pty/mine?" + "&".join(f"a{number}=1" for number in range(1001)), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_an_unknown_tunnel_is_no_door(alice: Party) -> None:
    assert alice.get("/pty/mine", headers=HOSTED).status_code == 401
