"""A site's records, grouped by privacy unit. `gather` is the one door through which records are read.

A *unit* is what differential privacy protects: a subject with all her records, or (unit = record) one record. A
*person* is a subject; consent and roles are per person whatever the unit is.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import is_

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from confide.clients.data.preprocess import features, labels, require_columns
from confide.config import LabelConfig, SchemaConfig
from confide.errors import DataError
from confide.privacy.consent import canonical_subject

__all__ = ["Batch", "SiteRecords"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of some units.

    Attributes:
        x: float32 [records, inputs].
        y: float32 [records].
        owner: int64 [records]: position of the record's unit in `units`.
        records_of: float32 [units]: number of records of each unit.
        units: int64 [units].
    """

    x: torch.Tensor
    y: torch.Tensor
    owner: torch.Tensor
    records_of: torch.Tensor
    units: Ints


class SiteRecords:
    """All records of one site, in memory, sorted by unit.

    Args:
        x: Features, float32 [records, inputs].
        y: Labels, float32 [records].
        unit_of: Unit of each record, int64 [records], sorted ascending, without gaps.
        person_of: Person of each unit, int64 [units].
        persons: Identifier of each person.
        encoded_as: Schema and label that features and labels were encoded with; a run must name the same ones.
    """

    def __init__(
        self,
        x: NDArray[np.float32],
        y: NDArray[np.float32],
        unit_of: Ints,
        person_of: Ints,
        persons: list[str],
        encoded_as: tuple[SchemaConfig, LabelConfig] | None = None,
    ) -> None:
        self.encoded_as = encoded_as
        self._x, self._y = torch.from_numpy(x), torch.from_numpy(y)
        self._starts = np.searchsorted(unit_of, np.arange(len(person_of) + 1))
        self._one_each = len(unit_of) == len(person_of)
        self.person_of, self.persons = person_of, persons

    @classmethod
    def build(
        cls,
        table: pd.DataFrame,
        *,
        schema: SchemaConfig,
        label: LabelConfig,
        subject: str,
        unit: str,
        where: str,
    ) -> SiteRecords:
        """Encode and group a site's table.

        Raises:
            DataError: A column or value is missing or unreadable (row and column named).
        """
        everybody = np.zeros(len(table), dtype=np.int64)
        return cls.split(table, everybody, 1, schema=schema, label=label, subject=subject, unit=unit, where=where)[0]

    @classmethod
    def split(
        cls,
        table: pd.DataFrame,
        part_of: Ints,
        parts: int,
        *,
        schema: SchemaConfig,
        label: LabelConfig,
        subject: str,
        unit: str,
        where: str,
    ) -> list[SiteRecords]:
        """The tables of several sites in one, encoded at once.

        Args:
            table: All rows.
            part_of: The site of each row, counted from 0, int64 [rows].
            parts: How many sites there are.
            schema, label, subject, unit, where: As for `build`.

        Raises:
            DataError: As for `build`.
        """
        require_columns(table, [subject], where)
        anonymous = table[subject].isna()
        if anonymous.any():
            raise DataError("the subject is missing, so nobody's consent covers the row",
                            where=f"{where}, row {anonymous.idxmax()}, column {subject!r}",
                            hint="leave such rows out of the table")  # fmt: skip
        codes, uniques = pd.factorize(table[subject].map(canonical_subject), sort=True)
        order = np.lexsort((codes, part_of))
        x = np.ascontiguousarray(features(table, schema, where)[order])
        y = np.ascontiguousarray(labels(table, label, where)[order])
        codes, ends = codes[order], np.searchsorted(part_of[order], np.arange(parts + 1))
        found = []
        for start, end in pairwise(ends):
            here, person_of_record = np.unique(codes[start:end], return_inverse=True)
            persons, as_ = [str(u) for u in uniques[here]], (schema, label)
            units = person_of_record.astype(np.int64), np.arange(len(here), dtype=np.int64)
            if unit == "record":
                units = np.arange(end - start, dtype=np.int64), units[0]
            found.append(cls(x[start:end], y[start:end], *units, persons, as_))
        return found

    @property
    def inputs(self) -> int:
        """Number of encoded features."""
        return int(self._x.shape[1])

    @property
    def size(self) -> int:
        """Number of records."""
        return len(self._y)

    def fits(self, schema: SchemaConfig, label: LabelConfig) -> bool:
        """Are these the schema and label that the records were encoded with, as far as that is known?"""
        return self.encoded_as is None or _same((*self.encoded_as, schema, label))

    def changed(
        self,
        features: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        labels: Callable[[torch.Tensor], torch.Tensor] = lambda y: y,
    ) -> SiteRecords:
        """The same persons with other values, of the same shapes: what a simulated world does to a site."""
        found = copy.copy(self)
        found._x, found._y = features(self._x), labels(self._y)
        return found

    def units_of(self, persons: NDArray[np.bool_]) -> Ints:
        """Units whose person is marked; `persons` is a mask over `self.persons`."""
        return np.flatnonzero(persons[self.person_of]).astype(np.int64)

    def gather(self, units: Ints) -> Batch:
        """The records of these units."""
        if self._one_each:
            rows, (belongs, ones) = torch.from_numpy(units), _one_each(len(units))
            return Batch(
                x=self._x.index_select(0, rows), y=self._y.index_select(0, rows), owner=belongs, records_of=ones,
                units=units,
            )  # fmt: skip
        starts, ends = self._starts[units], self._starts[units + 1]
        counts = ends - starts
        owner = np.repeat(np.arange(len(units)), counts)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = torch.from_numpy(np.repeat(starts, counts) + within)
        return Batch(
            x=self._x[rows],
            y=self._y[rows],
            owner=torch.from_numpy(owner),
            records_of=torch.from_numpy(counts.astype(np.float32)),
            units=units,
        )


@lru_cache(maxsize=256)
def _one_each(units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whose a batch's records are, and how many each unit has, where that is one."""
    with torch.inference_mode(False):  # whoever asks first, others use them where gradients are kept
        return torch.arange(units), torch.ones(units)


#: Schema and label, twice: pairs that were found to be equal.
_equal: deque[tuple[BaseModel, ...]] = deque(maxlen=4)


def _same(four: tuple[BaseModel, ...]) -> bool:
    """Are the first two equal to the last two? All sites of a simulation ask about the same four objects: these, which
    never change, are compared once, and kept, so that no other object can take the place of one of them."""
    if any(all(map(is_, four, known)) for known in tuple(_equal)):
        return True
    if four[:2] != four[2:]:
        return False
    _equal.append(four)
    return True
