"""Generate a corpus of invented bank reports: report files, and the examples that are read back from these files.

scripts/make_reports.py says which files a corpus has. The same request always gives the same bytes.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from common.durable_files import new_directory, write_json_lines
from common.errors import UserError
from xbrl.answers.answer_reader import letter_in
from xbrl.corpus import quickstart
from xbrl.corpus.card import SPLITS, check_counts, check_shares, group_by_split, write_splits
from xbrl.corpus.examples import PROFILES, make_example, read_filing, write_register
from xbrl.corpus.filing import write_reports
from xbrl.corpus.note_texts import HandNote, hand_notes
from xbrl.corpus.population import make_filings
from xbrl.corpus.report_figures import Filing
from xbrl.read.dpm import load_cells
from xbrl.read.folder import in_parallel
from xbrl.rules.findings import Finding, write_findings
from xbrl.rules.note_facts import consequences
from xbrl.rules.rules import evaluate

WITH_NOTE = 0.8  # share of the reports of a split that have a note
JSON_SHARE = 0.35  # fraction of banks without notes that file xBRL-JSON; the others file xBRL-CSV
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
HOW_MADE = (
    "scripts/make_reports.py: invented banks file EBA report files (xBRL-CSV packages and xBRL-JSON) around notes that were "
    "written by hand (xbrl/corpus/notes); the examples are read from these files and labelled by xbrl/rules/rules.jsonl. What "
    "a note states was annotated by its writer; what follows from that by law and arithmetic stands in findings.csv."
)
LIMITS = (
    "Synthetic. No real institution, filing, note or supervisory letter is in it; real filings with supervisory labels are not "
    "public. Violations are more frequent, and sit closer to the limits, than in practice; some banks hold more AT1 and Tier 2 "
    "than real ones do, so that each rule can fail alone; no bank is insolvent; a report violates at most nine rules by its "
    "figures. A bank has another name than the one that its note may give itself. Reports before 2026 are filed in the cells "
    "of a later release. Training repeats each note in several reports; a test has each note once."
)


@dataclass(frozen=True)
class Request:
    """What to generate. These values determine every byte of the corpus; the data card has them as `arguments`."""

    examples: int  # number of reports
    seed: int
    profile: str  # "full", "short" or "quickstart"
    splits: list[float]  # shares of the splits


@dataclass(frozen=True)
class Unit:
    """One bank to generate: its split, its number of quarters, its note and the other one of a minimal pair.

    In the quickstart it is one report, which is drawn already: a split has one stream of random numbers there.
    """

    index: int
    split: str
    quarters: int = 1
    note: HandNote | None = None
    pair: HandNote | None = None
    case: quickstart.Case | None = None


@dataclass(frozen=True)
class Made:
    """What came of one bank."""

    filings: list[Filing]
    examples: list[dict]
    findings: list[Finding]
    files: list[pathlib.Path]


def is_generated(directory: pathlib.Path, request: Request) -> bool:
    """Whether `directory` has the corpus of this request. Raises `UserError` if it has something else, or cannot be made."""
    if any(parent.is_file() for parent in directory.parents):
        raise UserError(f"{directory} cannot be made: a file is in its path; choose another --out.")
    if not directory.exists():
        return False
    try:
        found = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
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
    units = plan_units(request)
    with new_directory(directory) as draft:
        (draft / "reports").mkdir()
        made = list(in_parallel(functools.partial(make_unit, draft / "reports", request), units, processes, "banks"))
        filings = [filing for one in made for filing in one.filings]
        examples = [example for one in made for example in one.examples]
        of_unit = [unit.split for unit, one in zip(units, made, strict=True) for _ in one.examples]
        splits = group_by_split(examples, of_unit)
        write_register(draft / "register.csv", {one.bank.entity: one.bank.addressee for one in filings}.values())
        write_findings(draft / "findings.csv", [finding for one in made for finding in one.findings])
        noted = [example for members in splits.values() for example in members if example["note"]]
        facts = [{name: one[name] for name in ("bank", "period", "note", "note_facts")} for one in noted]
        write_json_lines(draft / "note_facts.jsonl", facts)
        texts, more = (quickstart.HOW_MADE, quickstart.LIMITS), {"notes": _note_uses(splits)}
        if request.profile != "quickstart":
            suffixes = Counter(path.suffix for one in made for path in one.files)
            texts = (HOW_MADE, LIMITS)
            more |= {
                "files": {"xBRL-CSV": suffixes[".zip"], "xBRL-JSON": suffixes[".json"]},
                "statements_of_notes": _statements(filings),
                "stands_in_training": _shared(splits),
            }
        return write_splits(draft, splits, dataclasses.asdict(request), texts, more, count_tokens)


def plan_units(request: Request) -> list[Unit]:
    """The banks of a corpus. Raises `UserError` as `split_counts` does."""
    counts = split_counts(request)
    if request.profile == "quickstart":
        starts = itertools.accumulate(counts.values(), initial=0)
        return [
            Unit(0, split, case=case)
            for (split, count), first in zip(counts.items(), starts, strict=False)
            for case in quickstart.draw_cases(request.seed, split, first, count)
        ]
    units = [unit for split, count in counts.items() for unit in _units_of_split(request, split, count)]
    numbers = random.Random(f"banks {request.seed}").sample(range(len(units)), len(units))
    return [dataclasses.replace(unit, index=number) for unit, number in zip(units, numbers, strict=True)]


def split_counts(request: Request) -> dict[str, int]:
    """Split -> number of its reports.

    A test has each of its notes at most once; what it cannot take goes to training. In the quickstart it consists of pairs.
    Raises `UserError` if the shares do not add up to 1, or if a split with a share above 0 would get no report.
    """
    check_shares(request.splits)
    counts = {split: round(request.examples * share) for split, share in zip(SPLITS, request.splits, strict=True)}
    if request.profile == "quickstart":
        counts["test"] -= counts["test"] % 2
    else:
        counts["test"] = min(counts["test"], int(len(hand_notes("test")) / WITH_NOTE))
        counts["train"] = request.examples - counts["validation"] - counts["test"]
    check_counts(f"{request.examples} examples", counts.values(), request.splits)
    return counts


def _units_of_split(request: Request, split: str, count: int) -> Iterator[Unit]:
    """The banks of a split, with `count` reports together.

    Half of the reports without a note are the quarter before one with a note, if earlier quarters are shown.
    """
    rng = random.Random(f"notes {request.seed} {split}")
    with_note = round(count * WITH_NOTE)
    earlier = (count - with_note) // 2 if request.profile == "full" else 0
    by_id = {note.id: note for note in hand_notes(split)}
    if split == "test":
        pairs = [note for note in by_id.values() if note.id < note.pair]
        pairs = rng.sample(pairs, with_note * len(pairs) // len(by_id))
        alone = [note for note in by_id.values() if not note.pair]
        uses = rng.sample(alone, with_note - 2 * len(pairs))
        yield from (Unit(0, split, 1, note, by_id[note.pair]) for note in pairs)
    else:
        rounds = (rng.sample(sorted(by_id), len(by_id)) for _ in itertools.count())
        uses = [by_id[name] for name in itertools.islice(itertools.chain.from_iterable(rounds), with_note)]
    earlier = min(earlier, len(uses))
    for place, note in enumerate(uses):
        yield Unit(0, split, 2 if place < earlier else 1, note)
    for _ in range(count - with_note - earlier):
        yield Unit(0, split)


def make_unit(directory: pathlib.Path, request: Request, unit: Unit) -> Made:
    """Write the report files of one bank, read them back, and make its examples from what was read."""
    profile, cells = PROFILES[request.profile], load_cells()
    numbers = (request.seed, unit.index, unit.quarters)
    filings = [unit.case.filing] if unit.case else make_filings(*numbers, profile, unit.note, unit.pair)
    made = Made(filings, [], [], [])
    chooses_json = random.Random(f"syntax {request.seed} {unit.index}").random() < JSON_SHARE
    syntax = "json" if filings[-1].note.id or chooses_json else "csv"  # EBA xBRL-CSV has no place for notes
    reports = []
    for filing in filings:
        arguments = (filing.bank, filing.period, filing.figures, cells, filing.unfiled or ("C_04.00",), syntax)
        files = write_reports(directory, *arguments, filing.footnotes)
        report = read_filing(files, cells)
        assert not report.warnings, report.warnings
        findings = consequences(report, evaluate(report), filing.note.facts)
        findings += quickstart.stated_findings(report, filing.note)
        findings = [dataclasses.replace(one, note=report.notes[0].id) for one in findings]
        earlier = [] if filing.pair else reports
        bank = filing.bank.addressee
        example = make_example(report, bank, cells, profile, earlier, findings=findings, note=filing.note)
        reports.append(report)
        made.examples.append(example | ({"pair": filing.pair} if filing.pair else {}))
        made.findings.extend(findings)
        made.files.extend(files)
    return made


def _note_uses(splits: dict[str, list[dict]]) -> dict[str, dict]:
    """Split -> how many notes it has, in how many reports, and how often the most frequent one."""
    found = {}
    for split, examples in splits.items():
        counts = Counter(one["note"] for one in examples if one["note"])
        most, total = max(counts.values(), default=0), counts.total()
        found[split] = {"notes": len(counts), "reports": total, "most": most, "without": len(examples) - total}
    return found


def _statements(filings: Iterable[Filing]) -> dict:
    """How many reports state figures in their note, and how many of these statements the figures do not follow."""
    stating = [one for one in filings if one.note.states or any(one.note.clients.values())]
    return {"reports": len(stating), "not_followed": dict(Counter(name for one in stating for name in one.dropped))}


def _shared(splits: dict[str, list[dict]]) -> dict[str, dict[str, int]]:
    """Split -> how many of its banks, notes and letters stand in training, which should be none."""
    parts = {
        split: {
            "banks": {one["bank"] for one in examples},
            "notes": {one["note"] for one in examples} - {""},
            "letters": {letter_in(one["messages"][-1]["content"]) for one in examples},
        }
        for split, examples in splits.items()
    }
    known = parts.pop("train")
    return {split: {name: len(found & known[name]) for name, found in part.items()} for split, part in parts.items()}
