"""The interface: profiles by name, tags after chunks, and a line for people that says what is used."""

from __future__ import annotations

import pytest

from confide.config import SealingConfig
from confide.privacy.sealing import (
    CkksProfile,
    MaskedProfile,
    OpenProfile,
    Payload,
    SealedProfile,
    Sealing,
    make_profile,
)

KINDS = {"sealed": SealedProfile, "masked": MaskedProfile, "ckks": CkksProfile, "open": OpenProfile}


@pytest.mark.parametrize("name", KINDS)
def test_the_profile_that_is_named_is_the_one_that_is_made(name: str) -> None:
    made = make_profile(SealingConfig.model_validate({"profile": name, "bits": 12}), 5)
    assert type(made) is KINDS[name]
    assert made.name == name
    assert made.keyed == (name != "open")
    assert bool(made.make_secret()) == made.keyed
    if made.keyed:
        assert made.make_secret() != made.make_secret()
        assert made.parameters["bits"] == 12


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sealed", ["12 bits", "3 to a slot", "N = 4096", "60-bit prime", "masks", "tags"]),
        ("masked", ["12 bits", "4 to a word", "masks", "tags", "no encryption"]),
        ("ckks", ["12 bits", "N = 4096", "60-bit prime", "without masks", "tags"]),
        ("open", ["readable", "float32"]),
    ],
)
def test_the_summary_says_what_is_used(name: str, words: list[str]) -> None:
    made = make_profile(SealingConfig.model_validate({"profile": name, "bits": 12}), 5)
    assert "\n" not in made.summary
    for word in words:
        assert word in made.summary
    if "fields" in made.parameters:
        assert f"{made.parameters['fields']} to a " in made.summary


def test_tags_are_there_once_all_chunks_were_made_and_not_before() -> None:
    made = []

    def chunks() -> object:
        for i in range(3):
            made.append(i)
            yield bytes([i])

    sealing = Sealing(chunks(), lambda: (len(made),))
    parts = iter(sealing)
    assert next(parts) == b"\0"
    assert made == [0], "one at a time"
    with pytest.raises(ValueError, match="chunks come first"):
        _ = sealing.tags
    assert list(parts) == [b"\1", b"\2"]
    assert sealing.tags == (3,)
    assert Sealing([b"a", b"b"]).payload() == Payload((b"a", b"b"), ())
