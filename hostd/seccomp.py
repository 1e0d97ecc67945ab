"""The system calls a box may make: Debian's own container profile, tightened, and compiled once per machine.

In charge of: :func:`derive` (pure) and :func:`compile_filter` (by libseccomp). Not in charge of: installing the filter,
which crun does for a box's init and the spawner for what it starts.

Taken away from Debian's profile: io_uring, userfaultfd, the key ring, handles, bpf and performance events (each a usual
way into the kernel); the ioctls of btrfs, with which a box could make subvolumes that carry no limit; and, unless asked
for, new namespaces: a box's own root would have all capabilities in one, and with them the kernel's least tried code.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from typing import Any, Final

SOURCE: Final = "/usr/share/containers/seccomp.json"

# What a box's root may do at most: the set Docker gives.
CAPABILITIES: Final = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"),
    *("CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_AUDIT_WRITE"),
    "CAP_SETFCAP",
)
DENIED: Final = frozenset(
    {"io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "keyctl", "add_key", "request_key"}
    | {"open_by_handle_at", "bpf", "perf_event_open"}
)
# Of no use without a namespace of one's own. EPERM, as the kernel itself would answer.
_MOUNTING: Final = (
    *("mount", "mount_setattr", "move_mount", "open_tree", "pivot_root", "setns", "umount", "umount2"),
    *("fsconfig", "fsmount", "fsopen", "fspick"),
)
_NAMESPACE_FLAGS: Final = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_ALL_NAMESPACE_FLAGS: Final = sum(_NAMESPACE_FLAGS)
_EPERM: Final = 1
_ENOSYS: Final = 38
_BTRFS_IOCTL: Final = 0x94
_REFLINK_IOCTLS: Final = (0x40049409, 0x4020940D, 0xC0189436)  # FICLONE, FICLONERANGE, FIDEDUPERANGE

_ARCHITECTURES: Final = {
    "x86_64": ({"amd64", "x32", "x86"}, ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    "aarch64": ({"arm64", "arm"}, ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
}


def load_source(path: str = SOURCE) -> dict[str, Any]:
    """Debian's profile. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        found: dict[str, Any] = json.load(file)
    return found


def derive(source: dict[str, Any], *, machine: str | None = None, nested_namespaces: bool = False) -> dict[str, Any]:
    """The profile in OCI's form (`linux.seccomp` of a `config.json`). Raises KeyError for an unknown machine."""
    arches, architectures = _ARCHITECTURES[machine or os.uname().machine]
    syscalls: list[dict[str, Any]] = []
    dropped = {"ioctl"} if nested_namespaces else {"ioctl", "clone", "clone3", "unshare", *_MOUNTING}
    for rule in source["syscalls"]:
        if not _applies(rule, arches):
            continue
        allow = rule["action"] == "SCMP_ACT_ALLOW"
        gone = DENIED | dropped if allow and not rule.get("args") else DENIED if allow else frozenset()
        names = [name for name in rule["names"] if name not in gone]
        if not nested_namespaces and not allow:
            names = [name for name in names if name not in dropped]  # said once, below
        if names:
            kept = {"names": names, "action": rule["action"]}
            if rule.get("errnoRet") is not None:
                kept["errnoRet"] = rule["errnoRet"]
            if rule.get("args"):
                kept["args"] = rule["args"]
            syscalls.append(kept)
    syscalls += _ioctls()
    if not nested_namespaces:
        syscalls += _no_namespaces()
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "architectures": architectures,
        "syscalls": syscalls,
    }


