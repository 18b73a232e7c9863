"""`site.toml`: what a site is, where its things lie, and what its operator allows. Default deny.

The section `[policy]` is the operator's word against the coordinator's: a line that is left out allows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from confide.config.experiment import LabelConfig, Purpose, SchemaConfig
from confide.config.load import read_toml, validate
from confide.config.strategy import STRATEGY_OPTIONS

__all__ = [
    "REPLY_SECONDS",
    "DeviceConfig",
    "FoldersConfig",
    "PolicyConfig",
    "SiteConfig",
    "SourceConfig",
    "load_site",
    "site_template",
]

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
_BUILT_IN = ("logistic", "mlp")
#: The span in whose multiples a site answers training, where its operator says nothing else.
REPLY_SECONDS = 1.0
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FoldersConfig(_Section):
    """`[folders]`: relative to `site.toml`. `ledger` outlives every run: keep its newest backup only.

    `consent` is a file, or a PostgreSQL database's URL; `"env:NAME"` takes that from the environment.
    """

    state: str = "state"
    ledger: str = "ledger"
    logs: str = "logs"
    consent: str = "consent.db"
    site_key: str = "site.key"


class SourceConfig(_Section):
    """`[data]`: the table, in exactly one of two forms, and the column that names persons.

    `file`: CSV or Parquet. `url` with `query`: a database as SQLAlchemy names it; `url = "env:NAME"` takes it from the
    environment, so that no password stands in a file. `public` says that anybody may see every row. `label` is the
    column that runs may predict.
    """

    file: str | None = None
    url: str | None = None
    query: str | None = None
    subject: str
    public: bool = False
    label: LabelConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SourceConfig:
        if (self.file is None) == (self.url is None):
            raise ValueError("give exactly one of file, url")
        if (self.url is None) != (self.query is None):
            raise ValueError("url and query belong together")
        return self


class PolicyConfig(_Section):
    """`[policy]`: see `confide.clients.policy`; every line here is a line there.

    `models`: built-in names, or `module:function` for code that is installed here; each of these needs its line in
    `model_digests`, the digest of the package's files. `strategies`, `strategy_digests`: the same for strategies; none
    given: the built-in ones. `reply_seconds`: training is answered so long after it was asked for, or a multiple of
    that, which leaves time to compute a round again; shorter than a run waits for replies; 0: when it is done, and so
    how long a site takes is to be seen.
    `hours`: `"22:00-06:00"`, UTC; none given: at any time.
    """

    coordinator_key: Hex32 | None = None
    purposes: tuple[Purpose, ...] = ()
    profiles: tuple[Annotated[str, Field(pattern="^(sealed|masked|ckks|open)$")], ...] = ()
    models: tuple[str, ...] = ()
    model_digests: dict[str, Hex32] = Field(default_factory=dict)
    strategies: tuple[str, ...] = tuple(STRATEGY_OPTIONS)
    strategy_digests: dict[str, Hex32] = Field(default_factory=dict)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    min_sites: Annotated[int, Field(ge=3)] = 3
    min_subjects: Annotated[int, Field(ge=1)] = 20
    population: Annotated[int, Field(ge=1)]
    max_sites_per_subject: Annotated[int, Field(ge=1, le=16)] = 1
    epsilon_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    ledger_epsilon_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    local_steps_limit: Annotated[int, Field(ge=0)] = 0
    reply_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = REPLY_SECONDS
    release: bool = False
    statistics: bool = False
    hours: tuple[str, ...] = ()

    @field_validator("hours")
    @classmethod
    def _intervals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            found = _HOURS.fullmatch(text)
            if found is None or found[1] + found[2] == found[3] + found[4]:
                raise ValueError(f"{text[:20]!r} is not hours like 22:00-06:00")
        return value

    @model_validator(mode="after")
    def _known_code(self) -> PolicyConfig:
        own = [kind for kind in self.models if kind not in _BUILT_IN]
        for kind in own:
            if kind.count(":") != 1:
                raise ValueError(f"models holds {kind!r}: logistic, mlp or module:function")
            if kind not in self.model_digests:
                raise ValueError(f"{kind} runs code here: give its digest in model_digests")
        if spare := set(self.model_digests) - set(own):
            raise ValueError(f"model_digests names {min(spare)!r}, which models does not allow")
        own = [kind for kind in self.strategies if kind not in STRATEGY_OPTIONS]
        for kind in own:
            if kind.count(":") != 1:
                raise ValueError(f"strategies holds {kind!r}: a built-in name or module:Class")
            if kind not in self.strategy_digests:
                raise ValueError(f"{kind} runs code here: give its digest in strategy_digests")
        if spare := set(self.strategy_digests) - set(own):
            raise ValueError(f"strategy_digests names {min(spare)!r}, which strategies does not allow")
        if self.epsilon_limit > self.ledger_epsilon_limit:
            raise ValueError("epsilon_limit is above ledger_epsilon_limit, the most that the ledger ever holds")
        return self


class DeviceConfig(_Section):
    """`[device]`: `auto`, `cpu`, `cuda:N`."""

    kind: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"


class SiteConfig(_Section):
    """A whole `site.toml`. `endpoint` is the coordinator's `host:port`; a site connects to nothing without it. `proxy`
    is the HTTP proxy on the way there; none given: what the environment says.

    `[schema]` and `[data] label` are those of the runs that the site takes part in, agreed on beforehand: the table is
    encoded with them and with no others. A coordinator that chose them could ask, run by run, which values there are.
    """

    name: Name
    federation: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    endpoint: str | None = None
    proxy: Annotated[str, Field(pattern=r"^http://[A-Za-z0-9.\[\]:_-]+:[0-9]{1,5}/?$")] | None = None
    folders: FoldersConfig = FoldersConfig()
    data: SourceConfig
    schema_: Annotated[SchemaConfig | None, Field(alias="schema")] = None
    policy: PolicyConfig
    device: DeviceConfig = DeviceConfig()


def load_site(source: Path | Mapping[str, Any]) -> SiteConfig:
    """Read a `site.toml`.

    Raises:
        ConfigError: It cannot be read or parsed, a key is unknown, or a value is not allowed.
    """
    where = str(source) if isinstance(source, Path) else "site.toml"
    tree = read_toml(source, "give the path of a site.toml") if isinstance(source, Path) else source
    return validate(SiteConfig, tree, where, "mend site.toml")


def site_template(
    name: str, federation: str, population: int, *, endpoint: str | None = None, coordinator_key: str | None = None
) -> str:
    """A `site.toml` that allows nothing yet: every line that would is there, commented out.

    It is made at the site from the site's own defaults: a coordinator fills in where it is and who it is, no policy.
    """
    lines = {
        "name": name,
        "federation": federation,
        "population": population,
        "reply_seconds": REPLY_SECONDS,
        "endpoint": f'endpoint = "{endpoint}"' if endpoint else '# endpoint = "host:port"          # from the kit',
        "key": f'coordinator_key = "{coordinator_key}"' if coordinator_key
        else '# coordinator_key = "…"           # from the kit',
    }  # fmt: skip
    return _TEMPLATE.format(**lines)


_TEMPLATE = """\
# What this site is, and what it allows. A line of [policy] that is commented out allows nothing.
name = "{name}"
federation = "{federation}"
{endpoint}
# proxy = "http://proxy.example:3128"   # to the coordinator; left out: as HTTPS_PROXY and NO_PROXY say

