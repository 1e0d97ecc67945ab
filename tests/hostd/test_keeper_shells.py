"""Named shells: what lives from command to command, what ends a shell, and that nothing ever blocks the next command."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hostd.bare_box import USER, Box, Host, text

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(71)


class Runner:
    """Runs commands in one shell of a box."""

    def __init__(self, box: Box, shell: str) -> None:
        self.box, self.shell, self.count = box, shell, 0

    def id(self) -> str:
        self.count += 1
        return f"exe_{self.shell}{self.count}"

    def __call__(self, command: str, **body: Any) -> tuple[int, str, str]:
        answer = self.answer(command, **body)
        return answer["exit"], text(answer), text(answer, "stderr")

    def answer(self, command: str, **body: Any) -> dict[str, Any]:
        return self.box.run(self.id(), command, shell=self.shell, **body)

    def start(self, command: str, **body: Any) -> str:
        name = self.id()
        answer = self.box.spawn(name, command, shell=self.shell, **body)
        assert answer.get("state") == "running", answer
        return name


@pytest.fixture
def run(box: Box, request: pytest.FixtureRequest) -> Runner:
    name = "".join(c for c in request.node.name.lower() if c.isalnum())[-40:]
    return Runner(box, name)


def test_directory_environment_functions_aliases_and_options_survive(run: Runner) -> None:
    assert run("cd /usr; x=5; export Y=6; f() { echo f$x; }; alias hh='echo al'; set -o pipefail; shopt -s extglob")[0] == 0
    assert run("pwd; f; hh; echo $x $(printenv Y)\nfalse | true; echo $?; [[ ab == a@(b|c) ]] && echo glob") == (
        0,
        "/usr\nf5\nal\n5 6\n1\nglob\n",
        "",
    )
