"""The splits of a corpus (training, validation and test have different banks), and its data card (`dataset.json`)."""

import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common.durable_files import write_json, write_json_lines
from common.errors import UserError
from eval.asked_examples import report_of
from xbrl.answers.baselines import PROBE, score_baselines
from xbrl.read.dpm import RELEASE
from xbrl.rules.findings import note_rules
from xbrl.rules.rules import built_in_rules

SPLITS = ("train", "validation", "test")
SOURCES = (
    f"Cells and labels: European Banking Authority, Data Point Model, release {RELEASE}. "
    "Thresholds: CRR (EU) 575/2013, CRD 2013/36/EU, Delegated Regulation (EU) 2015/61."
)


def group_by_split(examples: Sequence, splits: Sequence[str]) -> dict[str, list]:
    """Group the examples by split, in their order. `splits` has the split of each example."""
    pairs = list(zip(examples, splits, strict=True))
    return {name: [example for example, split in pairs if split == name] for name in SPLITS}


def check_shares(shares: Sequence[float]) -> None:
    """Check that there is one share per split, that none is negative, and that they add up to 1. Raise `UserError` otherwise."""
    if len(shares) != len(SPLITS) or not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-9):
        raise UserError(
            f"the splits {list(shares)} must be {len(SPLITS)} shares ({', '.join(SPLITS)}), none negative, that add up to 1."
        )


def check_counts(total: str, counts: Iterable[int], shares: Sequence[float]) -> None:
    """Raise `UserError` if a split with a share above 0 would be empty. `total` is the quantity that is split: `20 examples`."""
    for split, count, share in zip(SPLITS, counts, shares, strict=True):
        if share > 0 and not count:
            raise UserError(f"{total} are too few for a share of {share:.3g} in {split!r}; give more.")


def write_splits(
    directory: pathlib.Path,
    splits: dict[str, list[dict]],
    arguments: dict,
    texts: tuple[str, str],
    more: Mapping[str, Any],
    count_tokens: Callable[[str], int] | None = None,
) -> dict:
    """Write `SPLIT.jsonl` for each split, with the field `split` in each example, and the data card. Return the card.

    `texts` has two texts for the card: how the corpus was made, and its limits. `more` has further entries of the card.
    `count_tokens` returns the number of tokens of a text; with it, the card also has lengths in tokens.
    """
    for split, examples in splits.items():
        write_json_lines(directory / f"{split}.jsonl", [example | {"split": split} for example in examples])
    train, validation, test = (splits[name] for name in SPLITS)
    card = {
        "arguments": arguments,
        "splits": {split: split_summary(members, count_tokens) for split, members in splits.items()},
        **more,
        "baselines": {"test": score_baselines(train, test, validation)} if train else {},
        "baselines_left_out": [PROBE],  # it needs the base model to read notes: scripts/evaluate.py --probe BASE
        "how_made": texts[0],
        "sources": SOURCES,
        "limits": texts[1],
    }
    write_json(directory / "dataset.json", card)
    return card


def split_summary(examples: Sequence[dict], count_tokens: Callable[[str], int] | None) -> dict:
    """Return counts of one split and the lengths of its texts in characters; also in tokens if `count_tokens` is given."""
    counts = Counter(rule_id for example in examples for rule_id in example["violations"])
    rules = (*(rule.id for rule in built_in_rules()), *note_rules())
    notes: dict[str, dict[str, int]] = {}  # kind of note -> outcome, as in `_outcome` -> number of reports
    for kind, outcome in sorted((example["kind"], _outcome(example)) for example in examples if example["kind"]):
        of_kind = notes.setdefault(kind, {})
        of_kind[outcome] = of_kind.get(outcome, 0) + 1
    summary = {
        "examples": len(examples),
        "banks": len({example["bank"] for example in examples}),
        "clean": sum(not example["violations"] for example in examples),
        "combinations": len({frozenset(example["violations"]) for example in examples}),
        "violations": {name: counts[name] for name in rules if counts[name]},
        "notes": notes,
    }
    texts = {"report": [report_of(example) for example in examples]}
    texts["answer"] = [example["messages"][-1]["content"] for example in examples]
    summary["characters"] = {role: _lengths([len(text) for text in part]) for role, part in texts.items()}
    if count_tokens:
        tokens = {role: [count_tokens(text) for text in part] for role, part in texts.items()}
        tokens["together"] = [sum(pair) for pair in zip(*tokens.values(), strict=True)]
        summary["tokens"] = {role: _lengths(lengths) for role, lengths in tokens.items()}
    return summary


def _outcome(example: dict) -> str:
    """Return how the note of an example changes its violations: it adds ("violated"), lifts or changes nothing."""
    violated, by_engine = set(example["violations"]), set(example["engine"])
    return "violated" if violated - by_engine else "lifted" if by_engine - violated else "nothing"


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    return {"mean": round(sum(lengths) / len(lengths), 1), "max": max(lengths)} if lengths else {}


def token_counter(model_directory: pathlib.Path | None) -> Callable[[str], int] | None:
    """Return a function that counts the tokens of a text with the tokenizer of a model directory; None without a directory.

    Raise `UserError` if the directory has no tokenizer.
    """
    if model_directory is None:
        return None
    from data.tokens import load_tokenizer  # imports transformers

    tokenizer = load_tokenizer(str(model_directory))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
