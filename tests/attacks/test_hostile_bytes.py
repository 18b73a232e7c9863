"""Hostile bytes, properly signed: no crash, no swelling, nobody else's sum harmed, every refusal in a log.

The corpus is in `hostile_bytes` and runs once, in a process of its own; each item of it is a test here. `opened` may
only be what an honest sum opens to: a ciphertext has room for noise, so its lowest bits say nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConfideError
from confide.privacy.audit import records as audit
from confide.privacy.audit.entries import decode
from confide.protocol.envelope import MAX_BODY, Address, Envelope, seal_envelope
from tests.attacks.federation import Federation, header_of, open_federation, resign
from tests.attacks.hostile_bytes import HOSTILE, PROFILES, SIDES, corpus

MOST_MIB, MOST_KEPT_MIB = 256, 64
ITEMS = [(side, profile, name) for profile in PROFILES for side in SIDES for name in corpus(side, profile)]
#: A site takes a sum that differs in its noise only for the honest one; so do all others of its cohort.
NOISE = {"one bit", "mutations"}
WRONG_JSON = [
    "numbers for sums", "numbers for tags", "numbers for sites", "unknown keys", "a manifest with numbers for members",
    "a manifest with numbers for a shape", "a manifest with unknown keys",
]  # fmt: skip
Line = list[dict[str, Any]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Line]:
    """What the process said of each item before it ended."""
    command = [sys.executable, "-m", "tests.attacks.hostile_bytes", str(tmp_path_factory.mktemp("hostile"))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    lines = map(json.loads, done.stdout.splitlines())
    found = {(line["side"], line["profile"], line["item"]): line["results"] for line in lines}
    found["", "", "end"] = [{"code": done.returncode, "error": done.stderr[-2000:]}]
    return found


def test_the_process_that_took_all_of_it_is_alive_at_the_end(said: dict[tuple[str, str, str], Line]) -> None:
    assert said["", "", "end"][0]["code"] == 0, said["", "", "end"][0]["error"]


@pytest.mark.parametrize(("side", "profile", "name"), ITEMS)
def test_what_is_hostile_is_refused_harms_nobody_costs_little_and_is_logged(
    said: dict[tuple[str, str, str], Line], side: str, profile: str, name: str
) -> None:
    results, refused = said[side, profile, name], corpus(side, profile)[name].refused
    allowed = {"refused"} if side == "site" else {"refused", "dropped"}
    if not refused and side == "site":
        allowed.add("unopened")
    if name in NOISE:
        allowed.add("opened")
    assert results, "nothing was tried"
    assert {r["outcome"] for r in results} <= allowed, results
    assert all(r["right"] for r in results if r["outcome"] == "opened")
    assert all(r["unharmed"] for r in results if r["outcome"] in ("refused", "dropped")), "the others' sum, or the site"
    assert max(r["above"] for r in results) <= MOST_MIB, "MiB above what the process held before"
    # What has no signature is nobody's, and may not fill a log; everything else is in one, with its reason.
    assert all(r["logged"] for r in results if r["outcome"] in ("refused", "dropped")), "not in the log"


@pytest.mark.parametrize("side", SIDES)
def test_mutations_of_an_honest_message_are_refused_or_mean_the_same(
    said: dict[tuple[str, str, str], Line], side: str
) -> None:
    results = said[side, "sealed", "mutations"]
    assert {r["outcome"] for r in results} <= {"refused", "unopened" if side == "site" else "dropped", "opened"}
    assert all(r["right"] for r in results if r["outcome"] == "opened")
    assert all(r["unharmed"] and r["logged"] for r in results if r["outcome"] in ("refused", "dropped"))
    assert max(r["above"] for r in results) <= MOST_MIB
    assert len({r["outcome"] for r in results}) > 1, "the control: some get further than others"
    assert sum(r["outcome"] != "opened" for r in results) >= 20


@pytest.mark.parametrize("number", range(len(WRONG_JSON)), ids=WRONG_JSON)
def test_two_megabytes_of_wrong_json_cost_a_quarter_of_the_bound(
    said: dict[tuple[str, str, str], Line], number: int
) -> None:
    """A body may have eight where the roster is large, and a manifest any number; some is left for what is around."""
    result = said["coordinator", "sealed", "parsing"][number]
    assert result["what"] == WRONG_JSON[number]
    assert result["outcome"] == "refused"
    assert result["above"] <= MOST_MIB / 4 + 24, "the allocator's own share varies by some MiB"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("side", SIDES)
def test_the_honest_message_is_taken_before_and_after_all_of_it(
    said: dict[tuple[str, str, str], Line], side: str, profile: str
) -> None:
    """The control: what is refused is refused for what it is, and nothing that was tried has left a trace."""
    (result,) = said[side, profile, "control: the honest message"]
    assert result["outcome"] == "opened"
    assert result["right"]


@pytest.mark.parametrize("side", SIDES)
def test_the_files_that_inflate_do_inflate_and_the_meter_sees_it(
    said: dict[tuple[str, str, str], Line], side: str
) -> None:
    """The control of the bound: SEAL loads both files (else the process would have ended), and zlib swells on one."""
    (result,) = said[side, "sealed", "control: a decompressor"]
    assert result["inflated"] == 600 * 2**20
    assert result["above"] > 2 * MOST_MIB


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("side", SIDES)
def test_a_message_that_was_refused_is_not_kept(
    said: dict[tuple[str, str, str], Line], side: str, profile: str
) -> None:
    """100 MB were sent last; what is held once they are refused."""
    assert said[side, profile, "afterwards"][0]["above"] <= MOST_KEPT_MIB


# --- one member's nonsense in what the others must read ---------------------------------------------------------------


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Four sites, one round and its evaluation."""
    with open_federation(tmp_path / "f", run={"rounds": 1}, privacy={"epsilon": float("inf")}) as made:
        yield made


