"""The last screen of the quickstart: the tuned model beside the base model and the programs that need no training of one.

python -m xbrl.answers.screen runs/quickstart artifacts/quickstart [artifacts/models/SmolLM2-135M-Instruct]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError, run_script
from data.formats import read_examples
from eval.asked_examples import UNREADABLE, report_of
from eval.report import aligned
from xbrl.answers.baselines import COMPOSED, ENGINE, NGRAMS, PROBE, THRESHOLDS, baseline_predictions
from xbrl.answers.scores import micro_f1, pairs_right, score_kinds

PROGRAMS = {COMPOSED: "note words", PROBE: "note states", NGRAMS: "n-grams", ENGINE: "engine", THRESHOLDS: "thresholds"}
MEANING = (
    "note words: the engine and a logistic regression on the words of the note; note states: the same on the base model's\n"
    "mean hidden state of the note; n-grams: a logistic regression on all characters; thresholds: one cut per rule"
)
RESULTS = {  # file in eval/ -> what the screen shows of it
    "before": ("answers",),
    "after": ("answers", "facts", "rouge_l"),
    "forgetting": ("perplexity_per_byte", "questions", "kl"),
}
PAIRS = ("in words", "in figures")  # how the names of minimal pairs end
Column = tuple[list[dict], list[Sequence[str]]]  # test examples, and the rules that are named for each of them


def screen(run: Path, data: Path, base: str | None = None) -> str:
    """All of the last screen, from the results in `run`/eval and the corpus in `data`.

    `base` is the model directory of the column "note states". Raises UserError if a file is not what the quickstart writes.
    """
    before, after, forgetting = (_read(run / "eval" / f"{name}.json", keys) for name, keys in RESULTS.items())
    test, training, validation = (read_examples(data / f"{split}.jsonl") for split in ("test", "train", "validation"))
    models = {"base model": of_result(before, test), "tuned model": of_result(after, test)}
    found = baseline_predictions(training, test, validation, base)
    models |= {title: (test, list(found[name].rules)) for name, title in PROGRAMS.items() if name in found}
    per_byte, questions = forgetting["perplexity_per_byte"], forgetting["questions"]["all"]
    return f"""One report of the test, and the tuned model's answer:

{one_report(after, test)}

{table(models)}
{MEANING}

tuned model: F1 of rule, figure, limit and article together {after["facts"]["f1"]:.3f}, directive ROUGE-L {after["rouge_l"]["f"]:.3f}
general text, perplexity per byte: {per_byte["base"]["value"]:.3f} -> {per_byte["tuned"]["value"]:.3f}; \
KL {forgetting["kl"]["value"]:.2f} nats per token; \
general questions right: {questions["base"]["value"]:.0%} -> {questions["tuned"]["value"]:.0%}

curves          tensorboard --logdir {run}/tensorboard     (after: source .venv/bin/activate)
exported model  {run}/export                (a Hugging Face directory)
figures         {run}/eval/before.json, after.json, forgetting.json
next            a task that this model does not solve in minutes: configs/xbrl.py; your own data: README.md"""


def table(found: Mapping[str, Column]) -> str:
    """One row per measure, one column per model or program."""
    scores = [_scores(*column) for column in found.values()]
    return "\n".join(aligned([("", *found), *((name, *(s[name] for s in scores)) for name in scores[0])], last=">"))


def one_report(after: dict, test: Sequence[dict]) -> str:
    """The first report whose violation only its note shows, and the tuned model's answer."""
    answers = {answer["id"]: answer["answer"] for answer in after["answers"]}
    answered = [example for example in test if example["id"] in answers]
    shown = next((one for one in answered if set(one["violations"]) - set(one["engine"])), answered[0])
    true = ", ".join(shown["violations"]) or "none"
    return f"{report_of(shown)}\n\n{answers[shown['id']]}\n(true violations: {true})"


def _scores(examples: list[dict], predicted: list[Sequence[str]]) -> dict[str, str]:
    kinds, true = score_kinds(examples, predicted), [example["violations"] for example in examples]
    rows = {"reports": str(len(examples)), "F1, all rules": f"{micro_f1(predicted, true)['f1']:.3f}"}
    for kind in ("with a note", "pledged", "connected", "waiver"):
        f1 = kinds.get(kind, {}).get("note_f1")
        name = "F1, what notes decide (unseen wordings)" if kind == "with a note" else f"  {kind}"
        rows[name] = "-" if f1 is None else f"{f1:.3f}"
    for part in PAIRS:
        chosen = [i for i, example in enumerate(examples) if example.get("pair", "").endswith(part)]
        right = pairs_right([examples[i] for i in chosen], [predicted[i] for i in chosen])
        rows[f"minimal pairs {part}, both right"] = f"{sum(right)} of {len(right)}"
    return rows


def of_result(result: dict, test: Sequence[dict]) -> Column:
    """The column of a result of scripts/evaluate.py on all or some of the `test` examples.

    An answer that cannot be read, in whole or in a line, names a rule that does not exist, too, as in the scores of the result.
    """
    said = {one["id"]: [*(one["predicted"] or ()), *[UNREADABLE] * one["unreadable"]] for one in result["answers"]}
    answered = [example for example in test if example["id"] in said]
    return answered, [said[example["id"]] for example in answered]


def _read(path: Path, keys: Sequence[str]) -> dict:
    """The JSON of one result. Raises UserError if it is not JSON or lacks one of `keys`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove it, if it is there, and run scripts/quickstart.sh") from error
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"{path} has no {missing[0]}; remove it and run scripts/quickstart.sh")
    return result


def main() -> None:
    """Print the screen of the run, the corpus and the base model that the command line names."""
    if len(sys.argv) not in (3, 4):
        raise UserError("name the run, the corpus and the base model, as scripts/quickstart.sh does")
    print(screen(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))


if __name__ == "__main__":
    run_script(main)
