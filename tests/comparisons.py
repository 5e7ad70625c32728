"""Make up results of scripts/evaluate.py and scripts/measure.py forgetting, and their data."""

import hashlib
import json
from pathlib import Path

from eval.comparison.arms import Arm, Seed, Source

RULES = {"LCR_MIN": ("LCR", "75%", "100%"), "LR_MIN": ("Leverage ratio", "2%", "3%")}


def answer_text(rules, letter="The bank shall act."):
    """Return an answer that reports these rules as violated."""
    lines = [f"{rule} | {RULES[rule][0]} | {RULES[rule][1]} | min {RULES[rule][2]} | CRR Art. 412(1)" for rule in rules]
    return "\n".join(["Violations:", *(lines or ["none"]), "Directive:", letter])


def example(name, bank, rules, report="LCR 75%"):
    """Return the example of a report that violates the rules."""
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": answer_text(rules)}]
    return {"id": name, "bank": bank, "violations": rules, "engine": rules[:1], "messages": messages}


def row(true, predicted, bank=None, rouge=0.5, text="", **more):
    """Return one answer of a result."""
    facts = [len({*true} & {*predicted}), len(true), len(predicted)]
    return {
        "true": true,
        "predicted": predicted,
        "cluster": bank,
        "facts": facts,
        "rouge_l": rouge,
        "answer": text,
    } | more


def task(answers, loss=1.0, targets=2, sha="0" * 64, **more):
    """Return a result of scripts/evaluate.py with the same loss and number of targets for each answer."""
    header = {
        "model": "m",
        "data": "test.jsonl",
        "data_sha256": sha,
        "n_examples": len(answers),
        "n_in_file": len(answers),
    }
    losses = [[loss, targets]] * len(answers)
    total = {"mean": loss / targets, "targets": targets * len(answers)}
    return header | {"answers": answers, "losses": losses, "loss": total, "shots": 0, "cut_short": 0, "task": ""} | more


def general(rise=0.1, right=8, weights="w", texts=12):
    """Return a result of scripts/measure.py forgetting: 0.8 nats per byte before training, and `rise` more after it."""
    return {
        "base": "base",
        "text": "topics",
        "texts": texts,
        "bytes": 100 * texts,
        "weights": {"base": "b", "tuned": weights},
        "per_text": {
            "base_nats": [80.0] * texts,
            "tuned_nats": [100 * (0.8 + rise) + i % 3 for i in range(texts)],
            "bytes": [100] * texts,
            "kl": [10 * rise + i % 2 for i in range(texts)],
            "compared": [20] * texts,
        },
        "per_question": {"base": [True] * 10, "tuned": [True] * right + [False] * (10 - right)},
    }


def arm(name, *tasks, general=None, tokens=None):
    """Return an arm with one seed for each result."""
    sources = [Source(Path(f"{name}-{i}.json"), "result") for i in range(len(tasks))]
    seeds = [Seed(source, result, general, tokens) for source, result in zip(sources, tasks, strict=True)]
    return Arm(name, tuple(seeds))


def write_run(folder, result, forgotten, data, tokens=1000):
    """Write a finished run into `folder`, with its results on `data` and without weights. Return the path of the first result."""
    sha = hashlib.sha256(data.read_bytes()).hexdigest()
    for name in ("eval", "export"):
        (folder / name).mkdir(parents=True)
    result = result | {"data_sha256": sha, "weights": folder.name}
    forgotten = forgotten | {"weights": {"base": "b", "tuned": folder.name}}
    (folder / "eval" / f"{data.stem}-{sha[:8]}.json").write_text(json.dumps(result))
    (folder / "eval" / "general.json").write_text(json.dumps(forgotten))
    (folder / "export" / "export.json").write_text(json.dumps({"steps_in_total": 2}))
    rows = [
        {"step": step, "train/loss": 2.0 / (step + 1), "validation/loss": 1.5, "train/tokens": tokens * step // 2}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "eval" / f"{data.stem}-{sha[:8]}.json"
