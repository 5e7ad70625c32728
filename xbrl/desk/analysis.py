"""Analyse reports from beginning to end: find, read, ask the model, judge, write. Engine and pages run over processes.

A finished report is left alone as long as nothing has changed that its analysis depends on: the hashes of its files, of those of
earlier reports, of rules, code and blocks, the model's fingerprint, versions of libraries, options, decisions, names.
"""

import fcntl
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
from xbrl.corpus.examples import PROFILES, Profile, read_register
from xbrl.desk.output import AUDIT_FILE, RECORD_FILE, finish, folder_name, totals, write_overview
from xbrl.desk.record import READY, Case, Form
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.folder import in_parallel, join_modules, passed_over, read_files, report_files
from xbrl.read.render import Addressee
from xbrl.rules.findings import COLUMNS, NOTE_RULES_FILE, Finding, load_findings
from xbrl.rules.measures import load_basis
from xbrl.rules.rules import RULES_FILE, built_in_rules

DATA_CARD = "dataset.json"  # beside the examples of a run; scripts/make_reports.py writes it
LOCK_FILE = "lock"  # in the output directory: two analyses at once would mix their files
ROOT = Path(__file__).resolve().parents[2]
CODE = ("common", "xbrl", "eval")  # everything that an analysis without a model runs
SUFFIXES = (".py", ".jsonl", ".json", ".csv", ".css", ".toml", ".jinja")  # of code, rules, blocks and pages
LIBRARIES = ("arelle-release", "jinja2", "lxml")
MODEL_LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Options:
    """What to analyse, and how: the options of scripts/analyze.py, which documents them. The last six are those of a model."""

    files: tuple[Path, ...]
    out: Path
    draft: bool = False
    register: Path | None = None
    findings: Path | None = None
    taxonomy: tuple[Path, ...] = ()
    form: Form = Form()
    workers: int = 1
    model: Path | None = None
    profile: Profile = PROFILES["full"]
    source: str = ""  # where the profile is recorded
    max_new_tokens: int = 0
    batch_size: int = 64
    dtype: str = "auto"


