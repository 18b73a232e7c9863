"""A coordinator without a key forges sums, at real sites and in the wire's own bytes: the tags stop every way of it.

Each forgery is handed to one site with the tags on and to another with the tags off: there it is applied, so the tags
are what stopped it. (`test_sum_forgery.py` has the attacks on the primitive alone, and those on the protocol.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.clients.ranges import segments
from confide.errors import SealingError
from confide.privacy.sealing import Profile, make_profile
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.encoding import Encoder
from confide.privacy.sealing.masks import CohortMasks
from confide.privacy.sealing.slots import SlotSession
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.strategies import StepInput, make_strategy
from tests.attacks.federation import Federation, Sum, is_refusal, open_federation, refusal_of
from tests.attacks.forging import (
    chosen_chunks,
    combine,
    key_chunk,
    modulus_of,
    nudged,
    packing_of,
    split,
    tag_count,
    with_saturation,
)

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
#: Who is handed the forgery with the tags on, who with the tags off, and who the honest sum.
GUARDED, BARE, HONEST = "ash", "birch", "cedar"
DROPPED = "doum"


@dataclass
class Round:
    """An honest first round as the coordinator holds it, and what the sites put into it."""

    federation: Federation
    profile: Profile
    sealed: dict[str, Envelope]
    honest: Sum
    vectors: dict[str, Floats]

    @property
    def tags(self) -> list[int]:
        """Of the honest sum."""
        return [int(tag, 16) for tag in self.honest.reference.tags]

    def tags_of(self, site: str) -> list[int]:
        """Of one site's payload."""
        return [int(tag, 16) for tag in m.SealReply.model_validate_json(self.sealed[site].body).tags]

    def step(self) -> Floats:
        """What one unit of each coordinate's field is worth."""
        parts = segments(self.federation.manifest, 1)
        top = 2**self.federation.manifest.sealing.bits - 1
        return np.concatenate([np.full(p.size, (p.high - p.low) / top) for p in parts])

    def low(self) -> Floats:
        """The lower ends of the ranges."""
        return np.concatenate([np.full(p.size, p.low) for p in segments(self.federation.manifest, 1)])

    def read(self, fields: Words, sites: int) -> Floats:
        """The real sum that fields stand for."""
        encoder = Encoder(segments(self.federation.manifest, 1), self.federation.manifest.sealing.bits, "00" * 32)
        return encoder.decode([with_saturation(fields)], sites).values

    def forged(self, chunks: Sequence[bytes], tags: Sequence[int]) -> Sum:
        """Chunks and tags of the attacker's making in place of the honest ones."""
        modulus = modulus_of(self.profile)
        return self.honest.changed(chunks=tuple(chunks), tags=tuple(f"{tag % modulus:x}" for tag in tags))


@pytest.fixture
def make_round(tmp_path: Path) -> Iterator[Callable[[str], Round]]:
    """An honest first round under a profile. Updates lie low in their range, so that twice the sum is in it too."""
    opened = []

    def make(profile: str) -> Round:
        context = open_federation(
            tmp_path / "f", people={"people": 12}, sealing={"profile": profile},
            sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
        )  # fmt: skip
        federation = context.__enter__()
        opened.append(context)
        committed, vectors, rng = federation.agree().train(1), {}, np.random.default_rng(5)
        for name in federation.names:
            run = federation.sites[name]._runs[federation.manifest.run]
            (segment,) = run.segments(1)
            vectors[name] = segment.low + rng.uniform(0.1, 0.3, segment.size) * (segment.high - segment.low)
            run.pending = (1, vectors[name])
        sealed = federation.seal(1, committed)
        made = make_profile(federation.manifest.sealing, len(federation.names))
        return Round(federation, made, sealed, federation.add(1, sealed), vectors)

    yield make
    for context in opened:
        context.__exit__(None, None, None)


# --- the forgeries: (what is handed out, the sum that the attacker means it to be) ------------------------------------


