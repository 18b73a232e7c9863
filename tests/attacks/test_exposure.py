"""Who learns what: every cell of the table is attacked with exactly what the coalition holds.

An attack is one function of holdings (`tests/attacks/coalitions.py`): the cells that say yes are the controls of those
that say no, and where no coalition of the table succeeds in the same way a stronger one is added below.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.clients.ranges import segments
from confide.errors import SealingError
from confide.privacy.digest import digest
from confide.privacy.sealing import COALITIONS, Agreement, OpenProfile, Payload, make_profile, vault
from confide.privacy.sealing.encoding import Encoder
from confide.privacy.sealing.exposure import exposure_table
from confide.protocol import messages as m
from confide.strategies import StepInput, make_strategy
from tests.attacks.coalitions import PASSPHRASE, Attacker, Holdings, Recorded, recovers
from tests.attacks.federation import Sum, header_of, is_refusal, resign
from tests.attacks.forging import chosen_chunks, hostile_payload, modulus_of, right_tags, with_saturation

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
PROFILES = ("sealed", "masked", "ckks", "open")
VICTIM, PARTNER, OTHERS = "ash", "birch", ("birch", "cedar", "doum")
COORDINATOR, SITE, BOTH, ALL_OTHERS, OUTSIDER = COALITIONS
MATRIX = pytest.mark.parametrize(("profile", "coalition"), list(product(PROFILES, COALITIONS)))
DOCUMENT = Path(__file__).parents[2] / "docs" / "THREAT_MODEL.md"


def make(folder: Path, profile: str, *, vaults: bool = False, **sections: dict[str, object]) -> Recorded:
    """A federation that is recorded, with few people: nothing here depends on how many."""
    return Recorded(
        folder,
        vaults=vaults,
        people={"people": 12},
        **{"sites": {"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
           "sealing": {"profile": profile}} | sections,
    )  # fmt: skip


def whole_run(federation: Recorded) -> Recorded:
    """From the invitation to the release; disks and memories are copied after every step."""
    federation.agree()
    last, committed = (), {}
    for round_ in range(1, federation.manifest.rounds + 2):
        committed = federation.train(round_, *last)
        federation.keep()
        last = (federation.add(round_, federation.seal(round_, committed)),)
        federation.keep()
    release = federation.release_request(*last, ended=committed)
    for name in federation.names:
        answer = federation.ask(name, "release", federation.manifest.rounds + 2, release, last[0].chunks)
        assert not is_refusal(answer)
        assert federation.sites[name]._runs[federation.manifest.run].keys.destroyed
    federation.keep()
    return federation


Attackers = Callable[[str, str], Attacker]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Recorded]]:
    """One whole recorded run of each profile, made when it is first asked for."""
    made: dict[str, Recorded] = {}

    def of(profile: str) -> Recorded:
        if profile not in made:
            made[profile] = whole_run(make(tmp_path_factory.mktemp(profile) / "f", profile, vaults=True))
        return made[profile]

    with pytest.MonkeyPatch.context() as patch:
        for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
            patch.setattr(vault, name, cheap)
        yield of
    for federation in made.values():
        federation.world.close()


@pytest.fixture(scope="module")
def attackers(runs: Callable[[str], Recorded]) -> Attackers:
    """The attack by a coalition on the recorded run of a profile, made once; tests look at what it found."""
    return functools.cache(lambda profile, coalition: attacker(runs(profile), holdings(runs(profile), coalition)))


def holdings(federation: Recorded, coalition: str) -> Holdings:
    """What a coalition of the table holds."""
    return {
        COORDINATOR: lambda: federation.held_by(coordinator=True),
        SITE: lambda: federation.held_by(PARTNER),
        BOTH: lambda: federation.held_by(PARTNER, coordinator=True),
        ALL_OTHERS: lambda: federation.held_by(*OTHERS),
        OUTSIDER: federation.held_by_outsider,
    }[coalition]()


def attacker(federation: Recorded, held: Holdings) -> Attacker:
    """The attack on a recorded run."""
    return Attacker(federation.manifest, held, federation.true_keys())


def truths(federation: Recorded) -> tuple[Floats, Floats, float]:
    """The victim's update, the sum of all, and what quantisation may change of a sum."""
    size, cohort, vectors = federation.manifest.layout.size, federation.names, federation.vectors
    segment = segments(federation.manifest, 1)[0]
    step = (segment.high - segment.low) / (2**federation.manifest.sealing.bits - 1)
    mine = vectors[VICTIM, 1][:size]
    assert np.abs(mine).max() > 100 * len(cohort) * step, "guessing zero is no success"
    return mine, np.sum([vectors[s, 1][:size] for s in cohort], axis=0), len(cohort) * step


