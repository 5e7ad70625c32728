"""The parts of a model card about results: figures with 95% intervals from the JSON of the evaluations, or how to get them."""

import shlex
from pathlib import Path

from eval.compare_models import table as forgetting_table
from eval.intervals import intervals
from eval.regulator.report import figures
from training.export.markdown import block, escape, table
from training.export.results import Result, Results
from training.export.subject import Subject


def results_section(results: Results, out: Path, subject: Subject, record: dict) -> str:
    """One table for each evaluation; without any, the validation loss of the run and the command that evaluates."""
    parts = [_evaluation(result, record["dtype"]) for result in results.evaluations]
    if not parts:
        parts.append(
            "Not measured on a test set. This command measures it, and the same export command then adds it to this card:"
        )
        parts.append(block(evaluate_command(out, subject), "bash"))
    return "\n\n".join([*(_validation(subject) if not record["averaged"] else ()), *parts])


def _evaluation(result: Result, dtype: str) -> str:
    content = result.content
    part = f"{content['n_examples']} of {content['n_in_file']}" if "n_in_file" in content else content["n_examples"]
    lines = [
        f"**{escape(Path(content['data']).name)}** ({part} examples, sha256 `{content['data_sha256'][:16]}`), greedy decoding, "
        f"computed in {content.get('dtype', 'an unrecorded dtype')}. Intervals are 95% bootstrap intervals over banks, or "
        "over examples where no bank is named; at 0% and 100% they are Wilson's."
    ]
    if result.converted:
        lines.append(f"Measured with the files in {result.converted}, before they were converted to {dtype}.")
    known = intervals(content)
    rows = []
    for figure in figures(content):
        bounds = known.get(figure.metric)
        interval = f"{bounds.low:.3f} to {bounds.high:.3f}" if bounds else ""
        rows.append((figure.name.strip(), figure.value, interval, figure.n))
    return "\n\n".join([" ".join(lines), table(("", "value", "95% interval", "of"), rows)])


def _validation(subject: Subject) -> list[str]:
    state = subject.run.state if subject.run else {}
    step, loss = state.get("step"), state.get("loss")
    if state.get("best_step") == step and state.get("best_loss") is not None:
        loss = state["best_loss"]
    if loss is None or state.get("evaluated", {}).get("validation") != step:
        return []
    before = state.get("base_loss")
    compared = f", {before:.4g} before training" if before is not None else ""
    return [f"Loss on the validation data during training: {loss:.4g} nats per target token{compared}."]


def forgetting_section(results: Results, out: Path, subject: Subject) -> str:
    """The table of scripts/measure.py forgetting, or the command that makes it."""
    if results.forgetting is None:
        base = shlex.quote(str(subject.base or "BASE"))
        where = "--json " + shlex.quote(str(_folder(subject) / "general.json"))
        command = f"python scripts/measure.py forgetting {base} {shlex.quote(str(_measured(out, subject)))} {where}"
        return f"Not measured. This command measures what the model has forgotten:\n\n{block(command, 'bash')}"
    content = results.forgetting.content
    said = (
        f"General language against the base model, on {escape(content['text'])}, computed in {content['dtype']}; the change has "
        "a 95% bootstrap interval over texts or questions."
    )
    if results.forgetting.converted:
        said += f" Measured with the files in {results.forgetting.converted}."
    return f"{said}\n\n{block(forgetting_table(content))}"


def evaluate_command(out: Path, subject: Subject) -> str:
    """How to evaluate this export, with the test file beside the training data where there is one."""
    data = "TEST.jsonl"
    if subject.run:
        folder = Path(subject.run.config.data.train[0]).parent
        tests = sorted(folder.glob("test*.jsonl"))
        data = str(tests[0]) if tests else data
    file = _folder(subject) / f"{Path(data).stem}.json"
    return " ".join(
        [
            "python scripts/evaluate.py",
            shlex.quote(str(_measured(out, subject))),
            "--data",
            shlex.quote(data),
            "--json",
            shlex.quote(str(file)),
        ]
    )


def _measured(out: Path, subject: Subject) -> Path:
    """The directory that the scripts can load: for an adapter the run's export, which is the adapter merged."""
    is_adapter = subject.adapter is not None and subject.weights is None
    return subject.run.directory / "export" if is_adapter and subject.run else out


def _folder(subject: Subject) -> Path:
    return subject.run.directory / "eval" if subject.run else Path("results")
