"""The property of every keyed profile: what opens is the exact sum of the sites' integers, whatever was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.config import SealingConfig
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing import Opened, Payload, Segment, make_profile
from confide.privacy.sealing.encoding import SATURATION, Encoder
from tests.privacy.sealing.cohort import TRANSCRIPT, Cohort

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Case:
    """One sum.

    Attributes:
        profile: Name of the profile.
        sites: Sites that are summed.
        most: Sites that the parameters leave room for.
        bits: Bits a coordinate.
        segments: The vector's ranges.
        self_masked: Does each site add a mask of its own?
        extreme: Is every coordinate of every site at the upper end of its range?
        seed: Of the vectors, of the quantisers' draws and of the order in which payloads arrive.
    """

    profile: str
    sites: int
    most: int
    bits: int
    segments: tuple[Segment, ...]
    self_masked: bool
    extreme: bool
    seed: int

    @property
    def size(self) -> int:
        """Coordinates of a vector."""
        return sum(segment.size for segment in self.segments)


def coordinates(profile: str, sites: int, bits: int) -> int:
    """Coordinates that fill one chunk."""
    public = make_profile(SealingConfig.model_validate({"profile": profile, "bits": bits}), sites)
    return {
        "sealed": lambda: public.choice.packing.coordinates,
        "masked": lambda: public.packing.coordinates,
        "ckks": lambda: 2048,
    }[profile]()


@st.composite
def cases(draw: st.DrawFn, profile: str) -> Case:
    """Any admissible number of sites and bits; none to three chunks, also exactly full ones; any mix of segments."""
    sites, bits = draw(st.integers(2, 5)), draw(st.integers(8, 20))
    most = draw(st.just(sites) | st.integers(sites, 1000))
    chunk = coordinates(profile, most, bits)
    edges = st.integers(1, 3).flatmap(lambda n: st.integers(-2, 1).map(lambda d: n * chunk - SATURATION + d))
    size = draw(st.integers(0, 40) | st.integers(0, 3 * chunk - SATURATION) | edges.filter(lambda n: n < 3 * chunk))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=2)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    segments = []
    for length in sizes:
        if draw(st.booleans()):
            high = draw(st.floats(0.1, 10))
            segments.append(Segment(length, -high, high, rotation=(high, draw(st.floats(0.0, 0.1)) * high)))
        else:
            low = draw(st.floats(-100, 100))
            segments.append(Segment(length, low, low + draw(st.floats(0.01, 100))))
    return Case(
        profile=profile,
        sites=sites,
        most=most,
        bits=bits,
        segments=tuple(segments),
        self_masked=profile != "ckks" and draw(st.booleans()),
        extreme=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def vectors(case: Case, names: tuple[str, ...]) -> dict[str, Floats]:
    """A vector a site; some coordinates lie outside their range."""
    rng = np.random.default_rng(case.seed)
    low = np.concatenate([np.empty(0), *(np.full(s.size, s.low) for s in case.segments)])
    high = np.concatenate([np.empty(0), *(np.full(s.size, s.high) for s in case.segments)])
    if case.extreme:
        return dict.fromkeys(names, high)
    return {name: rng.uniform(low - 0.1 * (high - low), high) for name in names}


def make_deterministic(cohort: Cohort, seed: int) -> dict[str, SecureRandom]:
    """Quantise with known draws; returns the same draws once more, a site."""
    keys = {name: np.random.default_rng((seed, i)).bytes(32) for i, name in enumerate(cohort.names)}
    for name, session in cohort.sessions.items():
        session._rng = SecureRandom(unsafe_key=keys[name])
    return {name: SecureRandom(unsafe_key=key) for name, key in keys.items()}


def check(case: Case) -> None:
    """Seal, add up, open; compare with plain integer arithmetic and between sites."""
    cohort = Cohort.make(case.sites, case.bits, case.most, case.profile)
    agreement = cohort.agreement(self_masked=case.self_masked)
    mine, draws = vectors(case, cohort.names), make_deterministic(cohort, case.seed)
    payloads = cohort.seal(mine, case.segments, agreement)

    encoder = Encoder(case.segments, case.bits, TRANSCRIPT)
    integers = {name: np.concatenate(list(encoder.encode(mine[name], draws[name]))) for name in cohort.names}
    exact = np.sum([row.astype(object) for row in integers.values()], axis=0)  # Python's integers
    expected = encoder.decode([exact.astype(np.uint64)], case.sites)

    order = np.random.default_rng(case.seed).permutation(case.sites)
    total = cohort.total([payloads[cohort.names[i]] for i in order], case.size)
    check_sizes(cohort, case.size, payloads, total)
    bound = cohort.unlocked(agreement) if case.self_masked else agreement
    for name in cohort.names:
        opened = cohort.sessions[name].open(total, case.segments, bound)
        assert opened.values.tobytes() == expected.values.tobytes()
        assert opened.saturated == expected.saturated
    check_integers(case, expected, exact)


def check_integers(case: Case, opened: Opened, exact: NDArray[np.object_]) -> None:
    """The real sum stands for exactly these integers, where nothing was rotated."""
    offset, top = 0, 2**case.bits - 1
    for segment in case.segments:
        part, whole = slice(offset, offset + segment.size), exact[offset : offset + segment.size]
        offset += segment.size
        if segment.rotation is None:
            steps = (opened.values[part] - case.sites * segment.low) * (top / (segment.high - segment.low))
            assert np.allclose(steps, whole.astype(np.float64), rtol=0, atol=1e-2)
            assert not case.extreme or set(whole) <= {case.sites * top}


def check_sizes(cohort: Cohort, size: int, payloads: dict[str, Payload], total: Payload) -> None:
    """What is sent is as long as was said."""
    said = cohort.profile.size(size)
    assert {sum(map(len, payload.chunks)) for payload in payloads.values()} == {said.uplink}
    assert sum(map(len, total.chunks)) == said.downlink
    assert 0 <= said.padding < 1
