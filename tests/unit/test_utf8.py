"""The UTF-8 cutter: text never splits a character, offsets never lose a byte."""

import random

import pytest

from executions.utf8 import TextCutter

SAMPLES = [
    b"plain ascii\n",
    "naïve café — 日本語 🎉\n".encode(),
    b"\xff\xfe bad \xc3( \xe2\x82 cut \xf0\x9f\x8e",
    b"\x80\x80\x80stray",
    b"\xed\xa0\x80 surrogate \xf8\x88\x80\x80\x80",
    bytes(range(256)),
    b"",
]


def cut(data: bytes, sizes: list[int], offset: int = 0):
    cutter = TextCutter(offset)
    pieces = []
    at = 0
    for size in sizes:
        piece = cutter.feed(data[at : at + size])
        at += size
        if piece:
            pieces.append(piece)
    last = cutter.finish()
    return [*pieces, last] if last else pieces


@pytest.mark.parametrize("data", SAMPLES)
def test_any_cut_gives_the_text_of_the_whole(data):
    random.seed(7)
    for _ in range(50):
        sizes = []
        while sum(sizes) < len(data):
            sizes.append(random.randint(1, 5))
        pieces = cut(data, sizes)
        assert "".join(piece.text for piece in pieces) == data.decode("utf-8", "replace")
        if data:
            assert pieces[-1].end == len(data)


@pytest.mark.parametrize("data", SAMPLES)
def test_coming_back_at_any_offset_given_loses_and_repeats_nothing(data):
    pieces = cut(data, [1] * len(data))
    whole = data.decode("utf-8", "replace")
    for index, piece in enumerate(pieces):
        before = "".join(p.text for p in pieces[: index + 1])
        rest = cut(data[piece.end :], [3] * (len(data) // 3 + 1), piece.end)
        assert before + "".join(p.text for p in rest) == whole


def test_an_unfinished_character_is_held_and_not_counted():
    cutter = TextCutter(100)
    assert cutter.feed(b"a\xe2\x82").end == 101
    assert cutter.feed(b"") is None
    piece = cutter.feed(b"\xac")
    assert (piece.text, piece.end) == ("€", 104)
    assert cutter.finish() is None
