"""Generate a corpus of invented bank reports: report files, and the examples that are read back from these files.

The corpus directory has reports/ (EBA xBRL-CSV packages and xBRL-JSON reports, one per module), register.csv (the
banks), one JSON Lines file per split, and dataset.json (the data card). The same request always gives the same bytes.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Sequence

from tqdm import tqdm

from common.durable_files import new_directory, write_json
from common.errors import UserError
from data.regulator.card import SOURCES, split_summary, violation_baselines, write_splits
from data.regulator.corpus import PROFILES, make_filings
from data.regulator.dpm import BUILT_IN, load_cells
from data.regulator.examples import example_variants, read_filing, read_register, write_register
from data.regulator.filing import write_reports
from data.regulator.leaks import place_examples
from data.regulator.render import Addressee
from data.regulator.splits import SPLITS, group_by_split, split_banks

Splits = dict[str, list[dict]]  # split -> its examples
JSON_SHARE = 0.35  # fraction of banks in the full profile that file xBRL-JSON; the others file xBRL-CSV
VARIANTS = 6  # wordings of each full letter; a test uses one that does not occur in training
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
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


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate. These four values determine every byte of the corpus; the data card has them as `arguments`."""

    examples: int  # number of reports
    seed: int
    profile: str  # a key of PROFILES
    splits: list[float]  # shares of the splits


def is_generated(directory: pathlib.Path, request: Request) -> bool:
    """Whether `directory` has the corpus of this request. Raises `UserError` if it exists with other content."""
    if not directory.exists():
        return False
    card = directory / "dataset.json"
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("arguments") == dataclasses.asdict(request):
        return True
    raise UserError(f"{directory} exists and was not made with these arguments; remove it or choose another --out.")


def generate_corpus(
    directory: pathlib.Path,
    request: Request,
    processes: int,
    count_tokens: Callable[[str], int] | None = None,
    score_nearest: Callable[[Splits, int], dict] | None = None,
) -> dict:
    """Generate the corpus and return its data card. The directory appears only once it is complete.

    `count_tokens` returns the number of tokens of a text; the card then has lengths in tokens. `score_nearest` scores
    the nearest training letter as a baseline, from the splits and the seed.
    """
    full = request.profile == "full"
    with new_directory(directory) as draft:
        (draft / "reports").mkdir()
        examples, names, files_by_suffix = _generate_examples(draft, request, processes)
        if full:
            splits, leak_test = place_examples(examples, request.splits, request.seed, names)
        else:
            splits, leak_test = _split_by_bank([variants[0] for variants in examples], request), {}
        write_splits(draft, splits)
        card = {
            "arguments": dataclasses.asdict(request),
            "splits": {split: split_summary(members, count_tokens) for split, members in splits.items()},
            "files": {"xBRL-CSV": files_by_suffix[".zip"], "xBRL-JSON": files_by_suffix[".json"]},
            "leak_test": leak_test,
            "baselines": violation_baselines(splits),
            "nearest_training_letter": score_nearest(splits, request.seed) if full and score_nearest else {},
            "how_made": HOW_MADE,
            "sources": SOURCES,
            "limits": LIMITS,
        }
        write_json(draft / "dataset.json", card)
    return card


def _generate_examples(
    draft: pathlib.Path, request: Request, processes: int
) -> tuple[list[list[dict]], dict[str, str], Counter]:
    """Write all report files and the register, then read the files back.

    Returns (the variants of each example, bank -> its name, number of files by suffix).
    """
    quarters = PROFILES[request.profile].quarters
    full_banks, remainder = divmod(request.examples, quarters)
    quarters_of_bank = [quarters] * full_banks + [remainder] * (remainder > 0)
    n_banks = len(quarters_of_bank)
    repeat = itertools.repeat
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        chunk = {"chunksize": max(1, min(50, n_banks // (4 * processes)))}
        seeds, profiles = repeat(request.seed), repeat(request.profile)
        written = pool.map(
            write_files, repeat(draft / "reports"), seeds, range(n_banks), quarters_of_bank, profiles, **chunk
        )
        banks, files = zip(*tqdm(written, total=n_banks, desc="writing reports", unit="bank"), strict=True)
        write_register(draft / "register.csv", banks)
        register = read_register(draft / "register.csv")
        read = pool.map(read_examples, files, (register[bank.entity] for bank in banks), profiles, **chunk)
        per_bank = tqdm(read, total=n_banks, desc="reading reports", unit="bank")
        examples = list(itertools.chain.from_iterable(per_bank))
    suffixes = Counter(path.suffix for files_of_bank in files for paths in files_of_bank for path in paths)
    return examples, {bank.entity: bank.name for bank in banks}, suffixes


def write_files(
    directory: pathlib.Path, seed: int, index: int, quarters: int, profile: str
) -> tuple[Addressee, list[list[pathlib.Path]]]:
    """Write the reports of bank `index`. Returns its row of the register and the files of each reference date."""
    filings = make_filings(seed, index, quarters, PROFILES[profile])
    as_json = profile == "full" and random.Random(f"syntax {seed} {index}").random() < JSON_SHARE
    syntax = "json" if as_json else "csv"
    cells = load_cells(BUILT_IN)
    files = []
    for filing in filings:
        unfiled = filing.unfiled or ("C_04.00",)
        files.append(write_reports(directory, filing.bank, filing.period, filing.figures, cells, unfiled, syntax))
    bank = filings[0].bank
    return Addressee(bank.entity, bank.name, bank.country, bank.model), files


def read_examples(files: Sequence[Sequence[pathlib.Path]], bank: Addressee, profile: str) -> list[list[dict]]:
    """Read the files of one bank, by reference date, and make the variants of each example.

    Raises `RuntimeError` if a file gives a warning: our own files must read back without one.
    """
    cells = load_cells(BUILT_IN)
    reports = [read_filing(paths, cells) for paths in files]
    for report in reports:
        if report.warnings:
            raise RuntimeError(f"{report.path}: {report.warnings[0]}")
    letters = [None] * (VARIANTS if profile == "full" else 1)
    return [
        example_variants(report, bank, cells, PROFILES[profile], reports[:index], letters)
        for index, report in enumerate(reports)
    ]


def _split_by_bank(examples: list[dict], request: Request) -> Splits:
    """The three splits of the short profile."""
    banks = list(dict.fromkeys(example["bank"] for example in examples))
    split_of_bank = split_banks(banks, request.splits, request.seed)
    return group_by_split(examples, [split_of_bank[example["bank"]] for example in examples], SPLITS)
