"""Make examples from a supervisor's own archive: report files, and the directive letters that answered them.

A letter belongs to the reports of one bank and one reference date: it names both in its file name or in its first lines,
or a CSV of pairs says so. Each report that has a letter is labelled by the rules and becomes one example; what finds no
partner, or cannot be read, is listed. OUT holds one JSON Lines file per split, dataset.json (the data card) and
unmatched.txt. Nothing of the archive is changed, and nothing leaves this machine.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from common.errors import UserError, run_script
from data.regulator.archive import (
    Case,
    Letter,
    case_of,
    find_letters,
    find_reports,
    group_reports,
    incomplete_cases,
    match_letters,
    read_one,
    read_pairs,
)
from data.regulator.card import SOURCES, letter_of, split_summary, violation_baselines, write_splits
from data.regulator.corpus import FULL
from data.regulator.dpm import load_cells
from data.regulator.examples import make_example, read_register
from data.regulator.render import Addressee
from data.regulator.report import Report
from data.regulator.splits import DEFAULT_SHARES, FULL_SPLITS, leaks, split_examples

LIMITS = (
    "An archive of the supervisor's own. The violations are what data/regulator/rules.jsonl finds in the reported figures, "
    "not what the letters say. Letters of a test that, but for names, dates and numbers, stand in training are left out."
)


def read_all(folder: pathlib.Path, processes: int) -> tuple[list[Report], list[str]]:
    """(the reports below a folder, which files were refused and why)."""
    files, others = find_reports(folder)
    if not files:
        raise UserError(f"{folder}: no report file in it")
    reports, refused = [], [f"{path}: not a report by its name" for path in others]
    context = multiprocessing.get_context("spawn")  # Arelle and the open DPM must not be shared with this process
    with ProcessPoolExecutor(min(processes, len(files)), mp_context=context) as pool:
        read = tqdm(pool.map(read_one, files, chunksize=8), total=len(files), desc="reading reports", unit="file")
        for _, report, error in read:
            if report is None:
                refused.append(error)
            else:
                reports.append(report)
    return reports, refused


def pair(
    arguments: argparse.Namespace, reports: list[Report], names: dict[str, str]
) -> tuple[dict[Case, Letter], list[str]]:
    """(case -> its letter, letters without a report)."""
    letters, refused = find_letters(arguments.letters)
    if arguments.pairs is None:
        cases = dict.fromkeys(case_of(report) for report in reports)
        matched, without = match_letters(letters, cases, names)
        return matched, refused + without
    by_path = {letter.path: letter for letter in letters}
    pairs = read_pairs(arguments.pairs, arguments.reports, arguments.letters)
    matched = {}
    for report in reports:
        letter = by_path.get(pairs.get(report.path))
        if letter is not None and matched.setdefault(case_of(report), letter) != letter:
            raise UserError(f"{arguments.pairs}: the files of {case_of(report)} have two letters")
    used = {letter.path for letter in matched.values()}
    return matched, refused + [f"{path}: no report is paired with it" for path in by_path if path not in used]


def make_all(reports: dict[Case, Report], letters: dict[Case, Letter], register: dict[str, Addressee]) -> list[dict]:
    """One example for each case that has both, in the order of bank and date."""
    cells = load_cells()
    examples = []
    for case in tqdm(sorted(set(reports) & set(letters)), desc="examples", unit="report"):
        entity, period = case
        bank = register.get(entity, Addressee(entity, entity, "", ""))
        earlier = [report for (other, date), report in sorted(reports.items()) if other == entity and date < period]
        examples.append(make_example(reports[case], bank, cells, FULL, earlier, letters[case].text))
    return examples


def place(
    examples: list[dict], shares: list[float], seed: int, names: dict[str, str]
) -> tuple[dict[str, list[dict]], dict]:
    """(split -> examples, how many of each test leaked and were left out)."""
    splits = split_examples(examples, shares, seed)
    parts = {name: [one for one, split in zip(examples, splits, strict=True) if split == name] for name in FULL_SPLITS}

    def said(members: list[dict]) -> list[tuple[str, str]]:
        return [(letter_of(one), names.get(one["bank"], one["bank"])) for one in members]

    dropped = {}
    for split in FULL_SPLITS:
        if split.startswith("test"):
            gone = set(leaks(said(parts["train"]), said(parts[split])))
            parts[split] = [one for number, one in enumerate(parts[split]) if number not in gone]
            dropped[split] = len(gone)
    return parts, {"dropped": dropped}


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UserError for a folder that is not there, or an --out that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=pathlib.Path, required=True, help="folder of report files, any XBRL syntax")
    parser.add_argument("--letters", type=pathlib.Path, required=True, help="folder of letters, .txt or .md in UTF-8")
    parser.add_argument(
        "--pairs", type=pathlib.Path, help="CSV with the columns report,letter: paths below the folders"
    )
    parser.add_argument(
        "--register", type=pathlib.Path, help="CSV with the columns entity,name,country,type of the banks"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default 0)")
    parser.add_argument(
        "--splits",
        type=float,
        nargs=5,
        default=list(DEFAULT_SHARES[FULL_SPLITS]),
        metavar="SHARE",
        help=f"shares of {', '.join(FULL_SPLITS)} (default %(default)s); a share may be 0",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    arguments = parser.parse_args()
    for name in ("reports", "letters"):
        if not getattr(arguments, name).is_dir():
            raise UserError(f"--{name} {getattr(arguments, name)}: no such folder")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out.")
    return arguments


def main() -> None:
    """Read reports and letters, pair them, split by bank, write the examples and their data card."""
    arguments = parse_arguments()
    register = read_register(arguments.register) if arguments.register else {}
    names = {entity: bank.name for entity, bank in register.items()}
    found, refused = read_all(arguments.reports, max(1, arguments.processes or 1))
    reports, other_scopes = group_reports(found)
    letters, without_report = pair(arguments, found, names)
    incomplete = incomplete_cases(refused, reports)
    for case in incomplete:
        del reports[case]
        letters.pop(case, None)
    without_letter = [f"{entity} {period}: no letter" for entity, period in reports if (entity, period) not in letters]
    examples = make_all(reports, letters, register)
    if not examples:
        reasons = (refused + without_report + without_letter)[:3]
        raise UserError(f"no report has a letter; the first reasons: {'; '.join(reasons)}")
    parts, leak_test = place(examples, arguments.splits, arguments.seed, names)

    draft = arguments.out.with_name(arguments.out.name + ".partial")
    if draft.exists():
        shutil.rmtree(draft)  # what an interrupted run left
    draft.mkdir(parents=True)
    write_splits(draft, parts)
    unmatched = {
        "files that are not read": refused + other_scopes,
        "reports left out, a file of theirs is not read": [f"{e} {p}: {why}" for (e, p), why in incomplete.items()],
        "letters without a report": without_report,
        "reports without a letter": without_letter,
    }
    lines = [f"{title}: {line}" for title, members in unmatched.items() for line in members]
    (draft / "unmatched.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    card = {
        "arguments": {name: str(value) for name, value in vars(arguments).items() if name != "processes"},
        "splits": {split: split_summary(members) for split, members in parts.items()},
        "unmatched": {title: len(members) for title, members in unmatched.items()},
        "warnings": sum(len(report.warnings) for report in reports.values()),
        "leak_test": leak_test,
        "baselines": violation_baselines(parts),
        "how_made": "scripts/make_examples.py: report files of an archive, paired with their letters, labelled by data/regulator/rules.jsonl.",
        "sources": SOURCES,
        "limits": LIMITS,
    }
    (draft / "dataset.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    draft.rename(arguments.out)

    for line in lines:
        print(line, file=sys.stderr)
    for split, counts in card["splits"].items():
        print(f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean")
    print(f"{len(examples)} reports with a letter; unmatched: {card['unmatched']}; leak test: {leak_test}")


if __name__ == "__main__":
    run_script(main)
