"""What a run did, in words: the report's opening paragraph and its list of facts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from confide.config import StrategyConfig
from confide.privacy.audit.evidence import Evidence

__all__ = ["facts", "story", "unknown_bounds", "when"]


def story(evidence: Evidence, rounds: list[dict[str, Any]], epsilon: float | None, ended: bool) -> str:
    """The opening paragraph.

    Args:
        evidence: The run.
        rounds: What became of each round.
        epsilon: What it costs a person; None where nobody is protected.
        ended: Did it come to its end?
    """
    manifest = evidence.manifest
    logs = (evidence.coordinator, *evidence.sites.values())
    times = [log.times[number] for log in logs for number, _ in log.of_run()]
    start, end = when(min(times)), when(max(times))
    opened = sum(1 for x in rounds if x["outcome"] == "sum opened")
    abandoned = sum(1 for x in rounds if x["outcome"].startswith("abandoned"))
    what = (
        f"gave noised histograms of {', '.join(unknown)}, so that bounds for them could be learned"
        if (unknown := unknown_bounds(manifest))
        else f"trained a {_model(manifest)} to predict {_label(manifest['label'])}"
    )
    profile, gathered = manifest["sealing"]["profile"], manifest.get("single_updates", False)
    sealed = "summed in the open" if profile == "open" else "sealed, and opened only as sums"
    if gathered:
        sealed = "passed on to every site in the open, because the strategy compares single updates"
    cost = (
        f"For each {manifest['privacy']['unit']} the run costs at most ε = {epsilon:.2f} at "
        f"δ = {manifest['privacy']['delta']:g}."
        if epsilon is not None
        else "It gives no differential privacy: it is possible on public data only."
    )
    result = "bounds were" if unknown else "model was"
    released = f"The {result} released." if ended else f"No {result.split()[0]} was released."
    sums = "one a round, and a last one for evaluation" if not unknown else "two releases"
    return (
        f"From {start} to {end}, {len(evidence.sites)} sites {what}, for the purpose {manifest['purpose']}. The "
        f"records never left their sites: what was sent was {sealed}. {opened} of {manifest['rounds'] + 1} sums were "
        f"opened ({sums}), {abandoned} abandoned. {cost} {released}"
    )


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """What was trained and how: name and value."""
    manifest = evidence.manifest
    training, privacy = manifest["training"], manifest["privacy"]
    private = manifest["noise_multiplier"] > 0
    found = [
        ("model", _model(manifest)),
        ("predicts", _label(manifest["label"])),
        ("features", ", ".join(list(manifest["schema_"]["features"])[:40])),
        ("sites, declared population", ", ".join(f"{m['site']} ({m['population']:,})" for m in manifest["members"])),
        ("rounds × local steps", f"{manifest['rounds']} × {training['local_steps']}"),
        ("strategy", _strategy(manifest)),
        ("smallest sum", f"{manifest['min_sites']} sites"),
        ("held out for evaluation", f"{manifest['held_out']:.0%} of persons, fixed for ever by each site’s key"),
    ]
    if private:
        found.append((
            "mechanism",
            f"Poisson-sampled {privacy['unit']}s at rate q = {privacy['sample_rate']:g}, gradients clipped to "
            f"{privacy['max_grad_norm']:g}, Gaussian noise σ = {manifest['noise_multiplier']:g} "
            f"(metrics: σ = {manifest['metrics_noise_multiplier']:g})",
        ))  # fmt: skip
    return found


def _model(manifest: Mapping[str, Any]) -> str:
    size = sum(int(np.prod(shape)) for shape in manifest["layout"]["shapes"])
    return f"{manifest['model']['kind']} model with {size:,} parameters"


def _strategy(manifest: Mapping[str, Any]) -> str:
    """The strategy with its options; of a version that knows others, its name."""
    try:
        return StrategyConfig(**manifest["strategy"]).describe()
    except ValueError:
        return str(manifest["strategy"].get("kind"))


def _label(label: Mapping[str, Any]) -> str:
    if label["at_least"] is not None:
        return f"whether {label['column']} is at least {label['at_least']:g}"
    if label["classes"] is not None:
        return f"{label['column']} (one of {', '.join(map(str, label['classes'][:12]))})"
    return f"{label['column']} (a number between {label['bounds'][0]:g} and {label['bounds'][1]:g})"


def unknown_bounds(manifest: Mapping[str, Any]) -> list[str]:
    """Columns whose bounds a statistics run learns; none in any other run."""
    features = manifest["schema_"]["features"]
    return [name for name, feature in features.items() if feature["kind"] == "number" and feature["bounds"] is None]


def when(micros: int) -> str:
    """Microseconds since 1970, as people read them."""
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
