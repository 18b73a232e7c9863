"""`confide`: the entry point. Errors are caught here, once; nothing below exits."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from confide import __version__
from confide.cli import audit, consent, data, federation, model, render, run, server, simulate, site, sweep
from confide.errors import ConfideError, ConfigError

__all__ = ["app", "main"]

app = typer.Typer(
    name="confide",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning that people can confide in.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("simulate")(simulate.simulate)
app.command("sweep")(sweep.sweep)
app.add_typer(data.app, name="data")
app.add_typer(consent.app, name="consent")
app.add_typer(model.app, name="model")
app.add_typer(audit.app, name="audit")
app.add_typer(site.app, name="site")
app.add_typer(federation.app, name="federation")
app.add_typer(server.app, name="server")
app.add_typer(run.app, name="run")


def _version(value: bool) -> None:
    if value:
        render.out.print(f"confide {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning that people can confide in."""


def main() -> None:
    """Run a command; an error of ours becomes its text and its exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False, prog_name="confide")
    except ConfideError as error:
        render.show_error(error, as_json=as_json)
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            render.err.print(error.ctx.get_usage(), markup=False, soft_wrap=True)
        wrong = ConfigError(error.format_message(), hint="see the command's --help")
        render.show_error(wrong, as_json=as_json)
        raise SystemExit(wrong.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