def _applies(rule: dict[str, Any], arches: set[str]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and not arches & set(includes["arches"]):
        return False
    if excludes.get("arches") and arches & set(excludes["arches"]):
        return False
    held = set(CAPABILITIES)
    if includes.get("caps") and not set(includes["caps"]) <= held:
        return False
    return not (excludes.get("caps") and set(excludes["caps"]) & held)


def _ioctls() -> list[dict[str, Any]]:
    """Every ioctl whose type byte is not btrfs's: "differs in bit 8, or in bit 9, ..."; and reflinks by name."""
    rules = [_masked("ioctl", 1, 1 << bit, (1 << bit) ^ ((_BTRFS_IOCTL << 8) & (1 << bit))) for bit in range(8, 16)]
    return rules + [_masked("ioctl", 1, 0xFFFFFFFF, number) for number in _REFLINK_IOCTLS]


def _no_namespaces() -> list[dict[str, Any]]:
    refused = [{"names": list(_MOUNTING), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM}]
    # clone3 hides its flags in memory, where a filter cannot look; without it libraries fall back to clone.
    refused.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    for name in ("clone", "unshare"):
        refused.append(_masked(name, 0, _ALL_NAMESPACE_FLAGS, 0))
        for flag in _NAMESPACE_FLAGS:
            refused.append({**_masked(name, 0, flag, flag), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM})
    return refused


def _masked(name: str, index: int, mask: int, value: int) -> dict[str, Any]:
    condition = {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]}


# --- compiling ------------------------------------------------------------------------------------------------------

_ARCH_TOKENS: Final = {
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X32": 0x4000003E,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
}
_ACT_ALLOW: Final = 0x7FFF0000
_ACT_ERRNO: Final = 0x00050000
_COMPARE: Final = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_ATTR_OPTIMIZE: Final = 8
_BINARY_TREE: Final = 2
_UNKNOWN: Final = -1  # __NR_SCMP_ERROR
_EEXIST: Final = 17
_EDOM: Final = 33
_FILTER_MAX: Final = 4096 * 8  # BPF_MAXINSNS instructions of 8 bytes


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def compile_filter(profile: dict[str, Any]) -> bytes:
    """The profile as an array of struct sock_filter, ready for seccomp(2). Raises OSError.

    By libseccomp, which crun brings; calls it does not know by name are left to the default, a refusal. Sorted into a
    tree, so that a call costs some ten comparisons and not three hundred.
    """
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = library.seccomp_init(ctypes.c_uint32(_ACT_ERRNO | profile["defaultErrnoRet"]))
    if not context:
        raise OSError(12, "libseccomp made no filter")
    context = ctypes.c_void_p(context)
    try:
        for name in profile["architectures"]:
            _checked(library.seccomp_arch_add(context, ctypes.c_uint32(_ARCH_TOKENS[name])), name, _EEXIST)
        for rule in profile["syscalls"]:
            _add_rule(library, context, rule)
        # Older libseccomps have no tree: then it is a list, and slower.
        library.seccomp_attr_set(context, ctypes.c_int(_ATTR_OPTIMIZE), ctypes.c_uint32(_BINARY_TREE))
        with tempfile.TemporaryFile() as file:
            _checked(library.seccomp_export_bpf(context, ctypes.c_int(file.fileno())), "export")
            file.seek(0)
            compiled = file.read()
    finally:
        library.seccomp_release(context)
    if not compiled or len(compiled) % 8 or len(compiled) > _FILTER_MAX:
        raise OSError(22, f"libseccomp made a filter of {len(compiled)} bytes")
    return compiled


def _add_rule(library: ctypes.CDLL, context: ctypes.c_void_p, rule: dict[str, Any]) -> None:
    action = _ACT_ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else _ACT_ERRNO | rule.get("errnoRet", _EPERM)
    if action == _ACT_ERRNO | _ENOSYS and not rule.get("args"):
        return  # the default already; libseccomp refuses such a rule
    conditions = [
        _Compare(item["index"], _COMPARE[item["op"]], item["value"], item.get("valueTwo", 0))
        for item in rule.get("args") or ()
    ]
    array = (_Compare * len(conditions))(*conditions)
    for name in rule["names"]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            continue
        done = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(action), ctypes.c_int(number), ctypes.c_uint(len(conditions)), array
        )
        _checked(done, name, _EEXIST, _EDOM)


def _checked(result: int, what: str, *allowed: int) -> None:
    if result < 0 and -result not in allowed:
        raise OSError(-result, os.strerror(-result), what)
