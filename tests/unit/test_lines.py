"""The last lines of an output, in memory and read backwards from elsewhere."""

import random

import pytest

from executions.lines import last_lines, read_last_lines, start_of_last_lines

MANY = 1 << 30


@pytest.mark.parametrize(
    ("data", "count", "want"),
    [
        (b"", 3, b""),
        (b"a", 1, b"a"),
        (b"a\n", 1, b"a\n"),
        (b"a\nb\nc\nd\n", 3, b"b\nc\nd\n"),
        (b"a\nb\nc\nd", 3, b"b\nc\nd"),
        (b"a\nb\n", 2, b"a\nb\n"),
        (b"a\nb\n", 5, b"a\nb\n"),
        (b"a\nb\n", 0, b""),
        (b"\n\n\n", 1, b"\n"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"\n", 1, b"\n"),
        (b"x\n\n", 1, b"\n"),
    ],
)
def test_last_lines(data, count, want):
    assert last_lines(data, count, MANY) == want


def test_a_limit_cuts_the_front_between_characters():
    data = ("é" * 10).encode()
    assert last_lines(data, 1, 5) == "éé".encode()
    assert last_lines(data, 1, 4) == "éé".encode()
    assert last_lines("🎉🎉".encode(), 1, 5) == "🎉".encode()
    assert last_lines("🎉🎉".encode(), 1, 7) == "🎉".encode()


def test_reading_backwards_agrees_with_memory():
    random.seed(3)
    for _ in range(60):
        data = b"".join(
            b"x" * random.choice([0, 1, 10, 5000, 70000]) + random.choice([b"\n", b"\n", b""]) for _ in range(12)
        )
        reads = []

        def read(start, length, data=data, reads=reads):
            reads.append(length)
            assert length > 0
            assert start >= 0
            return data[start : start + length]

        for count in (0, 1, 2, 5, 100):
            for limit in (1000, 100_000, MANY):
                assert read_last_lines(read, len(data), count, limit) == last_lines(data, count, limit)


def test_a_short_tail_of_a_large_output_is_one_small_read():
    data = b"line\n" * 1_000_000
    reads = []

    def read(start, length):
        reads.append(length)
        return data[start : start + length]

    assert read_last_lines(read, len(data), 3, MANY) == b"line\n" * 3
    assert sum(reads) <= 65536


def test_start_of_last_lines_never_looks_at_a_trailing_newline_as_a_line():
    assert start_of_last_lines(b"a\nb\n", 1) == 2