def says(profile: str, coalition: str) -> tuple[bool, bool, bool]:
    """The table's cell: (update, sum, forges)."""
    (row,) = (row for row in exposure_table(profile, 6, 64) if row.coalition == coalition)
    return row.update, row.sum, row.forges


# --- learning ---------------------------------------------------------------------------------------------------------


@MATRIX
def test_a_coalition_learns_one_sites_update_exactly_where_the_table_says_so(
    runs: Callable[[str], Recorded], attackers: Attackers, profile: str, coalition: str
) -> None:
    update, _, tolerance = truths(runs(profile))
    found = attackers(profile, coalition).updates(1, VICTIM)
    assert recovers(found, update, tolerance) is says(profile, coalition)[0]


@MATRIX
def test_a_coalition_learns_a_rounds_sum_exactly_where_the_table_says_so(
    runs: Callable[[str], Recorded], attackers: Attackers, profile: str, coalition: str
) -> None:
    _, total, tolerance = truths(runs(profile))
    found = attackers(profile, coalition).sums(1)
    assert recovers(found, total, tolerance) is says(profile, coalition)[1]


@pytest.mark.parametrize("profile", ["sealed", "masked"])
def test_masks_hide_a_site_until_every_other_one_is_in_the_coalition(
    runs: Callable[[str], Recorded], profile: str
) -> None:
    """The control of `coordinator and one site`: its payload, opened and unmasked, without any subtraction."""
    federation = runs(profile)
    update, _, tolerance = truths(federation)
    for members, succeeds in ((OTHERS[:1], False), (OTHERS[:2], False), (OTHERS, True)):
        held = replace(federation.held_by(*members, coordinator=True), vectors={})
        assert recovers(attacker(federation, held).updates(1, VICTIM), update, tolerance) is succeeds


@pytest.mark.parametrize("profile", ["sealed", "ckks"])
def test_what_an_outsider_recorded_opens_with_one_sites_keys_and_not_without(
    runs: Callable[[str], Recorded], profile: str
) -> None:
    """The control of the outsider's row: had a site's memory been copied before the keys were destroyed."""
    federation = runs(profile)
    update, total, tolerance = truths(federation)
    held = federation.held_by_outsider()
    assert not recovers(attacker(federation, held).sums(1), total, tolerance)
    for private in (0, 1):  # its ephemeral key, from which the wrapped secret follows; its storage key, for the model
        key = federation.memories[PARTNER][private]
        with_key = attacker(federation, replace(held, memories=[b"a core dump: " + key]))
        assert recovers(with_key.sums(1), total, tolerance)
        assert recovers(with_key.updates(1, VICTIM), update, tolerance) is (profile == "ckks" and private == 0)


@pytest.mark.parametrize("profile", ["sealed", "masked"])
def test_with_every_ephemeral_key_an_outsider_would_open_every_update(
    runs: Callable[[str], Recorded], profile: str
) -> None:
    federation = runs(profile)
    update, _, tolerance = truths(federation)
    held = replace(federation.held_by_outsider(), memories=[federation.memories[s][0] for s in OTHERS])
    assert recovers(attacker(federation, held).updates(1, VICTIM), update, tolerance)


