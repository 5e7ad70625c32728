"""Print the last screen of the quickstart: the tuned model beside the base model and programs without a language model.

python -m xbrl.answers.screen runs/quickstart artifacts/quickstart [artifacts/models/SmolLM2-135M-Instruct]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, run_script
from data.formats import read_examples
from eval.asked_examples import UNREADABLE, report_of
from eval.report import aligned
from xbrl.answers.answer_reader import read_facts
from xbrl.answers.baselines import COMPOSED, ENGINE, NGRAMS, PROBE, THRESHOLDS, baseline_predictions
from xbrl.answers.note_scores import score_notes
from xbrl.answers.scores import micro_f1, pairs_right, score_kinds
from xbrl.rules.note_facts import NoteFact

PROGRAMS = {COMPOSED: "note words", PROBE: "note states", NGRAMS: "n-grams", ENGINE: "engine", THRESHOLDS: "thresholds"}
MEANING = (
    "note words: the engine and a logistic regression on the words of the note; note states: the same on the base model's\n"
    "mean hidden state of the note; n-grams: a logistic regression on all characters; thresholds: one cut per rule"
)
RESULTS = {  # file in eval/ -> the keys that the screen shows
    "before": ("answers",),
    "after": ("answers", "notes"),
    "forgetting": ("perplexity_per_byte", "questions", "kl"),
}
PAIRS = ("in words", "in figures")  # the last words of the names of minimal pairs


class Column(NamedTuple):
    """The predictions of one model or program for some test examples."""

    examples: list[dict]
    rules: list[Sequence[str]]  # of each example
    facts: Sequence[Sequence[NoteFact]] | None = None  # of each example's note; None if no facts are predicted


def screen(run: Path, data: Path, base: str | None = None) -> str:
    """Return the text of the screen, from the results in `run`/eval and the corpus in `data`.

    `base` is the model directory of the column "note states". Raise UserError if a file of the quickstart is missing or damaged.
    """
    before, after, forgetting = (_read(run / "eval" / f"{name}.json", keys) for name, keys in RESULTS.items())
    test, training, validation = (read_examples(data / f"{split}.jsonl") for split in ("test", "train", "validation"))
    models = {"base model": of_result(before, test), "tuned model": of_result(after, test)}
    predictions = baseline_predictions(training, test, validation, base)
    models |= {
        title: Column(test, list(predictions[name].rules), predictions[name].facts)
        for name, title in PROGRAMS.items()
        if name in predictions
    }
    per_byte, questions = forgetting["perplexity_per_byte"], forgetting["questions"]["all"]
    return f"""One report of the test, and the tuned model's answer:

{one_report(after, test)}

{table(models)}
{MEANING}

general text, perplexity per byte: {per_byte["base"]["value"]:.3f} -> {per_byte["tuned"]["value"]:.3f}; \
KL {forgetting["kl"]["value"]:.2f} nats per token; \
general questions right: {questions["base"]["value"]:.0%} -> {questions["tuned"]["value"]:.0%}

curves          tensorboard --logdir {run}/tensorboard     (after: source .venv/bin/activate)
exported model  {run}/export                (a Hugging Face directory)
figures         {run}/eval/before.json, after.json, forgetting.json
next            a task that this model does not solve in minutes: configs/xbrl.py; your own data: README.md"""


def table(columns: Mapping[str, Column]) -> str:
    """Return a table with a row per measure and a column per model or program."""
    scores = [_scores(column) for column in columns.values()]
    return "\n".join(aligned([("", *columns), *((name, *(s[name] for s in scores)) for name in scores[0])], last=">"))


def one_report(after: dict, test: Sequence[dict]) -> str:
    """Return the first report whose violation only its note shows, and the tuned model's answer."""
    answers = {answer["id"]: answer["answer"] for answer in after["answers"]}
    answered = [example for example in test if example["id"] in answers]
    by_note = (example for example in answered if set(example["violations"]) - set(example["engine"]))
    shown = next(by_note, answered[0])
    true = ", ".join(shown["violations"]) or "none"
    return f"{report_of(shown)}\n\n{answers[shown['id']]}\n(true violations: {true})"


def _scores(column: Column) -> dict[str, str]:
    examples, predicted = column.examples, column.rules
    of_notes = score_notes(examples, column.facts) if column.facts else None
    kinds, true = score_kinds(examples, predicted), [example["violations"] for example in examples]
    rows = {"reports": str(len(examples)), "F1, all rules": f"{micro_f1(predicted, true)['f1']:.3f}"}
    for kind in ("with a note", "pledged", "connected", "waiver"):
        f1 = kinds.get(kind, {}).get("note_f1")
        name = "F1, rules decided by notes (unseen wordings)" if kind == "with a note" else f"  {kind}"
        rows[name] = "-" if f1 is None else f"{f1:.3f}"
    rows["facts of notes: kind and applies right, F1"] = f"{of_notes['decided_f1']:.3f}" if of_notes else "-"
    for part in PAIRS:
        chosen = [i for i, example in enumerate(examples) if example.get("pair", "").endswith(part)]
        right = pairs_right([examples[i] for i in chosen], [predicted[i] for i in chosen])
        rows[f"minimal pairs {part}, both right"] = f"{sum(right)} of {len(right)}"
    return rows


def of_result(result: dict, test: Sequence[dict]) -> Column:
    """Return the column of a result of scripts/evaluate.py on all or some of the `test` examples.

    As in the scores of the result, an answer also predicts `UNREADABLE` if the answer or one of its lines cannot be read.
    """
    rules = {
        answer["id"]: [*(answer["predicted"] or ()), *[UNREADABLE] * answer["unreadable"]]
        for answer in result["answers"]
    }
    facts = {answer["id"]: (read_facts(answer["answer"]) or ([], 0))[0] for answer in result["answers"]}
    answered = [example for example in test if example["id"] in rules]
    return Column(
        answered, [rules[example["id"]] for example in answered], [facts[example["id"]] for example in answered]
    )


def _read(path: Path, keys: Sequence[str]) -> dict:
    """Read the JSON of one result. Raise UserError if it is not JSON or lacks a key."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove it, if it is there, and run scripts/quickstart.sh") from error
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"{path} has no {missing[0]}; remove it and run scripts/quickstart.sh")
    return result


def main() -> None:
    """Print the screen of the run, the corpus and the base model of the command line."""
    if len(sys.argv) not in (3, 4):
        raise UserError("name the run, the corpus and the base model, as scripts/quickstart.sh does")
    print(screen(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))


if __name__ == "__main__":
    run_script(main)
