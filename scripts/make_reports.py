"""Make a corpus of invented bank reports, as the files that banks file, and from these files the examples for training.

Writes OUT/reports/*.zip (EBA xBRL-CSV packages, one per module), OUT/register.csv (the banks), OUT/{train,validation,test}.jsonl
and OUT/dataset.json (the data card). The same arguments give the same bytes. OUT appears only when all of it is there.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import concurrent.futures
import itertools
import json
import os
import shutil
from collections import Counter

from tqdm import tqdm

from data.regulator.baselines import score_baselines
from data.regulator.corpus import PROFILES, make_filing, rules_of
from data.regulator.dpm import BUILT_IN, RELEASE, load_cells
from data.regulator.examples import SPLITS, make_example, read_filing, read_register, split_banks, write_register
from data.regulator.filing import write_packages
from data.regulator.render import Addressee
from data.regulator.rules import built_in_rules
from errors import UserError, exit_with_one_sentence

TEMPLATES = (
    "C_01.00",
    "C_02.00.a",
    "C_03.00",
    "C_04.00",
)  # of the own funds module; declared as not filed where they are not


def write_reports(
    folder: pathlib.Path, seed: int, index: int, quarters: int, profile: str
) -> tuple[Addressee, list[list[pathlib.Path]]]:
    """Write the packages of bank `index`; returns its row of the register and the files of each reference date."""
    filings = [make_filing(seed, index, quarter, PROFILES[profile]) for quarter in range(quarters)]
    files = [
        write_packages(folder, filing.bank, filing.period, filing.figures, load_cells(BUILT_IN), TEMPLATES)
        for filing in filings
    ]
    bank = filings[0].bank
    return Addressee(bank.entity, bank.name, bank.country, bank.model), files


def read_examples(files: list[list[pathlib.Path]], bank: Addressee, profile: str) -> list[dict]:
    """The examples of one bank from its files. Our own files must read back without a warning."""
    cells, look = load_cells(BUILT_IN), PROFILES[profile]
    examples = []
    for paths in files:
        report = read_filing(paths, cells)
        if report.warnings:
            raise RuntimeError(f"{paths[0]}: {report.warnings[0]}")
        examples.append(make_example(report, bank, cells, look.style, look.letters, look.instruction, rules_of(look)))
    return examples


def data_card(arguments: dict, parts: dict[str, list[dict]]) -> dict:
    """Counts, lengths and limits of the corpus."""

    def of_split(examples: list[dict]) -> dict:
        counts = Counter(rule_id for example in examples for rule_id in example["violations"])
        lengths = {
            role: sum(len(example["messages"][place]["content"]) for example in examples)
            for place, role in enumerate(("report", "answer"))
        }
        return {
            "examples": len(examples),
            "banks": len({example["bank"] for example in examples}),
            "clean": sum(not example["violations"] for example in examples),
            "reports_by_number_of_violations": dict(
                sorted(Counter(str(len(example["violations"])) for example in examples).items())
            ),
            "violations": {rule.id: counts[rule.id] for rule in built_in_rules() if counts[rule.id]},
            "mean_characters": {
                role: round(total / len(examples), 1) if examples else 0 for role, total in lengths.items()
            },
        }

    violated = {split: [example["violations"] for example in examples] for split, examples in parts.items()}
    return {
        "arguments": arguments,
        "splits": {split: of_split(examples) for split, examples in parts.items()},
        "baselines_on_test": score_baselines(violated["train"], violated["test"]),
        "how_made": "scripts/make_reports.py: invented banks file EBA xBRL-CSV packages; the examples are read from these files and labelled by data/regulator/rules.jsonl.",
        "sources": f"Cells and labels: EBA Data Point Model, release {RELEASE}. Thresholds: CRR, CRD, Delegated Regulation (EU) 2015/61.",
        "limits": "Synthetic. No real institution, filing or supervisory letter is in it; real filings with supervisory labels are not public. Violations are more frequent, and sit closer to the limits, than in practice; and some banks hold more AT1 and Tier 2 than real ones do, so that each rule can fail alone.",
    }


def write_splits(out: pathlib.Path, examples: list[dict], shares: list[float], seed: int) -> dict[str, list[dict]]:
    """Write one JSON Lines file per split; every report of a bank is in one split."""
    split_of = split_banks(list(dict.fromkeys(example["bank"] for example in examples)), shares, seed)
    parts = {
        split: [example | {"split": split} for example in examples if split_of[example["bank"]] == split]
        for split in SPLITS
    }
    for split, members in parts.items():
        (out / f"{split}.jsonl").write_text(
            "".join(json.dumps(member, ensure_ascii=False) + "\n" for member in members), encoding="utf-8"
        )
    return parts


def parse_arguments() -> argparse.Namespace:
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
        nargs=3,
        default=[0.8, 0.1, 0.1],
        metavar="SHARE",
        help="train, validation, test: shares of the banks",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    arguments = parser.parse_args()
    for name in ("examples", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; ask for at least 1.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    out: pathlib.Path = arguments.out
    asked = {
        "examples": arguments.examples,
        "seed": arguments.seed,
        "profile": arguments.profile,
        "splits": arguments.splits,
    }
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

    quarters = PROFILES[arguments.profile].quarters
    of_bank = [quarters] * (arguments.examples // quarters) + [arguments.examples % quarters] * (
        arguments.examples % quarters > 0
    )
    indices = range(len(of_bank))
    with concurrent.futures.ProcessPoolExecutor(arguments.processes) as pool:
        chunk = {"chunksize": max(1, min(50, len(of_bank) // (4 * (arguments.processes or 1))))}
        same = itertools.repeat
        written = pool.map(
            write_reports,
            same(draft / "reports"),
            same(arguments.seed),
            indices,
            of_bank,
            same(arguments.profile),
            **chunk,
        )
        banks, files = zip(*tqdm(written, total=len(of_bank), desc="banks filing", unit="bank"), strict=True)
        write_register(draft / "register.csv", banks)
        register = read_register(draft / "register.csv")
        read = pool.map(
            read_examples, files, (register[bank.entity] for bank in banks), same(arguments.profile), **chunk
        )
        examples = list(
            itertools.chain.from_iterable(tqdm(read, total=len(of_bank), desc="reading reports", unit="bank"))
        )
    parts = write_splits(draft, examples, arguments.splits, arguments.seed)
    card = data_card(asked, parts)
    (draft / "dataset.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    draft.rename(out)

    for split, counts in card["splits"].items():
        print(
            f"{split:10} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean, violations {counts['violations']}"
        )
    for name, score in card["baselines_on_test"].items():
        print(f"baseline on test: {name:24} F1 {score['f1']:.3f}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
