"""`[partition]`: how a simulation deals the people of one table out to sites."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from confide.config.section import Section

__all__ = ["PartitionConfig"]


class PartitionConfig(Section):
    """How people come to sites. Each kind reads its own options and leaves the others, so that a sweep can compare.

    `natural`: the column `data.site`. The rest deal people out at the experiment's seed to `sites` sites called
    `site-01`, …: `iid` evenly; `dirichlet` with each class shared out by Dirichlet(`alpha`) (Li et al. 2022, label
    distribution skew); `quantity` with the sites' sizes drawn from Dirichlet(`alpha`) (there, quantity skew); `shards`
    with people sorted by class and each site given `shards_per_site` runs of them (McMahan et al. 2017).

    A person lies at one site. `overlap` is the share of people whose records are dealt out to several, up to
    `privacy.max_sites_per_subject`; of a natural partition it is the largest share that the table may have of them.
    Whether she consents, and in which role she is, is then decided at each of her sites by itself.
    """

    kind: Literal["natural", "iid", "dirichlet", "quantity", "shards"] = "natural"
    sites: Annotated[int, Field(ge=3, le=100_000)] = 10
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    shards_per_site: Annotated[int, Field(ge=1, le=1000)] = 2
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.0
