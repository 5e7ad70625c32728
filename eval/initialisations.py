"""Compare runs whose new tokens were initialised differently: short passages to train on, and validation curves per byte."""

import json
import random
from pathlib import Path

from common.errors import UserError
from data.encoding import ExampleEncoder
from data.examples import read_examples
from data.tokens import load_tokenizer

PASSAGE_CHARACTERS = 1200  # maximum; about 130 tokens of the extended vocabulary
SPLITS = {"train": ("train.jsonl", 320, 0), "test": ("test_banks.jsonl", 16, 1)}  # file, number of passages, seed


def write_passages(reports: Path, out: Path) -> None:
    """Write out/train.jsonl and out/test.jsonl with passages of the reports in `reports` (scripts/make_reports.py).

    A passage is a text of whole lines from a random position of one report. The banks of the test passages differ from
    those of the training passages.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, (file, count, seed) in SPLITS.items():
        rng = random.Random(seed)
        examples = read_examples(reports / file)
        rng.shuffle(examples)
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as sink:
            for example in examples[:count]:
                lines = example["messages"][0]["content"].split("\n")[2:]  # without the question
                start = rng.randrange(max(1, len(lines) - 20))
                text = "\n".join(lines[start:])[:PASSAGE_CHARACTERS].rpartition("\n")[0]
                sink.write(json.dumps({"text": text}) + "\n")


def validation_curve(run: Path) -> dict[int, float]:
    """Step -> validation loss in nats per byte, which is comparable between vocabularies.

    Raises UserError if `run` is not the directory of a run.
    """
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{run} is not the directory of a run: {error}") from error
    config = config.get("config", config)
    examples = [example for path in config["data"]["validation"] for example in read_examples(path)]
    encoder = ExampleEncoder(load_tokenizer(config["model"]["path"]))
    targets = sum(len(s.ids) - 1 for outcome in encoder.encode(examples) for s in outcome.sequences)
    targets_per_byte = targets / sum(len(example["text"].encode()) for example in examples)
    return {row["step"]: row["validation/loss"] * targets_per_byte for row in rows if "validation/loss" in row}


def plot_curves(curves: dict[str, dict[int, float]], out: Path) -> None:
    """Plot validation curves of several runs to an image file. curves: name of a run -> `validation_curve`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
    axes.set(xlabel="step", ylabel="nats per byte, held-out banks")
    axes.legend()
    figure.savefig(out, dpi=110)
