"""What a command of a chaos run does: it writes numbered lines, and ends as it was told.

Runs twice: inside a devbox as the command itself (its source is the command's text, so standard library only, and no
import that takes long), and here, where the same functions say what must have been written.
"""

import os
import sys
import time

MARK = "chaos_writer"
"""In the command line of every command of a run, so that one that was left behind is found."""

_TEXT = "numbered and whole: aä€🙂 ".encode()
_BINARY = bytes((x * x * x + 7 * x + 13) & 255 for x in range(1021))


def line(name: str, stream: str, number: int, size: int, binary: bool) -> bytes:
    """Line `number` of a stream, of about `size` bytes."""
    head = b"%s %s %08d " % (name.encode(), stream.encode(), number)
    if binary:
        start = number % len(_BINARY)
        return head + (_BINARY * (size // len(_BINARY) + 2))[start : start + size] + b"\n"
    return head + _TEXT * (size // len(_TEXT)) + b"\n"


def expected(name: str, stream: str, count: int, size: int, every: int, binary: bool) -> bytes:
    """All that a writer writes on "o" or "e": every line on the one, each `every`-th on the other (0: none)."""
    step = 1 if stream == "o" else every
    return b"".join(line(name, stream, i, size, binary) for i in range(0, count, step)) if step else b""


def put(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    """MARK NAME COUNT SIZE GAP EVERY BINARY ENDING CODE: see `tests.chaos.plan.Job`."""
    name, ending = sys.argv[2], sys.argv[8]
    count, size, every, binary, code = (int(sys.argv[at]) for at in (3, 4, 6, 7, 9))
    gap = float(sys.argv[5])
    if ending == "echo":
        for given in sys.stdin.buffer:
            put(1, name.encode() + b" o " + given)
    else:
        due = time.monotonic()
        for i in range(count):
            put(1, line(name, "o", i, size, bool(binary)))
            if every and i % every == 0:
                put(2, line(name, "e", i, size, bool(binary)))
            due += gap
            if gap:
                time.sleep(max(0.0, due - time.monotonic()))
    if ending == "signal":
        os.kill(os.getpid(), code)
        time.sleep(60)
    if ending == "hog":
        taken = [b"x" * (64 << 20) for _ in range(64)]
        os._exit(len(taken))
    if ending == "child" and os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "3600"])
    if ending == "stay":
        time.sleep(3600)
    os._exit(code)


if __name__ == "__main__":
    main()
