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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tqdm import tqdm

from common.durable_files import new_directory, write_json
from common.errors import UserError
from xbrl.corpus.card import SOURCES, split_summary, violation_baselines, write_splits
from xbrl.corpus.corpus import Filing, make_filings, twin_of
from xbrl.corpus.examples import make_example, read_filing, read_register, write_register
from xbrl.corpus.filing import write_reports
from xbrl.corpus.leaks import leak_shares
from xbrl.corpus.notes import write_note
from xbrl.corpus.profiles import PROFILES, Profile
from xbrl.corpus.splits import FULL_SPLITS, SPLITS, group_by_split, split_banks, split_examples
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.render import Addressee
from xbrl.rules.findings import Finding, load_findings, write_findings

Splits = dict[str, list[dict]]  # split -> its examples
JSON_SHARE = 0.35  # fraction of banks without notes in the full profile that file xBRL-JSON; the others file xBRL-CSV
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
HOW_MADE = (
    "scripts/make_reports.py: invented banks over several quarters file EBA report files (xBRL-CSV packages and xBRL-JSON); "
    "the examples are read from these files alone and labelled by xbrl/rules/rules.jsonl. What follows from a bank's note "
    "was planted with the note and stands in findings.csv."
)
LIMITS = (
    "Synthetic. No real institution, filing or supervisory letter is in it; real filings with supervisory labels are not "
    "public. Violations are more frequent, and sit closer to the limits, than in practice; some banks hold more AT1 and "
    "Tier 2 than real ones do, so that each rule can fail alone; no bank is insolvent; a report violates at most nine rules. "
    "A report has at most one note, whose sentences were written for this project. What a note changes in other ratios than "
    "those of its finding is kept within their limits."
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate. These four values determine every byte of the corpus; the data card has them as `arguments`."""

    examples: int  # number of reports
    seed: int
    profile: str  # a key of PROFILES
    splits: list[float]  # shares of the splits


def is_generated(directory: pathlib.Path, request: Request) -> bool:
    """Whether `directory` has the corpus of this request.

    Raises `UserError` if it exists with other content, or cannot be made because a parent is a file.
    """
    if not directory.exists():
        file = next((parent for parent in directory.parents if parent.exists() and not parent.is_dir()), None)
        if file is not None:
            raise UserError(f"{directory} cannot be made: {file} is a file, not a directory; choose another --out.")
        return False
    card = directory / "dataset.json"
    try:
        found = json.loads(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a corpus
        found = None
    if isinstance(found, dict) and found.get("arguments") == dataclasses.asdict(request):
        return True
    raise UserError(f"{directory} exists and was not made with these arguments; remove it or choose another --out.")


def generate_corpus(
    directory: pathlib.Path,
    request: Request,
    processes: int,
    count_tokens: Callable[[str], int] | None = None,
) -> dict:
    """Generate the corpus and return its data card. The directory appears only once it is complete.

    `count_tokens` returns the number of tokens of a text; the card then has lengths in tokens.
    """
    profile = PROFILES[request.profile]
    with new_directory(directory) as draft:
        (draft / "reports").mkdir()
        filings, splits = plan_filings(request, processes)
        examples, files_by_suffix = _generate_examples(draft, request, filings, splits, processes)
        by_split = group_by_split(examples, [split for of_bank in splits for split in of_bank], names_of(profile))
        write_splits(draft, by_split)
        names = {filing.bank.entity: filing.bank.name for of_bank in filings for filing in of_bank}
        card = {
            "arguments": dataclasses.asdict(request),
            "splits": {split: split_summary(members, count_tokens) for split, members in by_split.items()},
            "files": {"xBRL-CSV": files_by_suffix[".zip"], "xBRL-JSON": files_by_suffix[".json"]},
            "leak_test": leak_shares(by_split, names),
            "baselines": violation_baselines(by_split),
            "how_made": HOW_MADE,
            "sources": SOURCES,
            "limits": LIMITS,
        }
        write_json(draft / "dataset.json", card)
    return card


def names_of(profile: Profile) -> tuple[str, ...]:
    """The splits of a profile."""
    return FULL_SPLITS if profile.name == "full" else SPLITS


def plan_filings(request: Request, processes: int) -> tuple[list[list[Filing]], list[list[str]]]:
    """(the filings of each bank, the split of each filing).

    The splits are known before anything is written, because the notes and the letters of a test have wordings of their
    own.
    """
    profile = PROFILES[request.profile]
    full_banks, remainder = divmod(request.examples, profile.quarters)
    counts = [profile.quarters] * full_banks + [remainder] * (remainder > 0)
    repeat = itertools.repeat
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(
            make_filings,
            repeat(request.seed),
            range(len(counts)),
            counts,
            repeat(profile),
            chunksize=_chunk(counts, processes),
        )
        filings = list(tqdm(drawn, total=len(counts), desc="drawing reports", unit="bank"))
    cases = [
        {
            "id": f"{filing.bank.entity}-{filing.period}",
            "bank": filing.bank.entity,
            "period": filing.period,
            "violations": sorted(filing.violated),
        }
        for filing in itertools.chain.from_iterable(filings)
    ]
    if profile.name == "full":
        flat = split_examples(cases, request.splits, request.seed)
    else:
        split_of_bank = split_banks(list(dict.fromkeys(case["bank"] for case in cases)), request.splits, request.seed)
        flat = [split_of_bank[case["bank"]] for case in cases]
        filings, flat = _with_twins([one for (one,) in filings], flat)
    position = iter(flat)
    return filings, [list(itertools.islice(position, len(of_bank))) for of_bank in filings]


def _with_twins(filings: Sequence[Filing], splits: Sequence[str]) -> tuple[list[list[Filing]], list[str]]:
    """The filings of a profile with one quarter, and their splits.

    Wherever it is possible, the filing of a test comes with its twin, for which the last filings of the test make room.
    """
    test = [filing for filing, split in zip(filings, splits, strict=True) if split == "test"]
    paired: list[Filing] = []
    for filing in test:
        twin = twin_of(filing)
        paired += [filing] if twin is None else [replace(filing, pair=twin.pair), twin]
    paired = paired[: len(test)]
    if paired and [filing.pair for filing in paired].count(paired[-1].pair) == 1:  # its twin found no room
        paired[-1] = replace(paired[-1], pair="")
    others = [(filing, split) for filing, split in zip(filings, splits, strict=True) if split != "test"]
    placed = [*others, *((filing, "test") for filing in paired)]
    return [[filing] for filing, _ in placed], [split for _, split in placed]


def _chunk(items: Sequence, processes: int) -> int:
    return max(1, min(50, len(items) // (4 * processes)))


def _generate_examples(
    draft: pathlib.Path, request: Request, filings: list[list[Filing]], splits: list[list[str]], processes: int
) -> tuple[list[dict], Counter]:
    """Write all report files, the register and findings.csv, then read the files back.

    Returns (the examples, number of files by suffix).
    """
    repeat = itertools.repeat
    banks = [of_bank[0].bank for of_bank in filings]
    write_register(draft / "register.csv", [Addressee(one.entity, one.name, one.country, one.model) for one in banks])
    findings = [finding for of_bank in filings for filing in of_bank if filing.note for finding in filing.note.findings]
    write_findings(draft / "findings.csv", findings)
    register, truth = read_register(draft / "register.csv"), load_findings(draft / "findings.csv")
    of_banks = [
        {period: truth[entity, period] for entity, period in cases}
        for cases in (
            [case for case in [(f.bank.entity, f.period) for f in of_bank] if case in truth] for of_bank in filings
        )
    ]
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        chunk = {"chunksize": _chunk(filings, processes)}
        folder, profiles = repeat(draft / "reports"), repeat(request.profile)
        seeds = repeat(request.seed)
        files = pool.map(write_files, folder, seeds, filings, splits, profiles, **chunk)
        files = list(tqdm(files, total=len(filings), desc="writing reports", unit="bank"))
        addressees = (register[bank.entity] for bank in banks)
        pairs = [[filing.pair for filing in of_bank] for of_bank in filings]
        read = pool.map(read_examples, files, addressees, splits, of_banks, pairs, profiles, **chunk)
        examples = list(
            itertools.chain.from_iterable(tqdm(read, total=len(filings), desc="reading reports", unit="bank"))
        )
    return examples, Counter(path.suffix for of_bank in files for paths in of_bank for path in paths)


def write_files(
    directory: pathlib.Path, seed: int, filings: Sequence[Filing], splits: Sequence[str], profile: str
) -> list[list[pathlib.Path]]:
    """Write the reports of one bank. Returns the files of each reference date.

    A bank that ever explains a figure in a note files xBRL-JSON, because EBA xBRL-CSV has no place for notes.
    """
    entity = filings[0].bank.entity
    has_notes = any(filing.note for filing in filings)
    chosen = profile == "full" and random.Random(f"syntax {seed} {entity}").random() < JSON_SHARE
    syntax = "json" if has_notes or chosen else "csv"
    cells = load_cells(BUILT_IN)
    files = []
    for filing, split in zip(filings, splits, strict=True):
        seed_of_note = f"{seed} {filing.pair or entity} {filing.period}"
        notes = [write_note(filing.note, split, seed_of_note)] if filing.note else []
        unfiled = filing.unfiled or ("C_04.00",)
        arguments = (directory, filing.bank, filing.period, filing.figures, cells, unfiled, syntax, notes)
        files.append(write_reports(*arguments))
    return files


def read_examples(
    files: Sequence[Sequence[pathlib.Path]],
    bank: Addressee,
    splits: Sequence[str],
    findings: Mapping[str, Sequence[Finding]],
    pairs: Sequence[str],
    profile: str,
) -> list[dict]:
    """Read the files of one bank, by reference date, and make the examples. `findings` are those of each date.

    `pairs` has the id of the minimal pair of each report, or "".

    Raises `RuntimeError` if a file gives a warning: our own files must read back without one.
    """
    cells = load_cells(BUILT_IN)
    reports = [read_filing(paths, cells) for paths in files]
    for report in reports:
        if report.warnings:
            raise RuntimeError(f"{report.path}: {report.warnings[0]}")
    return [
        make_example(
            report,
            bank,
            cells,
            PROFILES[profile],
            [reports[place] for place in shown_earlier(splits, index)],
            findings=findings.get(report.period, ()),
            split=splits[index],
        )
        | ({"pair": pairs[index]} if pairs[index] else {})
        for index, report in enumerate(reports)
    ]


def shown_earlier(splits: Sequence[str], index: int) -> list[int]:
    """Places of the earlier reports that report `index` of a bank may show.

    Below a training report no report of a test stands, and none before it: its figures must not be seen in training.
    """
    places: list[int] = []
    for place in range(index - 1, -1, -1):
        if splits[index] == "train" and splits[place] != "train":
            break
        places.insert(0, place)
    return places
