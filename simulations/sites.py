"""The sites of a simulated run, of which as many are open as take part: what a run costs follows the cohort.

Where all sites take part in every round, all are open from the start. Where each round draws a few, a site is made when
it is drawn for the first time, and closed again when others need its place; opened again it is a site that was
restarted, with everything on its disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from confide.clients.site import Site

__all__ = ["Sites"]


class Sites(Mapping[str, Site]):
    """By name, in their order.

    Args:
        names: All of them.
        open_: Makes a site, or opens it again.
        close: Told of a site that is to be closed.
        most: How many are open at once; None: all.
    """

    def __init__(
        self, names: Iterable[str], open_: Callable[[str], Site], close: Callable[[Site], None], most: int | None
    ) -> None:
        self._names, self._make, self._close, self._most = tuple(names), open_, close, most
        self._known = frozenset(self._names)
        #: Those that are open, the one that was asked for the longest time ago first.
        self._open: dict[str, Site] = {}

    def __getitem__(self, name: str) -> Site:
        if name not in self._known:
            raise KeyError(name)
        site = self._open.pop(name, None)
        if site is None:
            while self._most is not None and len(self._open) >= self._most:
                self._close(self._open.pop(next(iter(self._open))))
            site = self._make(name)
        self._open[name] = site
        return site

    def __setitem__(self, name: str, site: Site) -> None:
        """A site that was restarted takes its place."""
        self._open[name] = site

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def open(self) -> dict[str, Site]:
        """Those that are open now, in the order of names."""
        return {name: self._open[name] for name in sorted(self._open)}

    def close(self) -> None:
        """Close all that are open."""
        while self._open:
            self._close(self._open.pop(next(iter(self._open))))