def test_copies_of_a_vault_open_with_its_passphrase_only(runs: Callable[[str], Recorded]) -> None:
    """A passphrase is none of the keys that an outsider is assumed to have: with it, a backup made while the run went
    on opens everything, although the vault was destroyed afterwards."""
    federation = runs("sealed")
    update, total, tolerance = truths(federation)
    held = federation.held_by_outsider()
    assert any(path.endswith(".vault") for disk in held.disks for path in disk)
    assert not any(path.endswith(".vault") for path in held.disks[-1]), "at the end they are gone"
    for passphrase, succeeds in (("some other words", False), (PASSPHRASE, True)):
        guess = attacker(federation, replace(held, passphrase=passphrase))
        assert recovers(guess.sums(1), total, tolerance) is succeeds
        assert recovers(guess.updates(1, VICTIM), update, tolerance) is succeeds
    at_the_end = replace(held, passphrase=PASSPHRASE, disks=held.disks[-1:])
    assert not recovers(attacker(federation, at_the_end).sums(1), total, tolerance)


def test_a_release_tells_the_sum_of_a_run_of_one_round(tmp_path: Path) -> None:
    """By its nature: the table speaks of what is learnt before a release. Of several rounds it tells their total."""
    federation = whole_run(make(tmp_path / "f", "sealed", run={"rounds": 1}, privacy={"epsilon": math.inf}))
    _, total, tolerance = truths(federation)
    held = federation.held_by_outsider()
    assert recovers(attacker(federation, held).sums(1), total, tolerance)
    before = replace(held, traffic=[s for s in held.traffic if header_of(s.request).step != "release"])
    assert not recovers(attacker(federation, before).sums(1), total, tolerance)
    federation.world.close()


def test_a_coordinator_that_skips_to_the_end_is_released_the_first_rounds_sum(tmp_path: Path) -> None:
    """A limit, not a defence: rounds may be abandoned, so no site can tell that there should have been more."""
    federation = make(tmp_path / "f", "sealed").agree()
    last = federation.manifest.rounds + 1
    first = federation.round(1)
    ended = federation.train(last, first)
    end = federation.add(last, federation.seal(last, ended))
    _, total, tolerance = truths(federation)
    assert not recovers(attacker(federation, federation.held_by(coordinator=True)).sums(1), total, tolerance)
    release = federation.release_request(end, ended=ended)
    for name in federation.names:
        federation.ask(name, "release", last + 1, release, end.chunks)
    assert recovers(attacker(federation, federation.held_by(coordinator=True)).sums(1), total, tolerance)
    assert all(site._runs[federation.manifest.run].keys.destroyed for site in federation.sites.values()), "once a run"
    federation.world.close()


# --- a small model's digest -------------------------------------------------------------------------------------------


def guessed_sum(federation: Recorded, cohort: int, matches: Callable[[bytes], bool]) -> Words | None:
    """Try every sum that a round can have until the model that follows from it matches."""
    manifest = federation.manifest
    segment, bits = segments(manifest, 1)[0], manifest.sealing.bits
    fields = np.arange(cohort * (2**bits - 1) + 1, dtype=np.float64)
    values = fields * ((segment.high - segment.low) / (2**bits - 1)) + segment.low * cohort
    start = np.frombuffer(federation.weights, "<f4").astype(np.float64)
    scale = manifest.strategy.server_learning_rate / sum(manifest.weight(s) for s in federation.names[:cohort])
    columns = [(w + values * scale).astype("<f4") for w in start]
    for i, first in enumerate(columns[0]):
        for j, second in enumerate(columns[1]):
            if matches(first.tobytes() + second.tobytes()):
                return np.array([i, j], dtype=np.uint64)
    return None


def test_the_digest_of_a_small_model_does_not_let_the_coordinator_guess_the_sum(tmp_path: Path) -> None:
    """Two parameters at 8 bits: 766² sums, a second of hashing. The sites' replies name the model by a digest."""
    features = {"age": {"kind": "number", "bounds": [0, 100]}}
    federation = make(tmp_path / "f", "sealed", schema={"features": features}, sealing={"profile": "sealed", "bits": 8})
    assert federation.manifest.layout.size == 2
    federation.agree()
    cohort = federation.names[:3]
    total = federation.add(1, federation.seal(1, federation.train(1, sites=cohort)))
    reply = m.TrainReply.model_validate_json(federation.train(2, total, sites=cohort)[VICTIM].body)
    prefix = hashlib.sha256(b"confide/1\0" + (5).to_bytes(8, "big") + b"model" + (8).to_bytes(8, "big"))

    def digest_of(model: bytes) -> str:
        hasher = prefix.copy()
        hasher.update(model)
        return hasher.hexdigest()

    model = federation.model(VICTIM).weights.tobytes()
    assert digest_of(model) == digest("model", model).hex()
    plain = digest_of(model)
    control = guessed_sum(federation, 3, lambda candidate: digest_of(candidate) == plain)
    assert control is not None, "the control: a bare digest gives the sum away"
    assert guessed_sum(federation, 3, lambda candidate: digest_of(candidate) == reply.model) is None
    federation.world.close()