def chosen(of: Round) -> tuple[Sum, Floats]:
    """A sum made without any key; the honest tags go with it, for want of better ones."""
    bits, sites = of.federation.manifest.sealing.bits, len(of.vectors)
    fields = np.linspace(0.6, 0.9, len(of.step())) * (sites * (2**bits - 1))
    chunks = chosen_chunks(of.profile, with_saturation(fields.astype(np.uint64)))
    return of.forged(chunks, of.tags), of.read(fields.astype(np.uint64), sites)


def shifted(of: Round) -> tuple[Sum, Floats]:
    """One coordinate of the honest sum moved (`add_plain`)."""
    fields = np.zeros(len(of.step()), dtype=np.uint64)
    fields[1] = 2 ** (of.federation.manifest.sealing.bits - 1)
    chunks = nudged(of.profile, of.honest.chunks, with_saturation(fields))
    return of.forged(chunks, of.tags), sum(of.vectors.values()) + fields * of.step()


def scaled(of: Round) -> tuple[Sum, Floats]:
    """Twice the honest sum and its tags. Fields double; the ranges' lower ends do not."""
    chunks = combine(of.profile, [(2, of.honest.chunks)])
    total = sum(of.vectors.values())
    return of.forged(chunks, [2 * tag for tag in of.tags]), 2 * total - len(of.vectors) * of.low()


def dropped(of: Round) -> tuple[Sum, Floats]:
    """One site taken out again."""
    chunks = combine(of.profile, [(1, of.honest.chunks), (-1, of.sealed[DROPPED].chunks)])
    tags = [a - b for a, b in zip(of.tags, of.tags_of(DROPPED), strict=True)]
    return of.forged(chunks, tags), sum(of.vectors.values()) - of.vectors[DROPPED] + of.low()


def doubled(of: Round) -> tuple[Sum, Floats]:
    """One site counted twice."""
    chunks = combine(of.profile, [(1, of.honest.chunks), (1, of.sealed[DROPPED].chunks)])
    tags = [a + b for a, b in zip(of.tags, of.tags_of(DROPPED), strict=True)]
    return of.forged(chunks, tags), sum(of.vectors.values()) + of.vectors[DROPPED] - of.low()


FORGERIES = {f.__name__: f for f in (chosen, shifted, scaled, dropped, doubled)}


@pytest.mark.parametrize(("profile", "forgery"), list(product(("sealed", "masked", "ckks"), FORGERIES)))
def test_a_forged_sum_destroys_the_keys_and_changes_nothing_and_would_be_applied_without_tags(
    make_round: Callable[[str], Round], monkeypatch: pytest.MonkeyPatch, profile: str, forgery: str
) -> None:
    if forgery in ("dropped", "doubled"):
        # With masks such a sum is noise. They are taken away, so that the tags stand alone.
        monkeypatch.setattr(CohortMasks, "apply", lambda _self, values, _chunk, _modulus: values)
    of = make_round(profile)
    forged, wanted = FORGERIES[forgery](of)
    before = of.federation.model(GUARDED).weights.tobytes()
    answer = of.federation.train(2, forged, sites=(GUARDED,))[GUARDED]
    assert refusal_of(answer).kind == "sealing"
    has_left_the_run(of, before)
    with monkeypatch.context() as patch:
        patch.setattr(SumMac, "accepts", lambda *_: True)
        assert not is_refusal(of.federation.train(2, forged, sites=(BARE,))[BARE]), "the control: without tags"
    assert is_the_model_after(of, BARE, wanted)
    assert not is_refusal(of.federation.train(2, of.honest, sites=(HONEST,))[HONEST]), "and the honest sum is accepted"
    assert is_the_model_after(of, HONEST, sum(of.vectors.values()))


