"""Restarts, and disks that were put back: at most one sealed cohort a round, and no charge is ever taken back.

An update is in its process's memory only. What an operator restores, or an attacker with the disk, may therefore waste
a round, but not open one: there is nothing left that could be sealed for a second cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.rounds import RoundSteps
from confide.clients.run import SiteRun
from confide.errors import SealingError
from confide.privacy.audit.records import KeysDestroyed, RunStopped
from confide.privacy.sealing import vault
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from tests.attacks.federation import Sum, header_of, is_refusal, refusal_of
from tests.attacks.machines import PASSPHRASE, Machines

VICTIM, SITE = "ash", "birch"
Make = Callable[..., Machines]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Federations of four sites; passphrases cost nothing."""
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    made: list[Machines] = []

    def build(**options: Any) -> Machines:
        sites = {"min_sites": 3, "min_subjects": 1, "population": {"default": 12}}
        made.append(Machines(tmp_path / f"f{len(made)}", sites=sites, **options))
        return made[-1]

    yield build
    for federation in made:
        federation.world.close()


@pytest.fixture
def bare(make: Make) -> Machines:
    """Sites without a vault that share keys and wait for the first round."""
    federation = make()
    federation.agree()
    return federation


@pytest.fixture
def kept(make: Make) -> Machines:
    """The same with a vault each."""
    federation = make(vaults=True)
    federation.agree()
    return federation


def is_sealed(answer: Envelope) -> bool:
    """Is this a payload?"""
    return header_of(answer).type == m.SealReply.TYPE


def second_seals(federation: Machines, committed: Mapping[str, Envelope], site: str) -> list[Envelope]:
    """Everything a coordinator can ask that would seal the first round's update for another cohort."""
    others = [n for n in federation.names if n != site]
    cohorts = [federation.names, *(tuple(n for n in federation.names if n != left) for left in others)]
    answers = []
    for attempt in (0, 1):
        for cohort in cohorts:
            body = federation.seal_request(cohort, committed)
            answers += [federation.ask(site, "seal", round_, body, attempt=attempt) for round_ in (1, 2)]
    return answers


# --- without a vault --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", [(), ("sites",)], ids=["as it was", "put back"])
@pytest.mark.parametrize("sealed", [False, True], ids=["between train and seal", "after seal"])
def test_a_restarted_site_seals_nothing_and_its_charge_stands(
    bare: Machines, sealed: bool, restored: tuple[str, ...]
) -> None:
    committed = bare.train(1)
    put_back = bare.copy(*restored, sites=[SITE]) if restored else lambda: bare.restart(SITE) and None
    first = bare.seal(1, committed)[SITE] if sealed else None
    paid = bare.paid()
    put_back()
    for answer in second_seals(bare, committed, SITE):
        assert not is_sealed(answer) or (answer.chunks == first.chunks if first and not restored else False)
    assert is_refusal(bare.ask(SITE, "train", 2, m.TrainRequest(sums=()))), "it has left the run with its keys"
    assert bare.paid() == paid
    assert paid[SITE][1] == {f"{bare.run}/1/train": bare.manifest.training.local_steps}, "the control: it was charged"


def test_without_a_restart_the_update_is_sealed_and_an_unsent_one_is_given_back(bare: Machines) -> None:
    """The control: what is missing above is the process."""
    committed = bare.train(1)
    assert is_sealed(bare.seal(1, committed, bare.names[:3])[SITE])
    assert not any(map(is_refusal, bare.train(2, sites=("doum",)).values()))
    assert bare.charges("doum", 1) == {f"{bare.run}/1/train": 0}
    assert bare.charges(SITE, 1) == {f"{bare.run}/1/train": bare.manifest.training.local_steps}


@pytest.mark.parametrize("vaults", [False, True], ids=["without a vault", "with one"])
def test_a_restarted_site_never_gives_a_charge_back(make: Make, vaults: bool) -> None:
    """Only the process that made an update knows that it was not sent: a disk that says so may be an old one."""
    federation = make(vaults=vaults)
    federation.agree()
    federation.train(1)
    paid = federation.paid()
    for name in federation.names:
        federation.restart(name)
    answers = federation.train(2)
    assert all(map(is_refusal, answers.values())) == (not vaults), "the control: with a vault they go on"
    assert {s: charges for s, (_, charges) in federation.paid().items()} == {s: c for s, (_, c) in paid.items()}


