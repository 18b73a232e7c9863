"""Training anew after withdrawals: a run that begins where an earlier one began, with whom its registries hold now.

What it can go back to is the public initial model alone: the models of single rounds were replicated under run keys
that were destroyed with the run. It is a run like any other, with charges of its own on the same ledgers. It begins
whether or not anybody has withdrawn: when it does is for a public schedule to say, never for one person's withdrawal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from confide.clients.past import manifests_of
from confide.config import Experiment
from confide.errors import BudgetError, ConfigError
from confide.privacy.dp import Ledger
from confide.simulations.place import finished_result
from confide.simulations.planning import Source, load_source

__all__ = ["earlier_run", "ledgers_of", "retraining"]

#: What has to be the same for the initial model, and what it is for, to be the same.
_SAME = (("data",), ("partition",), ("schema_",), ("model",), ("run", "purpose"), ("run", "seed"))


def earlier_run(folder: Path) -> str:
    """The name of the run that was finished in a folder.

    Raises:
        ConfigError: There is none, or its registries are not there.
    """
    found = finished_result(folder)
    if found is None:
        raise ConfigError("holds no finished run", where=f"--retrain-after {folder}",
                          hint="name the output folder of a run that has released its model")  # fmt: skip
    return str(found["run_id"])


def retraining(source: Source, overrides: Iterable[str], folder: Path) -> tuple[Experiment, Path]:
    """The experiment to train anew, and where its relative paths start from.

    Args:
        source: None: the earlier run's own, from the current folder.
        overrides: `section.key=value`.
        folder: The earlier run's.

    Raises:
        ConfigError: It would begin with another model, or train for another purpose.
    """
    try:
        tree = json.loads((folder / "experiment.json").read_text())
    except (OSError, ValueError):
        raise ConfigError("holds no experiment that can be read", where=f"--retrain-after {folder}",
                          hint="restore experiment.json there") from None  # fmt: skip
    before, _ = load_source(tree, ())
    asked, base = load_source(tree if source is None else source, overrides)
    for path in _SAME:
        old, new = before, asked
        for name in path:
            old, new = getattr(old, name), getattr(new, name)
        if old != new:
            raise ConfigError(f"[{'.'.join(path).rstrip('_')}] is not the earlier run's", where="--retrain-after",
                              hint="it would be another training: run it without --retrain-after")  # fmt: skip
    # The officers' withdrawals of the earlier run are in its registries already.
    consent = asked.consent.model_copy(update={"withdrawals": ()})
    return asked.model_copy(update={"consent": consent}), base


def ledgers_of(folder: Path, run: str, ledger: str | Path | None) -> Path:
    """The ledgers that the earlier run was charged to, so that both are counted together.

    Raises:
        ConfigError: They are not here.
        BudgetError: These are others.
    """
    ledgers = Path(ledger) if ledger is not None else folder / "ledgers"
    for state in sorted((folder / "sites").glob("*/state.db")):
        name, path = state.parent.name, ledgers / state.parent.name / "ledger.db"
        if not (state.parent / "consent.db").is_file():
            raise ConfigError("is missing", where=str(state.parent / "consent.db"),
                              hint="without the registry nobody knows who has left")  # fmt: skip
        if not path.is_file():
            raise ConfigError("is missing", where=str(path), hint="name the earlier run's ledgers with --ledger")
        manifest = manifests_of(state, [run]).get(run)
        with closing(Ledger.open(path)) as held:
            charged = any(charge.startswith(f"{run}/") for charge in held.charges())
        if manifest is not None and manifest.privacy.is_private and not charged:
            raise BudgetError(f"holds no charge of run {run}", where=f"ledger of site {name}",
                              hint="name the ledgers that the earlier run was charged to with --ledger")  # fmt: skip
    return ledgers
