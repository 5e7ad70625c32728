"""Which reports are to be analysed: files are found, hashed, read in parallel and joined; finished ones are left alone."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from xbrl.desk.audit import AUDIT_FILE, hash_of_input
from xbrl.desk.output import folder_name
from xbrl.desk.record import Case
from xbrl.read.folder import find_reports, join_modules, read_files
from xbrl.read.render import Addressee
from xbrl.read.report import Report
from xbrl.read.xbrl import is_package
from xbrl.rules.findings import COLUMNS, Finding


@dataclass(frozen=True)
class Inputs:
    """What was found. `cases` are to be analysed, each with what its analysis depends on; `finished` are folders of others."""

    cases: tuple[tuple[Case, dict], ...]
    finished: tuple[Path, ...]
    refused: tuple[str, ...]  # one sentence per file


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
    """Read the files. A report is finished if `out` has an analysis with the same `key` of the same inputs."""
    hashes, refused = _hashes(files)
    reports, unread = read_files(list(hashes), workers, taxonomy)
    refused |= unread
    joined = join_modules(reports, refused)
    cases, finished = [], []
    for report in joined:
        earlier = tuple(one for one in joined if one.entity == report.entity and one.period < report.period)
        bank, decisions = knowledge.bank(report.entity), knowledge.decided(report.entity, report.period)
        case = Case(report, bank, earlier, decisions)
        depends = {
            "key": key,
            "inputs": _hashed([report], hashes),
            "earlier": _hashed(earlier, hashes),
            "knowledge": [bank.name, bank.country, bank.type, [_plain(one) for one in decisions]],
            "incomplete": list(report.incomplete),
        }
        folder = out / folder_name(report.entity, report.period)
        if _audit(folder).items() >= depends.items():
            finished.append(folder)
        else:
            cases.append((case, depends))
    return Inputs(tuple(cases), tuple(finished), tuple(refused[path] for path in files if path in refused))


def _hashes(files: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """(file -> its hash, file -> why it cannot be read)."""
    hashes, refused = {}, {}
    for path in tqdm(files, desc="hashes", unit="file", disable=len(files) < 100):
        try:
            hashes[path] = hash_of_input(path)
        except UserError as error:
            refused[path] = str(error)
    return hashes, refused


def _hashed(reports: Iterable[Report], hashes: dict[Path, str]) -> list[dict]:
    paths = (path for report in reports for path in report.files or (report.path,))
    return [{"file": path.name, "sha256": hashes[path]} for path in paths]


def _audit(folder: Path) -> dict:
    """The audit record of a finished report; {} if there is none that can be read."""
    try:
        return json.loads((folder / AUDIT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _plain(finding: Finding) -> list[str]:
    return [str(getattr(finding, name)) for name in COLUMNS]
