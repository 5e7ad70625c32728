"""Make a corpus from a supervisor's archive: read its report files and letters, pair them, and write the examples."""

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.durable_files import new_directory, write_durably, write_json
from common.errors import UserError
from xbrl.corpus.archive import (
    Case,
    Letter,
    case_of,
    find_letters,
    find_reports,
    group_reports,
    incomplete_cases,
    match_letters,
    read_pairs,
    try_read_report,
)
from xbrl.corpus.card import SOURCES, split_summary, violation_baselines, write_splits
from xbrl.corpus.disagreements import find_disagreements
from xbrl.corpus.examples import make_example, read_register
from xbrl.corpus.leaks import place_examples
from xbrl.corpus.profiles import FULL, rules_of
from xbrl.read.dpm import load_cells
from xbrl.read.render import Addressee
from xbrl.read.report import Report
from xbrl.rules.findings import Finding, apply_findings, load_findings
from xbrl.rules.rules import evaluate, violations

HOW_MADE = (
    "scripts/regulator.py examples: report files of an archive, paired with their letters, labelled by xbrl/rules/rules.jsonl "
    "and by findings.csv."
)
LIMITS = (
    "Made from a supervisor's own archive. The violations are those that xbrl/rules/rules.jsonl finds in the reported "
    "figures, corrected by findings.csv if one was given, not those that the letters name: disagreements.txt lists where "
    "the two contradict each other, as far as articles, cells and percentages show it. A letter in a test split that "
    "repeats a training letter except for names, dates and numbers is left out."
)


@dataclass(frozen=True)
class Archive:
    """Where an archive is: directories of report files and of letters, and three optional CSV files."""

    reports: Path
    letters: Path
    pairs: Path | None = None  # columns report,letter
    register: Path | None = None  # columns entity,name,country,type
    findings: Path | None = None  # findings.csv, annotated by a supervisor


@dataclass(frozen=True)
class ArchiveExamples:
    """The examples of an archive, and what could not be used: title -> one line per file, letter or report."""

    examples: list[dict]
    names: dict[str, str]  # bank -> its name
    unmatched: dict[str, list[str]]
    warnings: int  # number of warnings of the reports
    disagreements: list[str]  # one line for each contradiction between a letter and the labels of its report

    @property
    def unmatched_lines(self) -> list[str]:
        """All of `unmatched`, as lines `title: what`."""
        return [f"{title}: {line}" for title, lines in self.unmatched.items() for line in lines]