# --- forging ----------------------------------------------------------------------------------------------------------


@MATRIX
def test_a_coalition_forges_sums_exactly_where_the_table_says_so(
    runs: Callable[[str], Recorded], tmp_path: Path, profile: str, coalition: str
) -> None:
    """Success: an honest site applies a sum that the coalition chose before it knew the others' updates."""
    if coalition == OUTSIDER:
        recorded = len(runs(profile).traffic)
        succeeds = outsider_forges(runs(profile))
        del runs(profile).traffic[recorded:]
    else:
        succeeds = forges(tmp_path, profile, coalition)
    assert succeeds is says(profile, coalition)[2]


def forges(folder: Path, profile: str, coalition: str) -> bool:
    """Does an honest site accept, and apply, a sum of the coalition's choosing?"""
    if coalition in (SITE, ALL_OTHERS):
        members = OTHERS if coalition == ALL_OTHERS else (PARTNER,)
        # Each way to use one's own payload has a run of its own.
        return any(members_forge(folder / str(i), profile, members, huge=huge) for i, huge in enumerate((True, False)))
    federation = make(folder / "f", profile)
    try:
        honest = federation.agree().round(1)
        held = holdings(federation, coalition)
        victims = [s for s in federation.names if s not in held.members]
        # A site that was handed one wrong sum is gone: every victim is one try.
        tries = zip(victims, forged_by_the_pen(federation, held, honest), strict=False)
        return any(applies(federation, site, 2, forged, wanted) for site, (forged, wanted) in tries)
    finally:
        federation.world.close()


def forged_by_the_pen(federation: Recorded, held: Holdings, honest: Sum) -> Iterator[tuple[Sum, Floats]]:
    """Sums of a coordinator's making: with right tags for holders of the MAC key, else with any that might do."""
    profile, reference = make_profile(federation.manifest.sealing, len(federation.names)), honest.reference
    fields = with_saturation(target(federation))
    wanted = values_of(federation, fields, len(federation.names))
    if isinstance(profile, OpenProfile):
        yield honest.changed(chunks=(np.append(wanted, 0.0).astype("<f8").tobytes(),)), wanted
        return
    chunks, known = chosen_chunks(profile, fields), attacker(federation, held).secrets
    right = [right_tags(profile, s, reference.transcript, reference.cohort, chunks, fields) for s in known]
    recorded = tuple(int(tag, 16) for tag in reference.tags)
    for tags in [*right, recorded, (0,) * len(recorded), tuple(2 * t % modulus_of(profile) for t in recorded)]:
        yield honest.changed(chunks=chunks, tags=tuple(f"{tag:x}" for tag in tags)), wanted


