"""Make a corpus of invented bank reports, as the files that banks file, and from these files the examples for training.

Writes OUT/reports/ (EBA xBRL-CSV packages and xBRL-JSON reports, one per module), OUT/register.csv (the banks), one JSON
Lines file per split and OUT/dataset.json (the data card). The full profile has the splits train, validation, test_banks,
test_quarters and test_combinations; the short one train, validation and test. The same arguments give the same bytes. OUT
appears only when all of it is there.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import concurrent.futures
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable

from tqdm import tqdm

from common.errors import UserError, run_script
from data.regulator.baselines import nearest_letters
from data.regulator.card import SOURCES, letter_of, report_of, split_summary, violation_baselines, write_splits
from data.regulator.corpus import PROFILES, make_filings
from data.regulator.dpm import BUILT_IN, load_cells
from data.regulator.examples import read_filing, read_register, worded_examples, write_register
from data.regulator.filing import write_reports
from data.regulator.render import Addressee
from data.regulator.splits import DEFAULT_SHARES, FULL_SPLITS, SPLITS, leaks, split_banks, split_examples

JSON_SHARE = 0.35  # of the banks, in the full profile; the others file xBRL-CSV
VARIANTS = 6  # wordings of a letter of which one must differ from what training says
ROUGE_SAMPLE = 100  # letters of each test split that the nearest training letter is compared with
HOW_MADE = (
    "scripts/make_reports.py: invented banks over several quarters file EBA report files (xBRL-CSV packages and xBRL-JSON); "
    "the examples are read from these files alone and labelled by data/regulator/rules.jsonl."
)
LIMITS = (
    "Synthetic. No real institution, filing or supervisory letter is in it; real filings with supervisory labels are not "
    "public. Violations are more frequent, and sit closer to the limits, than in practice; some banks hold more AT1 and "
    "Tier 2 than real ones do, so that each rule can fail alone; no bank is insolvent; a report has at most four violations. "
    "A figure whose absence the rules count as zero is absent only as a filing error. Amounts of a report in a test by "
    "combination may stand, as ratios of an earlier quarter, in a later training report of the same bank."
)


def write_files(
    folder: pathlib.Path, seed: int, index: int, quarters: int, profile: str
) -> tuple[Addressee, list[list[pathlib.Path]]]:
    """Write the reports of bank `index`; returns its row of the register and the files of each reference date."""
    filings = make_filings(seed, index, quarters, PROFILES[profile])
    as_json = profile == "full" and random.Random(f"syntax {seed} {index}").random() < JSON_SHARE
    files = []
    for filing in filings:
        unfiled = filing.unfiled or ("C_04.00",)
        syntax = "json" if as_json else "csv"
        made = write_reports(folder, filing.bank, filing.period, filing.figures, load_cells(BUILT_IN), unfiled, syntax)
        files.append(made)
    bank = filings[0].bank
    return Addressee(bank.entity, bank.name, bank.country, bank.model), files


def read_examples(files: list[list[pathlib.Path]], bank: Addressee, profile: str) -> list[list[dict]]:
    """The examples of one bank from its files, each in several wordings. Our own files must read back without a warning."""
    cells, look = load_cells(BUILT_IN), PROFILES[profile]
    reports = [read_filing(paths, cells) for paths in files]
    for report in reports:
        if report.warnings:
            raise RuntimeError(f"{report.path}: {report.warnings[0]}")
    letters = [None] * (VARIANTS if profile == "full" else 1)
    return [
        worded_examples(report, bank, cells, look, reports[:place], letters) for place, report in enumerate(reports)
    ]


def place_examples(
    worded: list[list[dict]], shares: list[float], seed: int, names: dict[str, str], full: bool
) -> tuple[dict[str, list[dict]], dict]:
    """(split -> examples, what the leak test did). A letter of a test that training has, but for names, dates and numbers, is
    written in other words; if all of them leak, the example is left out."""
    examples = [variants[0] for variants in worded]
    if not full:
        of_bank = split_banks(list(dict.fromkeys(example["bank"] for example in examples)), shares, seed)
        return {split: [example for example in examples if of_bank[example["bank"]] == split] for split in SPLITS}, {}
    splits = split_examples(examples, shares, seed)
    training = [
        (letter_of(one), names[one["bank"]]) for one, split in zip(examples, splits, strict=True) if split == "train"
    ]
    parts: dict[str, list[dict]] = {split: [] for split in FULL_SPLITS}
    reworded: Counter = Counter()
    dropped: Counter = Counter()
    for split in FULL_SPLITS:
        members = [variants for variants, of_split in zip(worded, splits, strict=True) if of_split == split]
        chosen = [0] * len(members)
        left = list(range(len(members))) if split.startswith("test") else []
        for variant in range(VARIANTS):
            said = [(letter_of(members[place][variant]), names[members[place][0]["bank"]]) for place in left]
            leaking = {left[found] for found in leaks(training, said)}
            for place in left:
                chosen[place] = variant
            left = sorted(leaking)
            reworded[split] += len(left) if variant + 1 < VARIANTS else 0
        dropped[split] = len(left)
        parts[split] = [variants[chosen[place]] for place, variants in enumerate(members) if place not in set(left)]
    tests = [split for split in FULL_SPLITS if split.startswith("test")]
    remaining = {
        split: len(leaks(training, [(letter_of(one), names[one["bank"]]) for one in parts[split]])) for split in tests
    }
    counts = {"reworded": reworded, "dropped": dropped, "leaks_left": remaining}
    return parts, {name: {split: found[split] for split in tests} for name, found in counts.items()}


def rouge_of_nearest(parts: dict[str, list[dict]], seed: int) -> dict[str, dict]:
    """ROUGE-L of the letter of the nearest training report, on a sample of each test split."""
    from eval.rouge import rouge_l  # an evaluation library, which making data does not need otherwise

    training = [(report_of(example), letter_of(example)) for example in parts["train"]]
    scores = {}
    for split, examples in parts.items():
        if split.startswith("test") and examples:
            chosen = random.Random(f"rouge {seed} {split}").sample(examples, min(ROUGE_SAMPLE, len(examples)))
            letters = nearest_letters(training, [report_of(example) for example in chosen])
            values = rouge_l([letter_of(example) for example in chosen], letters)
            scores[split] = {"rouge_l": round(sum(values) / len(values), 4), "n": len(values)}
    return scores


def token_counter(tokenizer: pathlib.Path | None) -> Callable[[str], int] | None:
    """The length of a text in tokens of the tokenizer of a model directory."""
    if tokenizer is None:
        return None
    from transformers import AutoTokenizer

    if not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: no such model directory; --tokenizer wants one with a tokenizer.")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UserError for values that make no corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to make")
    parser.add_argument(
        "--examples", type=int, default=6800, help="number of reports, all splits together (default 6800)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another population of banks (default 0)")
    parser.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="full",
        help="short: few figures and one-sentence letters, for small models",
    )
    parser.add_argument(
        "--splits",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="shares of the splits named above, in that order (default 0.72 0.06 0.08 0.08 0.06; short: 0.8 0.1 0.1)",
    )
    parser.add_argument(
        "--tokenizer", type=pathlib.Path, help="a model directory: the data card then gives lengths in tokens"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    arguments = parser.parse_args()
    for name in ("examples", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; ask for at least 1.")
    if arguments.splits is None:
        arguments.splits = list(DEFAULT_SHARES[FULL_SPLITS if arguments.profile == "full" else SPLITS])
    return arguments


def make(arguments: argparse.Namespace, draft: pathlib.Path) -> tuple[list[list[dict]], dict[str, str], Counter]:
    """Write the files and read them back: (the examples in their wordings, bank -> name, files by suffix)."""
    quarters = PROFILES[arguments.profile].quarters
    whole, rest = divmod(arguments.examples, quarters)
    of_bank = [quarters] * whole + [rest] * (rest > 0)
    same = itertools.repeat
    with concurrent.futures.ProcessPoolExecutor(arguments.processes) as pool:
        chunk = {"chunksize": max(1, min(50, len(of_bank) // (4 * (arguments.processes or 1))))}
        tasks = (same(draft / "reports"), same(arguments.seed), range(len(of_bank)), of_bank, same(arguments.profile))
        written = pool.map(write_files, *tasks, **chunk)
        banks, files = zip(*tqdm(written, total=len(of_bank), desc="banks filing", unit="bank"), strict=True)
        write_register(draft / "register.csv", banks)
        register = read_register(draft / "register.csv")
        read = pool.map(
            read_examples, files, (register[bank.entity] for bank in banks), same(arguments.profile), **chunk
        )
        worded = list(
            itertools.chain.from_iterable(tqdm(read, total=len(of_bank), desc="reading reports", unit="bank"))
        )
    suffixes = Counter(path.suffix for of_bank in files for paths in of_bank for path in paths)
    return worded, {bank.entity: bank.name for bank in banks}, suffixes


def main() -> None:
    """Make banks, write their reports, read them back, write the examples and their data card."""
    arguments = parse_arguments()
    out: pathlib.Path = arguments.out
    asked = {name: getattr(arguments, name) for name in ("examples", "seed", "profile", "splits")}
    count_tokens = token_counter(arguments.tokenizer)
    if out.exists():
        card = out / "dataset.json"
        if card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("arguments") == asked:
            print(f"{out}: already made with these arguments")
            return
        raise UserError(f"{out} exists and was not made with these arguments; remove it or choose another --out.")
    draft = out.with_name(out.name + ".partial")
    if draft.exists():
        shutil.rmtree(draft)  # what an interrupted run left
    (draft / "reports").mkdir(parents=True)
    full = arguments.profile == "full"
    worded, names, suffixes = make(arguments, draft)
    parts, leak_test = place_examples(worded, arguments.splits, arguments.seed, names, full)
    write_splits(draft, parts)
    card = {
        "arguments": asked,
        "splits": {split: split_summary(examples, count_tokens) for split, examples in parts.items()},
        "files": {"xBRL-CSV": suffixes[".zip"], "xBRL-JSON": suffixes[".json"]},
        "leak_test": leak_test,
        "baselines": violation_baselines(parts),
        "nearest_training_letter": rouge_of_nearest(parts, arguments.seed) if full else {},
        "how_made": HOW_MADE,
        "sources": SOURCES,
        "limits": LIMITS,
    }
    (draft / "dataset.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    draft.rename(out)
    report(card)


def report(card: dict) -> None:
    """Print the card's main figures."""
    for split, counts in card["splits"].items():
        print(
            f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean, "
            f"{counts['combinations']} combinations, violations {counts['violations']}"
        )
    if card["leak_test"]:
        print(f"leak test: {card['leak_test']}")
    for split, scores in card["baselines"].items():
        for name, score in scores.items():
            print(f"baseline on {split}: {name:24} F1 {score['f1']:.3f}")
    for split, score in card["nearest_training_letter"].items():
        print(f"baseline on {split}: nearest training letter  ROUGE-L {score['rouge_l']:.3f} (n={score['n']})")


if __name__ == "__main__":
    run_script(main)
