"""Experiments are read by one cascade, and whatever is wrong with one is said before anything else happens."""

# ruff: noqa: E501 - the tables of expected texts are easier to read unbroken

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from confide.config import Experiment, load_experiment, parse_assignment, read_toml
from confide.errors import ConfigError
from tests.support import experiment_tree

MEND = "mend the experiment, or override a key with --set section.key=value"
FILE = """
[run]
name = "tiny"
purpose = "research/test"
rounds = 5
[data]
file = "people.csv"
subject = "person"
site = "clinic"
label = { column = "sick", classes = [0, 1] }
public = true
[schema.features]
age = { kind = "number", bounds = [0, 100] }
[sites]
population = { default = 40 }
[consent]
simulate = { fraction = 0.9 }
[privacy]
epsilon = 4.0
[sealing]
profile = "open"
"""


def refusal(*assignments: str, **sections: dict[str, Any]) -> ConfigError:
    """The error with which an otherwise good experiment is refused."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(experiment_tree("people.csv", **sections), assignments)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Write an experiment file."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "experiment.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# --- the cascade ---------------------------------------------------------------------------------------------------


def test_the_file_wins_over_the_defaults_and_an_assignment_over_the_file(write: Callable[[str], Path]) -> None:
    path = write(FILE)
    by_file, by_hand = load_experiment(path), load_experiment(path, ["run.rounds=7", "training.local_steps=3"])
    assert (by_file.run.rounds, by_hand.run.rounds) == (5, 7)
    assert (by_file.training.local_steps, by_hand.training.local_steps) == (10, 3)  # 10 is the default
    assert by_file.run.seed == by_hand.run.seed == 0
    assert by_hand.privacy.epsilon == 4.0


def test_the_last_of_two_assignments_wins() -> None:
    loaded = load_experiment(experiment_tree("people.csv"), ["run.rounds=7", "run.rounds=9"])
    assert loaded.run.rounds == 9


def test_an_assignment_makes_the_sections_it_needs(write: Callable[[str], Path]) -> None:
    loaded = load_experiment(write(FILE), ["model.kind=mlp", "model.hidden=[4, 2]", "sites.population.ash=60"])
    assert loaded.model.hidden == (4, 2)
    assert (loaded.sites.population_of("ash"), loaded.sites.population_of("birch")) == (60, 40)


def test_an_assigned_consent_file_replaces_simulated_consent_and_the_reverse() -> None:
    by_file = load_experiment(experiment_tree("people.csv"), ["consent.file=consent.csv"])
    assert (by_file.consent.file, by_file.consent.simulate) == ("consent.csv", None)
    tree = experiment_tree("people.csv") | {"consent": {"file": "consent.csv"}}
    for assignment in ("consent.simulate={fraction=0.5}", "consent.simulate.fraction=0.5"):
        simulated = load_experiment(tree, [assignment])
        assert simulated.consent.simulate is not None
        assert (simulated.consent.file, simulated.consent.simulate.fraction) == (None, 0.5)


def test_loading_does_not_change_the_callers_mapping() -> None:
    tree = experiment_tree("people.csv")
    load_experiment(tree, ["run.rounds=7", "sites.population.ash=60"])
    assert tree == experiment_tree("people.csv")


def test_a_file_and_the_same_mapping_give_the_same_experiment(write: Callable[[str], Path]) -> None:
    assert load_experiment(write(FILE)) == load_experiment(tomllib.loads(FILE))


def test_an_experiment_cannot_be_changed_afterwards() -> None:
    loaded = load_experiment(experiment_tree("people.csv"))
    with pytest.raises(ValueError, match="frozen"):
        loaded.run.rounds = 9


# --- unknown keys --------------------------------------------------------------------------------------------------


UNKNOWN = [
    ("rnu.rounds=1", "unknown key rnu", "did you mean run?"),
    ("run.ruonds=1", "unknown key run.ruonds", "did you mean run.rounds?"),
    ("data.label.colunm='x'", "unknown key data.label.colunm", "did you mean data.label.column?"),
    ("consent.simulate.fractoin=1", "unknown key consent.simulate.fractoin", "did you mean consent.simulate.fraction?"),
    ("consent.withdrawals=[{raund=1, fraction=0.1}]", "unknown key consent.withdrawals.0.raund", "did you mean consent.withdrawals.0.round?"),
    ("schema.features.age.boundz=[0, 1]", "unknown key schema.features.age.boundz", "did you mean schema.features.age.bounds?"),
    ("schema.featuers.age.kind='number'", "unknown key schema.featuers", "did you mean schema.features?"),
    ("training.learnin_rate=1", "unknown key training.learnin_rate", "did you mean training.learning_rate?"),
    ("strategy.knd='fedavg'", "unknown key strategy.knd", "did you mean strategy.kind?"),
    ("privacy.epsilom=1", "unknown key privacy.epsilom", "did you mean privacy.epsilon?"),
    ("sealing.profil='open'", "unknown key sealing.profil", "did you mean sealing.profile?"),
    ("sealing.rotations=true", "unknown key sealing.rotations", "did you mean sealing.rotation?"),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "what", "hint"), UNKNOWN, ids=[row[0] for row in UNKNOWN])
def test_an_unknown_key_is_refused_with_the_nearest_known_one(assignment: str, what: str, hint: str) -> None:
    error = refusal(assignment)
    assert (error.what, error.hint) == (what, hint)


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest_known_key(write: Callable[[str], Path]) -> None:
    path = write(FILE.replace("rounds = 5", "ruonds = 5"))
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert str(caught.value) == f"{path}: unknown key run.ruonds\n  → did you mean run.rounds?"


def test_a_key_that_resembles_nothing_lists_what_is_known() -> None:
    error = refusal("model.zzzzzzzz=1")
    assert (error.what, error.hint) == ("unknown key model.zzzzzzzz", "known here: hidden, kind, options")


@given(st.text(st.characters(codec="utf-8", exclude_characters=".=\n\r"), min_size=1).filter(str.strip))
def test_no_unknown_key_is_ever_ignored(key: str) -> None:
    known = set(load_experiment(experiment_tree("people.csv")).run.model_dump())
    if key.strip() not in known:
        assert refusal(f"run.{key}=1").what == f"unknown key run.{key.strip()}"


# --- what a value may be -------------------------------------------------------------------------------------------


NOT_ALLOWED = [
    ("run=5", "run = 5: input should be a valid dictionary or instance of RunConfig"),
    ("run.name='a b'", "run.name = 'a b': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'"),
    ("run.purpose='Research'", "run.purpose = 'Research': string should match pattern '^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$'"),
    ("run.rounds=0", "run.rounds = 0: input should be greater than or equal to 1"),
    ("run.rounds=10001", "run.rounds = 10001: input should be less than or equal to 10000"),
    ("run.rounds=2.5", "run.rounds = 2.5: input should be a valid integer, got a number with a fractional part"),
    ("run.seed=-1", "run.seed = -1: input should be greater than or equal to 0"),
    ("run.report_metrics_every=0", "run.report_metrics_every = 0: input should be greater than or equal to 1"),
    ("data.public='maybe'", "data.public = 'maybe': input should be a valid boolean, unable to interpret input"),
    ("data.held_out=1", "data.held_out = 1: input should be less than 1"),
    ("data.held_out=nan", "data.held_out = nan: input should be less than 1"),
    ("data.label={column='sick'}", "data.label: give exactly one of at_least, classes, bounds (got none)"),
    ("data.label={column='sick', at_least=1, bounds=[0, 1]}", "data.label: give exactly one of at_least, classes, bounds (got at_least, bounds)"),
    ("data.label.classes=[1]", "data.label: classes needs at least two different values"),
    ("data.label.classes=['a', 'a']", "data.label: classes needs at least two different values"),
    ("data.label.classes=[1, 1.0]", "data.label: classes needs at least two different values"),
    ("data.label.classes=[1, true]", "data.label: classes needs at least two different values"),
    ("data.label={column='sick', bounds=[1, 0]}", "data.label: bounds are two finite numbers, the lower first (got [1, 0])"),
    ("data.label={column='sick', bounds=[0, inf]}", "data.label: bounds are two finite numbers, the lower first (got [0, inf])"),
    ("schema.missing='zero'", "schema.missing = 'zero': input should be 'midpoint' or 'refuse'"),
    ("schema.features={}", "schema.features: Dictionary should have at least 1 item after validation, not 0"),
    ("schema.features.age.bounds=[1, 0]", "schema.features.age.bounds = [1, 0]: bounds are two finite numbers, the lower first (got [1, 0])"),
    ("schema.features.age.bounds=[0, 0]", "schema.features.age.bounds = [0, 0]: bounds are two finite numbers, the lower first (got [0, 0])"),
    ("schema.features.age.bounds=[0, nan]", "schema.features.age.bounds = [0, nan]: bounds are two finite numbers, the lower first (got [0, nan])"),
    ("schema.features.age.bounds=[0]", "schema.features.age.bounds.1 is required"),
    ("schema.features.smoker.values=[]", "schema.features.smoker.values = []: tuple should have at least 1 item after validation, not 0"),
    ("schema.features.age.kind='nubmer'", "schema.features.age: Input tag 'nubmer' found using 'kind' does not match any of the expected tags: 'number', 'category'"),
    ("schema.features.number={kind='number', bounds=[1, 0]}", "schema.features.number.bounds = [1, 0]: bounds are two finite numbers, the lower first (got [1, 0])"),
    ("schema.features.category={kind='category', values=[]}", "schema.features.category.values = []: tuple should have at least 1 item after validation, not 0"),
    ("sites.min_sites=2", "sites.min_sites = 2: input should be greater than or equal to 3"),
    ("sites.min_subjects=0", "sites.min_subjects = 0: input should be greater than or equal to 1"),
    ("sites.population.ash=9", "sites: population of ash is below min_subjects = 10"),
    ("consent={}", "consent: give exactly one of simulate, file: without consent nobody takes part"),
    ("consent={simulate={fraction=1}, file='c.csv'}", "consent: give exactly one of simulate, file: without consent nobody takes part"),
    ("consent.simulate.fraction=1.5", "consent.simulate.fraction = 1.5: input should be less than or equal to 1"),
    ("consent.withdrawals=[{round=0, fraction=0.5}]", "consent.withdrawals.0.round = 0: input should be greater than or equal to 1"),
    ("consent.withdrawals=[{round=1}]", "consent.withdrawals.0.fraction is required"),
    ("model.kind='cnn'", "model: kind is 'logistic', 'mlp' or 'package.module:function' (got 'cnn')"),
    ("model.kind='mlp'", "model: an mlp needs hidden, for example hidden = [64, 32]"),
    ("model.hidden=[4]", "model: hidden belongs to kind = 'mlp'"),
    ("model.options={depth=2}", "model: options belong to a model of your own (package.module:function)"),
    ("model={kind='mlp', hidden=[0]}", "model.hidden.0 = 0: input should be greater than or equal to 1"),
    ("training.local_steps=0", "training.local_steps = 0: input should be greater than or equal to 1"),
    ("training.learning_rate=0", "training.learning_rate = 0: input should be greater than 0"),
    ("training.learning_rate=inf", "training.learning_rate = inf: input should be a finite number"),
    ("training.momentum=1", "training.momentum = 1: input should be less than 1"),
    ("training={optimizer='adam', momentum=0.5}", "training: momentum belongs to optimizer = 'sgd'"),
    ("strategy.server_learning_rate=0", "strategy.server_learning_rate = 0: input should be greater than 0"),
    ("privacy.epsilon=0", "privacy.epsilon = 0: input should be greater than 0"),
    ("privacy.epsilon=nan", "privacy.epsilon = nan: input should be greater than 0"),
    ("privacy.epsilon=9", "privacy.epsilon = 9 is above privacy.site_epsilon_limit = 8, the most a site's ledger will ever hold"),
    ("privacy.delta=0.1", "privacy.delta = 0.1: input should be less than 0.1"),
    ("privacy.delta=nan", "privacy.delta = nan: input should be less than 0.1"),
    ("privacy.sample_rate=0", "privacy.sample_rate = 0: input should be greater than 0"),
    ("privacy.sample_rate=1.01", "privacy.sample_rate = 1.01: input should be less than or equal to 1"),
    ("privacy.max_grad_norm=inf", "privacy.max_grad_norm = inf: input should be less than or equal to 1000000"),
    ("privacy.unit='household'", "privacy.unit = 'household': input should be 'subject' or 'record'"),
    ("privacy.site_epsilon_limit=inf", "privacy.site_epsilon_limit = inf: input should be a finite number"),
    ("sealing.bits=7", "sealing.bits = 7: input should be greater than or equal to 8"),
    ("sealing.bits=21", "sealing.bits = 21: input should be less than or equal to 20"),
    ("sealing.bits=8.5", "sealing.bits = 8.5: input should be a valid integer, got a number with a fractional part"),
    ("sealing.range=0", "sealing.range = 0: input should be greater than 0"),
    ("sealing.range=1.1", "sealing.range = 1.1: input should be less than or equal to 1"),
    ("sealing.range=nan", "sealing.range = nan: input should be less than or equal to 1"),
    ("sealing.retry='maybe'", "sealing.retry = 'maybe': input should be a valid boolean, unable to interpret input"),
    ("sealing.rotation=true", "sealing: rotation belongs to a profile that quantises: sealed, masked or ckks"),
    ("sealing={profile='open', retry=true}", "sealing: retry needs masks: profile sealed or masked"),
    ("sealing={profile='ckks', retry=true}", "sealing: retry needs masks: profile sealed or masked"),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "text"), NOT_ALLOWED, ids=[row[0] for row in NOT_ALLOWED])
def test_a_value_that_is_not_allowed_is_named_with_its_key(assignment: str, text: str) -> None:
    error = refusal(assignment)
    assert str(error) == f"experiment: {text}\n  → {MEND}"


@pytest.mark.parametrize(
    ("assignment", "choice"),
    [
        ("training.optimizer='adamw'", "training.optimizer = 'adamw': input should be 'sgd'"),
        ("strategy.kind='fedprocs'", "strategy.kind = 'fedprocs': input should be one of 'fedavg', 'fedprox', "),
        ("privacy.placement='cloud'", "privacy.placement = 'cloud': input should be 'site'"),
        ("sealing.profile='glass'", "sealing.profile = 'glass': input should be 'sealed', 'masked', 'ckks' or 'open'"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_those_that_do(assignment: str, choice: str) -> None:
    assert refusal(assignment).what.startswith(choice)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rotation_goes_with_an_optimizer_whose_steps_have_a_public_norm(optimizer: str) -> None:
    sections: dict[str, Any] = {
        "training": {"optimizer": optimizer},
        "sealing": {"profile": "sealed", "rotation": True},
    }
    if optimizer == "sgd":
        assert load_experiment(experiment_tree("people.csv", **sections)).sealing.rotation
    else:
        assert refusal(**sections).what.startswith("sealing.rotation needs training.optimizer = 'sgd'")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_stand_in_for_a_missing_number_is_a_number(value: str) -> None:
    assert refusal(f"schema.features.age.missing={value}").what.startswith(f"schema.features.age.missing = {value}: ")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_label_threshold_is_a_number(value: str) -> None:
    error = refusal(f"data.label={{column='sick', at_least={value}}}")
    assert error.what.startswith("data.label")


def test_several_faults_are_told_together() -> None:
    error = refusal("run.rounds=0", "privacy.delta=1")
    assert error.what == (
        "run.rounds = 0: input should be greater than or equal to 1; privacy.delta = 1: input should be less than 0.1"
    )


def test_a_missing_section_is_named() -> None:
    tree = experiment_tree("people.csv")
    del tree["privacy"]
    with pytest.raises(ConfigError, match="privacy is required"):
        load_experiment(tree)


def test_no_noise_is_allowed_on_public_data_only() -> None:
    assert not load_experiment(experiment_tree("people.csv"), ["privacy.epsilon=inf"]).privacy.is_private
    assert refusal("privacy.epsilon=inf", "data.public=false").what == (
        "privacy.epsilon = inf needs data.public = true: without noise, what a site sends reveals its people"
    )


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "none.toml")
    assert str(caught.value) == (
        f"{tmp_path / 'none.toml'}: there is no such file\n  → give the path of an experiment file"
    )


def test_a_file_that_is_not_toml_is_refused_with_the_line(write: Callable[[str], Path]) -> None:
    path = write("[run]\nname = 'tiny'\nrounds = = 5\n")
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert str(caught.value) == (
        f"{path}: is not valid TOML: Invalid value (at line 3, column 10)\n  → mend that line and try again"
    )


def test_a_key_given_twice_is_refused_with_the_line(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"is not valid TOML: Cannot overwrite a value \(at line 3"):
        read_toml(write("[run]\nrounds = 1\nrounds = 2\n"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*directory"):
        read_toml(tmp_path)


#: What Python's own TOML reader answers with errors that are none of TOML: too long a number, too deep a nest.
MONSTERS = {"a number of 5000 digits": "1" * 5000, "5000 nested lists": "[" * 5000 + "]" * 5000}


@pytest.mark.parametrize("value", MONSTERS.values(), ids=MONSTERS)
def test_a_value_that_python_cannot_hold_is_refused_in_a_file(value: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError):
        read_toml(write(f"a = {value}"))


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(content=b"\xff\xfe")
def test_whatever_a_file_holds_it_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    try:
        tree: dict[str, Any] | None = read_toml(path)
    except ConfigError:
        tree = None
    assert tree is None or tree == tomllib.loads(path.read_text(encoding="utf-8"))


# --- assignments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("run.rounds=3", ("run", "rounds"), 3),
        ("privacy.epsilon=inf", ("privacy", "epsilon"), float("inf")),
        ("data.public=true", ("data", "public"), True),
        ("data.file=my people.csv", ("data", "file"), "my people.csv"),
        ("data.file='7'", ("data", "file"), "7"),
        ("data.file=a=b.csv", ("data", "file"), "a=b.csv"),
        ("model.hidden=[64, 32]", ("model", "hidden"), [64, 32]),
        ("data.label={column='y', at_least=3}", ("data", "label"), {"column": "y", "at_least": 3}),
        (" run . rounds = 3", ("run", "rounds"), 3),
        ("data.file=", ("data", "file"), ""),
    ],
)
def test_an_assigned_value_is_toml_or_else_text(text: str, path: tuple[str, ...], value: object) -> None:
    assert parse_assignment(text) == (path, value)


@pytest.mark.parametrize("text", ["", "=", "rounds", "run.=1", ".rounds=1", "run..rounds=1", "=3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(text)
    assert str(caught.value) == f"--set: {text!r} is not an assignment\n  → write it as section.key=value"


def test_a_value_is_not_a_section() -> None:
    error = refusal("run.rounds.x=3")
    assert str(error) == "--set: 'rounds' in 'run.rounds.x=3' is a value, not a section\n  → shorten the key"


def test_no_line_of_an_assigned_value_is_dropped() -> None:
    _, value = parse_assignment("run.rounds=1\nprivacy = 3")
    assert value == "1\nprivacy = 3"


@pytest.mark.parametrize("value", MONSTERS.values(), ids=MONSTERS)
def test_a_value_that_python_cannot_hold_is_refused_or_taken_as_text(value: str) -> None:
    assert refusal(f"run.rounds={value}").exit_code == 2


@given(text=st.text(max_size=60) | st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,4}){0,2}=.{0,20}", fullmatch=True))
@example(text="a=2021-02-30")
@example(text='a="\\ud800"')
def test_an_assignment_is_parsed_or_refused_and_nothing_else(text: str) -> None:
    key, equals, _ = text.partition("=")
    well_formed = bool(equals) and all(part.strip() for part in key.split("."))
    try:
        path: tuple[str, ...] = parse_assignment(text)[0]
    except ConfigError:
        path = ()
    assert bool(path) == well_formed
    assert all(path)


@given(
    key=st.sampled_from(
        ["run.rounds", "run", "data.label", "data.label.bounds", "schema.features", "schema.features.age",
         "schema.features.age.bounds", "sites.population", "consent", "consent.withdrawals", "model", "model.hidden",
         "model.options", "privacy.epsilon", "sealing", "data.public"]
    ),
    value=st.recursive(
        st.none().map(lambda _: "nan") | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=8).map(repr)
        | st.sampled_from(["true", "inf", "-inf", "2020-01-01", "{}", "[]"]),
        lambda inner: st.lists(inner, max_size=3).map(lambda xs: "[" + ", ".join(xs) + "]")
        | inner.map(lambda x: "{kind = " + x + "}"),
        max_leaves=4,
    ),
)  # fmt: skip
def test_whatever_is_assigned_gives_an_experiment_or_a_configuration_error(key: str, value: str) -> None:
    try:
        answer: Experiment | ConfigError = load_experiment(experiment_tree("people.csv"), [f"{key}={value}"])
    except ConfigError as error:
        answer = error
    assert isinstance(answer, Experiment) or answer.exit_code == 2