def has_left_the_run(of: Round, before: bytes) -> None:
    """Keys gone, run stopped for good, model as it was, and not even the honest sum is looked at again."""
    federation, run = of.federation, of.federation.manifest.run
    site = federation.sites[GUARDED]
    assert site._runs[run].keys.destroyed
    with pytest.raises(SealingError, match="holds no keys"):
        _ = site._runs[run].keys.session
    assert site._store.stopped(run) is not None
    assert federation.model(GUARDED).weights.tobytes() == before
    assert is_refusal(federation.train(3, of.honest, sites=(GUARDED,))[GUARDED])
    federation.restart(GUARDED)
    assert is_refusal(federation.train(3, of.honest, sites=(GUARDED,))[GUARDED])
    assert federation.model(GUARDED).weights.tobytes() == before


def is_the_model_after(of: Round, site: str, total: Floats) -> bool:
    """Does the site hold the model that follows from this sum, to within quantisation?"""
    manifest = of.federation.manifest
    weight = sum(manifest.weight(s) for s in of.vectors)
    start = np.frombuffer(of.federation.weights, "<f4").astype(np.float32)
    expected, _ = make_strategy(manifest.strategy).step(StepInput(start, total, weight, ()))
    tolerance = 4 * len(of.vectors) * float(of.step().max()) / weight
    return bool(np.allclose(of.federation.model(site).weights, expected, rtol=1e-6, atol=tolerance))


# --- the accumulator that opens to the key ----------------------------------------------------------------------------


def test_the_accumulator_that_opens_to_the_key_is_refused_and_would_move_the_model_by_the_key(
    make_round: Callable[[str], Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tags and range off, every site's model becomes a function of the run's key: whoever gets the model reads it
    there. (That such a plaintext is the key, and that the key opens recorded sums: `test_sum_forgery.py`.)"""
    of = make_round("sealed")
    forged = of.forged([key_chunk(of.profile)], of.tags)
    before = of.federation.model(GUARDED).weights.tobytes()
    bare = of.federation.sites[BARE]._runs[of.federation.manifest.run].keys.session
    assert isinstance(bare, SlotSession)
    packing, size = packing_of(of.profile), len(of.step())
    of_the_key = packing.unpack(bare._alive().open(forged.chunks[0]))[0][:size]
    assert refusal_of(of.federation.train(2, forged, sites=(GUARDED,))[GUARDED]).kind == "sealing"
    has_left_the_run(of, before)
    monkeypatch.setattr(SumMac, "accepts", lambda *_: True)
    unchecked = of.federation.train(2, forged, sites=(HONEST,))[HONEST]
    assert is_refusal(unchecked), "the range of the fields stops it as well"
    monkeypatch.setattr(SlotSession, "_fields", lambda _self, opened, size, _sites: (
        packing.unpack(words)[0][:size] for words in opened))  # fmt: skip
    assert not is_refusal(of.federation.train(2, forged, sites=(BARE,))[BARE])
    assert is_the_model_after(of, BARE, of.read(of_the_key, len(of.vectors)))


# --- guessing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_recorded_tags_and_what_can_be_made_of_them_do_not_fit_a_shifted_sum(
    make_round: Callable[[str], Round], profile: str
) -> None:
    """Who holds the MAC key makes tags that fit: `test_exposure.py`, coordinator and one site."""
    of = make_round(profile)
    fields = np.zeros(len(of.step()), dtype=np.uint64)
    fields[0] = 1
    chunks = nudged(of.profile, of.honest.chunks, with_saturation(fields))
    run = of.federation.sites[GUARDED]._runs[of.federation.manifest.run]
    single = [of.tags_of(s) for s in of.vectors]
    tries = [of.tags, [0] * tag_count(of.profile), *single, [t + 1 for t in of.tags], [-t for t in of.tags]]
    tries.append([t + int(np.sum(split(of.profile, with_saturation(fields))[0])) for t in of.tags])
    for tags in tries:
        forged = of.forged(chunks, tags)
        with pytest.raises(SealingError, match="authenticated sum"):
            run.apply(of.federation.model(GUARDED), forged.reference, forged.chunks)
    model = run.apply(of.federation.model(GUARDED), of.honest.reference, of.honest.chunks)
    assert model.round == 1, "the control: the honest sum opens, on the same session"
