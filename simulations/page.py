"""`index.html` of an output folder: the run's figures at a glance."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from confide.privacy.audit.chart import Series, line_chart
from confide.privacy.audit.page import write_page
from confide.privacy.dp import run_label
from confide.privacy.dp.metrics import NAMES
from confide.simulations.result import HONEST, Result

__all__ = ["write_index"]


def write_index(result: Result, path: Path) -> None:
    """Write the page."""
    private = result.epsilon.max != float("inf")
    quality = loss = ""
    if result.curve:
        series = [
            Series(NAMES.get(n, n), [(float(i), point[n]) for i, point in enumerate(result.curve) if n in point])
            for n in max((list(point) for point in result.curve), key=len)[
                :2
            ]  # a metric may have no value where few are held out
        ]
        quality = line_chart("quality", "Quality by round", "rounds trained", "exact, on held-out persons", series)
    if private:
        points = [(float(i), e) for i, e in enumerate(result.epsilon_curve)]
        label = f"ε (PRV) per {result.unit} at δ = {result.delta:g}"
        loss = line_chart("loss", "Privacy loss by round", "rounds trained", label, [Series("this run", points)])
    context = {
        "run": result.run_id,
        "folder": str(result.out),
        "facts": _facts(result, private),
        "warnings": result.warnings,
        # Markup: charts are built from numbers and escaped text only.
        "quality": Markup(quality),  # noqa: S704
        "loss": Markup(loss),  # noqa: S704
    }
    write_page(Path(__file__).with_name("index.html.j2"), context, path)


def _facts(result: Result, private: bool) -> list[tuple[str, str]]:
    facts = [
        ("sites", ", ".join(result.sites)),
        ("rounds", f"{result.rounds}, {result.rounds_abandoned} abandoned"),
        ("profile", result.profile),
        ("consent", result.consent_source),
        (
            "privacy loss of this run",
            f"ε = {result.epsilon.max:.2f} per {result.unit} at δ = {result.delta:g} "
            f"(neighbours: {result.neighbours} {result.unit}; {run_label(result.composed_sites)})"
            if private
            else ("∞: nobody is protected" if result.warnings else "∞: a baseline on public data, nobody is protected"),
        ),
    ]
    if result.retrained_after is not None:
        facts.insert(0, ("trained anew after", f"{result.retrained_after}. {HONEST}"))
    if result.learned:
        facts.append(("bounds, learned and charged", result.describe_learned()))
    if result.metrics:
        exact = ", ".join(f"{NAMES.get(k, k)} {v:.3f}" for k, v in result.metrics.items())
        facts.append(("exact, simulator only", exact))
    if result.released_metrics:
        facts.append(("released, noised" if private else "released", result.describe_released(NAMES)))
    facts += [
        ("uplink", f"{result.bytes_per_parameter:,.2f} bytes a parameter"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    return facts
