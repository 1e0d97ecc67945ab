"""Keeping what explains a finding, before the installation is removed: logs, rows, the host's files of executions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.chaos.drive import Run

_TABLES = ("devboxes_devbox", "executions_execution", "hosts_host")
_FILE_MAX = 64 << 20


def keep(run: Run, folder: Path) -> None:
    """Copy everything into `folder`, which is emptied first. What cannot be had is named there instead."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "findings").write_text("\n".join(run.findings) + "\n")
    timeline = [f"{at:8.2f} {kind} {' '.join(map(str, pids))} {more}" for at, kind, pids, more in run.striker.done]
    (folder / "timeline").write_text("\n".join(timeline) + "\n")
    (folder / "supervisor").write_text(run.site.said())
    _ledger(run, folder / "commands")
    for name, source in (("logs", run.site.state.logs), ("host-log", Path(run.site.host.root, "log"))):
        shutil.copytree(source, folder / name, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    for path in (Path(run.site.host.root, "zygote.log"), run.site.state.path / "s3" / "gateway.log"):
        if path.exists() and path.stat().st_size < _FILE_MAX:
            shutil.copy(path, folder / path.name)
    for table in _TABLES:
        try:
            rows = run.site.rows(f"SELECT row_to_json(t) FROM (SELECT * FROM {table} ORDER BY created_at) t")
            (folder / f"{table}.jsonl").write_text("".join(json.dumps(_short(row[0])) + "\n" for row in rows))
        except Exception as error:
            (folder / f"{table}.jsonl").write_text(f"{error!r}\n")
    shutil.copytree(run.site.host.outputs, folder / "outputs", dirs_exist_ok=True)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    hidden = {name for name in row if name.endswith("_sealed")}
    return {
        name: value if not isinstance(value, str) or len(value) < 2000 else f"{value[:200]}… ({len(value)})"
        for name, value in row.items()
        if name not in hidden
    }


def _ledger(run: Run, path: Path) -> None:
    with open(path, "w") as file:
        for command in run.commands:
            answer = {k: v for k, v in (command.answer or {}).items() if k not in ("stdout", "stderr")}
            live = {stream: size for stream, (_, size) in command.live.items()}
            stored = {stream: size for stream, (_, size) in command.stored.items()}
            file.write(
                f"{command.began:8.2f} to {command.ended:8.2f} {command.title} killed={command.killed}"
                f" live={live} stored={stored} {answer}\n"
            )
