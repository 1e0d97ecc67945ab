"""The protocol's words: what is refused, and frames cut anywhere."""

from __future__ import annotations

import json

import pytest

from hostd import framing, messages
from hostd.messages import FrameParser, ProtocolError, Refused

BOX = "dbx_01jd4k3v9w8x7y6z5a4b3c2d1e"
EXE = "exe_01jd4k3v9w8x7y6z5a4b3c2d1e"


def test_every_verb_has_fields():
    for verb in messages.VERBS:
        assert isinstance(messages.fields_of(verb), frozenset)
    assert not messages.HOST_VERBS & messages.BOX_VERBS


def test_a_request_comes_back():
    line = messages.request("prepare_disk", box=BOX, fence=3, image="img_0", disk_bytes=1 << 30)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    parsed = messages.parse_request(line)
    assert parsed["box"] == BOX and parsed["fence"] == 3 and parsed["v"] == messages.PROTOCOL


def test_none_is_left_out():
    assert "hold_ms" not in json.loads(messages.request("spawn", box=BOX, id=EXE, fence=1, body=9, hold_ms=None))


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("bad_request", b""),
        ("bad_request", b"nonsense"),
        ("bad_request", b"[]"),
        ("bad_request", b'"hello"'),
        ("bad_request", b"[" * 60000),
        ("bad_request", b'{"verb":"hello"}'),
        ("bad_request", b'{"v":2,"verb":"hello"}'),
        ("unknown_verb", b'{"v":1}'),
        ("unknown_verb", b'{"v":1,"verb":"mount"}'),
        ("unknown_verb", b'{"v":1,"verb":["hello"]}'),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"../etc","fence":1}'),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"%s"}' % BOX.encode()),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"%s","fence":true}' % BOX.encode()),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"%s","fence":-1}' % BOX.encode()),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"%s","fence":1.5}' % BOX.encode()),
        ("bad_request", b'{"v":1,"verb":"destroy","box":"%s\\n","fence":1}' % BOX.encode()),
        ("bad_request", b'{"v":1,"verb":"ship","digest":"../../x","body":5}'),
        ("too_large", b'{"v":1,"verb":"ship","digest":"%s","body":99999999999}' % (b"0" * 64)),
    ],
)
def test_wrong_lines_are_refused_by_name(code, line):
    with pytest.raises(Refused) as caught:
        messages.parse_request(line)
    assert caught.value.code == code


def test_a_callers_mistake_never_travels():
    with pytest.raises(ValueError, match="fence is missing"):
        messages.request("destroy", box=BOX)
    with pytest.raises(ValueError, match="no such verb"):
        messages.request("reboot")


def test_unknown_fields_are_ignored():
    assert messages.parse_request(b'{"v":1,"verb":"hello","later":1}')["verb"] == "hello"


def test_replies():
    assert messages.parse_reply(messages.ok(slot="s1"))["slot"] == "s1"
    with pytest.raises(Refused) as caught:
        messages.parse_reply(messages.error("stale_fence", "older", fence=7))
    assert (caught.value.code, caught.value.extra) == ("stale_fence", {"fence": 7})
    for line in (b"{}", b"", b'{"ok":1}', b'{"error":"no"}'):
        with pytest.raises(ProtocolError):
            messages.parse_reply(line)


def test_an_unknown_code_is_internal():
    assert json.loads(messages.error("whatever", "x"))["error"]["code"] == "internal"


def test_acks_are_cut_to_bounded_lines():
    pairs = [(BOX, EXE)] * (messages.ACKS_MAX + 1)
    lines = messages.acks(pairs)
    assert len(lines) == 2 and all(len(line) < messages.LINE_MAX for line in lines)
    assert [pair for line in lines for pair in messages.parse_acks(line)] == pairs
    assert messages.parse_acks(messages.acks([(BOX, "box")])[0]) == [(BOX, "box")]


@pytest.mark.parametrize("line", [b"{}", b'{"ack":1}', b'{"ack":[["x","y"]]}', b'{"ack":[["%s"]]}' % BOX.encode()])
def test_wrong_acks(line):
    with pytest.raises(ProtocolError):
        messages.parse_acks(line)


def test_events_are_checked():
    event = {"event": "exit", "box": BOX, "id": EXE, "exit": 0, "sizes": [1, 2]}
    assert messages.parse_event(messages.encode(event)) == event
    for change in ({"exit": 256}, {"exit": "0"}, {"sizes": [1]}, {"box": 7}, {"id": "x"}, {"event": None}):
        with pytest.raises(ProtocolError):
            messages.parse_event(messages.encode({**event, **change}))


def test_frames_may_be_cut_anywhere():
    whole = framing.frame(b"hello") + framing.frame(b"x" * 300) + framing.FRAMES_END + b'{"total":305}\nrest'
    for step in (1, 2, 3, 7, len(whole)):
        parser = FrameParser()
        found = b"".join(piece for at in range(0, len(whole), step) for piece in parser.feed(whole[at : at + step]))
        assert found == b"hello" + b"x" * 300
        assert parser.trailer == {"total": 305} and parser.rest == b"rest"


def test_a_cut_stream_has_no_trailer():
    parser = FrameParser()
    parser.feed(framing.frame(b"hello") + framing.FRAMES_END + b'{"total":5}')
    assert parser.trailer is None


def test_a_frame_over_the_limit():
    with pytest.raises(ProtocolError, match="limit"):
        FrameParser().feed(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError):
        framing.frame(b"")


def test_a_trailer_over_the_limit():
    with pytest.raises(ProtocolError, match="limit"):
        FrameParser().feed(framing.FRAMES_END + b"x" * (framing.TRAILER_MAX + 1))