def padded(federation: Federation, reply: Envelope) -> Envelope:
    """The hostile site's own reply, as large as an envelope may be: blanks behind a body that means the same."""
    header, site = header_of(reply), federation.sites[HOSTILE]
    return seal_envelope(
        site.identity,
        Address(**{name: getattr(header, name) for name in Address.model_fields}),
        recipient=header.recipient,
        type_=header.type,
        body=reply.body.ljust(MAX_BODY),
        checkpoint=header.checkpoint,
        chunks=reply.chunks,
        request=header.request,
    )


def crowded(federation: Federation, reply: Envelope) -> Envelope:
    """The hostile site's own reply with as many chunks as an envelope may have: each has its digest in the header."""
    return resign(federation.sites[HOSTILE], reply, chunks=(*reply.chunks, *(b"",) * 65_000))


def run_with(federation: Federation, step: str, round_: int, lie: Callable[[Federation, Envelope], Envelope]) -> None:
    """A whole run in which one reply of one site is not as it should be."""

    def tamper(site: str, request: Envelope, reply: Envelope) -> Envelope:
        asked = header_of(request)
        return lie(federation, reply) if (site, asked.step, asked.round) == (HOSTILE, step, round_) else reply

    try:
        federation.coordinator(federation.grid(tamper=tamper)).run()
    except ConfideError as error:
        pytest.fail(f"one site's {step} reply ended the run: {error.what}")


@pytest.mark.parametrize("step", ["nothing", "join", "train in the first round", "train in the last round"])
def test_one_site_with_a_reply_too_large_to_pass_on_does_not_end_the_run(federation: Federation, step: str) -> None:
    """Members' signed replies are passed on inside requests, which may be no larger than one of them."""
    name, round_ = {
        "nothing": ("", 0), "join": ("join", 0), "train in the first round": ("train", 1),
        "train in the last round": ("train", federation.manifest.rounds + 1),
    }[step]  # fmt: skip
    run_with(federation, name, round_, padded)
    assert sealed_in_every_round(federation), "the others go on, with it or without"


def test_one_site_with_a_reply_of_many_chunks_does_not_keep_the_others_from_sealing(federation: Federation) -> None:
    """65,000 digests stand in the header, and where no metrics are due a `train` reply has no chunk at all."""
    run_with(federation, "train", 1, crowded)
    assert sealed_in_every_round(federation)


def sealed_in_every_round(federation: Federation) -> bool:
    """Did every honest site seal every round? (What the hostile one does with its own update is its affair.)"""
    run, rounds = federation.manifest.run, range(1, federation.manifest.rounds + 2)
    stores = [federation.sites[s]._store for s in federation.names if s != HOSTILE]
    return all(store.sealed_transcript(run, r) is not None for store in stores for r in rounds)


def test_a_refusal_of_any_length_takes_little_room_in_the_log(federation: Federation) -> None:
    """A site may refuse, but not fill its coordinator's disk: the reason is the site's own text."""
    reason = "\x00" * (MAX_BODY // 8)

    def lie(of: Federation, reply: Envelope) -> Envelope:
        header = header_of(reply)
        body = json.dumps({"kind": "abstains", "reason": reason}).encode()
        return seal_envelope(
            of.sites[HOSTILE].identity, Address(**{name: getattr(header, name) for name in Address.model_fields}),
            recipient="coordinator", type_="refusal", body=body, checkpoint=header.checkpoint, request=header.request,
        )  # fmt: skip

    run_with(federation, "train", 1, lie)
    log = federation.world.log
    noted = [
        data
        for _, data in map(log.entry, range(log.size))
        if isinstance(decode(data)[0], audit.Refused | audit.Rejected)
    ]
    assert noted, "the control: it is in the log"
    longest = max(map(len, noted))
    assert longest < 2**16
