"""Write the corpus of the quickstart: report files, register.csv, findings.csv, the splits and the data card."""

import dataclasses
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from common.durable_files import new_directory, write_json
from common.errors import UserError
from xbrl.corpus.card import SOURCES, split_summary, violation_baselines, write_splits
from xbrl.corpus.examples import entity_code, read_filing, read_register, write_register
from xbrl.corpus.filing import write_reports
from xbrl.corpus.generate import Request
from xbrl.corpus.quickstart import Case, make_cases
from xbrl.corpus.quickstart_examples import quickstart_example
from xbrl.corpus.splits import SPLITS, check_shares
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.render import Addressee
from xbrl.rules.findings import load_findings, write_findings

HOW_MADE = (
    "scripts/make_reports.py: invented banks file xBRL-JSON reports with a note each; the examples are read from these files. "
    "The ratios are labelled by xbrl/rules/rules.jsonl, the notes by findings.csv, which holds what was planted."
)
LIMITS = (
    "Synthetic and small: two ratios and one note per report, three kinds of notes. A note gives the figure that matters, so "
    "that nothing needs to be added up. Violations are far more frequent than in practice."
)


@dataclass(frozen=True)
class Counts:
    """How many reports each split has."""

    train: int
    validation: int
    test: int

    @classmethod
    def of(cls, examples: int, shares: list[float]) -> "Counts":
        """Counts of a number of reports in all; a test has an even number, because it consists of pairs.

        Raises `UserError` if the shares do not add up to 1, or if a split with a share above 0 would get no report.
        """
        check_shares(shares, SPLITS)
        train, validation, test = (round(examples * share) for share in shares)
        counts = cls(train, validation, test - test % 2)
        for (split, count), share in zip(dataclasses.asdict(counts).items(), shares, strict=True):
            if share > 0 and not count:
                raise UserError(f"{examples} examples are too few for a share of {share:.3g} in {split!r}; give more.")
        return counts


def generate_quickstart(
    directory: pathlib.Path, request: Request, count_tokens: Callable[[str], int] | None = None
) -> dict:
    """Generate the corpus and return its data card. The directory appears only once it is complete."""
    counts = dataclasses.asdict(Counts.of(request.examples, request.splits))
    cases, first_bank = {}, 0
    for split, count in counts.items():
        cases[split] = make_cases(request.seed, split, first_bank, count)
        first_bank += count
    with new_directory(directory) as draft:
        splits = _write_and_read(draft, cases)
        write_splits(draft, splits)
        card = {
            "arguments": dataclasses.asdict(request),
            "splits": {split: split_summary(members, count_tokens) for split, members in splits.items()},
            "baselines": violation_baselines(splits),
            "how_made": HOW_MADE,
            "sources": SOURCES,
            "limits": LIMITS,
        }
        write_json(draft / "dataset.json", card)
    return card


def _write_and_read(draft: pathlib.Path, cases: dict[str, list[Case]]) -> dict[str, list[dict]]:
    """Write the files, register.csv and findings.csv; then make the examples from these files alone, split by split."""
    cells, reports = load_cells(BUILT_IN), draft / "reports"
    reports.mkdir()
    everything = [case for members in cases.values() for case in members]
    banks = {case.bank.entity: case.bank for case in everything}.values()
    write_register(draft / "register.csv", [Addressee(one.entity, one.name, one.country, one.model) for one in banks])
    write_findings(draft / "findings.csv", [case.finding for case in everything])
    register, truth = read_register(draft / "register.csv"), load_findings(draft / "findings.csv")
    splits = {split: [] for split in cases}
    for split, case in [(split, case) for split, members in cases.items() for case in members]:
        files = write_reports(reports, case.bank, case.period, case.figures, cells, (), "json", [case.note])
        report = read_filing(files, cells)
        if report.warnings:
            raise RuntimeError(f"{report.path}: {report.warnings[0]}")
        entity = entity_code(report.entity)
        findings = truth[entity, report.period]
        splits[split].append(quickstart_example(report, register[entity], cells, findings, case.pair))
    return splits
