"""`confide consent verify-receipt`: does a receipt that somebody shows come from this site, unchanged?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.consent_inputs import JsonOption
from confide.cli.consent_output import show
from confide.cli.render import show_json
from confide.errors import ConfigError, ConsentError

__all__ = ["verify_receipt"]

_MOST = 64 << 20


def verify_receipt(
    file: Annotated[Path, typer.Argument(help="The receipt's JSON file.")],
    signed_by: Annotated[
        str | None,
        typer.Option("--signed-by", help="The site's public key: 64 hexadecimal digits, or a PEM file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a receipt's signature, and show what it says. Needs neither registry nor site key.

    Without --signed-by the key is the one that the receipt itself names: compare it with the site's.
    """
    from confide.privacy.consent.receipt import load_public_key, read_receipt

    key = None if signed_by is None else load_public_key(signed_by)
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file), hint="name a receipt's JSON") from None
    try:
        if len(data) > _MOST:
            raise ConsentError("is too large for a receipt", hint="name a receipt's JSON file")
        found = read_receipt(data, key)
    except ConsentError as error:
        raise ConsentError(error.what, where=str(file), hint=error.hint) from None
    if as_json:
        show_json({
            "file": str(file), "valid": True, "signed_by": found.signed_by, "key_was_given": key is not None,
            "publisher": found.publisher, "created": found.created, "pseudonym": found.pseudonym,
            "standings": found.standings,
        })  # fmt: skip
        return
    whose = "the key that you named" if key is not None else "compare it with the site’s: the receipt cannot tell whose"
    show("The signature holds: nothing was changed since it was signed", [
        ("signed by", f"{found.signed_by} ({whose})"), ("says to be from", found.publisher), ("made", found.created),
        ("pseudonym", found.pseudonym), *found.standings.items(),
    ])  # fmt: skip