def test_a_run_that_is_repeated_by_sites_that_lost_their_state_is_paid_for_again(make: Make, tmp_path: Path) -> None:
    """Re-installed: the ledger is there, the state is not, and the coordinator names its run as it did before."""
    first = make(vaults=False)
    first.agree()
    first.finish(first.round(1))
    paid = {s: u for s, (u, _) in first.paid().items()}
    again = make(ledgers=first.folder / "ledgers")
    assert {s: u for s, (u, _) in again.paid().items()} == paid, "the control: it is the same ledger"
    again.manifest = again.manifest.model_copy(update={"run": first.run})
    again.agree()
    trained = {s for s, answer in again.train(1).items() if not is_refusal(answer)}
    assert {s for s in trained if again.sites[s].ledger.used() <= paid[s]} == set(), "trained again for nothing"


# --- with a vault -----------------------------------------------------------------------------------------------------


def test_a_site_restarted_between_rounds_opens_the_sum_and_goes_on(kept: Machines) -> None:
    first = kept.round(1)
    kept.restart(SITE)
    committed = kept.train(2, first)
    assert not any(map(is_refusal, committed.values()))
    second = kept.add(2, kept.seal(2, committed))
    kept.restart(SITE)
    assert not any(map(is_refusal, kept.train(3, second).values()))
    assert len(kept.models()) == 1
    assert kept.model(SITE).round == 2


@pytest.mark.parametrize("vaults", [False, True], ids=["without a vault", "with one"])
def test_a_site_restarted_between_train_and_seal_loses_this_round_and_with_a_vault_no_other(
    make: Make, vaults: bool
) -> None:
    federation = make(vaults=vaults)
    federation.agree()
    first = federation.round(1)
    committed = federation.train(2, first)
    federation.restart(SITE)
    sealed = federation.seal(2, committed)
    assert {s for s, answer in sealed.items() if is_refusal(answer)} == {SITE}
    assert federation.charges(SITE, 2) == {f"{federation.run}/2/train": federation.manifest.training.local_steps}
    later = federation.train(3)
    assert {s for s, answer in later.items() if is_refusal(answer)} == (set() if vaults else {SITE})
    later = {s: answer for s, answer in later.items() if not is_refusal(answer)}
    third = federation.add(3, federation.seal(3, later))
    assert not any(map(is_refusal, federation.train(4, third, sites=tuple(later)).values()))
    assert len({federation.model(s).weights.tobytes() for s in later}) == 1


@pytest.mark.parametrize("what", ["a wrong passphrase", "a flipped bit"])
def test_a_vault_that_does_not_open_refuses_and_nothing_is_destroyed(kept: Machines, what: str) -> None:
    first = kept.round(1)
    entry = kept.entry(SITE)
    assert entry is not None
    honest, paid = entry.read_bytes(), kept.paid()
    kept.stop(SITE)
    if what == "a flipped bit":
        entry.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    held = entry.read_bytes()
    kept.start(SITE, "another few small words" if what == "a wrong passphrase" else PASSPHRASE)
    body = m.TrainRequest(sums=(first.reference,))
    for step, round_ in (("train", 2), ("seal", 2), ("train", 3)):
        answer = refusal_of(kept.ask(SITE, step, round_, body, first.chunks))
        assert answer.kind == "sealing"
        assert "cannot be opened" in answer.reason
    assert entry.read_bytes() == held
    assert kept.sites[SITE]._store.stopped(kept.run) is None
    assert kept.paid() == paid
    entry.write_bytes(honest)
    kept.restart(SITE)
    assert not any(map(is_refusal, kept.train(2, first).values())), "with the right one it goes on"
    assert len(kept.models()) == 1


def forged(honest: Sum) -> Sum:
    """A sum with another tag."""
    return honest.changed(tags=tuple(f"{int(tag, 16) ^ 1:x}" for tag in honest.reference.tags))


@pytest.mark.parametrize("end", ["release", "a sum that is not authentic"])
def test_the_vaults_entry_goes_with_the_run(kept: Machines, end: str) -> None:
    first, entry = kept.round(1), kept.entry(SITE)
    assert entry is not None, "the control: it was there"
    if end == "release":
        last, ended = kept.finish(first)
        answer = kept.ask(SITE, "release", kept.manifest.rounds + 2, kept.release_request(last, ended=ended),
                          last.chunks)  # fmt: skip
        assert header_of(answer).type == m.ReleaseReply.TYPE
    else:
        assert is_refusal(kept.train(2, forged(first))[SITE])
    assert kept.entry(SITE) is None
    assert not list(kept.place("vaults", SITE).iterdir())
    assert kept.entry("doum") is not None or end != "release", "the control: others' are theirs"
    kept.restart(SITE)
    with pytest.raises(SealingError, match="holds no keys"):
        _ = kept.sites[SITE]._run(kept.manifest).keys.session
    assert kept.entry(SITE) is None, "and it does not come back"


