"""Analyse reports from beginning to end: find, read, ask the model, judge, write. Worker processes judge and write.

A finished report is analysed again only if an input of its analysis has changed: the hashes of its files, of the files of earlier
reports, of rules, code and blocks, the model's fingerprint, versions of libraries, options, decisions, names.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.sha256 import sha256
from xbrl.answers.profiles import PROFILES, Profile
from xbrl.desk.decisions import load_hearings
from xbrl.desk.letters import Hearing
from xbrl.desk.output import AUDIT_FILE, RECORD_FILE, finish, folder_name, totals, write_overview
from xbrl.desk.record import READY, Case, Form
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.folder import in_parallel, join_modules, passed_over, read_files, report_files
from xbrl.read.register import read_register
from xbrl.read.render import Addressee
from xbrl.read.replies import add_replies
from xbrl.rules.findings import KNOWN, NOTE_RULES_FILE, Finding, load_findings
from xbrl.rules.measures import load_basis
from xbrl.rules.note_facts import stands_in
from xbrl.rules.rules import RULES_FILE, built_in_rules

DATA_CARD = "dataset.json"  # beside the examples of a run; xbrl/scripts/make_reports.py writes it
ROOT = Path(__file__).resolve().parents[2]
CODE = ("common", "xbrl", "eval")  # folders with all code that an analysis without a model runs
SUFFIXES = (".py", ".jsonl", ".json", ".csv", ".css", ".toml", ".jinja")  # code, rules, blocks and pages
LIBRARIES = ("arelle-release", "jinja2", "lxml")
MODEL_LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Options:
    """The options of an analysis. The command `analyze.py` documents them. The last six apply to a model."""

    files: tuple[Path, ...]
    out: Path
    draft: bool = False
    register: Path | None = None
    findings: Path | None = None
    hearings: Path | None = None
    taxonomy: tuple[Path, ...] = ()
    form: Form = Form()
    workers: int = 1
    model: Path | None = None
    profile: Profile = PROFILES["full"]
    source: str = ""  # the file or option that names the profile
    max_new_tokens: int = 0
    batch_size: int = 64
    dtype: str = "auto"


class Analysis:
    """One run of the command: call `prepare`, then `write` for each group of cases with its replies, then `end`."""

    def __init__(self, options: Options, versions: dict, question_settings: dict) -> None:
        """`question_settings` has the settings of the questions to the model; {} without one. Raise UserError for a wrong option."""
        self.options, self.versions = options, versions
        load_basis(options.form.basis)
        for path in options.taxonomy:
            if not path.is_file():
                raise UserError(f"{path}: taxonomy package not found")
        taxonomy = [sha256(path) for path in options.taxonomy]
        # The inputs that all reports share. Each report adds its files, register entries and decisions.
        self.described = {"draft": options.draft, "taxonomy": taxonomy, **asdict(options.form), **question_settings}
        self.key = key_of(versions, self.described)
        self.records: list[dict] = []
        self.unchanged = 0  # the number of records that were read from finished reports
        self.refused: dict[Path, str] = {}  # file -> why it was not read, in one sentence
        self.ignored: list[Path] = []  # files of the folders that are no reports by their names
        self.strangers: list[str] = []  # a sentence for each reply of a bank that has no report here
        self.unnamed: list[str] = []  # entities that the register does not have
        self.decisions: dict[tuple[str, str], tuple[Finding, ...]] = {}
        self.used: set[Finding] = set()  # the decisions on these reports

    def prepare(self) -> tuple[Case, ...]:
        """Find and read the reports. Return the cases that must be analysed. Create the output directory and write nothing else.

        Raise UserError for a wrong path, register, file of decisions or output directory.
        """
        options = self.options
        files, self.ignored = find_files(options.files, options.out)
        register = read_register(options.register) if options.register else {}
        hearings = load_hearings(options.hearings) if options.hearings else {}
        self.decisions = load_findings(options.findings) if options.findings else {}
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {options.out}: {error.strerror or error}; name another directory") from error
        hashes, refused = {}, {}
        for path in files:
            try:
                hashes[path] = _hash_of_input(path)
            except OSError as error:
                refused[path] = f"{path}: {error.strerror or error}"
        reports, unread = read_files(list(hashes), options.workers, options.taxonomy)
        refused |= unread
        self.refused = {path: refused[path] for path in files if path in refused}
        (joined, self.strangers), cases = add_replies(join_modules(reports, refused), files), []
        names = {*register, *(bank.name for bank in register.values())}
        scopes = Counter((report.entity.partition(".")[0], report.period) for report in joined)
        for (code, period), (line, *_) in self.decisions.items():
            if scopes[code, period] > 1:
                reason = f"{code} has several reports as of {period}; add the scope, as in {code}.CON"
                raise UserError(f"{line.where}, column entity: {reason}")
        read = {cell for rule in built_in_rules() for cell in rule.cells}
        # Letters on later reports need only the facts that rules read. All 10,000 facts would be sent to a worker each time.
        older = [
            replace(report, facts=tuple(fact for fact in report.facts if read & {fact.cell, *fact.other_cells}))
            for report in joined
        ]
        for report in joined:
            for reason in report.incomplete:  # printed, because a report whose figures no rule reads has no findings
                print(f"warning: {reason}", file=sys.stderr)
            code, _, scope = report.entity.partition(".")
            scope = scope if scopes[code, report.period] > 1 else ""
            # The entity itself is the name of a bank that the register does not have.
            bank = register.get(report.entity) or register.get(code)
            self.unnamed += [] if bank else [report.entity]
            is_registered = bool(bank) or not register
            bank = bank or Addressee(code, code, "", "")
            texts = " ".join(note.text for note in report.notes)
            others = tuple(
                sorted({own.name for own in register.values() if own != bank and stands_in(own.name, texts)})
            )
            hearing = hearings.get((report.entity, report.period)) or hearings.get((code, report.period), Hearing())
            earlier = tuple(old for old in older if old.entity == report.entity and old.period < report.period)
            dates = [report.period, *(old.period for old in earlier)]
            keys = [(name, day) for day in dates for name in dict.fromkeys((code, report.entity))]
            decided = tuple(decision for key in keys for decision in self.decisions.get(key, ()))
            self.used.update(decided)
            known = names.intersection(member for fact in report.facts for member in fact.dimensions.values())
            lines = [[str(getattr(decision, name)) for name in KNOWN] for decision in decided]
            depends = {
                "key": self.key,
                "inputs": _file_hashes([report], hashes),
                "earlier": _file_hashes(earlier, hashes),
                "knowledge": [
                    *(bank.name, bank.country, bank.type, lines, sorted(known), scope),
                    *(list(others), is_registered, hearing.day, hearing.urgent),
                ],
                "notes": [[note.id, *map(list, note.cells)] for note in report.notes],
                "incomplete": list(report.incomplete),
            }
            folder = options.out / folder_name(report.entity, report.period)
            if finished := _finished(folder, depends):
                self.records.append(finished)
            else:
                case = Case(report, bank, earlier, decided, scope=scope, known=frozenset(known), depends=depends)
                cases.append(replace(case, others=others, is_registered=is_registered, hearing=hearing))
        self.unchanged = len(self.records)
        return tuple(cases)

    def write(self, cases: Sequence[Case]) -> None:
        """Judge these reports and write their folders, in worker processes."""
        options, audit = self.options, {"versions": self.versions, "options": self.described}
        write = partial(finish, out=options.out, form=options.form, draft=options.draft, audit=audit)
        self.records += list(in_parallel(write, cases, options.workers, "reports"))

    def end(self) -> int:
        """Write the overview, print the summary, and return the exit code.

        It is 2 if a file was refused, 1 if there are findings or a letter is not ready, and 0 otherwise.
        """
        refused = tuple(self.refused.values())
        write_overview(self.options.out, self.records, refused)
        for sentence in refused:
            print(f"error: {sentence}", file=sys.stderr)
        print(passed_over(self.ignored), totals(self.records), sep="")
        analysed = len(self.records) - self.unchanged
        print(f"{analysed} analysed, {self.unchanged} unchanged; {len(refused)} files refused")
        if self.options.register and self.unnamed:
            unnamed = dict.fromkeys(self.unnamed)
            print(f"{len(unnamed)} banks are not in {self.options.register}; the first: {self.unnamed[0]}")
        if unused := [line for lines in self.decisions.values() for line in lines if line not in self.used]:
            print(
                f"{len(unused)} decisions are on reports that are not among these; the first: {unused[0].where}, on "
                f"{unused[0].entity} as of {unused[0].period}"
            )
        if self.strangers:
            print(f"{len(self.strangers)} replies have no report among these; the first: {self.strangers[0]}")
        print(f"{self.options.out / 'index.html'}")
        if refused:
            return 2
        return int(any(record["has_findings"] or record["letter"]["state"] != READY for record in self.records))


def analyse(options: Options) -> int:
    """Run the whole analysis without a model. Return the exit code."""
    analysis = Analysis(options, versions(), {})
    analysis.write(analysis.prepare())
    return analysis.end()


def find_files(paths: Iterable[Path], out: Path) -> tuple[list[Path], list[Path]]:
    """Return (the report files and packages that the command line names, each once; the other files of its folders).

    Raise UserError for a wrong path, and for an output directory inside a folder of reports, whose pages would be read as
    reports by the next run.
    """
    by_path: dict[Path, Path] = {}
    ignored: list[Path] = []
    for path in paths:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies inside the reports ({path}); name a directory outside of them")
        if not path.exists():
            raise UserError(f"{path} does not exist; name a report, a package or a folder of reports")
        files, rest = report_files(path)
        ignored += rest
        for file in files:
            by_path.setdefault(file.resolve(), file)
    return list(by_path.values()), ignored


def choose_profile(option: str | None, model: Path) -> tuple[Profile, str]:
    """Return (the profile on which a model was trained, its source): --profile, or the data card.

    The export of a run lies in the run's directory, where config.json names the training file; the data card beside the training
    file names the profile. Raise UserError if this chain is broken.
    """
    if option:
        return PROFILES[option], "--profile"
    config = model.resolve().parent / "config.json"
    try:
        card = Path(_read_json(config)["config"]["data"]["train"][0]).parent / DATA_CARD
        return PROFILES[_read_json(card)["arguments"]["profile"]], str(card)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{model}: the profile that it was trained on is not recorded ({config} or its data card cannot be read); name it "
            f"with --profile {', '.join(PROFILES)}"
        ) from error


def versions(model: Path | None = None) -> dict:
    """Return versions and hashes as plain JSON. With a model directory, add its fingerprints and the libraries that run it."""
    result = {
        "project": tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"],
        "code": hash_of_code(),
        "rules": sha256(RULES_FILE),
        "note_rules": sha256(NOTE_RULES_FILE),
        "cells": sha256(load_cells().path),
        "python": platform.python_version(),
        "libraries": {
            name: importlib.metadata.version(name) for name in (*LIBRARIES, *(MODEL_LIBRARIES if model else ()))
        },
    }
    if model:
        from model.fingerprint import fingerprint_of_base

        # Answers depend on the weights and on these files: config, tokenizer, chat template, generation settings.
        small = [path for path in sorted(model.iterdir()) if path.suffix in (".json", ".jinja", ".model")]
        files = {path.name: sha256(path) for path in small}
        result["model"] = {"path": str(model), "fingerprint": fingerprint_of_base(model), "files": files}
    return result


def key_of(versions: dict, options: dict) -> str:
    """Hash the inputs that all reports of an analysis share. The path of the model is no input."""
    parts = json.loads(json.dumps([versions, options], default=str))
    if "model" in parts[0]:
        del parts[0]["model"]["path"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_of_code() -> str:
    """Return the SHA-256 of all source files, committed or not."""
    return _hash_of_files((path for name in CODE for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES), ROOT)


def _hash_of_files(paths: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 of the files: of their names below `root` and their contents."""
    lines = (f"{path.relative_to(root).as_posix()} {sha256(path)}\n" for path in sorted(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_of_input(path: Path) -> str:
    """Hash a report file, or all files of an unpacked package. `path` may be the metadata file of the package."""
    is_metadata = path.suffix.lower() == ".json" and (path.parent / "parameters.csv").is_file()
    folder = path.parent if is_metadata else path
    if not folder.is_dir():
        return sha256(path)
    return _hash_of_files((file for file in folder.rglob("*") if file.is_file()), folder)


def _file_hashes(reports: Iterable[Report], hashes: dict[Path, str]) -> list[dict]:
    paths = (path for report in reports for path in report.files or (report.path,))
    # A byte of a name that is not UTF-8 is written as `?` in the audit, so it is compared as `?`.
    return [{"file": path.name.encode("utf-8", "replace").decode(), "sha256": hashes[path]} for path in paths]


def _finished(folder: Path, depends: dict) -> dict:
    """Return the record of a report that was analysed with the inputs `depends` and whose files are undamaged, or {}."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # the folder may have any content
        audit = _read_json(folder / AUDIT_FILE)
        written = audit["outputs"].items()
        if audit.items() >= depends.items() and all(sha256(folder / name) == digest for name, digest in written):
            return _read_json(folder / RECORD_FILE)
    return {}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
