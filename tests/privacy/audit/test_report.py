"""The report: one page for people who answer for a run. It says what the logs say, to everybody, on any screen."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from confide.privacy.audit import records as r
from confide.privacy.audit.report import write_report
from confide.privacy.dp import metrics
from tests.privacy.audit.command import confide
from tests.privacy.audit.conftest import PEOPLE
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run
from tests.support import people_table

VOID = {"meta", "link", "br", "img", "hr", "input", "line", "polyline", "circle"}


class Page(HTMLParser):
    """A page as a tree of (tag, attributes, text inside, parents)."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None], list[str], tuple[str, ...]]] = []
        self._open: list[int] = []
        self.unclosed: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parents = tuple(self.elements[i][0] for i in self._open)
        self.elements.append((tag, dict(attrs), [], parents))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), [], tuple(self.elements[i][0] for i in self._open)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self.elements[self._open[-1]][0] != tag:
            self.unclosed.append(tag)
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def of(self, *tags: str) -> list[tuple[str, dict[str, str | None], list[str], tuple[str, ...]]]:
        """Elements by tag, in document order."""
        return [e for e in self.elements if e[0] in tags]

    @property
    def text(self) -> str:
        """All that can be read, with white space folded."""
        body = next(e for e in self.elements if e[0] == "body")
        return " ".join("".join(body[2]).split())


