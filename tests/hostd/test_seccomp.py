"""The filter: derived from a profile, compiled, and asked about calls by running it as the kernel would."""

from __future__ import annotations

import os
import struct

import pytest

from hostd import seccomp

X86_64 = 0xC000003E
I386 = 0x40000003
ALLOW = 0x7FFF0000
ERRNO = 0x00050000
EPERM, ENOSYS = 1, 38

if not os.path.exists(seccomp.SOURCE):
    pytest.skip(f"{seccomp.SOURCE} is not installed", allow_module_level=True)
if os.uname().machine != "x86_64":
    pytest.skip("the calls below are numbered for x86-64", allow_module_level=True)


def run_filter(program: bytes, number: int, *arguments: int, arch: int = X86_64) -> int:
    """The classic BPF machine, as far as seccomp uses it."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *(0,) * (6 - len(arguments)))
    code = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    a = at = steps = 0
    while True:
        steps += 1
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x20:  # ld [k]
            a = int(struct.unpack_from("=I", data, k)[0])
        elif operation == 0x06:  # ret k
            return int(k)
        elif operation == 0x05:  # ja
            at += k
        elif operation == 0x54:  # and
            a &= k
        elif operation in (0x15, 0x25, 0x35, 0x45):  # jeq jgt jge jset
            held = {0x15: a == k, 0x25: a > k, 0x35: a >= k, 0x45: bool(a & k)}[operation]
            at += yes if held else no
        else:
            raise AssertionError(f"unknown instruction {operation:#x}")
        assert steps < 4096


@pytest.fixture(scope="module")
def plain() -> bytes:
    return seccomp.compile_filter(seccomp.derive(seccomp.load_source()))


@pytest.fixture(scope="module")
def nested() -> bytes:
    return seccomp.compile_filter(seccomp.derive(seccomp.load_source(), nested_namespaces=True))


def test_ordinary_calls_are_allowed(plain: bytes) -> None:
    for number in (0, 1, 2, 9, 16 << 0, 41, 57, 59, 61, 101, 105, 257, 262, 302):  # read … ptrace, setuid, openat …
        arguments = (0, 0x5401) if number == 16 else ()
        assert run_filter(plain, number, *arguments) == ALLOW, number


def test_dangerous_calls_are_refused(plain: bytes, nested: bytes) -> None:
    # io_uring_setup and its kin, userfaultfd, keys, handles, bpf, perf, kexec, modules, clock, swap
    for number in (425, 426, 427, 323, 248, 249, 250, 304, 321, 298, 246, 320, 175, 313, 227, 167):
        for program in (plain, nested):
            assert run_filter(program, number) != ALLOW, number


def test_btrfs_ioctls_are_refused_and_reflinks_allowed(plain: bytes) -> None:
    for number in range(64):
        for direction in range(4):
            request = direction << 30 | 4096 << 16 | 0x94 << 8 | number
            assert run_filter(plain, 16, 3, request) != ALLOW, hex(request)
    for request in (0x40049409, 0x4020940D, 0xC0189436, 0x5401, 0x5413, 0x541B, 0x8913, 0x40049509, 0x40049309):
        assert run_filter(plain, 16, 3, request) == ALLOW, hex(request)


def test_new_namespaces_are_refused_unless_asked_for(plain: bytes, nested: bytes) -> None:
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x7E020000):
        for number in (56, 272):  # clone, unshare
            assert run_filter(plain, number, flag | 17) == ERRNO | EPERM, (number, hex(flag))
            assert run_filter(nested, number, flag | 17) == ALLOW
    for number in (165, 166, 155, 308, 428, 429, 430, 442):  # mount … mount_setattr
        assert run_filter(plain, number) == ERRNO | EPERM, number
    assert run_filter(nested, 165) == ALLOW


def test_processes_and_threads_are_made(plain: bytes) -> None:
    thread = 0x3D0F00
    for flags in (17, thread, 0x4111, 0x1200011, 0x8000 | 0x1000 | 17):  # fork, thread, vfork, glibc's fork, a sibling
        assert run_filter(plain, 56, flags) == ALLOW, hex(flags)
    assert run_filter(plain, 435) == ERRNO | ENOSYS  # clone3: libraries fall back to clone


def test_the_other_architectures_are_no_way_round(plain: bytes) -> None:
    assert run_filter(plain, 120, 0x10000000, arch=I386) == ERRNO | EPERM  # clone
    assert run_filter(plain, 310, 0x10000000, arch=I386) == ERRNO | EPERM  # unshare
    assert run_filter(plain, 54, 3, 0x5000940E, arch=I386) != ALLOW  # ioctl
    assert run_filter(plain, 425, arch=I386) != ALLOW
    assert run_filter(plain, 0x40000000 | 56, 0x10000000) != ALLOW  # x32
    assert run_filter(plain, 4, arch=I386) == ALLOW  # write


def test_an_unknown_call_does_not_exist(plain: bytes) -> None:
    assert run_filter(plain, 999) == ERRNO | ENOSYS


def test_an_unknown_machine_is_an_error() -> None:
    with pytest.raises(KeyError):
        seccomp.derive(seccomp.load_source(), machine="vax")
