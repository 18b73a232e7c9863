"""A coordinator that forges sums: every attack works on the locks alone, and fails on the tags.

Ported from shared/spikes/sum_forgery.py to the product's own bytes. BFV is malleable, so whoever holds the public
parameters can make sites open what he chooses, or even their key, unless sums are authenticated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.clients.store import SiteStore
from confide.errors import SealingError
from confide.privacy.sealing import Agreement, Payload, Segment
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.bfv import lattice_for
from confide.privacy.sealing.lattice import KEY_BYTES, unpack_residues
from confide.privacy.sealing.masks import CohortMasks
from confide.privacy.sealing.parameters import DEGREE
from confide.privacy.sealing.sealed import SealedProfile
from confide.privacy.sealing.slots import SlotSession
from confide.protocol import messages as m
from tests.attacks.federation import Federation, Sum, forged_ciphertext, is_refusal, open_federation, refusal_of
from tests.privacy.sealing.cohort import Cohort

SEGMENTS = [Segment(40, 0.0, 255.0)]
Floats = NDArray[np.float64]


@pytest.fixture
def no_tags(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The control: switch the tags off."""
    return lambda: monkeypatch.setattr(SumMac, "accepts", lambda *_: True)


@pytest.fixture
def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the other lock away, so that the tags stand alone."""
    monkeypatch.setattr(CohortMasks, "apply", lambda _self, values, _chunk, _modulus: values)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that share keys and wait for the first round."""
    with open_federation(tmp_path / "f") as made:
        yield made.agree()


def polynomial(profile: SealedProfile, slots: NDArray[np.uint64]) -> list[int]:
    """The plaintext polynomial of slots: public knowledge."""
    plain = seal.Plaintext()
    seal.BatchEncoder(lattice_for(profile.choice).context).encode(slots.tolist(), plain)
    data = plain.dyn_array()
    return [data.at(i) if i < data.size() else 0 for i in range(DEGREE)]


