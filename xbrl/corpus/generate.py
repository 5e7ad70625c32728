"""Generate a corpus of invented bank reports: report files, and the examples that are read back from these files.

xbrl/scripts/make_reports.py says which files a corpus has. The same request always gives the same bytes.
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
from xbrl.answers.profiles import PROFILES
from xbrl.corpus import quickstart
from xbrl.corpus.card import SPLITS, check_counts, check_shares, group_by_split, write_splits
from xbrl.corpus.examples import make_example, read_filing
from xbrl.corpus.filing import write_reports
from xbrl.corpus.note_texts import HandNote, hand_notes
from xbrl.corpus.population import make_filings
from xbrl.corpus.report_figures import Filing
from xbrl.read.dpm import load_cells
from xbrl.read.folder import in_parallel
from xbrl.read.register import write_register
from xbrl.read.replies import FILES, with_notes, write_replies
from xbrl.rules.findings import Finding, write_findings
from xbrl.rules.note_facts import consequences
from xbrl.rules.rules import evaluate

WITH_NOTE = 0.8  # fraction of the reports of a split that have a note
JSON_SHARE = 0.35  # fraction of banks without notes that file xBRL-JSON; the others file xBRL-CSV
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
HOW_MADE = (
    "xbrl/scripts/make_reports.py: invented banks file EBA report files (xBRL-CSV packages and xBRL-JSON) around notes that were "
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
    """The arguments of a corpus. They determine all of its bytes; the data card has them as `arguments`."""

    examples: int  # number of reports
    seed: int
    profile: str  # "full", "short" or "quickstart"
    splits: list[float]  # shares of the splits


@dataclass(frozen=True)
class Unit:
    """One bank to generate: its split, its number of quarters, its note, and the second note of a minimal pair.

    In the quickstart a unit is one report, which is drawn beforehand because a split draws from one stream of random numbers.
    """

    index: int
    split: str
    quarters: int = 1
    note: HandNote | None = None
    pair: HandNote | None = None
    report: quickstart.DrawnReport | None = None


@dataclass(frozen=True)
class GeneratedBank:
    """The reports, examples, findings and files of one bank."""

    filings: list[Filing]
    examples: list[dict]
    findings: list[Finding]
    files: list[pathlib.Path]


def is_generated(directory: pathlib.Path, request: Request) -> bool:
    """Return whether `directory` has the corpus of `request`, or False if there is no such directory.

    Raise `UserError` if it has other content, or cannot be created.
    """
    if any(parent.is_file() for parent in directory.parents):
        raise UserError(f"{directory} cannot be made: a file is in its path; choose another --out.")
    if not directory.exists():
        return False
    try:
        card = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a corpus
        card = None
    if isinstance(card, dict) and card.get("arguments") == dataclasses.asdict(request):
        return True
    raise UserError(f"{directory} exists and was not made with these arguments; remove it or choose another --out.")


def generate_corpus(
    directory: pathlib.Path,
    request: Request,
    processes: int,
    count_tokens: Callable[[str], int] | None = None,
) -> dict:
    """Generate the corpus and return its data card. The directory appears only once it is complete.

    `count_tokens` returns the number of tokens of a text; with it, the card also has lengths in tokens.
    """
    units = plan_units(request)
    with new_directory(directory) as draft:
        (draft / "reports").mkdir()
        banks = list(in_parallel(functools.partial(make_unit, draft / "reports", request), units, processes, "banks"))
        filings = [filing for bank in banks for filing in bank.filings]
        examples = [example for bank in banks for example in bank.examples]
        split_of_example = [unit.split for unit, bank in zip(units, banks, strict=True) for _ in bank.examples]
        splits = group_by_split(examples, split_of_example)
        register = {filing.bank.entity: filing.bank.addressee for filing in filings}
        write_register(draft / "register.csv", register.values())
        write_replies(draft / "reports" / FILES[0], [reply for filing in filings for reply in filing.replies])
        write_findings(draft / "findings.csv", [finding for bank in banks for finding in bank.findings])
        with_note = [example for members in splits.values() for example in members if example["note"]]
        facts = [{name: example[name] for name in ("bank", "period", "note", "note_facts")} for example in with_note]
        write_json_lines(draft / "note_facts.jsonl", facts)
        texts, more = (quickstart.HOW_MADE, quickstart.LIMITS), {"notes": _note_uses(splits)}
        if request.profile != "quickstart":
            suffixes = Counter(path.suffix for bank in banks for path in bank.files)
            texts = (HOW_MADE, LIMITS)
            more |= {
                "files": {"xBRL-CSV": suffixes[".zip"], "xBRL-JSON": suffixes[".json"]},
                "statements_of_notes": _statements(filings),
                "stands_in_training": _shared(splits),
            }
        return write_splits(draft, splits, dataclasses.asdict(request), texts, more, count_tokens)


def plan_units(request: Request) -> list[Unit]:
    """Plan the banks of a corpus. Raise `UserError` as `split_counts` does."""
    counts = split_counts(request)
    if request.profile == "quickstart":
        starts = itertools.accumulate(counts.values(), initial=0)
        return [
            Unit(0, split, report=report)
            for (split, count), first in zip(counts.items(), starts, strict=False)
            for report in quickstart.draw_reports(request.seed, split, first, count)
        ]
    units = [unit for split, count in counts.items() for unit in _units_of_split(request, split, count)]
    numbers = random.Random(f"banks {request.seed}").sample(range(len(units)), len(units))
    return [dataclasses.replace(unit, index=number) for unit, number in zip(units, numbers, strict=True)]


def split_counts(request: Request) -> dict[str, int]:
    """Return the number of reports of each split.

    A test uses each note at most once; reports beyond that go to training. In the quickstart a test consists of pairs.
    Raise `UserError` if the shares do not add up to 1, or if a split with a share above 0 would get no report.
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
    """Yield the banks of a split, which have `count` reports together.

    If the profile shows earlier quarters, half of the reports without a note are the quarter before a report with a note.
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


def make_unit(directory: pathlib.Path, request: Request, unit: Unit) -> GeneratedBank:
    """Write the report files of one bank, read the files back, and make examples from the reports that were read."""
    profile, cells = PROFILES[request.profile], load_cells()
    numbers = (request.seed, unit.index, unit.quarters)
    filings = [unit.report.filing] if unit.report else make_filings(*numbers, profile, unit.note, unit.pair)
    generated = GeneratedBank(filings, [], [], [])
    chooses_json = random.Random(f"syntax {request.seed} {unit.index}").random() < JSON_SHARE
    syntax = "json" if filings[-1].note.id or chooses_json else "csv"
    reports = []
    for filing in filings:
        arguments = (filing.bank, filing.period, filing.figures, cells, filing.unfiled or ("C_04.00",), syntax)
        files = write_reports(directory, *arguments)
        report = with_notes(read_filing(files, cells), [reply.note for reply in filing.replies])
        assert not report.warnings, report.warnings
        findings = consequences(report, evaluate(report), filing.note.facts)
        findings += quickstart.stated_findings(report, filing.note)
        findings = [dataclasses.replace(finding, note=report.notes[0].id) for finding in findings]
        earlier = [] if filing.pair else reports
        bank = filing.bank.addressee
        example = make_example(report, bank, cells, profile, earlier, findings=findings, note=filing.note)
        reports.append(report)
        generated.examples.append(example | ({"pair": filing.pair} if filing.pair else {}))
        generated.findings.extend(findings)
        generated.files.extend(files)
    return generated


def _note_uses(splits: dict[str, list[dict]]) -> dict[str, dict]:
    """Return, by split: the number of notes, of reports with and without a note, and of uses of the most frequent note."""
    uses = {}
    for split, examples in splits.items():
        counts = Counter(example["note"] for example in examples if example["note"])
        most, total = max(counts.values(), default=0), counts.total()
        uses[split] = {"notes": len(counts), "reports": total, "most": most, "without": len(examples) - total}
    return uses


def _statements(filings: Iterable[Filing]) -> dict:
    """Count the reports whose note states figures, and by name the statements that the reported figures contradict."""
    stating = [filing for filing in filings if filing.note.states or any(filing.note.clients.values())]
    dropped = Counter(name for filing in stating for name in filing.dropped)
    return {"reports": len(stating), "not_followed": dict(dropped)}


def _shared(splits: dict[str, list[dict]]) -> dict[str, dict[str, int]]:
    """Count, by split, the banks, notes and letters that training has too. There should be none."""
    parts = {
        split: {
            "banks": {example["bank"] for example in examples},
            "notes": {example["note"] for example in examples} - {""},
            "letters": {letter_in(example["messages"][-1]["content"]) for example in examples},
        }
        for split, examples in splits.items()
    }
    known = parts.pop("train")
    return {split: {name: len(values & known[name]) for name, values in part.items()} for split, part in parts.items()}