def members_forge(folder: Path, profile: str, members: tuple[str, ...], *, huge: bool) -> bool:
    """Sites without the coordinator have their own payloads only.

    One of them makes up for what the honest sites are expected to send (`huge`: drowns it, where nothing checks the
    range of a readable payload), the others send nothing.
    """
    if huge and profile != "open":
        return False
    federation = make(folder, profile).agree()
    try:
        committed = federation.train(1)
        sealed, cohort = federation.seal(1, committed), federation.names
        honest = [s for s in cohort if s not in members]
        agreement = Agreement(cohort, m.SealReply.model_validate_json(sealed[PARTNER].body).transcript)
        about_zero = np.full_like(target(federation), (2**federation.manifest.sealing.bits - 1) // 2)
        expected = about_zero * np.uint64(len(honest))
        wanted = values_of(federation, with_saturation(target(federation)), len(cohort))
        if huge:
            wanted = np.where(np.arange(len(wanted)) % 2, 1e30, -1e30)
        for name in members:
            session = federation.sites[name]._runs[federation.manifest.run].keys.session
            if profile == "open":
                mine = wanted if name == members[0] else np.zeros_like(wanted)
                payload = Payload((np.append(mine, 0.0).astype("<f4").tobytes(),))
            else:
                fields = target(federation) - expected if name == members[0] else np.zeros_like(expected)
                payload = hostile_payload(session, agreement, with_saturation(fields))
            tags = tuple(f"{tag:x}" for tag in payload.tags)
            sealed[name] = resign(federation.sites[name], sealed[name], chunks=payload.chunks, tags=tags)
        try:
            total = federation.add(1, sealed)
        except SealingError:  # the coordinator itself refuses the payload
            return False
        if applies(federation, VICTIM, 2, total, wanted):
            return True
        if not huge:  # no strawman: the sum was accepted, and is off the target by the honest sites' surprise alone
            surprise = sum(federation.vectors[s, 1] for s in honest)
            if profile != "open":
                surprise = surprise - values_of(federation, with_saturation(expected), len(honest))
            assert has_applied(federation, VICTIM, wanted + surprise)
        return False
    finally:
        federation.world.close()


def outsider_forges(federation: Recorded) -> bool:
    """With the coordinator's long-term key, after the run's end: at ended sites, and at restored ones."""
    held, rounds = federation.held_by_outsider(), federation.manifest.rounds
    honest = recorded_sum(federation, held, 1)
    before_the_sum = next(disk for disk in held.disks if any(p.endswith("state.db") for p in disk))
    for restored in (False, True):
        for site in federation.names:
            if restored:
                federation.restore(site, before_the_sum)
            for round_ in (2, rounds + 1):
                for forged, wanted in forged_by_the_pen(federation, held, honest):
                    if applies(federation, site, round_, forged, wanted):
                        return True
    return False


def recorded_sum(federation: Recorded, held: Holdings, round_: int) -> Sum:
    """An honest sum from recorded traffic."""
    for seen in held.traffic:
        if header_of(seen.request).type == m.TrainRequest.TYPE:
            for reference in m.TrainRequest.model_validate_json(seen.request.body).sums:
                if reference.round == round_:
                    return Sum(reference, seen.request.chunks[: reference.chunks])
    raise AssertionError("no such sum was recorded")


def target(federation: Recorded) -> Words:
    """Fields of a sum that no honest cohort comes near: each in the upper part of its range."""
    top = len(federation.names) * (2**federation.manifest.sealing.bits - 1)
    return (np.linspace(0.72, 0.88, federation.manifest.vector_size(1)) * top).astype(np.uint64)


def values_of(federation: Recorded, fields: Words, sites: int) -> Floats:
    """The real sum over so many sites that fields stand for."""
    return (
        Encoder(segments(federation.manifest, 1), federation.manifest.sealing.bits, "00" * 32)
        .decode([fields], sites)
        .values
    )


def applies(federation: Recorded, site: str, round_: int, forged: Sum, wanted: Floats) -> bool:
    """Does the site take a forged sum, and hold the model that follows from the wanted one?"""
    answer = federation.train(round_, forged, sites=(site,))[site]
    return not is_refusal(answer) and has_applied(federation, site, wanted)


def has_applied(federation: Recorded, site: str, total: Floats) -> bool:
    """Does the site hold the model that follows from this sum of the first round?"""
    manifest, start = federation.manifest, np.frombuffer(federation.weights, "<f4").astype(np.float32)
    weight = sum(manifest.weight(s) for s in federation.names)
    given = StepInput(start, total[: manifest.layout.size], weight, ())
    expected, _ = make_strategy(manifest.strategy).step(given)
    tolerance = truths(federation)[2] / weight
    held = federation.model(site)
    return held.round == 1 and bool(np.allclose(held.weights, expected, rtol=1e-5, atol=tolerance))


# --- the documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [*PROFILES, "open, gathered"])
def test_the_threat_model_holds_every_cells_words(profile: str) -> None:
    lines = DOCUMENT.read_text().splitlines()
    for row in exposure_table(profile, 6, 64):
        assert any(row.coalition in line and row.learns in line for line in lines), f"{row.coalition}: {row.learns}"
