"""Analyse reports from beginning to end: find, read, ask the model, judge, write. Engine and pages run over processes."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import UserError
from xbrl.corpus.examples import read_register
from xbrl.desk.audit import hash_of_file, key_of
from xbrl.desk.inputs import Inputs, Knowledge, collect, find_files
from xbrl.desk.output import RECORD_FILE, Job, finish, totals, write_overview
from xbrl.desk.record import READY, Case, Form, Reply
from xbrl.read.folder import in_parallel
from xbrl.rules.findings import Finding, load_findings
from xbrl.rules.measures import load_basis


@dataclass(frozen=True)
class Options:
    """What to analyse, and how: the options of scripts/analyze.py, which documents them."""

    files: tuple[Path, ...]
    out: Path
    draft: bool = False
    register: Path | None = None
    findings: Path | None = None
    taxonomy: tuple[Path, ...] = ()
    form: Form = Form()
    workers: int = 1

    def for_key(self) -> dict:
        """What changes the result, besides the reports and what the register and the findings say of each."""
        taxonomy = [hash_of_file(path) for path in self.taxonomy]
        return {"draft": self.draft, "taxonomy": taxonomy, **asdict(self.form)}


class Analysis:
    """One call of the command. Without a model: `prepare`, then `write` once. With one, `write` after each batch of replies."""

    def __init__(self, options: Options, versions: dict, asked: dict) -> None:
        """`asked` describes how the model is asked, {} without one."""
        self.options, self.versions = options, versions
        load_basis(options.form.basis)
        for path in options.taxonomy:
            if not path.is_file():
                raise UserError(f"{path}: taxonomy package not found")
        self.described = options.for_key() | asked
        self.key = key_of(versions, self.described)
        self.records: list[dict] = []
        self.inputs = Inputs((), (), ())
        self.decisions: dict[tuple[str, str], tuple[Finding, ...]] = {}

    def prepare(self) -> tuple[Case, ...]:
        """Find and read the reports; those that are to be analysed. Writes nothing but the output directory."""
        options = self.options
        files = find_files(options.files, options.out)
        register = read_register(options.register) if options.register else {}
        self.decisions = decisions = load_findings(options.findings) if options.findings else {}
        _make_directory(options.out)
        knowledge = Knowledge(register, decisions)
        self.inputs = collect(files, options.out, self.key, knowledge, options.taxonomy, options.workers)
        self.records = [json.loads((folder / RECORD_FILE).read_text("utf-8")) for folder in self.inputs.finished]
        self.audits = {(case.report.entity, case.report.period): depends for case, depends in self.inputs.cases}
        return tuple(case for case, _ in self.inputs.cases)

    def write(self, cases: Sequence[Case]) -> None:
        """Judge and write these reports over the worker processes."""
        made_by = {"versions": self.versions, "options": self.described}
        jobs = [
            Job(case, self.options.out, self.options.form, self.options.draft, self._audit(case) | made_by)
            for case in cases
        ]
        self.records += list(in_parallel(finish, jobs, self.options.workers, "reports"))

    def end(self) -> int:
        """Write the overview, print the summary, and return the exit code: 0, 1 if a person must act, 2 with refused files.

        A person must act on findings, and on a letter that is not ready, whatever keeps it back.
        """
        write_overview(self.options.out, self.records, self.inputs.refused)
        for sentence in self.inputs.refused:
            print(f"error: {sentence}", file=sys.stderr)
        unchanged = len(self.inputs.finished)
        print(totals(self.records))
        print(
            f"{len(self.records) - unchanged} analysed, {unchanged} unchanged; {len(self.inputs.refused)} files refused"
        )
        analysed = {(one["entity"].partition(".")[0], one["period"]) for one in self.records}
        others = [one for case, lines in self.decisions.items() if case not in analysed for one in lines]
        if others:
            print(
                f"{len(others)} decisions are on reports that are not among these; the first: {others[0].where}, on "
                f"{others[0].entity} as of {others[0].period}"
            )
        print(f"{self.options.out / 'index.html'}")
        if self.inputs.refused:
            return 2
        return int(any(one["has_findings"] or one["letter"]["state"] != READY for one in self.records))

    def _audit(self, case: Case) -> dict:
        return self.audits[case.report.entity, case.report.period]


def with_replies(cases: Sequence[Case], replies: Sequence[Reply]) -> list[Case]:
    """The cases with the replies of the model."""
    return [replace(case, reply=reply) for case, reply in zip(cases, replies, strict=True)]


def batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    """The cases in groups of `size`: what is finished is written before the next group is asked."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def analyse(
    options: Options,
    versions: dict,
    asked: dict,
    ask: Callable[[Sequence[Case]], Sequence[Reply]] | None = None,
    batch: int = 1,
) -> tuple[int, list[dict]]:
    """The whole analysis in one process: (exit code, records). `ask` answers a batch of cases; None without a model."""
    analysis = Analysis(options, versions, asked)
    cases = analysis.prepare()
    if ask is None:
        analysis.write(cases)
    else:
        for group in batches(cases, batch):
            analysis.write(with_replies(group, ask(group)))
    return analysis.end(), analysis.records


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; name a directory that can be made") from error
