"""`confide model`: look at a trained model, and apply it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.render import err, out, show_json, table
from confide.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Trained models: safetensors, never pickle.")
_Model = Annotated[Path, typer.Option("--model", help="The model.safetensors of a finished run.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def root() -> None:
    """Trained models: safetensors, never pickle."""


@app.command("predict")
def predict(
    file: Annotated[Path, typer.Argument(help="CSV or Parquet file with the model's feature columns.")],
    model: _Model,
    out_file: Annotated[Path | None, typer.Option("--out", help="CSV to write. Default: stdout.")] = None,
    as_json: _Json = False,
) -> None:
    """Predict for every row, with the preprocessing that the model was trained with."""
    from confide.clients.data.source import read_table
    from confide.clients.training.artifact import load_model
    from confide.privacy.files import write_atomically

    if as_json and out_file is None:
        raise ConfigError(
            "--json needs --out: stdout cannot hold both",
            where="confide model predict",
            hint="add --out FILE",
        )
    if out_file is not None and out_file.exists():
        raise ConfigError("is there already", where=str(out_file), hint="name a new file")
    trained = load_model(model)
    frame = trained.predict(read_table(file), file.name)
    frame.index.name = "row"
    text = frame.to_csv(float_format="%.6f")
    if out_file is None:
        out.file.write(text)
        return
    try:
        write_atomically(out_file, text.encode())
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(out_file), hint="name a writable place"
        ) from None
    if as_json:
        show_json({"rows": len(frame), "columns": list(frame.columns), "out": str(out_file)})
    else:
        err.print(f"{len(frame):,} predictions written to {out_file}")


@app.command("show")
def show(
    model: Annotated[Path, typer.Argument(help="The model.safetensors of a finished run.")],
    as_json: _Json = False,
) -> None:
    """What a model file says about itself."""
    from confide.clients.training.artifact import load_model

    card = load_model(model).card
    if as_json:
        show_json(card.model_dump(mode="json"))
        return
    out.print(table(str(model), [
        ("run", card.run), ("purpose", card.purpose), ("model", f"{card.model.kind}, {card.layout.size:,} parameters"),
        ("strategy", card.strategy.describe() if card.strategy is not None else "not said"),
        ("label", f"{card.label.column} ({card.label.task})"), ("features", f"{len(card.schema_.features)}"),
        ("digest", card.digest), ("privacy", card.privacy),
    ]))  # fmt: skip


@app.command("digest")
def digest(
    kind: Annotated[str, typer.Argument(help="A model of your own: package.module:function.")],
    as_json: _Json = False,
) -> None:
    """What a site writes into [policy.model_digests]: the digest of the installed package. Nothing of it is run."""
    from confide.clients.training.code import package_digest

    if kind.count(":") != 1:
        raise ConfigError(f"{kind[:80]!r} is not module:function", where="confide model digest",
                          hint="built-in models need no digest")  # fmt: skip
    found = package_digest(kind)
    show_json({"kind": kind, "digest": found}) if as_json else out.print(f'"{kind}" = "{found}"', soft_wrap=True)
