"""The rules of consent once more, as lists and comparisons: what the registry is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from confide.privacy.consent import ConsentEvent

GRANTS = ("given", "renewed")
DENIALS = ("refused", "withdrawn", "revoked", "objected", "invalidated")
#: What a notice says: the purposes it was written for, and whether it reaches beneath them.
Says = tuple[frozenset[str], bool]


def beneath(purpose: str, other: str) -> bool:
    return other == "" or purpose.startswith(other + "/")


def written_for(says: Says, purpose: str) -> bool:
    return purpose in says[0] or (says[1] and any(beneath(purpose, p) for p in says[0]))


def may(
    events: Sequence[ConsentEvent], notices: Mapping[str, Says], purpose: str, at: int
) -> tuple[bool, float | None]:
    """One person's events in the order they were learnt: may she take part, and with which limit of her own?"""
    here = [e for e in events if e.effective_at <= at and (e.purpose == purpose or beneath(purpose, e.purpose))]
    verdicts = [(e.effective_at, False, None) for e in here if e.type in DENIALS]
    for name in {e.purpose for e in here}:
        flags = [(e.effective_at, e.type == "restricted") for e in here if e.purpose == name and "restrict" in e.type]
        if flags and max(flags)[1]:
            return False, None
        grants = [e for e in here if e.purpose == name and e.type in GRANTS]
        tied = [e for e in grants if e.effective_at == max(g.effective_at for g in grants)]
        said = [notices.get(e.notice_digest) for e in tied]
        if name != purpose and not all(s is not None and s[1] and written_for(s, name) for s in said):
            continue  # it says nothing about what lies beneath
        sound = all(s is None or written_for(s, purpose) for s in said)
        sound &= all(e.valid_until is None or at < e.valid_until for e in tied)
        verdicts += [(e.effective_at, sound, tied[-1].max_epsilon) for e in tied]
    last = [v for v in verdicts if v[0] == max(w[0] for w in verdicts)]
    if not last or not all(sound for _, sound, _ in last) or any(e.type == "erased" for e in here):
        return False, None
    return True, min((limit for _, _, limit in last if limit is not None), default=None)
