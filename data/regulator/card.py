"""The splits as JSON Lines files, and the data card that says what they hold, how they were made, and what they are not."""

import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence

from data.regulator.answers import parse_answer
from data.regulator.baselines import score_baselines
from data.regulator.dpm import RELEASE
from data.regulator.rules import built_in_rules

SOURCES = (
    f"Cells and labels: European Banking Authority, Data Point Model, release {RELEASE}. "
    "Thresholds: CRR (EU) 575/2013, CRD 2013/36/EU, Delegated Regulation (EU) 2015/61."
)


def write_splits(out: pathlib.Path, parts: dict[str, list[dict]]) -> None:
    """One JSON Lines file per split; each example says which it is in."""
    for split, members in parts.items():
        lines = (json.dumps(member | {"split": split}, ensure_ascii=False) + "\n" for member in members)
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def split_summary(examples: Sequence[dict], count_tokens: Callable[[str], int] | None = None) -> dict:
    """Counts and lengths of one split. `count_tokens`, where there is a tokenizer, is the length of a text in tokens."""
    counts = Counter(rule_id for example in examples for rule_id in example["violations"])
    sizes = Counter(len(example["violations"]) for example in examples)
    summary = {
        "examples": len(examples),
        "banks": len({example["bank"] for example in examples}),
        "clean": sizes[0],
        "reports_by_number_of_violations": {str(size): number for size, number in sorted(sizes.items())},
        "combinations": len({frozenset(example["violations"]) for example in examples}),
        "violations": {rule.id: counts[rule.id] for rule in built_in_rules() if counts[rule.id]},
        "characters": {},
    }
    texts = {"report": [report_of(example) for example in examples]}
    texts["answer"] = [example["messages"][-1]["content"] for example in examples]
    summary["characters"] = {role: _spread([len(text) for text in found]) for role, found in texts.items()}
    if count_tokens:
        tokens = {role: [count_tokens(text) for text in found] for role, found in texts.items()}
        tokens["together"] = [sum(pair) for pair in zip(*tokens.values(), strict=True)]
        summary["tokens"] = {role: _spread(lengths) for role, lengths in tokens.items()}
    return summary


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {
        "mean": round(sum(ordered) / len(ordered), 1),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[(len(ordered) * 95) // 100],
        "max": ordered[-1],
    }


def violation_baselines(parts: dict[str, list[dict]]) -> dict[str, dict]:
    """Test split -> baseline -> precision, recall and F1 on the violations, fitted on the training split."""
    violated = {split: [example["violations"] for example in examples] for split, examples in parts.items()}
    tests = [split for split in parts if split.startswith("test")]
    return {split: score_baselines(violated["train"], violated[split]) for split in tests}


def report_of(example: dict) -> str:
    """What the model is given to read, without a system message."""
    return next(message["content"] for message in example["messages"] if message["role"] == "user")


def letter_of(example: dict) -> str:
    """The directive of an example."""
    return parse_answer(example["messages"][-1]["content"]).directive
