"""`confide audit`: verify logs offline, and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from confide.cli.render import Display, err, number, out, plain, show_json, table, when
from confide.cli.site_setup import PassphraseFile
from confide.errors import AuditError, ConfigError

if TYPE_CHECKING:
    from confide.protocol.rosterbook import RosterBook

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Evidence that a stranger can verify offline.")
_Folder = Annotated[Path, typer.Argument(help="A run's output folder, or a folder of exported logs.")]
_Run = Annotated[str | None, typer.Option("--run", help="The run, where the logs hold several.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def root() -> None:
    """Evidence that a stranger can verify offline."""


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A run's output folder, a folder of exported logs, or a proof file.")],
    witness: Annotated[
        list[Path] | None, typer.Option("--witness", help="A folder of an independent witness's notes.")
    ] = None,
    run: _Run = None,
    as_json: _Json = False,
) -> None:
    """Check signatures, trees, whose keys these are, agreement of the parties, charges, ε. Exit 0, or 7 with findings.

    Logs of several runs are checked run by run.
    """
    from confide.privacy.audit.verify import verify as check
    from confide.privacy.audit.verify import verify_runs
    from confide.privacy.audit.witness import WitnessNotes
    from confide.protocol.rosterbook import RosterBook

    if folder.is_file():
        _show_proof(folder, as_json=as_json)
        return
    notes = [WitnessNotes(w) for w in witness or ()]
    book = RosterBook.read(folder)
    runs = verify_runs(folder, notes, book) if run is None else [check(folder, notes, run, book)]
    found = list(dict.fromkeys(finding for evidence in runs for finding in evidence.findings))
    logs = {
        log.party: len(log.entries) for evidence in runs for log in (evidence.coordinator, *evidence.sites.values())
    }
    entries = sum(logs.values())
    if as_json:
        show_json({
            "run_id": runs[-1].run, "runs": [evidence.run for evidence in runs], "parties": len(logs),
            "entries": entries, "verified": not found, "findings": [plain(finding) for finding in found],
            "roster": _roster(book),
        })  # fmt: skip
    if found and as_json:
        err.print(f"{folder}: {len(found)} findings; first: {found[0]}", markup=False, soft_wrap=True)
        raise typer.Exit(AuditError.exit_code)
    if found:
        for finding in found[1:20]:
            err.print(f"also ({finding.severity}): {finding}", markup=False, soft_wrap=True)
        raise AuditError(
            f"{len(found)} finding{'s' if len(found) > 1 else ''}; first ({found[0].severity}): {found[0]}",
            where=str(folder),
            hint="do not rely on this run's evidence; compare with copies that other parties keep",
        )
    if not as_json:
        names = f"run {runs[0].run}" if len(runs) == 1 else f"{len(runs)} runs, the last {runs[-1].run}"
        out.print(f"verified: {names}, {len(logs)} logs, {entries:,} entries, no finding")
        roster = _roster(book)
        if roster is not None:
            out.print(f"keys: version {roster['version']} of {roster['federation']}, signed by its {roster['members']} "
                      f"members; ask one of them whether its fingerprint is {roster['fingerprint']}",
                      soft_wrap=True, markup=False)  # fmt: skip


def _roster(book: RosterBook) -> dict[str, Any] | None:
    """What somebody who doubts the keys has to ask a site for."""
    from confide.protocol.fingerprint import fingerprint

    if book.latest is None:
        return None
    return {"federation": book.latest.federation, "version": book.latest.version, "digest": book.latest.digest,
            "members": len(book.latest.members), "fingerprint": fingerprint(book.latest)}  # fmt: skip


def _show_proof(path: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from confide.privacy.audit.participation import KIND, read_participation
    from confide.privacy.audit.proof import kind_of, read_proof

    part = read_participation(path) if kind_of(path) == KIND else None
    proved = part.entry if part is not None else read_proof(path)
    record = {"kind": proved.record.KIND, **asdict(proved.record)}
    if as_json:
        person = part and {"pseudonym": part.pseudonym, "run": part.run, "round": part.round, "role": part.role}
        show_json({
            "verified": True, "person": person, "party": proved.party, "log": proved.checkpoint.origin,
            "entry": proved.number, "entries": proved.checkpoint.size, "at": when(proved.at),
            "key_fingerprint": proved.fingerprint, "record": record,
        })  # fmt: skip
        return
    if part is not None:
        role = {"train": "in the snapshot, to train on", "held_out": "in the snapshot, to evaluate on"}
        out.print(table(f"Proved: one person's part in round {part.round} of run {part.run}", [
            ("person", f"{role.get(str(part.role), 'not in the snapshot')}, at site {proved.party}"),
            ("pseudonym", f"{part.pseudonym} (compare it with the one on her consent receipt)"),
        ]))  # fmt: skip
    out.print(table(f"Proved: entry {proved.number} of the log of {proved.party}", [
        ("log", f"{proved.checkpoint.origin}, when it had {proved.checkpoint.size:,} entries"),
        ("written", when(proved.at)),
        *((name, value if isinstance(value, str) else str(value)) for name, value in record.items()),
        ("signed by", f"{proved.fingerprint} (compare this fingerprint with what {proved.party} told you)"),
    ]))  # fmt: skip


@app.command("prove")
def prove(
    folder: _Folder,
    party: Annotated[str, typer.Option(help="Whose log: a site, or the coordinator.")],
    entry: Annotated[int | None, typer.Option(help="The entry's number, counted from 0.")] = None,
    charge: Annotated[str | None, typer.Option(help="Or a charge: RUN/ROUND/train or RUN/ROUND/held_out.")] = None,
    person: Annotated[
        str | None, typer.Option(help="Or a person's part in --round, by identifier. Run at the site.")
    ] = None,
    round_: Annotated[int | None, typer.Option("--round", help="The round that --person is about.")] = None,
    site: Annotated[
        Path | None, typer.Option("--site", help="The folder of the deployed site that --person is about.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="The sites' ledger folder. Default: ledgers/ in the folder.")
    ] = None,
    run: _Run = None,
    passphrase_file: PassphraseFile = None,
    out_file: Annotated[Path, typer.Option("--out", help="The proof file.")] = Path("proof.json"),
    as_json: _Json = False,
) -> None:
    """Write a small file that proves one entry of a log, or one person's part in a round, by itself.

    `confide audit verify FILE` checks it.
    """
    from confide.clients.attest import attest
    from confide.clients.sitefiles import SiteFiles
    from confide.privacy.audit.participation import find_snapshot
    from confide.privacy.audit.proof import find_charge, make_proof
    from confide.privacy.audit.verify import verify as check
    from confide.protocol.keyfiles import passphrase_from
    from confide.protocol.rosterbook import RosterBook

    if sum(given is not None for given in (entry, charge, person)) != 1 or (person is None) != (round_ is None):
        raise ConfigError("name exactly one of --entry, --charge, --person with --round", where="confide audit prove",
                          hint="--entry 12, or --charge RUN/ROUND/train, or --person ID --round 3")  # fmt: skip
    evidence = check(folder, run=run, rosters=RosterBook.read(folder))
    if person is not None and round_ is not None:
        number = find_snapshot(evidence, party, round_)
        if site is not None:
            files = SiteFiles.deployed(site, passphrase_from(passphrase_file))
        else:
            files = SiteFiles.of(party, folder / "sites" / party, (ledger or folder / "ledgers") / party)
        data = attest(person, round_, evidence, files)
    else:
        number = entry if entry is not None else find_charge(evidence, party, charge or "")
        data = make_proof(evidence, party, number)
    try:
        out_file.write_bytes(data)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(out_file), hint="name a place you may write to"
        ) from None
    if as_json:
        show_json({"proof": str(out_file), "party": party, "entry": number, "bytes": len(data)})
    else:
        what = f"a person's part in round {round_}, by entry {number}" if person is not None else f"entry {number}"
        out.print(f"{out_file}: {what} of the log of {party}, {len(data):,} bytes", soft_wrap=True)


@app.command("export")
def export(folder: _Folder, as_json: _Json = False) -> None:
    """Write the logs of a run whose program was killed as files that travel. A run that ends does so by itself."""
    from confide.privacy.audit.log import LOG_SUFFIX, export_log
    from confide.protocol.rosterbook import RosterBook, write_rosters

    logs, written = folder / "logs", list[str]()
    sites = sorted(p for p in (folder / "sites").glob("*") if p.is_dir()) if (folder / "sites").is_dir() else []
    found = [(folder / "sites" / "coordinator.db", "coordinator"), *((p / "federated.db", p.name) for p in sites)]
    found = [(database, name) for database, name in found if database.is_file()]
    if not found:
        raise AuditError("there are no logs of a run here", where=str(folder), hint="give the output folder of a run")
    logs.mkdir(exist_ok=True)
    for database, name in found:
        export_log(database, logs / f"{name}{LOG_SUFFIX}")
        written.append(name)
    chain = RosterBook.read(folder / "sites").chain
    if chain:
        write_rosters(logs, chain)
    if as_json:
        show_json({"folder": str(logs), "parties": written})
    else:
        out.print(f"{logs}: {len(written)} logs", soft_wrap=True)


@app.command("exposure")
def exposure(
    subject: Annotated[str, typer.Argument(help="The person's identifier, as in the site's table.")],
    folder: Annotated[Path, typer.Argument(help="The site's folder (site.toml), or a simulated run's output folder.")],
    ledger: Annotated[
        Path | None, typer.Option(help="A simulated run's ledger folder. Default: ledgers/ in the folder.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Whose answer, where several sites hold her. Default: the first that does.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Also write the answer as a page.")] = None,
    as_json: _Json = False,
) -> None:
    """Answer one person (GDPR Art. 15): purposes, rounds, models, ε, recipients, how to withdraw. Run at the site."""
    from confide.clients.exposure import describe_person, write_person
    from confide.clients.sitefiles import sites_of
    from confide.protocol.keyfiles import passphrase_from

    answers = [describe_person(subject, files) for files in sites_of(folder, ledger, passphrase_from(passphrase_file))]
    if site is not None and site not in {a.site for a in answers}:
        raise ConfigError(f"there is no site {site!r} in {folder}", where="--site",
                          hint=f"there are {', '.join(a.site for a in answers)}")  # fmt: skip
    answer = next((a for a in answers if (a.known if site is None else a.site == site)), answers[0])
    others = [a.site for a in answers if a.known and a.site != answer.site]
    if others and site is None:
        err.print(f"held at {', '.join(others)} too: --site asks there", markup=False)
    if out_file is not None:
        try:
            write_person(answer, out_file)
        except OSError as error:
            raise ConfigError(
                f"cannot be written: {error.strerror}", where=str(out_file), hint="name a place you may write to"
            ) from None
    if as_json:
        show_json(plain(answer))
        return
    if not answer.known:
        out.print("No site here holds anything about such a person.")
        return
    now = ", ".join(f"{d.purpose}: {d.status}" for d in answer.decisions) or "none on record"
    if answer.erased:
        now = "erased: her record cannot be found any more, and nothing can be recorded of her"
    if answer.forgotten:
        now += "; which runs held her was destroyed: ε is the most that they can have cost her"
    charged = f"ε ≤ {number(answer.charged_epsilon, 2)} at δ = {answer.delta:g}, per {answer.unit}"
    if answer.epsilon > answer.charged_epsilon:
        charged = f"ε = ∞: a run on public data protected nobody; from all others {charged}"
    out.print(table(f"What site {answer.site} did with the data of {answer.subject}: for this person only", [
        ("consent now", now),
        ("role", "evaluation only" if answer.role == "held_out" else "training only"),
        ("privacy loss so far", charged),
        *((f"run {r.run}", f"{r.purpose or 'of another folder'}; rounds {', '.join(map(str, r.rounds))}; "
           f"ε {number(r.epsilon, 2)}; model {r.model[:16] + '…' if r.model else 'not released'}")
          for r in answer.runs),
        *([] if answer.erased else [("to withdraw", answer.how_to_withdraw)]),
    ]))  # fmt: skip
    if out_file is not None:
        out.print(f"written to {out_file}", markup=False, soft_wrap=True)


@app.command("attack")
def attack(
    folder: _Folder,
    run: _Run = None,
    site: Annotated[str | None, typer.Option(help="Which site's part. Default: the first of the roster.")] = None,
    canaries: Annotated[
        int, typer.Option(help="Persons that are invented, each for a whole run of the site: more show more.")
    ] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    as_json: _Json = False,
) -> None:
    """Try to refute a run's ε with invented persons; sign the result and put it beside the logs. Exit 7 if it is.

    No real person's record is read, so nothing is charged.
    """
    from confide.simulations.attack import attack_run

    with Display("attacking") as display:
        found = attack_run(folder, run=run, site=site, canaries=canaries, device=device, progress=display.count)
    record, refuted = found.record, float(found.record.shown) > float(found.record.claimed)
    if as_json:
        show_json({
            "attack": f"{found.name}.log", **{k: v for k, v in plain(record).items() if k != "software"},
            "key_fingerprint": found.fingerprint, "refuted": refuted,
        })  # fmt: skip
    else:
        out.print(table(f"Attack {found.name} on run {record.run}, site {record.site}: {record.attack}", [
            ("invented persons", f"{record.canaries:,}, each in or out by a fair coin"),
            ("guessed right", f"{record.correct:,} of {record.guesses:,}"),
            ("ε shown", f"≥ {number(float(record.shown), 2)}, at {float(record.confidence):.1%} confidence"),
            ("ε claimed", f"≤ {number(float(record.claimed), 2)} at δ = {record.delta}"),
            ("signed by", f"{found.fingerprint} (tell it to those who are to believe this)"),
        ]))  # fmt: skip
        out.print(f"{folder / 'attacks' / found.name}.log", soft_wrap=True)
    if refuted and as_json:
        raise typer.Exit(AuditError.exit_code)
    if refuted:
        raise AuditError(
            f"a person loses at least ε = {record.shown}, where the run claims at most {record.claimed}",
            where=str(folder), hint="release nothing more of this run, and look for the fault in its training",
        )  # fmt: skip


witnesses = typer.Typer(no_args_is_help=True, help="An independent witness: remembers logs, and signs only growth.")
app.add_typer(witnesses, name="witness")


@witnesses.command("init")
def init_witness(
    folder: Annotated[Path, typer.Argument(help="New folder of the witness.")],
    name: Annotated[str, typer.Option(help="The witness's name.")],
    as_json: _Json = False,
) -> None:
    """Make a witness: a folder with a key of its own."""
    from confide.privacy.audit.proof import fingerprint
    from confide.privacy.audit.witness import Witness

    key = Witness.create(folder, name).notes.public_key
    if as_json:
        show_json({"witness": name, "folder": str(folder), "public_key": key.hex(), "fingerprint": fingerprint(key)})
    else:
        out.print(f"{name}: key {fingerprint(key)} in {folder}", soft_wrap=True)


@witnesses.command("cosign")
def cosign(
    folder: Annotated[Path, typer.Argument(help="The witness's folder.")],
    run: Annotated[Path, typer.Argument(help="A run's output folder, or a folder of exported logs.")],
    as_json: _Json = False,
) -> None:
    """Look at every log of a run, and sign those states that only grew since the last time. Exit 7 if one did not."""
    from confide.privacy.audit.evidence import load_runs
    from confide.privacy.audit.witness import Witness
    from confide.protocol.rosterbook import RosterBook

    witness, runs = Witness(folder), load_runs(run, RosterBook.read(run))
    logs = {log.party: log for evidence in runs for log in (evidence.coordinator, *evidence.sites.values())}
    done = []
    for log in logs.values():
        if log.checkpoint is None or log.path is None:
            raise AuditError("there is no log with a checkpoint that holds", where=f"log of {log.party}",
                             hint="see confide audit verify")  # fmt: skip
        seen = witness.cosign(log.path, log.checkpoint.origin, log.party, log.public_key, log.keys)
        done.append({"party": log.party, "entries": seen.checkpoint.size, "at": when(seen.at * 10**6)})
    if as_json:
        show_json({"witness": witness.name, "run_id": runs[-1].run, "logs": done})
    else:
        out.print(f"{witness.name} cosigned {len(done)} logs, the last run {runs[-1].run}", soft_wrap=True)


@app.command("report")
def report(
    folder: _Folder,
    out_file: Annotated[Path | None, typer.Option("--out", help="Default: report.html in the folder.")] = None,
    run: _Run = None,
    as_json: _Json = False,
) -> None:
    """Write one self-contained HTML page: what was trained, for what, at what privacy loss, who could see what."""
    from confide.privacy.audit.report import write_report
    from confide.protocol.rosterbook import RosterBook

    path = out_file or folder / "report.html"
    try:
        summary = write_report(folder, path, run, RosterBook.read(folder))
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(path), hint="name a place you may write to"
        ) from None
    if as_json:
        show_json({"report": str(path), **summary})
    else:
        verdict = "verified" if summary["verified"] else f"{summary['findings']} findings: the page says which"
        out.print(f"{path} ({verdict})", soft_wrap=True)
