"""Keep letters of the test splits from repeating letters of the training split.

A letter leaks if a training letter is equal to it except for names, dates, entity codes and numbers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from eval.asked_examples import report_of
from xbrl.corpus.examples import EARLIER_CELLS, letter_of
from xbrl.corpus.splits import FULL_SPLITS, group_by_split, split_examples
from xbrl.read.printed_cells import printed_cells
from xbrl.read.render import cell_name, short_label

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b\d{{1,2}} (?:{_MONTHS}) \d{{4}}\b|\b\d{{4}}-\d\d-\d\d\b")
_CODE = re.compile(r"\b[A-Z0-9]{18}[0-9]{2}\b")
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_CLIENT = re.compile(r"\b[A-Z]\d{2}\b")
_SENTENCE_END = re.compile(r"(?<!Art\.)(?<!Reg\.)(?<=[.:])\s+")
_LONG_FIGURE = re.compile(r" \| -?\d{5,}(?: thousand| million)?$")


def mask(letter: str, names: Iterable[str]) -> str:
    """Replace the given names, dates, entity codes and numbers in a letter by placeholders."""
    for name in sorted(names, key=len, reverse=True):
        letter = letter.replace(name, "<name>")
    return _NUMBER.sub("<number>", _CODE.sub("<code>", _DATE.sub("<date>", letter)))


def leaks(training: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> list[int]:
    """Indices of the test letters that, once masked, occur in training. Both are (letter, name of the bank) pairs."""
    known = {mask(letter, [name]) for letter, name in training}
    return [index for index, (letter, name) in enumerate(test) if mask(letter, [name]) in known]


def place_examples(
    examples: Sequence[dict], shares: Sequence[float], seed: int, names: Mapping[str, str]
) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Assign examples with letters of their own to `FULL_SPLITS`, and drop the test examples whose letter leaks.

    `names` maps a bank to its name in letters (default: the bank's id). Returns (split -> examples, number of dropped
    examples per test split).
    """
    placed = group_by_split(examples, split_examples(examples, shares, seed), FULL_SPLITS)
    training = [_letter_and_name(example, names) for example in placed["train"]]
    dropped = {}
    for split in _tests(placed):
        leaking = set(leaks(training, [_letter_and_name(example, names) for example in placed[split]]))
        placed[split] = [example for place, example in enumerate(placed[split]) if place not in leaking]
        dropped[split] = len(leaking)
    return placed, dropped


def leak_shares(splits: Mapping[str, Sequence[dict]], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Test split -> how much of it stands in training, as shares between 0 and 1.

    `letters` and `sentences`: of its letters, and of the sentences of its letters, once masked. `notes`: of its notes,
    once masked. `figures`: of the lines of its reports that have a figure of five digits or more, word for word.
    `ratios`: of its reports, the printed ratios all together, as a training report's own or as those of an earlier quarter.
    """
    parts = {split: [_parts(example, names) for example in examples] for split, examples in splits.items()}
    compared = ("letters", "sentences", "notes", "figures", "ratios")
    known = {
        name: {one for part in parts["train"] for one in part[name] + part.get(f"earlier {name}", [])}
        for name in compared
    }
    return {
        split: {
            name: _share_known([one for part in parts[split] for one in part[name]], known[name]) for name in compared
        }
        for split in _tests(splits)
    }


def _parts(example: dict, names: Mapping[str, str]) -> dict[str, list[str]]:
    """What is compared of one example; `leak_shares` describes it."""
    letter, name = _letter_and_name(example, names)
    report, _, earlier = report_of(example).partition("\nEarlier reports\n")
    notes = [line for line in report.splitlines() if line.lower().startswith("note")]
    lines = [line for line in report.splitlines() if line not in notes]
    masked = mask(letter, [name])
    return {
        "letters": [masked],
        "sentences": [one for one in _SENTENCE_END.split(masked) if len(one.split()) > 3],
        "notes": [mask(_CLIENT.sub("<client>", note), [name]) for note in notes],
        "figures": [line for line in lines if _LONG_FIGURE.search(line)],
        "ratios": [_ratios(lines)],
        "earlier ratios": [line.partition(": ")[2] for line in earlier.splitlines()],
    }


def _ratios(lines: Sequence[str]) -> str:
    """The ratios of a report as one line, in the form in which `render.render_earlier` prints those of an earlier one."""
    figures = printed_cells("\n".join(lines))
    if not figures:  # the style "labels" prints nothing but ratios
        return ", ".join(line for line in lines if line.endswith("%"))
    return ", ".join(
        f"{short_label(cell)} {figures[cell_name(cell)]}" for cell in EARLIER_CELLS if cell_name(cell) in figures
    )


def _share_known(parts: Sequence[str], known: set[str]) -> float:
    return round(sum(part in known for part in parts) / len(parts), 4) if parts else 0.0


def _tests(splits: Iterable[str]) -> list[str]:
    return [split for split in splits if split.startswith("test")]


def _letter_and_name(example: dict, names: Mapping[str, str]) -> tuple[str, str]:
    return letter_of(example), names.get(example["bank"], example["bank"])
