"""The rules of the house. Each failure says which file breaks which rule and what to do instead."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.house.tree import PROJECT, ROOMS, imported, name, parsed, sources, tracked

LINES_MAX = 600


def test_rooms_are_used_from_above_only():
    """The layers are in pyproject.toml under [tool.importlinter]."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[run.stdout.find("Contracts") :] + run.stderr


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("paramiko", lambda path: path.startswith("hosts/ssh")),
        ("boto3", lambda path: path.startswith("storage/")),
        ("botocore", lambda path: path.startswith("storage/")),
        ("granian", lambda path: path.startswith("config/")),
        ("asyncssh", lambda path: path.startswith("ssh_access/")),
    ],
)
def test_a_library_is_known_in_one_place(library: str, allowed: Callable[[str], bool]):
    wrong = [
        name(path)
        for path in sources()
        if not allowed(name(path)) and any(module.split(".")[0] == library for module in imported(path))
    ]
    assert not wrong, f"{library} is imported outside of its one place: {wrong}; add a function there and call it"


def test_hosts_use_only_the_words_of_hostd():
    """What runs on hosts is shipped, not imported: the control plane shares the protocol with it, and the packing."""
    allowed = ("hostd", "hostd.messages", "hostd.bundle")
    wrong = {
        name(path): sorted(strangers)
        for path in sources(*(room for room in ROOMS if room not in ("hostd", "config")))
        if (
            strangers := {
                module
                for module in imported(path)
                if module.split(".")[0] == "hostd"
                and module not in allowed
                and not module.startswith(("hostd.messages.", "hostd.bundle."))
            }
        )
    }
    assert not wrong, f"import hostd.messages only: {wrong}"


def test_hostd_needs_the_standard_library_only():
    wrong = {
        name(path): sorted(strangers)
        for path in sources("hostd")
        if (
            strangers := {
                module
                for module in imported(path)
                if module.split(".")[0] not in sys.stdlib_module_names and module.split(".")[0] != "hostd"
            }
        )
    }
    assert not wrong, f"hosts have no libraries: {wrong}"


def test_the_environment_has_one_reader():
    """config.env gives settings; scripts that start the roles hand their own environment on through config.state."""
    allowed = {"config/env.py", "config/state.py"}
    wrong = []
    for path in sources(*(room for room in ROOMS if room != "hostd")):
        if name(path) in allowed:
            continue
        # os.environ.setdefault("DJANGO_SETTINGS_MODULE", …) is how every launcher begins.
        defaults = {
            call.func.value
            for call in ast.walk(parsed(path))
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "setdefault"
        }
        wrong += [
            f"{name(path)}:{node.lineno}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and node not in defaults
        ]
    assert not wrong, f"read settings, which come from config.env: {wrong}"


def test_no_file_is_longer_than_it_can_be_read():
    long = {
        name(path): count
        for path in [*sources(), *(PROJECT / "tests").rglob("*.py")]
        if (count := path.read_text().count("\n")) > LINES_MAX
    }
    assert not long, f"over {LINES_MAX} lines, split by what changes together: {long}"


def test_no_module_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "base", "manager", "managers", "misc", "core"}
    wrong = [name(path) for path in sources() if path.stem in vague]
    assert not wrong, f"name a module after what it is in charge of: {wrong}"


def test_every_module_says_what_it_is_in_charge_of():
    wrong = [
        name(path)
        for path in sources()
        if "migrations" not in path.parts and path.read_text().strip() and not ast.get_docstring(parsed(path))
    ]
    assert not wrong, f"a module opens with what it is in charge of: {wrong}"


def test_durable_rows_change_by_guarded_updates_only():
    """``row.save()`` writes what was read earlier over what another writer did since; a deletion forgets the work."""
    from django.apps import apps

    from flows.models import Durable

    durable = {model.__name__ for model in apps.get_models() if issubclass(model, Durable)}
    assert durable, "no durable model was found: this test would pass for nothing"
    wrong = []
    for path in sources(*(room for room in ROOMS if room not in ("hostd", "accounts", "config"))):
        for node in ast.walk(parsed(path)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("save", "asave", "bulk_update", "abulk_update", "update_or_create")
                and not _is_super(node.func.value)
            ):
                wrong.append(f"{name(path)}:{node.lineno} .{node.func.attr}()")
    assert not wrong, f"use a filtered UPDATE and check that it hit one row: {wrong}"


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def test_there_are_no_signals():
    wrong = [
        name(path)
        for path in sources(*(room for room in ROOMS if room != "hostd"))
        if any(module.startswith(("django.db.models.signals", "django.dispatch")) for module in imported(path))
    ]
    assert not wrong, f"call what must happen; a signal hides it: {wrong}"


def test_no_print_in_the_product():
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sources(*(room for room in ROOMS if room != "hostd"))
        if "commands" not in path.parts
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, f"log it, or write to the stream you were given: {wrong}"


def test_the_tree_knows_no_machine():
    """No path of the machine it was written on, and no private key."""
    place = str(PROJECT) if str(PROJECT).startswith(("/home", "/root", "/tmp")) else str(PROJECT.parent).rstrip("/")
    patterns = {
        "an absolute path of a work place": re.compile(
            rb"(?<![\w.])" + re.escape(place or str(PROJECT)).encode() + rb"/\w"
        ),
        "a private key": re.compile(rb"-----BEGIN (?:OPENSSH |RSA |EC )?PRIVATE KEY-----\n[A-Za-z0-9+/]{20}"),
    }
    allowed = {"tests/house/test_rules.py"}
    wrong = []
    for path in tracked():
        if name(path) in allowed:
            continue
        content = path.read_bytes()
        if b"\0" in content[:1000]:
            continue
        for what, pattern in patterns.items():
            for found in pattern.finditer(content):
                line = content.count(b"\n", 0, found.start()) + 1
                wrong.append(f"{name(path)}:{line}: {what}: {found.group()[:60]!r}")
    assert not wrong, "\n".join(wrong)


def test_every_app_has_its_tasks_and_admin():
    from django.apps import apps

    wrong = []
    for config in apps.get_app_configs():
        if config.name not in ROOMS or config.name in ("storage", "flows", "config"):  # these have no work of their own
            continue
        folder = PROJECT / config.name
        if not (folder / "tasks.py").exists():
            wrong.append(f"{config.name}/tasks.py")
        if list(config.get_models()) and not (folder / "admin.py").exists():
            wrong.append(f"{config.name}/admin.py")
    assert not wrong, f"missing: {wrong}"


def test_every_model_is_in_the_admin_and_can_be_searched():
    from django.apps import apps
    from django.contrib import admin
    from unfold.admin import ModelAdmin

    wrong = []
    for model in apps.get_models():
        if model._meta.app_label not in ROOMS or model.__module__.startswith("tests."):
            continue  # the engine's tests have a model of their own
        shown = admin.site._registry.get(model)
        if shown is None:
            wrong.append(f"{model._meta.label}: not registered")
        elif not isinstance(shown, ModelAdmin):
            wrong.append(f"{model._meta.label}: not in the theme")
        elif not shown.search_fields:
            wrong.append(f"{model._meta.label}: cannot be searched")
    assert not wrong, "\n".join(wrong)
