"""The last screen of the quickstart: the tuned model beside the base model and the programs that cost nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from data.regulator.baselines import baseline_predictions, micro_f1
from data.regulator.examples import report_of
from eval.report import aligned

# Kind of note -> the rule that the note decides, together with a figure.
DECIDES = {"pledged": "LCR_PLEDGED", "connected": "LE_CONNECTED", "waiver": "LCR_MIN"}
PROGRAMS = {"character n-grams": "n-grams", "threshold program": "thresholds", "engine": "engine"}  # as columns
Violations = Mapping[str, Sequence[str]]  # id of a report -> the rules that are named as violated


def screen(run: Path, data: Path) -> str:
    """All of the last screen, from the results in `run`/eval and the corpus in `data`.

    Raises UserError if a file is missing.
    """
    before, after, forgetting = (_read(run / "eval" / f"{name}.json") for name in ("before", "after", "forgetting"))
    test, training = (
        [json.loads(line) for line in _text(data / f"{split}.jsonl").splitlines()] for split in ("test", "train")
    )
    per_byte = forgetting["perplexity_per_byte"]
    questions = forgetting["questions"]["all"]
    rouge, facts = after["rouge_l"]["f"], after["facts"]["f1"]
    return "\n".join(
        [
            "One report of the test and the tuned model's answer:\n",
            one_report(after, test),
            "",
            table(columns(before, after, test, training)),
            "",
            f"facts of the violations (rule, figure, limit, article)  F1 {facts:.3f};  directive ROUGE-L {rouge:.3f}",
            f"general text, perplexity per byte  {per_byte['base']['value']:.3f} -> {per_byte['tuned']['value']:.3f};  "
            f"KL {forgetting['kl']['value']:.2f} nats/token;  "
            f"general questions {questions['base']['value']:.0%} -> {questions['tuned']['value']:.0%}",
            f"""
curves          tensorboard --logdir {run}/tensorboard     (after: source .venv/bin/activate)
exported model  {run}/export                (a Hugging Face directory)
figures         {run}/eval/before.json, after.json, forgetting.json
next            a corpus that this model does not solve: configs/xbrl_laptop.py; your own data: README.md""",
        ]
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run scripts/quickstart.sh") from error


def _read(path: Path) -> dict:
    return json.loads(_text(path))


def columns(
    before: dict, after: dict, test: Sequence[dict], training: Sequence[dict]
) -> dict[str, tuple[list[dict], Violations]]:
    """Column -> (the test reports that it has an answer to, its answers).

    `before` and `after` are results of scripts/evaluate.py on all or some of the `test` examples. The programs are fitted on
    `training`.
    """
    found = {"base model": _of_result(before, test), "tuned model": _of_result(after, test)}
    for name, predicted in baseline_predictions(training, test).items():
        if name in PROGRAMS:
            ids = [example["id"] for example in test]
            found[PROGRAMS[name]] = list(test), dict(zip(ids, predicted, strict=True))
    return found


def table(found: Mapping[str, tuple[list[dict], Violations]]) -> str:
    """One row per measure, one column per model or program."""
    rows = [("", *found), ("reports", *(str(len(examples)) for examples, _ in found.values()))]
    rows.append(("F1, all rules", *(f"{_f1(*column):.3f}" for column in found.values())))
    rows.append(("F1, what notes decide (unseen wordings)", *(f"{_note_f1(*column):.3f}" for column in found.values())))
    for kind in DECIDES:
        cells = (
            f"{_note_f1([e for e in examples if e.get('kind') == kind], said):.3f}" for examples, said in found.values()
        )
        rows.append((f"  {kind} ({DECIDES[kind]})", *cells))
    for part in ("in words", "in figures"):
        rows.append((f"minimal pairs {part}", *(_pairs(part, *column) for column in found.values())))
    return "\n".join(aligned(rows, last=">"))


def one_report(after: dict, test: Sequence[dict]) -> str:
    """The first report whose violation only its note shows, and the tuned model's answer."""
    answers = {answer["id"]: answer["answer"] for answer in after["answers"]}
    shown = next((e for e in test if e["id"] in answers and set(e["violations"]) - set(e["engine"])), test[0])
    true = ", ".join(shown["violations"]) or "none"
    return f"{report_of(shown)}\n\n{answers[shown['id']]}\n(true violations: {true})"


def _of_result(result: dict, test: Sequence[dict]) -> tuple[list[dict], Violations]:
    said = {answer["id"]: tuple(answer["predicted"] or ("unreadable",)) for answer in result["answers"]}
    for answer in result["answers"]:
        if answer["predicted"] == []:
            said[answer["id"]] = ()
    return [example for example in test if example["id"] in said], said


def _f1(examples: Sequence[dict], said: Violations) -> float:
    return micro_f1([said[e["id"]] for e in examples], [e["violations"] for e in examples])["f1"]


def _note_f1(examples: Sequence[dict], said: Violations) -> float:
    """F1 over the one rule of each report that its note decides."""

    def of_note(example: dict, rules: Sequence[str]) -> set[str]:
        return {DECIDES[example["kind"]]} & set(rules)

    noted = [example for example in examples if example.get("kind")]
    return micro_f1([of_note(e, said[e["id"]]) for e in noted], [of_note(e, e["violations"]) for e in noted])["f1"]


def _pairs(part: str, examples: Sequence[dict], said: Violations) -> str:
    """`27 of 30`: the pairs of which both reports are right."""
    members: dict[str, list[bool]] = {}
    for example in examples:
        if example.get("pair", "").endswith(part):
            members.setdefault(example["pair"], []).append(set(said[example["id"]]) == set(example["violations"]))
    complete = [all(right) for right in members.values() if len(right) == 2]
    return f"{sum(complete)} of {len(complete)}"
