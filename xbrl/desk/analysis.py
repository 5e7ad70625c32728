"""Analyse reports from beginning to end: find, read, ask the model, judge, write. Engine and pages run over processes."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from xbrl.corpus.examples import read_register
from xbrl.desk.audit import hash_of_file, key_of
from xbrl.desk.inputs import Inputs, Knowledge, collect, find_files
from xbrl.desk.letter import READY
from xbrl.desk.output import RECORD_FILE, Job, finish
from xbrl.desk.overview import totals, write_overview
from xbrl.desk.record import Case, Reply
from xbrl.read.folder import in_parallel
from xbrl.rules.findings import load_findings

LISTED = 50  # reports that are named one by one on the terminal


@dataclass(frozen=True)
class Options:
    """What to analyse, and how: the options of scripts/analyze.py, which documents them."""

    files: tuple[Path, ...]
    out: Path
    draft: bool = False
    register: Path | None = None
    findings: Path | None = None
    taxonomy: tuple[Path, ...] = ()
    workers: int = 1

    def for_key(self) -> dict:
        """What changes the result, besides the reports and what the register and the findings say of each."""
        return {"draft": self.draft, "taxonomy": [hash_of_file(path) for path in self.taxonomy]}


class Analysis:
    """One call of the command. Without a model: `prepare`, then `write` once. With one, `write` after each batch of replies."""

    def __init__(self, options: Options, versions: dict, asked: dict) -> None:
        """`asked` describes how the model is asked, {} without one."""
        self.options, self.versions = options, versions
        for path in options.taxonomy:
            if not path.is_file():
                raise UserError(f"{path}: taxonomy package not found")
        self.described = options.for_key() | asked
        self.key = key_of(versions, self.described)
        self.records: list[dict] = []
        self.inputs = Inputs((), (), (), {})

    def prepare(self) -> tuple[Case, ...]:
        """Find and read the reports; those that are to be analysed. Writes nothing but the output directory."""
        options = self.options
        files = find_files(options.files, options.out)
        register = read_register(options.register) if options.register else {}
        decisions = load_findings(options.findings) if options.findings else {}
        self.knowledge = Knowledge(register, dict(decisions))
        _make_directory(options.out)
        self.inputs = collect(files, options.out, self.key, self.knowledge, options.taxonomy, options.workers)
        self.records = [_read_record(folder) for folder in self.inputs.finished]
        return self.inputs.cases

    def write(self, cases: Sequence[Case]) -> None:
        """Judge and write these reports over the worker processes."""
        jobs = [Job(case, self.options.out, self.options.draft, self._audit(case)) for case in cases]
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
        print(f"{self.options.out / 'index.html'}")
        if self.inputs.refused:
            return 2
        return int(any(one["has_findings"] or one["letter"]["state"] != READY for one in self.records))

    def _audit(self, case: Case) -> dict:
        return {
            "key": self.key,
            "versions": self.versions,
            "options": self.described,
            "inputs": self._hashed(case.report.files or (case.report.path,)),
            "earlier": self._hashed(path for old in case.earlier for path in old.files or (old.path,)),
            "knowledge": self.knowledge.describe(case.report.entity, case.report.period),
        }

    def _hashed(self, paths: Iterable[Path]) -> list[dict]:
        return [{"file": path.name, "sha256": self.inputs.hashes[path]} for path in paths]


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


def _read_record(folder: Path) -> dict:
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