def make_archive_corpus(
    archive: Archive, out: Path, shares: Sequence[float], seed: int, processes: int, arguments: dict[str, str]
) -> None:
    """Read the archive, write the corpus, and print what was used, and on stderr what was not.

    Raises UserError if a directory is missing, or if no report has a letter.
    """
    for name, folder in (("reports", archive.reports), ("letters", archive.letters)):
        if not folder.is_dir():
            raise UserError(f"--{name} {folder}: no such directory.")
    found = read_archive(archive, processes)
    card = write_archive_corpus(out, found, shares, seed, arguments)
    for line in (*found.unmatched_lines, *(f"letter and labels disagree: {line}" for line in found.disagreements)):
        print(line, file=sys.stderr)
    for split, counts in card["splits"].items():
        print(f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean")
    print(
        f"{len(found.examples)} reports with a letter; unmatched: {card['unmatched']}; "
        f"disagreements: {card['disagreements']}; leak test: {card['leak_test']}"
    )


def read_archive(archive: Archive, processes: int) -> ArchiveExamples:
    """Read an archive and make an example of each report that has a letter. Raises `UserError` if there is none."""
    register = read_register(archive.register) if archive.register else {}
    findings = load_findings(archive.findings) if archive.findings else {}
    names = {entity: bank.name for entity, bank in register.items()}
    found, refused = read_reports(archive.reports, processes)
    reports, other_scopes = group_reports(found)
    letters, without_report = pair_letters(archive, found, names)
    incomplete = incomplete_cases(refused, reports)
    for case in incomplete:
        del reports[case]
        letters.pop(case, None)
    without_letter = [f"{entity} {period}: no letter" for entity, period in reports if (entity, period) not in letters]
    examples, disagreements, unused = _make_examples(reports, letters, register, findings)
    if not examples:
        reasons = (refused + without_report + without_letter)[:3]
        raise UserError(f"{archive.reports}: no report has a letter; the first reasons: {'; '.join(reasons)}")
    unmatched = {
        "files that are not read": refused + other_scopes,
        "reports left out, a file of theirs is not read": [f"{e} {p}: {why}" for (e, p), why in incomplete.items()],
        "letters without a report": without_report,
        "reports without a letter": without_letter,
        "findings that change nothing": unused,
    }
    warnings = sum(len(report.warnings) for report in reports.values())
    return ArchiveExamples(examples, names, unmatched, warnings, disagreements)


def read_reports(directory: Path, processes: int) -> tuple[list[Report], list[str]]:
    """(the reports in a directory, a line for each file that is not a report or could not be read)."""
    files, others = find_reports(directory)
    if not files:
        raise UserError(f"{directory}: the directory has no report file; check --reports.")
    reports, refused = [], [f"{path}: not a report by its name" for path in others]
    context = multiprocessing.get_context("spawn")  # Arelle and the open DPM database must not be shared after a fork
    with ProcessPoolExecutor(min(processes, len(files)), mp_context=context) as pool:
        results = tqdm(
            pool.map(try_read_report, files, chunksize=8), total=len(files), desc="reading reports", unit="file"
        )
        for _, report, error in results:
            if report is None:
                refused.append(error)
            else:
                reports.append(report)
    return reports, refused


def pair_letters(
    archive: Archive, reports: Sequence[Report], names: Mapping[str, str]
) -> tuple[dict[Case, Letter], list[str]]:
    """(case -> its letter, a line for each letter without a report).

    The pairs come from the CSV file of the archive, or else from the texts and file names of the letters.
    """
    letters, refused = find_letters(archive.letters)
    if archive.pairs is None:
        cases = dict.fromkeys(case_of(report) for report in reports)
        matched, without_report = match_letters(letters, cases, names)
        return matched, refused + without_report
    by_path = {letter.path: letter for letter in letters}
    pairs = read_pairs(archive.pairs, archive.reports, archive.letters)
    matched = {}
    for report in reports:
        path = pairs.get(report.path)
        letter = by_path.get(path) if path is not None else None
        if letter is not None and matched.setdefault(case_of(report), letter) != letter:
            raise UserError(f"{archive.pairs}: the files of {case_of(report)} have two letters; keep one.")
    used = {letter.path for letter in matched.values()}
    return matched, refused + [f"{path}: no report is paired with it" for path in by_path if path not in used]


def _make_examples(
    reports: Mapping[Case, Report],
    letters: Mapping[Case, Letter],
    register: Mapping[str, Addressee],
    findings: Mapping[Case, tuple[Finding, ...]],
) -> tuple[list[dict], list[str], list[str]]:
    """(an example for each case that has a report and a letter, disagreements of the letters, findings without effect).

    Examples are sorted by bank and date.
    """
    cells = load_cells()
    examples, disagreements = [], []
    unused = [
        f"{finding.where}: no report of {entity} {period} has a letter"
        for (entity, period), stated in findings.items()
        for finding in stated
        if (entity, period) not in reports or (entity, period) not in letters
    ]
    for case in tqdm(sorted(set(reports) & set(letters)), desc="examples", unit="report"):
        entity, period = case
        bank = register.get(entity, Addressee(entity, entity, "", ""))
        earlier = [report for (other, date), report in sorted(reports.items()) if other == entity and date < period]
        report, letter, stated = reports[case], letters[case], findings.get(case, ())
        examples.append(make_example(report, bank, cells, FULL, earlier, letter.text, findings=stated))
        results = evaluate(report, rules_of(FULL))
        violated = apply_findings(results, stated)
        contradictions = find_disagreements(letter.text, report, results, violated, earlier)
        disagreements += [f"{entity} {period}: {letter.path}: {one}" for one in contradictions]
        found = {result.rule_id for result in violations(results)}
        unused += [
            f"{finding.where}: {finding.rule} is lifted, but the rules do not find it in the report"
            for finding in stated
            if finding.state == "lifted" and finding.rule not in found
        ]
    return examples, disagreements, unused


def write_archive_corpus(
    directory: Path, found: ArchiveExamples, shares: Sequence[float], seed: int, arguments: dict[str, str]
) -> dict:
    """Split the examples, write the corpus and return its data card, which records `arguments`.

    Writes one JSON Lines file per split, unmatched.txt, disagreements.txt and dataset.json. The directory appears only once
    it is complete.
    """
    splits, dropped = place_examples(found.examples, shares, seed, found.names)
    card = {
        "arguments": arguments,
        "splits": {split: split_summary(members) for split, members in splits.items()},
        "unmatched": {title: len(lines) for title, lines in found.unmatched.items()},
        "disagreements": len(found.disagreements),
        "warnings": found.warnings,
        "leak_test": {"dropped": dropped},
        "baselines": violation_baselines(splits),
        "how_made": HOW_MADE,
        "sources": SOURCES,
        "limits": LIMITS,
    }
    with new_directory(directory) as draft:
        write_splits(draft, splits)
        write_durably(draft / "unmatched.txt", "".join(line + "\n" for line in found.unmatched_lines))
        write_durably(draft / "disagreements.txt", "".join(line + "\n" for line in found.disagreements))
        write_json(draft / "dataset.json", card)
    return card
