"""The bundle: the same bytes anywhere, and it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

from hostd import bundle


def test_the_same_code_gives_the_same_digest(tmp_path):
    source = os.path.dirname(bundle.__file__)
    copy = tmp_path / "elsewhere" / "hostd"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in os.listdir(copy):
        os.utime(copy / name, (time.time() - 99999,) * 2)
        os.chmod(copy / name, 0o600)
    assert bundle.build().digest == bundle.build(str(copy)).digest
    (copy / "bundle.py").write_text((copy / "bundle.py").read_text() + "\n")
    assert bundle.build().digest != bundle.build(str(copy)).digest


def test_it_runs_and_knows_its_digest(tmp_path):
    built = bundle.build()
    path = tmp_path / f"{built.digest}.pyz"
    path.write_bytes(built.data)
    done = subprocess.run(["/usr/bin/python3", "-I", path, "version"], capture_output=True, cwd="/", check=True)
    assert json.loads(done.stdout) == {"protocol": 1, "digest": built.digest}


def test_it_needs_nothing_but_the_standard_library():
    folder = os.path.dirname(bundle.__file__)
    names = [name[:-3] for name in os.listdir(folder) if name.endswith(".py") and name != "__main__.py"]
    code = f"import sys; sys.path.insert(0, {os.path.dirname(folder)!r})\n"
    code += "".join(f"import hostd.{name}\n" for name in names)
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", code], check=True, cwd="/")
