"""Run the steps of the experiment that are left, one after the other, and say what they have cost and what is left."""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence

from common.durable_files import append_json_line, write_durably, write_json
from common.errors import UserError
from experiment.cost import duration
from experiment.launch import Ended, run_jobs
from experiment.setup import Experiment
from experiment.steps import Step, all_steps, choose_steps, read_choices
from experiment.sweep import DIVERGED, owned

_SEED = 0  # of the draw of the examples of the learning curve


def run_experiment(experiment: Experiment, only: Sequence[str] | None = None, parallel: int = 1) -> None:
    """Run what is left, `parallel` steps at once, each on its share of the cores and GPUs.

    Raises Interrupted after a signal, when the running steps have saved; UserError if a step fails.
    """
    experiment.out.mkdir(parents=True, exist_ok=True)
    is_checked = False
    with owned(experiment.out, "experiment"):
        while True:
            if experiment.split("train").is_file():
                check_data(experiment)
                write_subsets(experiment)
            steps = choose_steps(all_steps(experiment), only, is_checked)
            is_checked = True  # a choice that is made renames the steps that have waited for it
            ready = [step for step in steps if step.is_ready][:parallel]
            if not ready:
                break
            names = " and ".join(step.name for step in ready)
            print(f"{sum(step.is_done for step in steps)} of {len(steps)} done | {names}", flush=True)
            run_steps(experiment, ready)
    left = [step for step in steps if not step.is_done]
    chosen = read_choices(experiment).rates
    failed = [method for method in experiment.size.rates if method not in chosen]
    if left and failed and not only:  # every choice has been made that can be made
        raise UserError(
            f"every learning rate of {' and of '.join(failed)} diverged, so none can be chosen; add lower ones in "
            "experiment/setup.py"
        )
    if left:
        raise UserError(f"{left[0].name} waits for files of another step; start again without --only")


def run_steps(experiment: Experiment, steps: Sequence[Step]) -> None:
    """Run some steps at once and record their times. Raises UserError if one failed, when all have ended."""
    by_job = {step.job: step for step in steps if step.job}
    failures: list[UserError] = []

    def end(ended: Ended) -> None:
        step = by_job[ended.job]
        record = {"step": step.name, "kind": step.kind, "seconds": ended.seconds, "at_once": len(steps)}
        append_json_line(experiment.rows, record)
        if not ended.stopped:
            failures.extend(_finish(step, ended))

    run_jobs(list(by_job), len(by_job), on_end=end)
    if failures:
        raise failures[0]


def _finish(step: Step, ended: Ended) -> list[UserError]:
    """Look at what a step has left; why it failed, if it did."""
    if not step.is_done and step.diverges and DIVERGED in ended.last_words:
        step.diverged.parent.mkdir(parents=True, exist_ok=True)
        write_durably(step.diverged, ended.last_words + "\n")  # a learning rate that is too high is a result
        print(f"{step.name} diverged: {ended.last_words}", flush=True)
    elif not step.is_done:
        return [
            UserError(f"{step.name} failed: {ended.last_words}; its log is {ended.job.log}; start again to continue")
        ]
    elif ended.code:
        code, log = ended.code, ended.job.log
        return [UserError(f"{step.name} ended with exit code {code}: {ended.last_words}; its log is {log}")]
    elif step.kind.startswith("train ") and step.kind != "train full":
        shutil.rmtree(step.output.parents[1] / "checkpoints", ignore_errors=True)  # the averages need those of `full`
    return []


def check_data(experiment: Experiment) -> None:
    """Raise UserError if a split has changed since the first step: its runs and scores could not be compared."""
    names = ("train", "validation", experiment.size.test)
    now = {name: hashlib.sha256(experiment.split(name).read_bytes()).hexdigest() for name in names}
    file = experiment.out / "data.json"
    if not file.is_file():
        write_json(file, now)
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in names:
        if before.get(name) != now[name]:
            raise UserError(
                f"{experiment.split(name)} has changed since {experiment.out} was begun; put it back, or choose another --out"
            )


def write_subsets(experiment: Experiment) -> None:
    """The files of the learning curve: the first examples of one order, so that a larger share contains a smaller one."""
    lines = experiment.split("train").read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(_SEED).shuffle(lines)
    for share in experiment.size.shares:
        path = experiment.subset(share)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, "".join(lines[: max(1, round(share * len(lines)))]))


def seconds_of(experiment: Experiment) -> list[dict]:
    """The times of all steps that have run: one record per start, with `step`, `kind` and `seconds`."""
    if not experiment.rows.is_file():
        return []
    return [json.loads(line) for line in experiment.rows.read_text(encoding="utf-8").splitlines() if line.strip()]


def list_steps(experiment: Experiment, only: Sequence[str] | None = None) -> str:
    """A table of the steps, and what is left in time. A step that has not run takes as long as the mean of its kind."""
    steps, records = choose_steps(all_steps(experiment), only), seconds_of(experiment)
    by_step: dict[str, float] = {}
    for record in records:
        by_step[record["step"]] = by_step.get(record["step"], 0.0) + record["seconds"]
    lines = []
    for step in steps:
        state = "done" if step.is_done else "to do" if step.job else "waits for a choice"
        time = duration(by_step[step.name]) if step.name in by_step else ""
        lines.append(f"{step.name:45} {state:18} {time}".rstrip())
    lines.append("")
    if any(step.job is None and not step.is_done for step in steps):
        lines.append(
            "waits for a choice: of a learning rate or of an average, made by steps above it on validation data"
        )
    return "\n".join([*lines, _left(steps, by_step)])


def _left(steps: Sequence[Step], by_step: dict[str, float]) -> str:
    times: dict[str, list[float]] = {}
    for step in steps:
        if step.is_done and step.name in by_step:
            times.setdefault(step.kind.partition(" ")[0], []).append(by_step[step.name])
    left = [step for step in steps if not step.is_done]
    kinds = [step.kind.partition(" ")[0] for step in left]
    known = [sum(times[kind]) / len(times[kind]) for kind in kinds if kind in times]
    spent = duration(sum(by_step.values()))
    unknown = len(left) - len(known)
    parts = [f"about {duration(sum(known))}"] if known or not left else []
    parts += [f"{unknown} steps of kinds that have not run yet, so their time is not known"] if unknown else []
    return f"{len(steps) - len(left)} of {len(steps)} steps done in {spent}; left: {', and '.join(parts)}"
