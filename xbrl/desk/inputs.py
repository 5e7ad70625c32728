"""Which reports are to be analysed: files are found, hashed, read in parallel and joined; finished ones are left alone.

A bank is analysed as a whole: the letter on a report mentions the bank's earlier reports. If a file of a bank is new, has
changed or is gone, all reports of the bank are analysed again.
"""

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from xbrl.corpus.archive import find_reports, is_named_after, try_read_report
from xbrl.desk.audit import AUDIT_FILE, hash_of_input
from xbrl.desk.output import folder_name
from xbrl.desk.record import Case
from xbrl.read.folder import in_parallel, join_modules
from xbrl.read.render import Addressee
from xbrl.read.report import Report
from xbrl.read.xbrl import is_package
from xbrl.rules.findings import Finding


@dataclass(frozen=True)
class Inputs:
    """What was found. `cases` are to be analysed; `finished` are the folders of those that are analysed already."""

    cases: tuple[Case, ...]
    finished: tuple[Path, ...]
    refused: tuple[str, ...]  # one sentence per file
    hashes: dict[Path, str]


@dataclass(frozen=True)
class Knowledge:
    """What the desk knows besides the reports: the names of banks, and its decisions on notes."""

    register: dict[str, Addressee]
    decisions: dict[tuple[str, str], tuple[Finding, ...]]

    def bank(self, entity: str) -> Addressee:
        """A bank by the entity of its report; the entity itself is the name of an unknown one."""
        code = entity.partition(".")[0]
        return self.register.get(entity) or self.register.get(code) or Addressee(code, code, "", "")

    def decided(self, entity: str, period: str) -> tuple[Finding, ...]:
        """The decisions on one report."""
        return self.decisions.get((entity.partition(".")[0], period), ())

    def describe(self, entity: str, period: str) -> list:
        """What an analysis depended on, as plain JSON."""
        bank = self.bank(entity)
        return [[bank.name, bank.country, bank.type], [_plain(one) for one in self.decided(entity, period)]]


def find_files(paths: Iterable[Path], out: Path) -> list[Path]:
    """The report files and packages that the command line names, without repetition.

    Raises UserError for a wrong path, and for an output directory inside a folder of reports: its pages would be read as reports.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies inside the reports ({path}); name a directory outside of them")
        if not path.exists():
            raise UserError(f"{path} does not exist; name a report, a package or a folder of reports")
        files = find_reports(path)[0] if path.is_dir() and not is_package(path) else [path]
        if not files:
            raise UserError(f"{path} contains no reports; docs/xbrl.md lists what a report is")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def collect(
    files: Sequence[Path], out: Path, key: str, knowledge: Knowledge, taxonomy: Sequence[Path], workers: int
) -> Inputs:
    """Read what is new or has changed since the analyses in `out` with the same `key`."""
    hashes, refused = _hashes(files)
    by_content: dict[tuple[str, str], list[Path]] = {}
    for path, value in hashes.items():
        by_content.setdefault((path.name, value), []).append(path)
    finished = {
        folder: audit for folder, audit in _audits(out) if _is_current(folder, audit, key, by_content, knowledge)
    }
    reports: list[Report] = []
    while True:
        kept = {path for audit in finished.values() for one in audit["inputs"] for path in by_content[_content(one)]}
        known = {path for report in reports for path in report.files or (report.path,)} | set(refused)
        unread = [path for path in hashes if path not in kept | known]
        for path, report, error in in_parallel(partial(try_read_report, taxonomy=taxonomy), unread, workers, "files"):
            if report is None:
                refused[path] = error
            elif not report.entity.isprintable():
                refused[path] = (
                    f"{path}: the entity {report.entity!a} is no identifier; ask the bank to file the report again"
                )
            else:
                reports.append(report)
        banks = {report.entity for report in reports}
        again = [folder for folder, audit in finished.items() if audit["entity"] in banks or _lacks(audit, refused)]
        if not again:
            break
        for folder in again:  # their files are read in the next round
            del finished[folder]
    joined = join_modules(reports, refused)
    cases = []
    for report in joined:
        earlier = tuple(one for one in joined if one.entity == report.entity and one.period < report.period)
        bank, decisions = knowledge.bank(report.entity), knowledge.decided(report.entity, report.period)
        cases.append(Case(report, bank, earlier, decisions))
    return Inputs(tuple(cases), tuple(finished), tuple(refused[path] for path in files if path in refused), hashes)


def _hashes(files: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """(file -> its hash, file -> why it cannot be read)."""
    hashes, refused = {}, {}
    for path in tqdm(files, desc="hashes", unit="file", disable=len(files) < 100):
        try:
            hashes[path] = hash_of_input(path)
        except UserError as error:
            refused[path] = str(error)
    return hashes, refused


def _audits(out: Path) -> list[tuple[Path, dict]]:
    """(folder, audit record) of each finished report. A record that cannot be read counts as none."""
    found = []
    for path in sorted(out.glob(f"*/{AUDIT_FILE}")):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return found


def _is_current(folder: Path, audit: dict, key: str, present: Container[tuple[str, str]], knowledge: Knowledge) -> bool:
    """Whether an analysis was made by the same code, with the same options, from the same files."""
    try:
        wanted = [_content(one) for one in (*audit["inputs"], *audit["earlier"])]
        case = audit["entity"], audit["period"]
        known = json.loads(json.dumps(knowledge.describe(*case)))
        is_same = audit["key"] == key and audit["knowledge"] == known
        is_same = is_same and folder.name == folder_name(*case)  # not a folder that an interruption left unfinished
    except (KeyError, TypeError):
        return False
    return is_same and all(one in present for one in wanted)


def _content(entry: dict) -> tuple[str, str]:
    """(file name, hash) of a file in an audit record."""
    return entry["file"], entry["sha256"]


def _lacks(audit: dict, refused: dict[Path, str]) -> bool:
    """Whether other files of this bank and date are refused now than when it was analysed."""
    missing = [error for path, error in refused.items() if is_named_after(path, audit["entity"], audit["period"])]
    return missing != audit["incomplete"]


def _plain(finding: Finding) -> list:
    fields = (finding.rule, finding.state, finding.cell, finding.value, finding.limit, finding.legal, finding.kind)
    return [str(field) for field in fields]
