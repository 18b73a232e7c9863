"""Runs that retry: a site that dies while sealing is left out of the next attempt, and no second sum falls out of it.

Each attempt adds a mask of a site's own, whose seed it gives away for one attempt a round, ever. Without that, two
attempts are a differencing attack; here it is carried out with the coordinator's key and one site's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from numpy.typing import NDArray

import confide.privacy.sealing.slots as slots_module
from confide.clients.ranges import segments
from confide.clients.run import SiteRun
from confide.errors import SealingError
from confide.privacy.audit.verify import verify
from confide.privacy.dp import Role
from confide.privacy.sealing import Agreement, make_profile, vault
from confide.privacy.sealing.encoding import Encoder
from confide.privacy.sealing.masks import PairKeys, remove_own
from confide.privacy.sealing.slots import SlotSession
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.server.coordinator import RoundOutcome
from confide.strategies import StepInput, make_strategy
from tests.attacks.coalitions import Recorded
from tests.attacks.federation import Federation, Sum, header_of, is_refusal, refusal_of, resign
from tests.attacks.forging import packing_of

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
Make = Callable[..., Recorded]
VICTIM, PARTNER = "ash", "birch"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A federation whose rounds are retried, unless said otherwise."""
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    folders = (tmp_path / f"f{i}" for i in itertools.count())
    with ExitStack() as stack:

        def made(*, profile: str = "sealed", retry: bool = True, vaults: bool = False) -> Recorded:
            federation = Recorded(
                next(folders), vaults=vaults, people={"people": 12},
                sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
                sealing={"profile": profile, "retry": retry},
            )  # fmt: skip
            stack.callback(federation.world.close)
            return federation

        yield made


@pytest.fixture
def federation(make: Make) -> Recorded:
    """Sites that share keys and wait for the first round."""
    return make().agree()


def without(names: tuple[str, ...], *gone: str) -> tuple[str, ...]:
    """The others."""
    return tuple(n for n in names if n not in gone)


def steps(federation: Federation, site: str, round_: int) -> int:
    """Training steps that a round still costs a site."""
    return sum(n for charge, n in federation.charges(site, round_).items() if charge.endswith("train"))


def apply(federation: Federation, site: str, total: Sum) -> Floats:
    """What a site would make of a sum, without the consequences that a wrong one has."""
    return federation.sites[site]._runs[federation.manifest.run].apply(
        federation.model(site), total.reference, total.chunks
    ).weights  # fmt: skip


def is_refused(federation: Federation, site: str, total: Sum) -> bool:
    """Would a site refuse a sum?"""
    try:
        apply(federation, site, total)
    except SealingError:
        return True
    return False


def agreement_of(total: Sum) -> Agreement:
    """What a sum claims to be bound to."""
    return Agreement(total.reference.cohort, total.reference.transcript, self_masked=True)


# --- a site dies ------------------------------------------------------------------------------------------------------