@pytest.mark.parametrize("end", ["release", "a sum that is not authentic"])
def test_keys_do_not_outlive_a_process_that_died_just_before_it_destroyed_them(
    kept: Machines, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The end of the run was durable, the keys' end was not: the next process owes it."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    first = kept.round(1)
    if end == "release":
        last, ended = kept.finish(first)
        round_, body = kept.manifest.rounds + 2, kept.release_request(last, ended=ended)
        step, chunks, where = "release", last.chunks, (RoundSteps, "end")
    else:
        step, round_, body = "train", 2, m.TrainRequest(sums=(forged(first).reference,))  # type: ignore[assignment]
        chunks, where = first.chunks, (SiteRun, "destroy")
    with monkeypatch.context() as patch:
        patch.setattr(*where, die)
        with pytest.raises(Killed):
            kept.ask(SITE, step, round_, body, chunks)
    assert kept.entry(SITE) is not None, "the control: it was killed before"
    told = [e for e in kept.sites[SITE].log.entries() if isinstance(e, KeysDestroyed | RunStopped)]
    assert told == [], "the control: nor has it said so"
    kept.restart(SITE)
    kept.ask(SITE, step, round_, body, chunks)
    assert kept.entry(SITE) is None
    told = [e for e in kept.restart(SITE).log.entries() if isinstance(e, KeysDestroyed | RunStopped)]
    assert len(told) == 1, "and it says so, once"


# --- copies of everything, put back -----------------------------------------------------------------------------------


def test_copies_of_state_and_vault_put_back_after_sealing_seal_nothing(kept: Machines) -> None:
    committed = kept.train(1)
    put_back = kept.copy("sites", "vaults")
    assert all(map(is_sealed, kept.seal(1, committed).values()))
    paid = kept.paid()
    put_back()
    for site in kept.names:
        assert kept.sites[site]._store.sealed_transcript(kept.run, 1) is None, "the disk knows nothing of it"
        answers = second_seals(kept, committed, site)
        assert not any(map(is_sealed, answers))
        assert any("no update of round 1 left" in refusal_of(answer).reason for answer in answers)
    assert kept.paid() == paid
    assert not any(map(is_refusal, kept.train(2).values())), "the control: keys are there"
    assert {s: c for s, (_, c) in kept.paid().items()} == {s: c for s, (_, c) in paid.items()}


def test_were_the_updates_put_back_too_the_difference_of_two_sums_would_be_one_sites_update(kept: Machines) -> None:
    """The control of the one above: with the vectors by hand in memory again, everything else lets it happen."""
    committed = kept.train(1)
    put_back, vectors = kept.copy("sites", "vaults"), {s: kept.vector(s) for s in kept.names}
    everybody = kept.add(1, kept.seal(1, committed))
    put_back()
    rest = tuple(n for n in kept.names if n != VICTIM)
    assert not any(map(is_sealed, kept.seal(1, committed, rest).values()))
    for name in rest:
        kept.sites[name]._runs[kept.run].pending = vectors[name]
    again = kept.seal(1, committed, rest)
    assert all(map(is_sealed, again.values()))
    found = kept.opened(everybody, SITE) - kept.opened(kept.add(1, again), SITE)
    segment = kept.sites[SITE]._runs[kept.run].segments(1)[0]
    step = (segment.high - segment.low) / (2**kept.manifest.sealing.bits - 1)
    assert np.abs(found - vectors[VICTIM][1]).max() <= 7.5 * step
    assert np.abs(vectors[VICTIM][1]).max() > 1000 * step, "and that is no rounding: the update has been read"


@pytest.mark.parametrize("parts", [("sites",), ("sites", "vaults")], ids=["state", "state and vault"])
def test_a_round_that_a_put_back_disk_has_forgotten_is_not_trained_again_for_nothing(
    kept: Machines, parts: tuple[str, ...]
) -> None:
    """The copy is from before the round; the ledger is not put back, and remembers one charge."""
    put_back = kept.copy(*parts)
    kept.seal(1, kept.train(1))
    paid = kept.paid()
    put_back()
    again = {s for s, answer in kept.train(1).items() if not is_refusal(answer)}
    assert {s for s in again if kept.sites[s].ledger.used() <= paid[s][0]} == set(), "two updates, one charge"


@pytest.mark.parametrize("parts", [("sites",), ("sites", "vaults")], ids=["state", "state and vault"])
def test_a_round_is_sealed_for_one_cohort_also_when_the_disk_has_forgotten_it(
    kept: Machines, parts: tuple[str, ...]
) -> None:
    put_back = kept.copy(*parts)
    assert all(map(is_sealed, kept.seal(1, kept.train(1)).values()))
    put_back()
    again = {s: e for s, e in kept.train(1).items() if not is_refusal(e)}
    if len(again) >= kept.manifest.min_sites:
        twice = {s for s, answer in kept.seal(1, again).items() if is_sealed(answer)}
        assert twice == set(), "a second cohort for the same run and round"
