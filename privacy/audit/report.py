"""One self-contained page about a run, for the people who answer for it. Every figure names the entry it comes from.

The page is made from the logs alone, but for two things that stand beside them and are marked as such: exact metrics
(simulator, public data) and whether the run was interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.attacks import read_attacks
from confide.privacy.audit.charges import standing_charges
from confide.privacy.audit.chart import Series, line_chart
from confide.privacy.audit.evidence import COORDINATOR, Evidence, PartyLog, Rosters
from confide.privacy.audit.page import write_page
from confide.privacy.audit.protection import describe_protection
from confide.privacy.audit.story import facts, story, unknown_bounds, when
from confide.privacy.audit.verify import verify
from confide.privacy.dp import metrics
from confide.privacy.dp.accounting import LEDGER_LABEL, person_epsilon, rdp_epsilon, run_epsilon, run_label
from confide.privacy.dp.events import Role, merge_events
from confide.privacy.randomness import UNSAFE_NOISE

__all__ = ["write_report"]

_LAW = (
    ("GDPR Art. 5(1)(b), (c), (f): purpose, minimisation, integrity", "What was trained; Who could learn what"),
    ("GDPR Art. 7: demonstrable consent", "Consent; the snapshot commitments in each site’s log"),
    ("GDPR Art. 17: erasure", "Consent; note that differential privacy bounds influence and is not erasure"),
    ("GDPR Art. 30: records of processing", "the whole page; the logs it was made from"),
    ("GDPR Art. 35: impact assessment", "Privacy loss; Who could learn what; Refusals and faults; Attacks"),
    ("AI Act Art. 10–12, for high-risk systems: data governance, documentation, logs", "Quality; Rounds; Versions"),
)


def write_report(folder: Path, path: Path, run: str | None = None, rosters: Rosters | None = None) -> dict[str, Any]:
    """Verify a run's folder and write its page.

    Args:
        folder: The run's folder, or a folder of exported logs.
        path: Where the page goes.
        run: The run's name; None where the logs hold one run only.
        rosters: The chain of rosters beside the logs; None: it is not looked at.

    Returns:
        `verified`, `findings` (how many), `interrupted`.

    Raises:
        AuditError: There is no run to report on.
        OSError: The page cannot be written.
    """
    evidence = verify(folder, run=run, rosters=rosters)
    try:
        context = _context(evidence, folder)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise AuditError(f"the run's manifest makes no sense ({type(error).__name__})", where=str(folder),
                         hint="see confide audit verify") from None  # fmt: skip
    write_page(Path(__file__).with_name("report.html.j2"), context, path)
    return {
        "verified": not evidence.findings,
        "findings": len(evidence.findings),
        "interrupted": bool(context["interruption"]),
    }


def _context(evidence: Evidence, folder: Path) -> dict[str, Any]:
    manifest, privacy = evidence.manifest, evidence.manifest["privacy"]
    unsafe = privacy.get("unsafe_noise_seed") is not None
    private = privacy["epsilon"] not in ("Infinity", None) and not unsafe
    site_epsilon = [_site_epsilon(log, privacy["delta"]) for log in evidence.sites.values()] if private else []
    epsilon = max((s["worst"] for s in site_epsilon), default=0.0)
    ended = next((e for _, e in evidence.coordinator.of(r.RunEnded)), None)
    head, interruption = _interruption(ended, folder)
    rounds, releases = _rounds(evidence), _releases(evidence)
    exact = _json_lines(folder / "rounds.jsonl")
    return {
        "run": evidence.run,
        "purpose": manifest["purpose"],
        "parties": 1 + len(evidence.sites),
        "entries": len(evidence.coordinator.entries) + sum(len(s.entries) for s in evidence.sites.values()),
        "verified": not evidence.findings,
        "findings": [str(f) for f in evidence.findings],
        "warnings": [UNSAFE_NOISE] if unsafe else [],
        "story": story(evidence, rounds, epsilon if private else None, ended is not None and not head),
        "interruption_head": head,
        "interruption": interruption,
        "facts": facts(evidence),
        "private": private,
        "epsilon": f"{epsilon:.2f}",
        "delta": f"{privacy['delta']:g}",
        "run_label": run_label(_sites(privacy)),
        "unit": privacy["unit"],
        "neighbours": "add or remove",
        # Markup: charts are built from numbers and escaped text only.
        "epsilon_chart": Markup(_epsilon_chart(evidence)) if site_epsilon else "",  # noqa: S704
        "site_epsilon": site_epsilon,
        "assumptions": _assumptions(manifest),
        "consent": _consent(evidence, folder),
        "quality_chart": Markup(_quality_chart(releases, exact)) if releases or exact else "",  # noqa: S704
        "releases": releases,
        "exact": _exact_note(exact),
        "profile": manifest["sealing"]["profile"],
        "protection": describe_protection(evidence),
        "limits": (
            "The coordinator chooses the cohorts: together with all but one of a cohort’s sites it isolates the last.",
            "A poisoned update cannot be detected under encryption.",
        ),
        "rounds": rounds,
        "refusals": _refusals(evidence),
        "attacks": _attacks(evidence, folder),
        "law": _LAW,
        "versions": _versions(evidence),
    }


def _interruption(ended: r.RunEnded | None, folder: Path) -> tuple[str, str]:
    if ended is not None and ended.status in ("stopped", "failed"):
        head = "This run was stopped." if ended.status == "stopped" else "This run failed."
        return head, "Nothing of it was released. What was charged stays charged."
    if ended is not None:
        return "", ""
    status = _json(folder / "status.json").get("status", "unknown")
    head = "This run was interrupted." if status != "failed" else "This run failed."
    return head, "The log has no end: figures cover what happened until then. What was charged stays charged."


def _site_epsilon(log: PartyLog, delta: float) -> dict[str, Any]:
    charges = standing_charges(log)
    by_role = {role: merge_events([e for _, _, e in charges if e.role is role]) for role in Role}
    exact = {role: sum(run_epsilon(e, delta) for e in events) for role, events in by_role.items()}
    numbers = [n for n, _, _ in charges]
    return {
        "site": log.party,
        "train": f"{exact[Role.TRAIN]:.2f}",
        "held_out": f"{exact[Role.HELD_OUT]:.2f}",
        "rdp": f"{max(rdp_epsilon(e, delta) for e in by_role.values()):.2f}",
        "worst": person_epsilon([e for events in by_role.values() for e in events], delta),
        "entries": f"{len(numbers)} charges, {numbers[0]}–{numbers[-1]}" if numbers else "none",
    }


def _epsilon_chart(evidence: Evidence) -> str:
    delta = evidence.manifest["privacy"]["delta"]
    charges = max((standing_charges(log) for log in evidence.sites.values()), key=len)
    last = max((round_ for _, round_, _ in charges), default=0)
    series = []
    for role, name in ((Role.TRAIN, "training"), (Role.HELD_OUT, "evaluation")):
        points = []
        for upto in range(last + 1):
            events = merge_events([e for _, round_, e in charges if e.role is role and round_ <= upto])
            points.append((float(upto), sum(run_epsilon(e, delta) for e in events)))
        series.append(Series(name, points))
    return line_chart(
        "eps", "Privacy loss by round", "round", f"ε (PRV) per {evidence.manifest['privacy']['unit']}", series
    )


def _rounds(evidence: Evidence) -> list[dict[str, Any]]:
    abandoned = {e.round: (n, e.reason) for n, e in evidence.coordinator.of(r.RoundAbandoned)}
    opened = {e.round for log in evidence.sites.values() for _, e in log.of(r.Opened)}
    last = {e.round: e.attempt for _, e in evidence.coordinator.of(r.Cohort)}
    found = []
    for number, cohort in evidence.coordinator.of(r.Cohort):
        if cohort.attempt < last[cohort.round]:
            outcome = "a site did not seal: tried again without it"
        elif cohort.round in abandoned:
            outcome = f"abandoned: {abandoned[cohort.round][1]}; charges stand"
        else:
            outcome = "sum opened" if cohort.round in opened else "not opened"
        found.append({
            "round": cohort.round, "cohort": ", ".join(cohort.cohort), "outcome": outcome,
            "transcript": cohort.transcript[:16], "entry": f"coordinator {number}",
        })  # fmt: skip
    known = {x["round"] for x in found}
    for round_, (number, reason) in abandoned.items():
        if round_ not in known:
            found.append({
                "round": round_, "cohort": "none", "outcome": f"abandoned: {reason}", "transcript": "",
                "entry": f"coordinator {number}",
            })  # fmt: skip
    return sorted(found, key=lambda x: x["round"])


def _task(manifest: Mapping[str, Any]) -> metrics.Task:
    label = manifest["label"]
    if label["bounds"] is not None:
        return "regression"
    return "multiclass" if label["classes"] is not None and len(label["classes"]) > 2 else "binary"


def _releases(evidence: Evidence) -> list[dict[str, Any]]:
    found = []
    manifest = evidence.manifest
    if unknown_bounds(manifest):
        return []  # what it released is bounds, not metrics: they stand in the manifest of the run that uses them
    task, population = _task(manifest), max(m["population"] for m in manifest["members"])
    for number, entry in evidence.coordinator.of(r.MetricsReleased):
        total = np.array([float(v) for v in entry.values])
        noise = metrics.noise_deviation(
            manifest["metrics_noise_multiplier"], sites=entry.cohort_size, population=population,
            bits=manifest["sealing"]["bits"],
        )  # fmt: skip
        bounds = metrics.interval(task, total, noise)
        for name, value in metrics.read(task, total, noise).items():
            bound = bounds[name]
            found.append({
                "after": entry.round - 1, "name": metrics.NAMES.get(name, name), "key": name, "number": value,
                "bounds": bound, "value": "—" if value is None else f"{value:.3f}", "entry": number,
                "interval": "too noisy to say" if bound is None else f"{bound[0]:.3f} to {bound[1]:.3f}",
            })  # fmt: skip
    return found


def _quality_chart(releases: list[dict[str, Any]], exact: list[dict[str, Any]]) -> str:
    keys = [*dict.fromkeys(x["key"] for x in releases), *(k for line in exact[:1] for k in line.get("metrics") or {})]
    if not keys:
        return ""
    key, series = keys[0], list[Series]()
    points = [(float(line["round"]), line["metrics"][key]) for line in exact if line["metrics"].get(key) is not None]
    if points:
        series.append(Series("exact", points))
    shown = [x for x in releases if x["key"] == key and x["number"] is not None]
    if shown:
        points = [(float(x["after"]), x["number"]) for x in shown]
        series.append(Series("released", points, [x["bounds"] for x in shown], line=False))
    name = metrics.NAMES.get(key, key)
    return line_chart("quality", f"{name} by round", "rounds trained", name, series) if series else ""


def _exact_note(exact: list[dict[str, Any]]) -> str:
    last = next((line["metrics"] for line in reversed(exact) if line.get("metrics")), None)
    if last is None:
        return ""
    shown = ", ".join(f"{metrics.NAMES.get(k, k)} {v:.3f}" for k, v in last.items())
    return f"Exact, on public data in the simulator only, and not part of the logs: {shown} after the last round shown."


def _consent(evidence: Evidence, folder: Path) -> str:
    snapshots = sum(1 for log in evidence.sites.values() for _ in log.of(r.SnapshotTaken))
    config = _json(folder / "experiment.json").get("consent")
    try:
        source = _consent_source(config if isinstance(config, dict) else {})
    except (AttributeError, LookupError, TypeError, ValueError):
        source = "Where consent came from cannot be read from experiment.json."
    return (
        f"{source} A site took a snapshot for every round and checked it again just before it committed to its update: "
        f"{snapshots} snapshots are committed to in the logs, by salted digests of constant size that tell nothing "
        "of anybody. How many persons were considered or left out stays in each site’s local log. Whoever is not in "
        "the registry, has withdrawn, or whose consent has run out takes part in nothing."
    )


def _consent_source(config: Mapping[str, Any]) -> str:
    source = "Consent was recorded in each site’s own registry."
    if config.get("simulate"):
        source = (
            f"This is simulated consent: {config['simulate']['fraction']:.0%} of the subjects were drawn to consent."
        )
    elif config.get("file"):
        source = f"Consent was imported from {config['file']}."
    return source


def _refusals(evidence: Evidence) -> list[dict[str, Any]]:
    found = [
        {"party": e.party, "round": e.round, "step": e.step, "reason": e.reason, "entry": f"{COORDINATOR} {n}"}
        for kind in (r.Refused, r.Rejected, r.Fault)
        for n, e in evidence.coordinator.of(kind)
    ]
    for site, log in evidence.sites.items():
        found += [
            {"party": site, "round": "—", "step": "stopped for good", "reason": e.reason, "entry": f"{site} {n}"}
            for n, e in log.of(r.RunStopped)
        ]
        found += [
            {"party": site, "round": "—", "step": "told the end", "reason": e.status, "entry": f"{site} {n}"}
            for n, e in log.of(r.ToldEnded)
        ]
    return found


def _attacks(evidence: Evidence, folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "name": attack.name, "attack": attack.record.attack, "site": attack.record.site, "when": when(attack.at),
            "canaries": f"{attack.record.canaries:,}",
            "guesses": f"{attack.record.correct:,} of {attack.record.guesses:,}",
            "shown": attack.record.shown, "claimed": attack.record.claimed, "confidence": attack.record.confidence,
            "refuted": float(attack.record.shown) > float(attack.record.claimed), "key": attack.fingerprint,
        }
        for attack in read_attacks(folder, evidence)[0]
    ]  # fmt: skip


def _sites(privacy: Mapping[str, Any]) -> int:
    """Over how many sites of the privacy unit losses are composed."""
    return int(privacy.get("max_sites_per_subject", 1)) if privacy["unit"] == "subject" else 1


def _assumptions(manifest: Mapping[str, Any]) -> list[str]:
    sites = _sites(manifest["privacy"])
    found = [
        "A person’s records lie at one site only; at m sites the losses would add up m times."
        if sites == 1
        else f"A person’s records lie at up to {sites} sites. Each charges its share {sites} times: ε of "
        f"this run is composed over {sites} sites, whichever role each of them gives her; ledgers that keep to their "
        "limit keep her whole loss to it, over all runs that assume as many sites.",
        "Each site’s declared population is public knowledge and is never recomputed from the data.",
        "Noise is Gaussian in floating point: known attacks on its lowest bits (Mironov 2012) are blunted by the "
        "quantisation of what leaves, not excluded by proof.",
        f"ε of this run is {run_label(sites)}. A site’s ledger bounds all runs together at "
        f"ε = {manifest['privacy']['site_epsilon_limit']:g}, {LEDGER_LABEL}.",
        "Differential privacy bounds a person’s influence; it does not erase it.",
    ]
    if manifest["schema_"].get("bounds") == "learn" and not unknown_bounds(manifest):
        found.append(
            "Bounds of columns were learned from noised histograms in a statistics run of its own, charged to the "
            "held-out persons at the same σ as the metrics; its logs are kept beside this run’s."
        )
    if manifest["privacy"]["unit"] == "record":
        found.insert(0, "The unit is a record: a person with several records is protected less than this ε says.")
    return found


def _versions(evidence: Evidence) -> list[tuple[str, str]]:
    released = next((e.model for _, e in evidence.coordinator.of(r.ModelReleased)), "none was released")
    return [
        *sorted(evidence.software.items()),
        ("manifest", evidence.manifest_digest),
        (f"roster, version {evidence.manifest['roster_version']}", evidence.manifest["roster"]),
        ("first model", evidence.manifest["initial_model"]),
        ("released model", released),
        *((f"log of {p.party}: {len(p.entries)} entries, root", p.tree.root().hex())
          for p in (evidence.coordinator, *evidence.sites.values())),
    ]  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """A file beside the logs; what cannot be read is as if it were not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Rounds with exact metrics, as far as they can be read."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return [
        x for x in lines if isinstance(x, dict) and isinstance(x.get("round"), int) and _is_metrics(x.get("metrics"))
    ]


def _is_metrics(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(v, float) and math.isfinite(v) for v in found.values())