class Scene:
    """The honest coordinator among sites of which one is gone for a step of the second round."""

    def __init__(self, federation: Recorded, monkeypatch: pytest.MonkeyPatch, step: str, lost: str) -> None:
        self.federation, self._step, self._lost, self._round = federation, step, lost, 0
        self.outcomes: dict[int, RoundOutcome] = {}
        self.models: dict[int, Floats] = {}
        self.vectors: dict[tuple[str, int], Floats] = {}
        compute = SiteRun.compute

        def computed(run: SiteRun, round_: int, *rest: Any) -> Floats:
            self.vectors[run.site, round_] = vector = compute(run, round_, *rest)
            return vector

        monkeypatch.setattr(SiteRun, "compute", computed)
        self.coordinator = federation.coordinator(
            federation.grid(self._drop, self._tamper),
            before_round=lambda round_: setattr(self, "_round", round_),
            after_round=self._look,
        )

    def run(self) -> None:
        """To the end; the logs must hold together."""
        self.coordinator.run()
        self.federation.world.export()
        assert verify(self.federation.folder).findings == []

    def follows(self, round_: int, cohort: tuple[str, ...]) -> bool:
        """Is the model after a round the one before plus the sum over this cohort, to within quantisation?"""
        manifest = self.federation.manifest
        (segment,) = segments(manifest, round_)[:1]
        weight = sum(manifest.weight(s) for s in cohort)
        total = np.sum([self.vectors[s, round_][: segment.size] for s in cohort], axis=0)
        before = self.models[round_].astype(np.float32)
        expected, _ = make_strategy(manifest.strategy).step(StepInput(before, total, weight, ()))
        tolerance = len(cohort) * (segment.high - segment.low) / (2**manifest.sealing.bits - 1) / weight
        return bool(np.allclose(self.models[round_ + 1], expected, rtol=1e-6, atol=tolerance))

    def _look(self, outcome: RoundOutcome) -> None:
        """A site's model after round r holds the sums up to r − 1."""
        self.outcomes[outcome.round] = outcome
        self.models[outcome.round] = self.federation.model("cedar").weights.copy()

    def _drop(self, message: FlowerMessage, site: str) -> bool:
        here = message.metadata.message_type.endswith(self._step) and (self._round, site) == (2, PARTNER)
        return here and self._lost == "the request"

    def _tamper(self, site: str, request: Envelope, reply: Envelope) -> Envelope | None:
        header = header_of(request)
        here = (header.step, header.round, site) == (self._step, 2, PARTNER)
        return None if here and self._lost == "the reply" else reply


@pytest.mark.parametrize(
    ("profile", "lost"), [("sealed", "the request"), ("sealed", "the reply"), ("masked", "the reply")]
)
def test_a_site_that_dies_while_sealing_is_left_out_and_the_sum_is_that_of_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch, profile: str, lost: str
) -> None:
    scene = Scene(make(profile=profile), monkeypatch, "seal", lost)
    scene.run()
    rest = without(scene.federation.names, PARTNER)
    assert [(o.abandoned, o.cohort) for r, o in sorted(scene.outcomes.items())] == [
        (False, scene.federation.names), (False, rest), (False, scene.federation.names),
        (False, scene.federation.names),
    ]  # fmt: skip
    assert scene.follows(2, rest)
    assert not scene.follows(2, scene.federation.names)
    local_steps = scene.federation.manifest.training.local_steps
    assert steps(scene.federation, PARTNER, 2) == (local_steps if lost == "the reply" else 0), "what left is paid for"
    assert steps(scene.federation, VICTIM, 2) == local_steps


