"""The `confide` command in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from confide.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    code: int
    out: str
    err: str


def confide(*arguments: str | Path) -> Answer:
    """Run the command's own `main`."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["confide", *map(str, arguments)]
    code: object = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Answer(int(str(code or 0)), out.getvalue(), err.getvalue())