def report(run: Run) -> Page:
    """The run's page."""
    write_report(run.folder, run.folder / "report.html")
    return Page((run.folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pages: a finished run's, an interrupted one's, one with findings."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(finished.folder, folder / "finished.html")
    damaged = finished.copy(folder / "damaged")
    damaged.log("cedar").write_bytes(damaged.log("cedar").read_bytes()[:-50])
    write_report(damaged.folder, folder / "findings.html")
    return folder


@pytest.fixture(scope="module")
def pages(written: Path, interrupted: Run) -> Path:
    """The same with the interrupted run's."""
    write_report(interrupted.folder, written / "interrupted.html")
    return written


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    """The finished run's page."""
    return Page((written / "finished.html").read_text(encoding="utf-8"))


@pytest.fixture(params=["finished", "findings", "interrupted"])
def any_page(request: pytest.FixtureRequest, pages: Path) -> Page:
    """Each page in turn."""
    return Page((pages / f"{request.param}.html").read_text(encoding="utf-8"))


# --- how it is built -------------------------------------------------------------------------------------------------


def test_it_is_one_file_that_refers_to_nothing_outside(any_page: Page) -> None:
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|javascript:|data:", any_page.source)
    for tag, attributes, _, _ in any_page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base", "form"), tag
        assert not {"src", "srcset", "action", "data", "poster", "background"} & set(attributes), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
        target = attributes.get("href") or attributes.get("xlink:href")
        assert target is None or target.startswith("#"), target


def test_every_link_inside_it_leads_somewhere(any_page: Page) -> None:
    ids = [a["id"] for _, a, _, _ in any_page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for _, a, _, _ in any_page.elements if "href" in a]
    assert targets
    assert {t and t[1:] for t in targets} <= set(ids)


def test_it_has_a_language_a_title_one_main_heading_and_its_parts(any_page: Page) -> None:
    assert any_page.source.lower().startswith("<!doctype html>")
    assert any_page.unclosed == []
    assert any_page.of("html")[0][1]["lang"] == "en"
    assert len("".join(any_page.of("title")[0][2]).strip()) > 10
    assert {a.get("charset") for _, a, _, _ in any_page.of("meta")} >= {"utf-8"}
    assert [len(any_page.of(tag)) for tag in ("h1", "header", "main", "footer")] == [1, 1, 1, 1]


def test_headings_never_skip_a_level(any_page: Page) -> None:
    levels = [int(tag[1]) for tag, *_ in any_page.of("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all("".join(text).strip() for _, _, text, _ in any_page.of("h1", "h2", "h3"))


def test_every_table_says_what_it_is_and_every_heading_cell_what_it_heads(any_page: Page) -> None:
    tables = len(any_page.of("table"))
    assert tables >= 4
    assert len(any_page.of("caption")) == tables
    for _, attributes, text, parents in any_page.of("th"):
        assert attributes.get("scope") == ("col" if "thead" in parents else "row"), text


def test_a_table_of_refusals_says_what_it_is_too(run: Run) -> None:
    book = Logbook(run)
    refused = r.Refused(run=book.logs["ash"][0].record.run, round=2, step="train", party="ash", reason="abstains")
    book.insert("ash", book.index("ash", r.UpdateCommitted, round=2), refused)
    book.insert(COORDINATOR, book.index(COORDINATOR, r.Cohort, round=2), refused)
    book.conspire()
    page = report(run)
    assert "abstains" in page.text
    assert len(page.of("caption")) == len(page.of("table"))


def test_every_drawing_can_be_read_aloud(any_page: Page) -> None:
    drawings = any_page.of("svg")
    assert drawings
    ids = {a["id"]: " ".join(text) for _, a, text, _ in any_page.elements if a.get("id")}
    for _, attributes, _, _ in drawings:
        assert attributes["role"] == "img"
        named = str(attributes["aria-labelledby"]).split()
        assert len(named) == 2
        assert all(len(ids[name]) > 10 for name in named)
    assert [len(any_page.of("title")) - 1, len(any_page.of("desc"))] == [len(drawings)] * 2


def test_what_scrolls_can_be_reached_with_the_keyboard(any_page: Page) -> None:
    for _, attributes, _, _ in any_page.elements:
        if "scroll" in str(attributes.get("class", "")).split():
            assert attributes["tabindex"] == "0"


# --- what it says ----------------------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_the_result(page: Page, finished: Run) -> None:
    result = json.loads((finished.folder / "result.json").read_text())
    assert f"run {result['run_id']}" in page.text
    assert f"at most ε = {result['epsilon']['max']:.2f} at δ = {result['delta']:g}" in page.text
    assert "per subject" in page.text
    for name, value in result["released_metrics"].items():
        shown = metrics.NAMES[name]
        row = [f for f in _rows(page) if f[:2] == [str(result["rounds"]), shown]]
        assert row, name
        assert row[0][2] == ("—" if value is None else f"{value:.3f}")
        bounds = result["released_intervals"][name]
        assert row[0][3] == ("too noisy to say" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}")
    for site in result["sites"]:
        cells = next(f for f in _rows(page) if f[0] == site)
        assert max(float(cells[1]), float(cells[2])) == float(f"{result['epsilon']['per_site'][site]:.2f}")
    assert f"{result['rounds']} × 4" in page.text
    for name, value in result["metrics"].items():
        assert f"{metrics.NAMES[name]} " in page.text
        assert value is not None


def _rows(page: Page) -> list[list[str]]:
    """The cells of every table row."""
    rows: list[list[str]] = []
    for tag, _, text, _ in page.elements:
        if tag == "tr":
            rows.append([])
        elif tag in ("th", "td") and rows:
            rows[-1].append(" ".join("".join(text).split()))
    return rows


def test_every_figure_names_the_entry_it_comes_from(page: Page, finished: Run) -> None:
    records = finished.records(COORDINATOR)
    cohorts = [n for n, e in enumerate(records) if isinstance(e, r.Cohort)]
    shown = [row[-1] for row in _rows(page) if len(row) == 5 and row[2] == "sum opened"]
    assert shown == [f"coordinator {n}" for n in cohorts]
    metrics = {f"coordinator {n}" for n, e in enumerate(records) if isinstance(e, r.MetricsReleased)}
    assert metrics <= {row[-1] for row in _rows(page)}
    for site in finished.sites:
        charges = [n for n, e in enumerate(finished.records(site)) if isinstance(e, r.Charged)]
        row = next(f for f in _rows(page) if f[0] == site)
        assert row[-1] == f"{len(charges)} charges, {charges[0]}–{charges[-1]}"


def test_it_counts_no_persons(any_page: Page, finished: Run) -> None:
    table = people_table(people=PEOPLE)
    exact = [e for site in finished.sites for e in finished.records(site, local=True) if isinstance(e, r.LocalSnapshot)]
    counts = {PEOPLE, len(table)} | {e.training for e in exact} | {e.held_out for e in exact}
    counts |= {e.training + e.held_out for e in exact} | set(table.groupby("clinic").size())
    words = set(re.findall(r"(?<![\w.:-])\d+(?![\w.:-])", any_page.text))
    assert words & {str(c) for c in counts if c > 100} == set()
    assert not re.search(r"\b\d[\d,]*\s+(persons?|people|subjects?|patients?|records?)\b", any_page.text)
    assert max(counts) > 100  # the control
    assert "450" in words  # another: numbers are found; this one is declared, and public


def test_it_says_that_the_evidence_holds(page: Page) -> None:
    assert "The evidence holds together." in page.text
    assert "does not hold" not in page.text
    assert "evidence towards compliance, not a claim of it" in page.text
    assert "interrupted" not in page.text.lower()


def test_it_says_what_does_not_hold_before_anything_else(run: Run) -> None:
    run.log("cedar").unlink()
    page = report(run)
    assert "The evidence does not hold together." in page.text
    assert "The evidence holds together" not in page.text
    assert "log of cedar: the log is missing" in page.text
    assert page.text.index("does not hold together") < page.text.index("What was trained")


def test_an_interrupted_run_is_told_as_such(interrupted: Run, tmp_path: Path) -> None:
    run = interrupted.copy(tmp_path / "run")
    assert json.loads((run.folder / "status.json").read_text())["status"] == "interrupted"
    page = report(run)
    assert "This run was interrupted." in page.text
    assert "No model was released." in page.text
    assert "What was charged stays charged." in page.text
    assert "The evidence holds together." in page.text
    outcomes = [row[2] for row in _rows(page) if len(row) == 5 and row[0] in ("1", "2")]
    assert outcomes[0] == "sum opened"


def test_an_interrupted_run_costs_what_was_charged_until_then(interrupted: Run, finished: Run, tmp_path: Path) -> None:
    whole, part = (
        float(re.search(r"at most ε = ([\d.]+)", report(run.copy(tmp_path / name)).text).group(1))  # type: ignore[union-attr]
        for name, run in (("whole", finished), ("part", interrupted))
    )
    assert 0 < part <= whole <= 4.0


def test_a_failed_run_is_told_as_such(stopped: Run) -> None:
    status = stopped.folder / "status.json"
    status.write_text(status.read_text().replace("interrupted", "failed"))
    assert "This run failed." in report(stopped).text


def test_a_charge_taken_back_though_its_update_was_summed_is_never_shown_as_less(run: Run) -> None:
    """The figure on the page must not fall because a site says afterwards that a charge was nothing."""
    before = _training_epsilon(report(run))
    book = Logbook(run)
    name = book.logs[COORDINATOR][0].record.run
    for site in run.sites:
        settled = r.Settled(run=name, charge=f"{name}/1/train", steps=0)
        book.insert(site, book.index(site, r.ModelReleased), settled)
    book.conspire()
    page = report(run)
    assert _training_epsilon(page) == before or "does not hold together" in page.text


def _training_epsilon(page: Page) -> dict[str, str]:
    return {row[0]: row[1] for row in _rows(page) if len(row) == 5 and "charges" in row[4]}


def test_a_run_that_ended_before_anything_was_charged_costs_nothing(start: Callable[..., Run]) -> None:
    """Interrupted before its first round: the page must say so, and not fail over an empty figure."""

    def stop(_: Any, round_: int) -> None:
        raise KeyboardInterrupt

    run = start("sealed", people=40, before_round=stop)
    page = report(run)
    assert "This run was interrupted." in page.text
    assert "at most ε = 0.00" in page.text
    assert "The evidence holds together." in page.text


def test_consent_is_said_to_be_simulated_where_it_is(page: Page) -> None:
    assert "simulated consent" in page.text
    assert "90% of the subjects were drawn" in page.text


def test_who_could_learn_what_is_said_for_the_profile(page: Page) -> None:
    assert "Profile sealed" in page.text
    assert "isolates the last" in page.text
    assert "A poisoned update cannot be detected under encryption." in page.text


def test_it_says_where_the_keys_of_the_run_were_destroyed(run: Run) -> None:
    numbers = {site: Logbook(run).index(site, r.KeysDestroyed) for site in run.sites}
    told = ", ".join(f"{site} (entry {numbers[site]})" for site in run.sites)
    assert f"The run’s keys were destroyed at: {told}." in report(run).text
    book = Logbook(run)
    del book.logs["birch"][numbers["birch"]]
    book.write("birch")
    assert "birch (entry" not in report(run).text


def test_an_interrupted_run_says_that_nobody_tells_of_destroyed_keys(interrupted: Run, tmp_path: Path) -> None:
    page = report(interrupted.copy(tmp_path / "run"))
    assert "No log says that the run’s keys were destroyed." in page.text


@pytest.mark.parametrize(
    ("share", "told"),
    [
        ("0.000000", "No coordinate of a sum was clipped"),
        ("0.250000", "At most 25.00% of a sum’s coordinates were clipped"),
        *((nonsense, "At most 100.00% of a sum’s") for nonsense in ("", "little", "nan", "inf", "-1", "7", "1e999")),
    ],
)
def test_it_says_how_much_was_clipped_and_takes_nonsense_for_the_worst(run: Run, share: str, told: str) -> None:
    book = Logbook(run)
    book.change("cedar", book.index("cedar", r.Opened, round=2), saturated=share)
    book.write("cedar")
    assert told in report(run).text


def test_every_attempt_at_a_round_is_told(retried: Run, tmp_path: Path) -> None:
    page = report(retried.copy(tmp_path / "run"))
    assert "The evidence holds together." in page.text
    again = "a site did not seal: tried again without it"
    assert [(row[0], row[2]) for row in _rows(page) if len(row) == 5 and re.fullmatch("[0-9a-f]{16}", row[3])] == [
        ("1", "sum opened"), ("2", again), ("2", "sum opened"), ("3", again), ("3", "sum opened"),
    ]  # fmt: skip
    assert "3 of 3 sums were opened" in page.text
    assert "0 abandoned" in page.text


def test_a_run_without_privacy_says_so(start: Callable[..., Run]) -> None:
    run = start("open", people=40, privacy={"epsilon": float("inf")})
    page = report(run)
    assert "No differential privacy (ε = ∞)" in page.text
    assert "at most ε" not in page.text
    assert "It gives no differential privacy" in page.text


# --- hostile text ----------------------------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</title></style></svg>{{1234*1001}}"


def _is_harmless(page: Page) -> None:
    assert page.of("script", "img", "iframe") == []
    assert not [a for _, a, _, _ in page.elements if any(name.startswith("on") for name in a)]
    assert page.unclosed == []
    assert "1235234" not in page.text
    assert len(page.of("style")) == len(page.of("main")) == 1


@pytest.mark.parametrize(
    "path",
    [("run",), ("purpose",), ("label", "column"), ("members", 0, "site"), ("model", "kind"), ("federation",),
     ("privacy", "unit"), ("sealing", "profile"), ("initial_model",)],
    ids=str,
)  # fmt: skip
def test_text_of_a_hostile_coordinator_is_shown_and_not_obeyed(run: Run, path: tuple[Any, ...]) -> None:
    first = run.records(COORDINATOR)[0]
    assert isinstance(first, r.RunCreated)
    manifest = json.loads(first.manifest)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = EVIL
    book = Logbook(run)
    book.change(COORDINATOR, 0, manifest=json.dumps(manifest))
    book.write(COORDINATOR)
    answer = confide("audit", "report", run.folder)
    assert answer.code in (0, 7), answer.err  # a page, or a finding: never a crash
    if answer.code == 0:
        page = Page((run.folder / "report.html").read_text(encoding="utf-8"))
        _is_harmless(page)
        if path in (("run",), ("purpose",), ("label", "column"), ("model", "kind")):
            assert " ".join(EVIL.split()) in page.text  # the control: it is on the page


def test_hostile_names_of_columns_and_values_are_shown_and_not_obeyed(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    table = people_table().rename(columns={"sick": EVIL, "age": f"{EVIL}-age"})
    table.to_csv(tmp_path / "people.csv", index=False)
    run = start(
        "open", people=40, data={"file": str(tmp_path / "people.csv"), "label": {"column": EVIL, "classes": [0, 1]}},
        schema={"features": {f"{EVIL}-age": {"kind": "number", "bounds": [0, 100]},
                             "smoker": {"kind": "category", "values": [0, 1]}}},
    )  # fmt: skip
    page = report(run)
    _is_harmless(page)
    assert f"predict {EVIL}" in page.text
    assert f"{EVIL}-age" in page.text
    assert "The evidence holds together." in page.text
    _is_harmless(Page((run.folder / "index.html").read_text(encoding="utf-8")))


def test_hostile_text_of_sites_is_shown_and_not_obeyed(run: Run) -> None:
    book = Logbook(run)
    name = book.logs["ash"][0].record.run
    book.insert(COORDINATOR, 2, r.Refused(run=name, round=1, step=EVIL, party=EVIL, reason=EVIL))
    book.insert(COORDINATOR, 2, r.RoundAbandoned(run=name, round=7, reason=EVIL))
    book.insert("birch", 2, r.RunStopped(run=name, reason=EVIL))
    book.change(COORDINATOR, 0, software={EVIL: EVIL})
    book.conspire()
    page = report(run)
    _is_harmless(page)
    assert page.text.count("<script>alert(1)</script>") >= 5


DAMAGED = [
    "", "null", "[]", "7", "{", '"text"', "[[]]", '{"metrics": 7}', '{"metrics": {"auc": "high"}, "round": 1}',
    '{"metrics": {"auc": null}, "round": null}', '{"metrics": {"auc": 0.5}}', '{"consent": 7}',
    '{"consent": {"simulate": true}}', '{"consent": {"simulate": {"fraction": "x"}}}', '{"consent": {"file": 7}}',
    '{"status": 7}', '{"status": ["failed"]}', '{"round": 1, "metrics": {"auc": NaN}}',
    '{"round": Infinity, "metrics": {"auc": 0.5}}', "[" * 100_000, "\x00\x01",
]  # fmt: skip


@pytest.mark.parametrize("name", ["rounds.jsonl", "experiment.json", "status.json"])
def test_a_damaged_file_beside_the_logs_does_not_keep_the_report_from_being_written(run: Run, name: str) -> None:
    """The page is made from the logs; what stands beside them is marked, and nothing depends on it."""
    crashed = []
    for content in DAMAGED:
        (run.folder / name).write_text(content)
        try:
            page = report(run)
        except Exception as error:
            crashed.append((content[:50], type(error).__name__))
        else:
            assert "The evidence holds together." in page.text
            assert "ε = " in page.text
    assert crashed == []


@pytest.mark.parametrize("name", ["rounds.jsonl", "experiment.json", "status.json"])
def test_a_missing_file_beside_the_logs_does_not_keep_the_report_from_being_written(run: Run, name: str) -> None:
    (run.folder / name).unlink()
    assert "The evidence holds together." in report(run).text


def test_hostile_text_beside_the_logs_is_not_obeyed(run: Run) -> None:
    (run.folder / "rounds.jsonl").write_text(
        "".join(json.dumps({"round": i, "metrics": {EVIL: 0.5, "auc": 0.25 * i}}) + "\n" for i in range(3))
    )
    experiment = {"consent": {"file": EVIL}}
    (run.folder / "experiment.json").write_text(json.dumps(experiment))
    page = report(run)
    _is_harmless(page)
    assert "<script>alert(1)</script>" in page.text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_it_into_the_folder(run: Run) -> None:
    answer = confide("audit", "report", run.folder)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.split() == [str(run.folder / "report.html"), "(verified)"]
    assert "<!doctype html>" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_command_writes_it_where_it_is_told(run: Run, tmp_path: Path) -> None:
    answer = confide("audit", "report", run.folder, "--out", tmp_path / "page.html", "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {
        "report": str(tmp_path / "page.html"), "verified": True, "findings": 0, "interrupted": False,
    }  # fmt: skip
    assert not (run.folder / "report.html").exists()


def test_the_command_says_how_many_findings_the_page_tells_of(run: Run) -> None:
    run.log("cedar").unlink()
    answer = confide("audit", "report", run.folder, "--json")
    found = json.loads(answer.out)
    assert found["verified"] is False
    assert found["findings"] > 0
    assert "log of cedar: the log is missing" in (run.folder / "report.html").read_text(encoding="utf-8")


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    """A browser. In CI it must be there; elsewhere one attempt is made to install it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and os.environ.get("CI", "").lower() != "true":
        command = "apt-get update -qq && apt-get install -y -qq chromium"
        subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=300)
        found = shutil.which("chromium")
    if found is None:
        pytest.fail("no Chromium: apt-get install -y chromium", pytrace=False)
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(pages: Path) -> Iterator[str]:
    """The pages, served on this machine: every other address stays unreachable for the browser."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(pages)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Chromium without a window."""
    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


class View:
    """The pages, one at a time, as one reader sees them."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self._address = page, address
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def __call__(self, name: str, scheme: str = "light", width: int = 1000, media: str = "screen") -> Any:
        """Open a page afresh."""
        self.complaints.clear()
        self.requests.clear()
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.emulate_media(media=media, color_scheme=scheme)
        self.page.goto("about:blank")
        self.page.goto(f"{self._address}/{name}.html")
        return self.page


@pytest.fixture(scope="module")
def view(browser: Any, address: str) -> Iterator[View]:
    """Open a page: `view("finished", "light", 1000)`."""
    context = browser.new_context()
    yield View(context.new_page(), address)
    context.close()


NAMES = ["finished", "findings", "interrupted"]

#: Contrast of every visible text with what lies behind it, by WCAG 2's formula.
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const light = c => { const f = c.slice(0, 3).map(v => { v /= 255; return v <= .04045 ? v / 12.92 :
    ((v + .055) / 1.055) ** 2.4; }); return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || ['STYLE', 'SCRIPT', 'title', 'desc'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    if (style.display === 'none') continue;
    const ink = parse(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.tagName, text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("light", "print"),
                                               ("dark", "print")])  # fmt: skip
def test_every_text_can_be_told_from_its_background(view: View, name: str, scheme: str, media: str) -> None:
    found = view(name, scheme, 1000, media).evaluate(CONTRAST)
    assert len(found) > 50
    assert {tag for _, tag, _ in found} >= {"P", "H2", "TH", "TD", "text"}
    assert [x for x in found if x[0] < 4.5] == []


@pytest.mark.parametrize("name", NAMES)
def test_dark_and_light_differ_and_print_is_always_on_white(view: View, name: str) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = (view(name, scheme).evaluate(ground) for scheme in ("light", "dark"))
    printed = {view(name, scheme, 1000, "print").evaluate(ground) for scheme in ("light", "dark")}
    assert light != dark
    assert printed == {"rgb(255, 255, 255)"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [320, 360, 1000])
def test_nothing_runs_over_the_edge(view: View, name: str, width: int) -> None:
    page = view(name, "light", width)
    size = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert size[0] <= size[1] <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg') &&
        e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert cut == []


@pytest.mark.parametrize("name", NAMES)
def test_the_browser_has_nothing_to_complain_about_and_fetches_nothing(view: View, name: str, address: str) -> None:
    for scheme in ("light", "dark"):
        view(name, scheme)
        assert [c for c in view.complaints if "favicon" not in c and "404" not in c] == []
        assert {u for u in view.requests if not u.endswith("/favicon.ico")} <= {f"{address}/{name}.html", "about:blank"}
        assert f"{address}/{name}.html" in view.requests


def test_the_first_tab_offers_to_skip_to_the_report(view: View) -> None:
    page = view("finished")
    hidden = page.evaluate("() => document.querySelector('a.skip').getBoundingClientRect().right")
    assert hidden <= 0
    page.keyboard.press("Tab")
    focus = page.evaluate(
        """() => { const e = document.activeElement, b = e.getBoundingClientRect(), s = getComputedStyle(e);
        return [e.className, b.left >= 0 && b.top >= 0 && b.width > 0, s.outlineStyle, s.outlineWidth]; }"""
    )
    assert focus[:2] == ["skip", True]
    assert focus[2] != "none"
    assert focus[3] != "0px"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")


def test_the_keyboard_reaches_every_table_that_scrolls(view: View) -> None:
    page = view("finished", "light", 360)
    count = page.evaluate("() => document.querySelectorAll('.scroll').length")
    reached = set()
    for _ in range(count + 3):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => [...document.querySelectorAll('.scroll')].indexOf(document.activeElement)"))
    assert reached >= set(range(count))


def test_drawings_have_names_and_descriptions_for_a_screen_reader(view: View) -> None:
    page = view("finished")
    names = page.get_by_role("img").all()
    assert len(names) == len(page.query_selector_all("svg")) >= 2
    assert page.get_by_role("img", name=re.compile("Privacy loss by round")).count() == 1


def test_it_prints_onto_paper(view: View) -> None:
    data = view("finished", "dark", 1000, "print").pdf(format="A4")
    assert data.startswith(b"%PDF")
    assert len(data) > 10_000