class Analysis:
    """One call of the command: `prepare`, `write` each group of cases once it has its replies, `end`."""

    def __init__(self, options: Options, versions: dict, asked: dict) -> None:
        """`asked` describes how the model is asked, {} without one."""
        self.options, self.versions = options, versions
        load_basis(options.form.basis)
        for path in options.taxonomy:
            if not path.is_file():
                raise UserError(f"{path}: taxonomy package not found")
        taxonomy = [sha256(path) for path in options.taxonomy]
        # What changes the result, besides the reports and what the register and the findings say of each.
        self.described = {"draft": options.draft, "taxonomy": taxonomy, **asdict(options.form), **asked}
        self.key = key_of(versions, self.described)
        self.records: list[dict] = []
        self.unchanged = 0  # how many of the records are those of finished reports
        self.refused: dict[Path, str] = {}  # file -> why it was not read, in one sentence
        self.others: list[Path] = []  # files of the folders that are no reports by their names
        self.unnamed: list[str] = []  # entities that the register does not have
        self.decisions: dict[tuple[str, str], tuple[Finding, ...]] = {}
        self.used: set[Finding] = set()  # the decisions on these reports

    def prepare(self) -> tuple[Case, ...]:
        """Find and read the reports; those that are to be analysed. Writes nothing but the output directory."""
        options = self.options
        files, self.others = find_files(options.files, options.out)
        register = read_register(options.register) if options.register else {}
        self.decisions = load_findings(options.findings) if options.findings else {}
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            self.lock = (options.out / LOCK_FILE).open("a")
        except OSError as error:
            raise UserError(f"--out {options.out}: {error.strerror or error}; name another directory") from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except (BlockingIOError, PermissionError) as error:
            what = "another analysis writes there; wait for its end, or name another directory"
            raise UserError(f"--out {options.out}: {what}") from error
        except OSError:  # a file system without locks
            pass
        hashes, refused = {}, {}
        for path in files:
            try:
                hashes[path] = _hash_of_input(path)
            except OSError as error:
                refused[path] = f"{path}: {error.strerror or error}"
        reports, unread = read_files(list(hashes), options.workers, options.taxonomy)
        refused |= unread
        self.refused = {path: refused[path] for path in files if path in refused}
        joined, cases = join_modules(reports, refused), []
        names = {*register, *(one.name for one in register.values())}
        scopes = Counter((one.entity.partition(".")[0], one.period) for one in joined)
        for (code, period), (line, *_) in self.decisions.items():
            if scopes[code, period] > 1:
                said = f"{code} has several reports as of {period}; add the scope, as in {code}.CON"
                raise UserError(f"{line.where}, column entity: {said}")
        read = {cell for rule in built_in_rules() for cell in rule.cells}
        older = [  # as the letter on a later one looks at it; the rest of 10,000 facts would be sent to a worker with each of them
            replace(one, facts=tuple(fact for fact in one.facts if read & {fact.cell, *fact.other_cells}))
            for one in joined
        ]
        for report in joined:
            for reason in report.incomplete:  # said aloud: it may be that no rule reads its figures
                print(f"warning: {reason}", file=sys.stderr)
            code, _, scope = report.entity.partition(".")
            scope = scope if scopes[code, report.period] > 1 else ""
            # The entity itself is the name of a bank that the register does not have.
            bank = register.get(report.entity) or register.get(code)
            self.unnamed += [] if bank else [report.entity]
            bank = bank or Addressee(code, code, "", "")
            earlier = tuple(one for one in older if one.entity == report.entity and one.period < report.period)
            dates = [report.period, *(one.period for one in earlier)]
            mine = [(name, day) for day in dates for name in dict.fromkeys((code, report.entity))]
            decided = tuple(one for case in mine for one in self.decisions.get(case, ()))
            self.used.update(decided)
            known = names.intersection(member for fact in report.facts for member in fact.dimensions.values())
            lines = [[str(getattr(one, name)) for name in COLUMNS] for one in decided]
            depends = {
                "key": self.key,
                "inputs": _hashed([report], hashes),
                "earlier": _hashed(earlier, hashes),
                "knowledge": [bank.name, bank.country, bank.type, lines, sorted(known), scope],
                "incomplete": list(report.incomplete),
            }
            folder = options.out / folder_name(report.entity, report.period)
            if finished := _finished(folder, depends):
                self.records.append(finished)
            else:
                cases.append(Case(report, bank, earlier, decided, scope=scope, known=frozenset(known), depends=depends))
        self.unchanged = len(self.records)
        return tuple(cases)

    def write(self, cases: Sequence[Case]) -> None:
        """Judge and write these reports over the worker processes."""
        options, audit = self.options, {"versions": self.versions, "options": self.described}
        write = partial(finish, out=options.out, form=options.form, draft=options.draft, audit=audit)
        self.records += list(in_parallel(write, cases, options.workers, "reports"))

    def end(self) -> int:
        """Write the overview, print the summary, and return the exit code: 0, 1 if a person must act, 2 with refused files.

        A person must act on findings, and on a letter that is not ready, whatever keeps it back.
        """
        refused = tuple(self.refused.values())
        write_overview(self.options.out, self.records, refused)
        for sentence in refused:
            print(f"error: {sentence}", file=sys.stderr)
        print(passed_over(self.others), totals(self.records), sep="")
        analysed = len(self.records) - self.unchanged
        print(f"{analysed} analysed, {self.unchanged} unchanged; {len(refused)} files refused")
        if self.options.register and self.unnamed:
            unnamed = dict.fromkeys(self.unnamed)
            print(f"{len(unnamed)} banks are not in {self.options.register}; the first: {self.unnamed[0]}")
        mine = {folder_name(one["entity"], one["period"]) for one in self.records}
        found = sorted(path.parent.name for path in self.options.out.glob(f"*/{AUDIT_FILE}"))
        if stale := [name for name in found if name not in mine]:
            print(
                f"{len(stale)} folders of {self.options.out} are of reports that are not among these; the first: {stale[0]}"
            )
        if others := [one for lines in self.decisions.values() for one in lines if one not in self.used]:
            print(
                f"{len(others)} decisions are on reports that are not among these; the first: {others[0].where}, on "
                f"{others[0].entity} as of {others[0].period}"
            )
        print(f"{self.options.out / 'index.html'}")
        if refused:
            return 2
        return int(any(one["has_findings"] or one["letter"]["state"] != READY for one in self.records))


