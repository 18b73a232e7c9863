"""What must hold of every run of a deployed federation, whatever died in it."""

from __future__ import annotations

from dataclasses import dataclass

from confide.privacy.audit import records as audit
from tests.integration.staged import COORDINATOR, Staged


@dataclass(frozen=True)
class Outcome:
    """What did not happen in a run: rounds without a sum, and the rounds that a site was in no cohort of."""

    lost: list[int]
    missed: dict[str, list[int]]


#: Nothing.
NOTHING = Outcome([], {})


def check_run(made: Staged, run: str, *, away: frozenset[str] = frozenset()) -> Outcome:
    """The run has ended with one model at all sites, nothing was trained or charged twice, and the logs verify.

    Args:
        made: The federation.
        run: Its run.
        away: Sites that have left for good.
    """
    result, here = made.result(run), [site for site in made.names if site not in away]
    assert result["status"] == "finished", result
    assert result["sites_in_last_cohort"] == here
    released = {site: [e.model for e in made.entries(site, audit.ModelReleased, run)] for site in here}
    assert released == {site: [result["model"]] for site in here}, "not the same model everywhere"
    computed = made.computed(run)
    assert len(computed) == len(set(computed)) > 0, "an update was computed twice"
    rounds = range(1, result["rounds"] + 2)
    cohorts = {e.round: e.cohort for e in made.entries(COORDINATOR, audit.Cohort, run)}
    summed = {e.round for e in made.entries(here[0], audit.Opened, run)}
    assert len(rounds) - len(summed) == result["rounds_abandoned"]
    for site in made.names:
        check_site(made, run, site, [r for r in cohorts if site in cohorts[r]])
        opened = [e.round for e in made.entries(site, audit.Opened, run)]
        assert site in away or set(opened) == summed, "a sum was not opened"
    evidence = made.evidence(run)
    assert evidence.findings == []
    assert set(evidence.sites) == set(made.names), "the control: every log was read"
    missed = {site: [r for r in rounds if r in cohorts and site not in cohorts[r]] for site in made.names}
    return Outcome([r for r in rounds if r not in summed], {site: found for site, found in missed.items() if found})


def check_site(made: Staged, run: str, site: str, sealed: list[int]) -> None:
    """Each round trained once at most and charged once; what may have left is charged whole."""
    trained = [e.round for e in made.entries(site, audit.UpdateCommitted, run)]
    assert len(trained) == len(set(trained)), "a round was trained twice"
    assert set(sealed) <= set(trained), "the control: cohorts are of those who trained"
    manifest = made.manifest(run)
    events = {r: {f"{run}/{r}/{e.role.value}": e for e in manifest.charges(r)} for r in range(1, manifest.rounds + 2)}
    reserved, standing = made.charges(site, run)
    assert reserved.items() <= {c: e for of_round in events.values() for c, e in of_round.items()}.items()
    for round_ in trained:
        assert events[round_].items() <= reserved.items(), "trained for nothing"
    logged = [e.charge for e in made.entries(site, audit.Charged, run)]
    assert sorted(logged) == sorted(reserved), "a charge was not logged once"
    for round_ in {e.round for e in made.entries(site, audit.Sealed, run)}:
        assert events[round_].items() <= standing.items(), "something was given back that may have left"
