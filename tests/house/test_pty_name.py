"""The name ``pty``: our app and the standard library's module, whoever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.tree import PROJECT

CHECK = """
import os, pty, sys
master, slave = pty.openpty()
os.close(master); os.close(slave)
assert pty.STDIN_FILENO == 0 and callable(pty.fork) and callable(pty.spawn)
import pty.apps, pty.tasks
assert pty.apps.__file__.startswith(os.getcwd()), pty.apps.__file__
try:
    pty.no_such_thing
except AttributeError:
    pass
else:
    raise AssertionError("an unknown attribute was found")
"""
STANDARD_FIRST = """
import sys
root = sys.path[0]
sys.path.append(sys.path.pop(0))
import pty
assert not hasattr(pty, "__path__"), "the standard module should have answered"
sys.path.insert(0, root)
"""
ORDERS = {
    "ours first": "import pty; import config",
    "config first": "import config",
    "standard first": STANDARD_FIRST + "import config",
    "pexpect first": "import pexpect, config",
    "pexpect after": "import config, pexpect",
    "pexpect between": "import pty, pexpect, config",
    "pexpect over the standard one": STANDARD_FIRST + "import pexpect, config",
    "settings first": "import config.settings",
    "celery first": "import celery, config.celery",
    "django first": "import django, os; os.environ['DJANGO_SETTINGS_MODULE'] = 'config.settings'; django.setup()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_both_halves_answer(order: str):
    program = ORDERS[order] + CHECK
    if "pexpect" in order:
        program += "\nassert pexpect.spawn('echo', ['it works']).read().strip() == b'it works'"
    run = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [["manage.py", "check"], ["-m", "celery", "-A", "config", "report"]])
def test_launchers_find_the_app(command: list[str]):
    run = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_no_submodule_takes_a_standard_name():
    program = (
        "import sys, importlib.util, sysconfig, pathlib\n"
        "path = pathlib.Path(sysconfig.get_path('stdlib'), 'pty.py')\n"
        "spec = importlib.util.spec_from_file_location('standard', path)\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(' '.join(dir(module)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    taken = {path.stem for path in (PROJECT / "pty").glob("*.py")} & set(run.stdout.split())
    assert not taken - {"__init__"}, f"pty.{taken} would hide the standard attribute"