def shift(profile: SealedProfile, fields: NDArray[np.uint64]) -> list[int]:
    """round(q · m / t), with m the plaintext of these coordinates: what added to c₀ adds m to the plaintext."""
    q, t = profile.choice.coefficient_modulus, profile.choice.plain_modulus
    slots = profile.choice.packing.pack(fields, DEGREE)
    return [(q * coefficient + t // 2) // t % q for coefficient in polynomial(profile, slots)]


def coefficients(ciphertext: bytes) -> tuple[list[int], list[int]]:
    """Both polynomials of a summed ciphertext."""
    data = unpack_residues(ciphertext).tolist()
    return data[:DEGREE], data[DEGREE:]


def chosen_sum(profile: SealedProfile, fields: NDArray[np.uint64]) -> bytes:
    """(b): (round(q · m / t), 1): opens to m, whatever the key is; made without any key."""
    return forged_ciphertext(shift(profile, fields), [1] + [0] * (DEGREE - 1))


def key_ciphertext(profile: SealedProfile) -> bytes:
    """(a): (0, ⌊q/t⌋): opens to the secret key."""
    delta = profile.choice.coefficient_modulus // profile.choice.plain_modulus
    return forged_ciphertext([0] * DEGREE, [delta] + [0] * (DEGREE - 1))


@pytest.fixture
def cohort() -> Cohort:
    """Four sites; parameters with room for twelve, so that noise is not what stops an attack."""
    made = Cohort.make(4, 8, most=12)
    assert isinstance(made.profile, SealedProfile)
    return made


def vectors(cohort: Cohort, low: int = 0, high: int = 256) -> dict[str, Floats]:
    """Whole numbers, so that sums are exact."""
    rng = np.random.default_rng(4)
    return {name: rng.integers(low, high, 40).astype(np.float64) for name in cohort.names}


def honest_total(cohort: Cohort, mine: dict[str, Floats]) -> Payload:
    """An honest sum."""
    return cohort.total(list(cohort.seal(mine, SEGMENTS).values()), 40)


# --- (a) a sum that opens to the secret key ---------------------------------------------------------------------------


def test_a_forged_sum_would_open_to_the_secret_key_and_the_key_would_open_every_recorded_sum(cohort: Cohort) -> None:
    """The attack itself, on the decryption alone: this is what every other defence is for."""
    profile, mine = cohort.profile, vectors(cohort)
    recorded = honest_total(cohort, mine)
    session = cohort.sessions[cohort.names[0]]
    assert isinstance(session, SlotSession)
    slots = session._alive().open(key_ciphertext(profile))  # which refuses what has more noise than an honest sum
    t, q = profile.choice.plain_modulus, profile.choice.coefficient_modulus
    secret = [c - t if c > t // 2 else c for c in polynomial(profile, slots)]
    assert set(secret) == {-1, 0, 1}, "the ternary secret key"
    assert len(cohort.secret) == KEY_BYTES + 32
    first, second = coefficients(recorded.chunks[0])
    product = _negacyclic(second, secret, q)
    opened = [(((a + b) % q) * t * 2 + q) // (2 * q) % t for a, b in zip(first, product, strict=True)]
    honest = session._alive().open(recorded.chunks[0])
    assert opened == polynomial(profile, honest), "the coordinator has opened the recorded sum by itself"


def test_the_key_forgery_is_refused_by_the_tags_and_again_by_the_range(
    cohort: Cohort, no_tags: Callable[[], None]
) -> None:
    total = honest_total(cohort, vectors(cohort))
    forged = Payload((key_ciphertext(cohort.profile),), total.tags)
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(forged, SEGMENTS)
    no_tags()
    with pytest.raises(SealingError, match="no honest sum"):
        cohort.open(forged, SEGMENTS)


# --- (b) a sum of the coordinator's choosing --------------------------------------------------------------------------


def test_a_chosen_sum_is_refused_and_would_open_without_tags(cohort: Cohort, no_tags: Callable[[], None]) -> None:
    total = honest_total(cohort, vectors(cohort))
    wanted = np.arange(40, dtype=np.uint64) * np.uint64(7)
    forged = Payload((chosen_sum(cohort.profile, wanted),), total.tags)
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(forged, SEGMENTS)
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(Payload(forged.chunks, (0,)), SEGMENTS)
    no_tags()
    assert np.array_equal(cohort.open(forged, SEGMENTS), wanted)


# --- (c) one coordinate nudged ----------------------------------------------------------------------------------------


def test_adding_to_one_slot_is_refused_and_would_work_without_tags(cohort: Cohort, no_tags: Callable[[], None]) -> None:
    mine = vectors(cohort, high=200)
    total, profile = honest_total(cohort, mine), cohort.profile
    nudge = np.zeros(40, dtype=np.uint64)
    nudge[3] = 21
    first, second = coefficients(total.chunks[0])
    q = profile.choice.coefficient_modulus
    moved = [(a + b) % q for a, b in zip(first, shift(profile, nudge), strict=True)]
    forged = Payload((forged_ciphertext(moved, second),), total.tags)
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(forged, SEGMENTS)
    no_tags()
    assert np.array_equal(cohort.open(forged, SEGMENTS), sum(mine.values()) + nudge)


# --- (d) contributions left out, counted twice, scaled ----------------------------------------------------------------


@pytest.mark.usefixtures("no_masks")
@pytest.mark.parametrize("attack", ["dropped", "doubled", "scaled", "replaced"])
def test_tampering_with_contributions_is_refused_and_would_work_without_tags(
    cohort: Cohort, no_tags: Callable[[], None], attack: str
) -> None:
    mine = vectors(cohort, high=64)
    payloads = cohort.seal(mine, SEGMENTS)
    one, *rest = payloads.values()
    chosen, expected = {
        "dropped": (rest, sum(mine.values()) - mine[cohort.names[0]]),
        "doubled": ([one, one, *rest], sum(mine.values()) + mine[cohort.names[0]]),
        "scaled": ([one, *rest] * 2, 2 * sum(mine.values())),
        "replaced": ([rest[0], *rest], sum(mine.values()) - mine[cohort.names[0]] + mine[cohort.names[1]]),
    }[attack]
    forged = cohort.total(chosen, 40)
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(forged, SEGMENTS)
    no_tags()
    assert np.array_equal(cohort.open(forged, SEGMENTS), expected)


def test_with_masks_a_sum_that_lacks_a_site_is_noise_even_without_tags(
    cohort: Cohort, no_tags: Callable[[], None]
) -> None:
    _, *rest = cohort.seal(vectors(cohort), SEGMENTS).values()
    no_tags()
    with pytest.raises(SealingError, match="no honest sum"):
        cohort.open(cohort.total(rest, 40), SEGMENTS)


# --- at a site: what a failure leaves behind --------------------------------------------------------------------------


def forged_for(federation: Federation, honest: Sum, value: int = 3) -> Sum:
    """An honest round's sum with chosen content."""
    profile = SealedProfile(len(federation.manifest.members), federation.manifest.sealing.bits)
    size = federation.manifest.vector_size(honest.reference.round)
    fields = np.full(size, value, dtype=np.uint64)
    return honest.changed(chunks=(chosen_sum(profile, fields),))


def test_a_forged_sum_ends_the_run_at_the_site_for_good(federation: Federation) -> None:
    honest = federation.round(1)
    before = federation.models()
    answers = federation.train(2, forged_for(federation, honest))
    assert {refusal_of(a).kind for a in answers.values()} == {"sealing"}
    assert federation.models() == before, "nothing was applied"
    run = federation.manifest.run
    for name in federation.names:
        site = federation.sites[name]
        with pytest.raises(SealingError, match="holds no keys"):
            site._runs[run].keys.session.open(_payload(honest), site._runs[run].segments(1), _agreement(honest))
        with pytest.raises(SealingError, match="destroyed"):
            site.current_model(run)
    assert all(map(is_refusal, federation.train(3, honest).values())), "not even the honest sum is looked at again"
    assert all(map(is_refusal, federation.train(2, honest).values()))
    release = federation.release_request(honest)
    assert all(is_refusal(federation.ask(s, "release", 5, release, honest.chunks)) for s in federation.names)
    federation.restart("ash")
    assert is_refusal(federation.ask("ash", "train", 3, m.TrainRequest(sums=())))
    assert federation.models() == before


def test_without_tags_the_coordinator_chooses_every_sites_model(
    federation: Federation, no_tags: Callable[[], None]
) -> None:
    honest = federation.round(1)
    no_tags()
    answers = federation.train(2, forged_for(federation, honest, value=0))
    assert not any(map(is_refusal, answers.values()))
    (model,) = federation.models()
    bound = federation.sites["ash"]._runs[federation.manifest.run].segments(1)[0].low
    moved = np.frombuffer(model, dtype="<f4") - np.frombuffer(federation.weights, dtype="<f4")
    assert np.allclose(moved, bound, rtol=1e-4), "every coordinate was moved to the end of its range"


#: What is wrong with a sum, and what a site tells its own operator of it. (The coordinator is told less.)
WRONG = {
    "tags": "authenticated",
    "a bit": "more noise|authenticated",
    "noise": "more noise",
    "a residue": "not below q",
    "a fresh form": "of another length than the run",
    "short": "of another length than the run",
    "missing": "not complete",
    "too many": "not complete",
    "cohort": "transcript is not of this round",
    "statements": "transcript is not of this round",
    "transcript": "did not agree to",
    "attempt": "did not agree to",
    "unlocked": "lacks what its cohort unlocked",
}


@pytest.mark.parametrize("change", WRONG)
def test_whatever_is_wrong_with_a_sum_it_is_refused_before_it_is_applied(federation: Federation, change: str) -> None:
    committed = federation.train(1)
    sealed = federation.seal(1, committed)
    honest = federation.add(1, sealed)
    chunk, of = honest.chunks[0], honest.reference
    first, second = coefficients(chunk)
    wrong = {
        "tags": honest.changed(tags=(f"{int(of.tags[0], 16) ^ 1:x}",)),
        "a bit": honest.changed(chunks=(chunk[:-4] + bytes([chunk[-4] ^ 1]) + chunk[-3:],)),
        "noise": honest.changed(chunks=(forged_ciphertext(first, second[::-1]),)),
        "a residue": honest.changed(chunks=(forged_ciphertext([2**60 - 1, *first[1:]], second),)),
        "a fresh form": honest.changed(chunks=sealed["ash"].chunks),
        "short": honest.changed(chunks=(chunk[:-1],)),
        "missing": honest.changed(chunks=()),
        "too many": honest.changed(chunks=(chunk, chunk)),
        "cohort": honest.changed(cohort=federation.names[:3]),
        "statements": honest.changed(statements=of.statements[::-1]),
        "transcript": honest.changed(transcript="00" * 32),
        "attempt": honest.changed(attempt=1),
        "unlocked": honest.changed(unlocked=_unlocked_by_themselves(federation, of)),
    }[change]
    before = federation.models()
    assert all(map(is_refusal, federation.train(2, wrong).values()))
    assert federation.models() == before
    for site in federation.sites.values():
        told = site.last_refusal
        assert isinstance(told, SealingError)
        assert re.search(WRONG[change], (told.__cause__ or told).args[0])


def _unlocked_by_themselves(federation: Federation, of: m.SumReference) -> tuple[m.Statement, ...]:
    """Seeds that the sites sign though the run has no masks of their own: right in everything but that."""
    body, found = m.UnlockReply(transcript=of.transcript, seed="00" * 32), []
    for name in of.cohort:
        identity = federation.sites[name].identity
        found.append(m.Statement.of(name, federation.sign("unlock", of.round, "coordinator", body, identity=identity)))
    return tuple(found)


def test_the_honest_sum_is_accepted(federation: Federation) -> None:
    """The control of the whole file: what is refused above is refused for being forged."""
    honest = federation.round(1)
    before = federation.models()
    assert not any(map(is_refusal, federation.train(2, honest).values()))
    assert len(federation.models()) == 1
    assert federation.models() != before


# --- (e) two cohorts over one update ----------------------------------------------------------------------------------


def test_the_difference_of_two_cohorts_would_be_one_sites_update(cohort: Cohort) -> None:
    mine = vectors(cohort)
    everybody = cohort.open(honest_total(cohort, mine), SEGMENTS)
    rest = {name: mine[name] for name in cohort.names[1:]}
    second = cohort.agreement(tuple(rest), "ef" * 32)
    total = cohort.total(list(cohort.seal(rest, SEGMENTS, second).values()), 40)
    without = cohort.open(total, SEGMENTS, second, site=cohort.names[1])
    assert np.array_equal(everybody - without, mine[cohort.names[0]])


def waiting(federation: Federation, site: str) -> tuple[int, Floats] | None:
    """The update that a site's process still holds."""
    run = federation.sites[site]._runs.get(federation.manifest.run)
    return None if run is None else run.pending


@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_seals_its_update_for_one_cohort_only(federation: Federation, restarted: bool) -> None:
    committed = federation.train(1)
    first = federation.seal(1, committed)
    assert not any(map(is_refusal, first.values()))
    if restarted:
        for name in federation.names:
            federation.restart(name)
    second = federation.seal(1, committed, federation.names[1:])
    assert {refusal_of(a).kind for a in second.values()} == {"sealing"}
    run = federation.manifest.run
    for name in federation.names:
        store = federation.sites[name]._store
        assert store.sealed_transcript(run, 1) == federation.transcript(1, committed)
        assert waiting(federation, name) is None, "the update itself is gone"
    again = federation.seal(1, committed)
    assert {s: e.chunks for s, e in again.items()} == {s: e.chunks for s, e in first.items()}


def test_a_site_that_forgot_what_it_sealed_would_give_its_neighbour_away(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the site's memory switched off the second cohort is sealed, and the difference opens."""
    committed = federation.train(1)
    pending = {n: waiting(federation, n) for n in federation.names}
    all_ = federation.add(1, federation.seal(1, committed))
    monkeypatch.setattr(SiteStore, "stored_reply", lambda *_: None)
    monkeypatch.setattr(SiteStore, "commit_reply", lambda *_a, **_k: None)
    assert all(map(is_refusal, federation.seal(1, committed, federation.names[1:]).values())), "the update is gone, too"
    for name, update in pending.items():
        assert update is not None
        federation.sites[name]._runs[federation.manifest.run].pending = update
    rest = federation.add(1, federation.seal(1, committed, federation.names[1:]))
    site = federation.sites["birch"]._runs[federation.manifest.run]
    opened = [site.keys.session.open(_payload(s), site.segments(1), _agreement(s)).values for s in (all_, rest)]
    step = (site.segments(1)[0].high - site.segments(1)[0].low) / (2**federation.manifest.sealing.bits - 1)
    assert pending["ash"] is not None
    assert np.allclose(opened[0] - opened[1], pending["ash"][1], atol=8 * step)


# --- (f) an old sum in a later round ----------------------------------------------------------------------------------


def relabelled(honest: Sum, round_: int, like: Sum | None = None) -> Sum:
    """A recorded sum under another round's number, and where `like` is given with that round's own transcript."""
    if like is None:
        return honest.changed(round=round_)
    return like.changed(chunks=honest.chunks, tags=honest.reference.tags, round=round_)


def test_an_old_sum_is_refused_where_the_site_sealed_another_one(federation: Federation) -> None:
    first = federation.round(1)
    second = federation.round(2, first)
    before = federation.models()
    assert all(map(is_refusal, federation.train(3, relabelled(first, 2)).values()))
    assert all(map(is_refusal, federation.train(3, relabelled(first, 2, second)).values()))
    assert federation.models() == before


def test_an_old_sum_is_refused_also_where_the_round_was_abandoned(federation: Federation) -> None:
    first = federation.round(1)
    federation.train(2, first)  # nobody is asked to seal: the coordinator says that the round was abandoned
    before = federation.models()
    answers = federation.train(3, relabelled(first, 2))
    assert federation.models() == before, "the same sum was applied twice"
    assert all(map(is_refusal, answers.values()))


def test_sums_that_a_late_site_replays_cannot_be_put_in_another_order(federation: Federation) -> None:
    others = federation.names[1:]
    first = federation.add(1, federation.seal(1, federation.train(1, sites=others)))
    second = federation.add(2, federation.seal(2, federation.train(2, first, sites=others)))
    before = federation.model("ash").weights.tobytes()
    swapped = (relabelled(second, 1), relabelled(first, 2))
    answer = federation.train(3, *swapped, sites=("ash",))["ash"]
    assert is_refusal(answer)
    assert federation.model("ash").weights.tobytes() == before


@pytest.mark.parametrize("bound", [True, False], ids=["bound to its round", "the control: not bound"])
def test_a_sum_of_updates_cannot_be_passed_off_as_metrics_and_so_reach_the_coordinator(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """All sites are at the end, so that nothing but the binding of a sum to its round stands in the way."""
    first = federation.round(1)
    last = federation.manifest.rounds + 1
    ended = federation.train(last, first)
    run = federation.sites["ash"]._runs[federation.manifest.run]
    secret_sum = run.keys.session.open(_payload(first), run.segments(1), _agreement(first)).values
    moved = relabelled(first, last)
    if not bound:
        monkeypatch.setattr("confide.clients.run.transcript", lambda *_: moved.reference.transcript)
        # Nor does the site look whether it has sealed anything for that round.
        monkeypatch.setattr("confide.clients.rounds.RoundSteps._agreed_to", lambda *_: True)
    answer = federation.ask("ash", "release", last + 1, federation.release_request(moved, ended=ended), moved.chunks)
    assert is_refusal(answer) is bound
    if not bound:
        segment, scaled = run.segments(1)[0], run.segments(last)[0]
        metrics = np.frombuffer(answer.chunks[1], dtype="<f8")[: len(secret_sum)]
        integers = (metrics - 4 * scaled.low) / (scaled.high - scaled.low)
        recovered = integers * (segment.high - segment.low) + 4 * segment.low
        assert np.allclose(recovered, secret_sum), "the coordinator holds the sum of the updates"


def test_without_tags_an_old_sum_is_applied_twice(federation: Federation, no_tags: Callable[[], None]) -> None:
    """The control: under the later round's own transcript nothing but the tags tells that the sum is an old one."""
    first = federation.round(1)
    second = federation.round(2, first)
    before = federation.models()
    no_tags()
    assert not any(map(is_refusal, federation.train(3, relabelled(first, 2, second)).values()))
    assert federation.models() != before


def test_a_sum_from_the_future_is_refused(federation: Federation) -> None:
    first = federation.round(1)
    before = federation.models()
    for round_ in (2, 3):
        assert all(map(is_refusal, federation.train(2, relabelled(first, round_)).values()))
    assert federation.models() == before


def test_chunks_that_no_sum_names_are_refused(federation: Federation) -> None:
    first = federation.round(1)
    body = m.TrainRequest(sums=(first.reference,))
    assert is_refusal(federation.ask("ash", "train", 2, body, (*first.chunks, b"extra")))


def _payload(of: Sum) -> Payload:
    return Payload(of.chunks, tuple(int(tag, 16) for tag in of.reference.tags))


def _agreement(of: Sum) -> Agreement:
    return Agreement(of.reference.cohort, of.reference.transcript)


def _negacyclic(left: list[int], ternary: list[int], modulus: int) -> list[int]:
    """left · ternary mod (xᴺ + 1, modulus), exactly, through one big-integer product a sign."""

    def product(sign: int) -> list[int]:
        a = int.from_bytes(b"".join(x.to_bytes(10, "little") for x in left), "little")
        b = int.from_bytes(b"".join(int(x == sign).to_bytes(10, "little") for x in ternary), "little")
        data = (a * b).to_bytes(20 * DEGREE, "little")
        return [int.from_bytes(data[10 * i : 10 * i + 10], "little") for i in range(2 * DEGREE)]

    wide = [x - y for x, y in zip(product(1), product(-1), strict=True)]
    return [(wide[i] - wide[i + DEGREE]) % modulus for i in range(DEGREE)]