def test_without_retry_the_same_death_abandons_the_round(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    scene = Scene(make(retry=False), monkeypatch, "seal", "the reply")
    scene.run()
    assert [o.abandoned for _, o in sorted(scene.outcomes.items())] == [False, True, False, False]
    assert np.array_equal(scene.models[3], scene.models[2])


@pytest.mark.parametrize("lost", ["the request", "the reply"])
def test_a_site_that_dies_while_unlocking_abandons_the_round_and_the_run_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    scene = Scene(make(), monkeypatch, "unlock", lost)
    scene.run()
    assert [o.abandoned for _, o in sorted(scene.outcomes.items())] == [False, True, False, False]
    assert np.array_equal(scene.models[3], scene.models[2]), "nothing of the round was applied"
    assert scene.follows(3, scene.federation.names)
    assert {steps(scene.federation, s, 2) for s in scene.federation.names} == {
        scene.federation.manifest.training.local_steps
    }, "the updates have left, so their charges stand"


@pytest.mark.parametrize("moment", ["before it seals", "between sealing and unlocking"])
def test_a_site_restarted_from_its_vault_loses_its_mask_and_harms_nobody(make: Make, moment: str) -> None:
    """Its own key for such masks was in memory. Whatever it says now, the others must not take it for a forgery."""
    federation = make(vaults=True).agree()
    committed = federation.train(1)
    if moment == "before it seals":
        federation.restart(PARTNER)
        assert is_refusal(federation.ask(PARTNER, "seal", 1, federation.seal_request(federation.names, committed)))
        return
    sealed = federation.seal(1, committed)
    federation.restart(PARTNER)
    unlocked = federation.unlock(1, sealed)
    assert is_refusal(unlocked[PARTNER]), "it cannot know the seed any more"
    assert not any(is_refusal(unlocked[s]) for s in without(federation.names, PARTNER))
    honest = [s for s in federation.names if not is_refusal(federation.train(2, sites=(s,))[s])]
    assert set(honest) >= set(without(federation.names, PARTNER)), "the round is lost, and not the run"


# --- one attempt a round, ever ----------------------------------------------------------------------------------------


def test_a_site_unlocks_one_attempt_a_round_also_when_its_answer_was_lost(federation: Recorded) -> None:
    committed = federation.train(1)
    first = federation.seal(1, committed)
    rest = without(federation.names, "doum")
    second = federation.seal(1, committed, rest, attempt=1)
    assert not any(map(is_refusal, (*first.values(), *second.values()))), "both attempts were sealed"
    lost = federation.unlock(1, second, attempt=1)  # suppose that none of it arrived
    assert not any(map(is_refusal, lost.values()))
    again = federation.unlock(1, second, attempt=1)
    assert again == lost, "the same request gets the stored answer"
    for site in rest:
        assert is_refusal(federation.unlock(1, {s: first[s] for s in federation.names})[site])
    assert federation.add(1, second, unlocked=again, attempt=1).reference.attempt == 1
    total = federation.add(1, second, unlocked=again, attempt=1)
    assert not is_refusal(federation.train(2, total, sites=(VICTIM,))[VICTIM]), "and it opens"


def test_after_unlocking_nothing_more_is_sealed_for_the_round(federation: Recorded) -> None:
    committed = federation.train(1)
    sealed = federation.seal(1, committed)
    again = federation.seal(1, committed, federation.names[:3], attempt=1)
    assert not any(map(is_refusal, again.values())), "the control: before, it is"
    federation.unlock(1, sealed)
    for attempt, cohort in ((2, federation.names[:3]), (3, federation.names)):
        refused = federation.seal(1, committed, cohort, attempt=attempt)
        assert {refusal_of(e).kind for e in refused.values()} == {"sealing"}


def test_an_attempt_that_is_not_the_unlocked_one_is_no_sum_of_the_round(federation: Recorded) -> None:
    """A site that unlocked one attempt refuses the other's sum, even if the coordinator had all of its seeds."""
    committed = federation.train(1)
    first = federation.seal(1, committed)
    second = federation.seal(1, committed, without(federation.names, "doum"), attempt=1)
    unlocked = federation.unlock(1, first)
    assert is_refusal(federation.train(2, federation.add(1, second, attempt=1), sites=(VICTIM,))[VICTIM])
    assert not is_refusal(federation.train(2, federation.add(1, first, unlocked=unlocked), sites=(VICTIM,))[VICTIM])


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_run_without_retry_has_one_attempt_and_nothing_to_unlock(make: Make, attempt: int) -> None:
    federation = make(retry=False).agree()
    committed = federation.train(1)
    refused = federation.seal(1, committed, attempt=attempt)
    assert {refusal_of(e).kind for e in refused.values()} == {"sealing"}
    sealed = federation.seal(1, committed)
    assert not any(map(is_refusal, sealed.values())), "the control: attempt 0"
    assert all(map(is_refusal, federation.unlock(1, sealed).values()))
    relabelled = federation.add(1, sealed, attempt=attempt)
    assert is_refusal(federation.train(2, relabelled, sites=(VICTIM,))[VICTIM])


# --- what is paid for -------------------------------------------------------------------------------------------------


def test_an_update_that_was_sealed_in_a_later_attempt_only_is_paid_for(federation: Recorded) -> None:
    """The coordinator asks for attempt 1 at once, lets the next round begin, and unlocks then."""
    committed = federation.train(1)
    cohort = without(federation.names, "doum")
    sealed = federation.seal(1, committed, cohort, attempt=1)
    federation.train(2)
    assert steps(federation, "doum", 1) == 0, "the control: what never left costs nothing"
    unlocked = federation.unlock(1, sealed, attempt=1)
    if not any(map(is_refusal, (*sealed.values(), *unlocked.values()))):
        opened = federation.train(3, federation.add(1, sealed, unlocked=unlocked, attempt=1))
        assert not any(map(is_refusal, opened.values())), "the round's sum is in everybody's model"
    paid = {steps(federation, s, 1) for s in cohort if not is_refusal(sealed[s])}
    assert paid <= {federation.manifest.training.local_steps}


def test_a_round_that_is_over_is_not_unlocked_any_more(federation: Recorded) -> None:
    """Its update is destroyed when the next round begins, and so must be what opens it."""
    sealed = federation.seal(1, federation.train(1))
    assert not is_refusal(federation.unlock(1, {s: sealed[s] for s in federation.names})[PARTNER]), "the control"
    later = federation.seal(2, federation.train(2))
    federation.train(3)
    assert all(map(is_refusal, federation.unlock(2, later).values()))


def test_a_round_that_is_trained_again_from_a_restored_disk_is_paid_for_again(make: Make) -> None:
    """The site's state of the run is a backup from before the round; its vault, its ledger and its logs are not."""
    federation = make(retry=False, vaults=True).agree()
    before = federation.disks[-1]
    assert not any(map(is_refusal, federation.seal(1, federation.train(1)).values())), "one update has left"
    ledger = federation.sites[PARTNER].ledger
    spent, first = ledger.epsilon(Role.TRAIN), federation.vectors[PARTNER, 1]
    federation.restore(PARTNER, before)
    again = federation.train(1, sites=(PARTNER,))[PARTNER]
    if not is_refusal(again):
        assert not np.array_equal(federation.vectors[PARTNER, 1], first), "it is another update of the same people"
        assert ledger.epsilon(Role.TRAIN) > spent


# --- differencing -----------------------------------------------------------------------------------------------------


def fields_of(federation: Recorded, words: list[Words], seeds: list[bytes]) -> tuple[Words, bool]:
    """Opened words without own masks whose seeds are known: (fields, could an honest sum hold them?)."""
    packing = packing_of(make_profile(federation.manifest.sealing, len(federation.names)))
    bare = [remove_own(w, seeds, n, packing.modulus) for n, w in enumerate(words)]
    parts = [packing.unpack(w) for w in bare]
    return np.concatenate([f for f, _ in parts])[: federation.manifest.vector_size(1)], all(ok for _, ok in parts)


def differences(federation: Recorded, attempts: list[dict[str, Envelope]], seeds: Mapping[tuple[str, int], bytes],
                key_holder: str) -> Iterator[Floats]:  # fmt: skip
    """The attack: open both sums with the key holder's key, take off every own mask that is known, subtract."""
    session = federation.sites[key_holder]._runs[federation.manifest.run].keys.session
    assert isinstance(session, SlotSession)
    totals = [federation.add(1, a, attempt=i) for i, a in enumerate(attempts)]
    words = [[session._alive().open(c) for c in t.chunks] for t in totals]
    known = [[seeds[s, i] for s in t.reference.cohort if (s, i) in seeds] for i, t in enumerate(totals)]
    (part,) = segments(federation.manifest, 1)
    step = (part.high - part.low) / (2**federation.manifest.sealing.bits - 1)
    for chosen in itertools.product(*([[], k] for k in known)):
        first, second = (fields_of(federation, w, s)[0].astype(np.float64) for w, s in zip(words, chosen, strict=True))
        yield (first - second) * step + part.low


@pytest.mark.parametrize("profile", ["sealed", "masked"])
@pytest.mark.parametrize("own_masks", [True, False], ids=["own masks", "the control: none"])
def test_two_attempts_do_not_give_away_the_site_that_is_in_one_of_them_only(
    make: Make, monkeypatch: pytest.MonkeyPatch, own_masks: bool, profile: str
) -> None:
    """Attempt 0 is sealed by all, attempt 1 by all but the victim; the coordinator has a colluding site's keys."""
    federation = make(profile=profile).agree()
    if not own_masks:
        honest = PairKeys.for_cohort
        monkeypatch.setattr(PairKeys, "for_cohort", lambda keys, cohort, x, own=None: honest(keys, cohort, x))
        monkeypatch.setattr(slots_module, "remove_own", lambda words, *_: words)
    committed = federation.train(1)
    rest = without(federation.names, VICTIM)
    attempts = [federation.seal(1, committed), federation.seal(1, committed, rest, attempt=1)]
    # Everybody gives away one seed; the coordinator chooses whose is for which attempt, the colluding site gives both.
    answers = {s: federation.unlock(1, attempts[1], attempt=1)[s] for s in rest if s != PARTNER}
    assert not any(map(is_refusal, answers.values()))
    seeds = {(s, 1): bytes.fromhex(m.UnlockReply.model_validate_json(e.body).seed) for s, e in answers.items()}
    first = {s: e for s, e in federation.unlock(1, attempts[0]).items() if not is_refusal(e)}
    assert VICTIM in first
    assert not set(first) & set(answers)
    seeds |= {(s, 0): bytes.fromhex(m.UnlockReply.model_validate_json(e.body).seed) for s, e in first.items()}
    partner = federation.sites[PARTNER]._runs[federation.manifest.run].keys.session
    for number, attempt in enumerate(attempts):
        seeds[PARTNER, number] = partner.unlock(agreement_of(federation.add(1, attempt, attempt=number)))
    update = federation.vectors[VICTIM, 1]
    (part,) = segments(federation.manifest, 1)
    tolerance = 8 * (part.high - part.low) / (2**federation.manifest.sealing.bits - 1)
    if not own_masks:
        seeds = {}
    found = list(differences(federation, attempts, seeds, PARTNER))
    assert any(np.abs(f - update).max() <= tolerance for f in found) is not own_masks


def test_the_unlocked_attempt_itself_does_open(federation: Recorded) -> None:
    """The control of the attack's reading: with all seeds of one attempt the fields are those of its sum."""
    sealed = federation.seal(1, federation.train(1))
    unlocked = federation.unlock(1, sealed)
    seeds = [bytes.fromhex(m.UnlockReply.model_validate_json(e.body).seed) for e in unlocked.values()]
    total = federation.add(1, sealed)
    session = federation.sites[PARTNER]._runs[federation.manifest.run].keys.session
    words = [session._alive().open(c) for c in total.chunks]  # type: ignore[attr-defined]  # a site's own key
    fields, clean = fields_of(federation, words, seeds)
    assert clean
    assert not fields_of(federation, words, seeds[1:])[1]
    encoder = Encoder(segments(federation.manifest, 1), federation.manifest.sealing.bits, "00" * 32)
    values = encoder.decode([np.append(fields, np.uint64(0))], 4).values
    expected = np.sum([federation.vectors[s, 1] for s in federation.names], axis=0)
    assert np.allclose(values, expected, atol=1e-3)


# --- the seeds in a sum -----------------------------------------------------------------------------------------------


def other_seed(statement: m.Statement) -> m.Statement:
    """A reply with another seed in it, as the coordinator can write it: without the site's signature."""
    body = m.UnlockReply.model_validate_json(statement.body).model_copy(update={"seed": "11" * 32})
    return statement.model_copy(update={"body": body.to_bytes().decode()})


WRONG_SEEDS: dict[str, Callable[[Federation, dict[str, m.Statement], dict[str, m.Statement]], list[m.Statement]]] = {
    "missing": lambda _f, s, _o: list(s.values())[:-1],
    "none at all": lambda _f, _s, _o: [],
    "swapped": lambda _f, s, _o: [s["birch"], s["ash"], s["cedar"], s["doum"]],
    "twice the same": lambda _f, s, _o: [s["ash"], s["ash"], s["cedar"], s["doum"]],
    "forged by the coordinator": lambda _f, s, _o: [other_seed(s["ash"]), s["birch"], s["cedar"], s["doum"]],
    "forged under its own name": lambda _f, s, _o: [
        s["ash"].model_copy(update={"site": "birch"}), s["birch"], s["cedar"], s["doum"]],
    "changed by its owner": lambda f, s, _o: [
        m.Statement.of("ash", resign(f.sites["ash"], s["ash"].envelope(), seed="22" * 32)),
        s["birch"], s["cedar"], s["doum"]],
    "of another round": lambda _f, s, o: [o["ash"], s["birch"], s["cedar"], s["doum"]],
    "all of another round": lambda _f, _s, o: list(o.values()),
}  # fmt: skip


def test_a_sum_whose_seeds_are_not_those_that_its_cohort_unlocked_for_it_is_refused(federation: Recorded) -> None:
    def unlocked_round(round_: int, *sums: Sum) -> tuple[Sum, dict[str, m.Statement]]:
        sealed = federation.seal(round_, federation.train(round_, *sums))
        unlocked = federation.unlock(round_, sealed)
        found = {s: m.Statement.of(s, e) for s, e in sorted(unlocked.items())}
        return federation.add(round_, sealed, unlocked=unlocked), found

    first, older = unlocked_round(1)
    second, seeds = unlocked_round(2, first)
    wrong = {n: second.changed(unlocked=tuple(f(federation, seeds, older))) for n, f in WRONG_SEEDS.items()}
    assert [name for name, total in wrong.items() if not is_refused(federation, PARTNER, total)] == []
    after = apply(federation, PARTNER, second)
    assert not np.array_equal(after, federation.model(PARTNER).weights), "the control: the right ones open it"
    assert is_refusal(federation.train(3, wrong["missing"], sites=(PARTNER,))[PARTNER])
    assert federation.sites[PARTNER]._runs[federation.manifest.run].keys.destroyed, "and at the site it is final"


def test_a_seed_that_was_unlocked_for_another_attempt_of_the_round_is_refused(federation: Recorded) -> None:
    """One site was talked into unlocking another attempt than the others."""
    committed = federation.train(1)
    first = federation.seal(1, committed)
    second = federation.seal(1, committed, without(federation.names, "doum"), attempt=1)
    shown = m.UnlockRequest(statements=tuple(m.Statement.of(s, e) for s, e in sorted(second.items())))
    other = federation.ask(VICTIM, "unlock", 1, shown, attempt=1)
    unlocked = federation.unlock(1, first)
    assert [s for s, e in unlocked.items() if is_refusal(e)] == [VICTIM]
    total = federation.add(1, first, unlocked={**unlocked, VICTIM: other})
    assert is_refused(federation, PARTNER, total)
    site = federation.sites[VICTIM]
    seed = site._runs[federation.manifest.run].keys.session.unlock(agreement_of(total))
    body = m.UnlockReply(transcript=total.reference.transcript, seed=seed.hex())
    right = federation.sign("unlock", 1, "coordinator", body, identity=site.identity, request="")
    whole = federation.add(1, first, unlocked={**unlocked, VICTIM: right})
    assert not is_refused(federation, PARTNER, whole), "the control: that seed is all that was wrong"


# --- the proof that all have sealed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("proof", ["all but one", "of another attempt", "of another cohort", "one twice", "unsigned"])
def test_a_site_does_not_unlock_without_the_proof_that_the_whole_cohort_has_sealed(
    federation: Recorded, proof: str
) -> None:
    committed = federation.train(1)
    first = federation.seal(1, committed)
    rest = without(federation.names, "doum")
    second = federation.seal(1, committed, rest, attempt=1)
    statements = {s: m.Statement.of(s, e) for s, e in first.items()}
    other = {s: m.Statement.of(s, e) for s, e in second.items()}
    body = m.SealReply.model_validate_json(first["doum"].body)
    unsigned = replace(first["doum"], body=body.model_copy(update={"tags": ("1",)}).to_bytes())
    shown = {
        "all but one": [statements[s] for s in rest],
        "of another attempt": list(other.values()),
        "of another cohort": [*(other[s] for s in rest), statements["doum"]],
        "one twice": [statements[s] for s in ("ash", "ash", "birch", "cedar")],
        "unsigned": [*(statements[s] for s in rest), m.Statement.of("doum", unsigned)],
    }[proof]
    answer = federation.ask(VICTIM, "unlock", 1, m.UnlockRequest(statements=tuple(shown)))
    assert is_refusal(answer)
    whole = m.UnlockRequest(statements=tuple(statements.values()))
    assert not is_refusal(federation.ask(VICTIM, "unlock", 1, whole)), "the control: all of them"
