"""Memory: sealing goes chunk by chunk, and a sum takes the room of one sum, whatever the number of sites.

What is large runs in a process of its own (`stream_large`), whose peak the kernel measures.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, Context

from confide.clients.app import make_client_app
from confide.config import SealingConfig
from confide.privacy.sealing import make_profile
from confide.privacy.sealing.transcript import transcript
from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope, Header, seal_envelope
from confide.protocol.identity import Identity
from confide.server.coordinator import Coordinator
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from tests.privacy.sealing.stream_large import payloads

MIB, GIB = 2**20, 2**30
SMALL, MIDDLE, LARGE = 2_500_000, 10_000_000, 100_000_000
#: A process that seals 100 million parameters stays below this, and one that has imported everything below that.
MOST, FIXED = 5 * GIB // 2, 160 * MIB
EXTRA, WORKER = 32 * MIB, 160 * MIB


def run(*arguments: object) -> list[dict[str, Any]]:
    """What the process says, a line for each size."""
    command = [sys.executable, "-m", "tests.privacy.sealing.stream_large", *map(str, arguments)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def most(size: int) -> float:
    """Of the bound for 100 million parameters, the part that is left for `size` of them."""
    return FIXED + (MOST - FIXED) * size / LARGE


@pytest.mark.parametrize(
    ("profile", "dtype", "scale"), [("sealed", "float64", 1), ("masked", "float32", 1), ("ckks", "float64", 10)]
)
def test_what_sealing_takes_beside_the_vector_does_not_grow_with_it(profile: str, dtype: str, scale: int) -> None:
    small, large = run("seal", profile, dtype, SMALL // scale, MIDDLE // scale)
    assert large["sent"] > 3 * large["size"], "the control: it did seal"
    assert large["peak"] > large["size"] * np.dtype(dtype).itemsize, "the control: and the meter saw the vector"
    assert large["extra"] <= small["extra"] + 8 * MIB
    for line in (small, large):
        assert line["extra"] <= EXTRA
        assert line["peak"] <= most(line["size"])
        assert all(peak <= WORKER for peak in line["workers"])


def test_keeping_the_chunks_would_be_seen() -> None:
    """The control of the one above: the same process, but for a list."""
    small, large = run("hold", "sealed", "float64", SMALL, MIDDLE)
    assert large["extra"] > small["extra"] + 8 * MIB


@pytest.mark.skipif(os.environ.get("CONFIDE_LARGE") != "1", reason="takes gigabytes; make test-large")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hundred_million_parameters_are_sealed_below_two_and_a_half_gibibytes(dtype: str) -> None:
    (line,) = run("seal", "sealed", dtype, LARGE)
    print(f"{line['seconds']} s, {line['peak'] / GIB:.2f} GiB")
    assert line["peak"] + sum(line["workers"]) <= MOST
    assert line["extra"] <= EXTRA
    assert line["sent"] > 3 * LARGE


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_sum_over_thirty_sites_takes_the_memory_of_one_over_two(profile: str) -> None:
    two, thirty = run("add", profile, 300_000 if profile == "ckks" else 1_000_000, 2, 30)
    assert (two["count"], thirty["count"]) == (2, 30)
    assert thirty["extra"] <= 1.1 * two["extra"]
    assert two["extra"] >= two["payload"], "the control: the meter sees a payload"
    assert 28 * two["payload"] > two["extra"], "and 28 more that were kept would more than double it"


# --- the coordinator, while payloads arrive ---------------------------------------------------------------------------

SIZE = 200_000


class Waiting:
    """Sites that answer a `seal` request at once; each notes how many bytes of payloads are alive before it does."""

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"site-{i:02d}" for i in range(count)]
        self.identities = {name: Identity.generate(name) for name in self.names}
        coordinator = Identity.generate("coordinator")
        profile = make_profile(SealingConfig.model_validate({"profile": "sealed", "bits": 20}), 30)
        self._payloads, self.alive = payloads(profile, SIZE, count), list[int]()
        self.payload = profile.size(SIZE).uplink
        members = [
            SimpleNamespace(site=n, public_key=i.public_key.hex(), population=1) for n, i in self.identities.items()
        ]
        manifest = SimpleNamespace(
            federation="f", roster_version=1, run="r", digest="0" * 64, members=members, rounds=9, min_sites=3,
            sealing=SealingConfig.model_validate({"profile": "sealed", "bits": 20}), vector_size=lambda _: SIZE,
            single_updates=False, wait_seconds=None, sites_per_round=None,
            layout=SimpleNamespace(size=SIZE), trains_in=lambda _: True,
            member=lambda site: next(x for x in members if x.site == site), to_bytes=lambda: b"{}",
        )  # fmt: skip
        grid = LocalGrid(make_client_app(self._find), self.names)
        self.log = coordinator.open_log(folder / f"{count}.db", "coordinator", "f")
        self.coordinator = Coordinator(grid, coordinator, cast(Any, manifest), np.zeros(1, dtype="<f4"), self.log)
        self.coordinator._profile = make_profile(manifest.sealing, 30)  # the same parameters for any number of sites
        self.coordinator._exchange.nodes = {site: node for node, site in grid._site_of.items()}

    def seal(self) -> None:
        """One round of payloads; all of them count."""
        place = self.coordinator._exchange.address("train", 1)
        committed = {n: self._sign(n, place, "train.reply", b"{}", "", ()) for n in self.names}
        total, _, sealed = self.coordinator._seal(1, 0, committed)
        assert total is not None
        assert set(sealed) == set(self.names)

    def _find(self, context: Context) -> Any:
        site = str(context.node_config[NODE_CONFIG_SITE])
        return SimpleNamespace(handle=lambda _step, request: self._answer(site, request))

    def _answer(self, site: str, request: Envelope) -> Envelope:
        self.alive.append(_alive())
        asked = Header.model_validate_json(request.header)
        place = Address(**{name: getattr(asked, name) for name in Address.model_fields})
        statements = m.SealRequest.model_validate_json(request.body).statements
        agreed = transcript("0" * 64, 1, 0, 1, {s.site: s.envelope().digest for s in statements})
        payload = next(self._payloads)
        body = m.SealReply(transcript=agreed, tags=tuple(f"{t:x}" for t in payload.tags))
        return self._sign(site, place, body.TYPE, body.to_bytes(), request.digest, payload.chunks)

    def _sign(
        self, site: str, place: Address, type_: str, body: bytes, request: str, chunks: tuple[bytes, ...]
    ) -> Envelope:
        return seal_envelope(
            self.identities[site], place, recipient="coordinator", type_=type_, body=body,
            checkpoint="1:" + "0" * 64, chunks=chunks, request=request,
        )  # fmt: skip


def _alive() -> int:
    """Bytes of bulk that an envelope or a Flower record still holds, each string once."""
    gc.collect()  # looks only at what is younger than the fixture below
    held = dict[int, int]()
    for thing in gc.get_objects():
        if type(thing) is Envelope:
            held |= {id(c): len(c) for c in thing.chunks}
        elif type(thing) is Array:
            held[id(thing.data)] = len(thing.data)
    return sum(held.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Waiting]]:
    """A round with 3 sites and one with 12."""
    found = {count: Waiting(count, tmp_path_factory.mktemp("round")) for count in (3, 12)}
    gc.freeze()
    for waiting in found.values():
        waiting.seal()
    yield found
    gc.unfreeze()
    for waiting in found.values():
        waiting.log.close()


def test_no_more_payloads_are_alive_among_twelve_sites_than_among_three(measured: dict[int, Waiting]) -> None:
    few, many = measured[3], measured[12]
    assert len(many.alive) == 12
    assert max(many.alive) <= max(few.alive)


def test_a_payload_is_forgotten_before_the_next_one_is_made(measured: dict[int, Waiting]) -> None:
    """One sum and one payload, not two: the one that was added last need not wait for its successor."""
    assert max(measured[12].alive) == 0, f"one payload is {measured[12].payload} bytes"


def test_the_counter_sees_a_payload_that_is_kept(measured: dict[int, Waiting]) -> None:
    """The control of the two above."""
    before = _alive()
    kept = Envelope(b"", b"", b"", (bytes(measured[3].payload),))
    assert _alive() == before + len(kept.chunks[0])
    record = Array(dtype="uint8", shape=(10,), stype="x", data=b"x" * 1000)
    assert _alive() == before + len(kept.chunks[0]) + len(record.data)


def test_a_process_that_ends_before_its_workers_have_started_says_nothing() -> None:
    code = "from confide.privacy.sealing import workers; workers._Worker().stop()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
