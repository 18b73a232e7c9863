"""The `confide` command for tests: in this process where a process is not the point, in one of its own where it is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import typer.main

from confide.cli.main import main

#: A command is made of its functions at every call, and each of its hundreds of options asks `gettext` for a catalogue
#: that is not there: once in a process is enough, as it is for whoever has typed it.
typer.main.get_command = cache(typer.main.get_command)

#: The installed console script, beside this interpreter.
SCRIPT = str(Path(sys.executable).with_name("confide"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> dict[str, Any]:
        """The last line of stdout, which must be one JSON object."""
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    @property
    def words(self) -> str:
        """Stdout with its line breaks and table spacing folded away."""
        return " ".join(self.out.split())


def confide(*arguments: str | Path) -> Answer:
    """Run the command's own `main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["confide", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
    return Answer(int(code or 0), out.getvalue(), err.getvalue())


def spawn(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start the installed script; Ctrl-C reaches it also where the tests themselves run in the background."""
    return subprocess.Popen(
        [SCRIPT, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "80"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def to_toml(tree: Mapping[str, Any]) -> str:
    """An experiment tree as TOML."""
    return "".join(f"{json.dumps(key)} = {_value(value)}\n" for key, value in tree.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def files_under(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content and every folder (None), by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
