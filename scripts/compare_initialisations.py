"""How the rows of new tokens begin, compared: passages to train on, and the curves of the runs (docs/vocabulary.md).

    python scripts/compare_initialisations.py passages artifacts/xbrl --out artifacts/vocabulary
    python scripts/compare_initialisations.py curve runs/vocabulary-subtokens runs/vocabulary-random --out docs/vocabulary.png

Losses are shown in nats a byte, so that they compare with another vocabulary's.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import random
from pathlib import Path

from common.errors import UserError, run_script
from data.examples import read_examples
from data.tokens import encode_document, load_tokenizer

CHARACTERS = 1200  # of a passage, at most: some 130 tokens of the extended vocabulary
SPLITS = {"train": ("train.jsonl", 320, 0), "test": ("test_banks.jsonl", 16, 1)}  # file, passages, seed


def write_passages(reports: Path, out: Path) -> None:
    """Whole lines from a random place in each of some reports, a text document each; test passages are of other banks."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (file, count, seed) in SPLITS.items():
        rng = random.Random(seed)
        examples = read_examples(reports / file)
        rng.shuffle(examples)
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as sink:
            for example in examples[:count]:
                lines = example["messages"][0]["content"].split("\n")[2:]  # without the question
                start = rng.randrange(max(1, len(lines) - 20))
                text = "\n".join(lines[start:])[:CHARACTERS].rpartition("\n")[0]
                sink.write(json.dumps({"text": text}) + "\n")


def loss_per_byte(run: Path) -> dict[int, float]:
    """Step -> nats a byte of the validation texts. Raises UserError for a folder without a finished evaluation."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{run} is no run: {error}") from error
    config = config.get("config", config)
    texts = [example["text"] for path in config["data"]["validation"] for example in read_examples(path)]
    tokenizer = load_tokenizer(config["model"]["path"])
    targets = sum(len(encode_document(tokenizer, text)[0]) - 1 for text in texts)
    factor = targets / sum(len(text.encode()) for text in texts)
    return {row["step"]: row["validation/loss"] * factor for row in rows if "validation/loss" in row}


def main() -> int:
    """Write the passages, or print and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("passages", "curve"))
    parser.add_argument("folders", nargs="+", type=Path, help="the folder of make_reports.py; or the runs")
    parser.add_argument("--out", type=Path, required=True, help="a folder; or the picture")
    arguments = parser.parse_args()
    if arguments.what == "passages":
        write_passages(arguments.folders[0], arguments.out)
        return 0
    columns = {run.name: loss_per_byte(run) for run in arguments.folders}
    print(f"{'step':>6}" + "".join(f"{name:>24}" for name in columns))
    for step in sorted(set().union(*columns.values())):
        print(f"{step:>6}" + "".join(f"{column.get(step, float('nan')):>24.4f}" for column in columns.values()))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, column in columns.items():
        axes.plot(list(column), list(column.values()), marker="o", label=name)
    axes.set(xlabel="step", ylabel="nats a byte, held-out banks")
    axes.legend()
    figure.savefig(arguments.out, dpi=110)
    return 0


if __name__ == "__main__":
    run_script(main)