def analyse(options: Options) -> int:
    """The whole analysis without a model. Returns the exit code."""
    analysis = Analysis(options, versions(), {})
    analysis.write(analysis.prepare())
    return analysis.end()


def find_files(paths: Iterable[Path], out: Path) -> tuple[list[Path], list[Path]]:
    """(the report files and packages that the command line names, without repetition; other files of its folders).

    Raises UserError for a wrong path, and for an output directory inside a folder of reports: its pages would be read as reports.
    """
    found: dict[Path, Path] = {}
    others: list[Path] = []
    for path in paths:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies inside the reports ({path}); name a directory outside of them")
        if not path.exists():
            raise UserError(f"{path} does not exist; name a report, a package or a folder of reports")
        files, rest = report_files(path)
        others += rest
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), others


def choose_profile(option: str | None, model: Path) -> tuple[Profile, str]:
    """(the profile that a model was trained on, where that stands): `--profile`, its export.json, or the data card of its run.

    scripts/export.py records the profile. The export of a run lies in the run's directory: the run's config.json names the
    training file, and the data card beside that names the profile. Raises UserError if this chain is broken.
    """
    if option:
        return PROFILES[option], "--profile"
    record = model / "export.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return PROFILES[_read_json(record)["profile"]], str(record)
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
    """Versions and hashes, as plain JSON. With a model directory also its fingerprints and the libraries that run it."""
    found = {
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

        # Beside the weights, these files change answers: config, tokenizer, chat template, generation.
        small = [path for path in sorted(model.iterdir()) if path.suffix in (".json", ".jinja", ".model")]
        files = {path.name: sha256(path) for path in small}
        found["model"] = {"path": str(model), "fingerprint": fingerprint_of_base(model), "files": files}
    return found


def key_of(versions: dict, options: dict) -> str:
    """The hash of all that every report of an analysis depends on. Where the model lies does not matter."""
    parts = json.loads(json.dumps([versions, options], default=str))
    if "model" in parts[0]:
        del parts[0]["model"]["path"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_of_code() -> str:
    """SHA-256 over the source files, whatever git says."""
    return _hash_of_files((path for name in CODE for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES), ROOT)


def _hash_of_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over the names below `root` and the contents of files."""
    lines = (f"{path.relative_to(root).as_posix()} {sha256(path)}\n" for path in sorted(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_of_input(path: Path) -> str:
    """The hash of a report file, or of all files of an unpacked package, whose metadata file may stand for it."""
    is_metadata = path.suffix.lower() == ".json" and (path.parent / "parameters.csv").is_file()
    folder = path.parent if is_metadata else path
    if not folder.is_dir():
        return sha256(path)
    return _hash_of_files((one for one in folder.rglob("*") if one.is_file()), folder)


def _hashed(reports: Iterable[Report], hashes: dict[Path, str]) -> list[dict]:
    paths = (path for report in reports for path in report.files or (report.path,))
    # A byte of a name that is not UTF-8 is written as `?`, and must be known again by that.
    return [{"file": path.name.encode("utf-8", "replace").decode(), "sha256": hashes[path]} for path in paths]


def _finished(folder: Path, depends: dict) -> dict:
    """The record of a report that was analysed by the same `depends` and has all of its files as they were; {} if there is none."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # also what another program left there
        audit = _read_json(folder / AUDIT_FILE)
        written = audit["outputs"].items()
        if audit.items() >= depends.items() and all(sha256(folder / name) == one for name, one in written):
            return _read_json(folder / RECORD_FILE)
    return {}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