[folders]                           # relative to this file
state = "state"
ledger = "ledger"                   # for ever: what persons were exposed to
logs = "logs"
consent = "consent.db"              # or "env:NAME", which holds a postgresql:// URL
site_key = "site.key"

[data]
file = "data.csv"                   # CSV or Parquet; or a database:
# url = "env:DATABASE_URL"          # as SQLAlchemy names it
# query = "SELECT * FROM visits"
subject = "person"                  # the column that names persons
# label = {{ column = "outcome", classes = ["no", "yes"] }}

# [schema]                          # as in the run: what the table is encoded with, and nothing else
# missing = "midpoint"
# [schema.features]
# age = {{ kind = "number", bounds = [0, 110] }}

[policy]
{key}
population = {population}
# purposes = ["research/example"]
# profiles = ["sealed"]
# models = ["logistic"]             # or "package.module:function", with its line in [policy.model_digests]
# strategies = ["fedavg"]           # left out: all built-in ones; or "package.module:Class", with its line in
#                                   # [policy.strategy_digests]
# epsilon_limit = 2.0               # the most that one run may ask for
# local_steps_limit = 100           # a round
ledger_epsilon_limit = 8.0          # for the ledger's lifetime
delta = 1e-5
held_out = 0.2
min_sites = 3
min_subjects = 20
# max_sites_per_subject = 1         # persons here may be at so many sites of a federation: no run may assume fewer
reply_seconds = {reply_seconds:<4g}                # training is answered so long after it was asked for, or a multiple
#                                   # of that; longer than twice a round hides most of how long it took; 0: no padding
release = false                     # may this site hand out the trained model?
statistics = false                  # may bounds of columns be learned from noised histograms?
# hours = ["22:00-06:00"]           # UTC; left out: at any time

[device]
kind = "auto"
"""
