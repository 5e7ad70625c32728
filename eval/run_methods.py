"""Train one config with several methods against forgetting, evaluate every model, and read the results.

The methods are plain training, a low learning rate, replay, EWC, and replay with EWC. They share the base model, the
examples, their order and the number of steps. Each is a run of train.py in `Comparison.out`, followed by
scripts/evaluate.py and scripts/measure.py. Results that exist are kept, so that an interrupted comparison
can resume.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import write_durably
from common.errors import UserError
from configs.load import load_config, override
from eval.compare_methods import Method, compare_methods, markdown
from eval.plots import plot_methods
from eval.results import prepare_output, read_result

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain"


@dataclass(frozen=True)
class Comparison:
    """What all methods have in common.

    config, overrides: as on the command line of train.py. base, learning_rate, train: `model.path`,
    `optimizer.learning_rate` and the first file of `data.train` in that config. test: examples of the task that no run
    trains on. general: text of the old domain, for replay and for the Fisher diagonal. processes: how many every
    launch starts.
    """

    config: str
    overrides: Sequence[str]
    base: str
    learning_rate: float
    train: str
    test: Path
    general: str
    out: Path
    processes: int = 1

    @property
    def results(self) -> Path:
        """The directory of all evaluation results."""
        return self.out / "results"

    def result(self, name: str, kind: str) -> Path:
        """The file of an evaluation of a method (or `base`); kind: `task` or `general`."""
        return self.results / f"{name}-{kind}.json"


def compare(
    config: str,
    overrides: Sequence[str],
    test: Path,
    general: str,
    out: Path,
    low: float,
    shares: Sequence[float],
    strengths: Sequence[float],
    both: Sequence[tuple[float, float]] | None,
    processes: int,
    only: Sequence[str] | None,
    plan_only: bool,
) -> str:
    """Train, evaluate and compare: the options of `scripts/measure.py methods`, which documents them.

    Returns what is to be printed. Raises UserError for a mistake in any of them before the first run.
    """
    loaded = load_config(config, overrides)
    if loaded.data.mix or loaded.ewc.strength:
        raise UserError(
            f"{config} has data.mix or ewc.strength, which the methods set: add data.mix=none ewc.strength=0"
        )
    base, train, rate = loaded.model.path, loaded.data.train[0], loaded.optimizer.learning_rate
    comparison = Comparison(config, overrides, base, rate, train, test, general, out, processes)
    check_comparison(comparison)
    methods = plan_methods(comparison, low, shares, strengths, both or [(0.05, 10), (0.05, 100)])
    for options in methods.values():  # a mistake in the last method must not show only after hours of the others
        override(loaded, options)
    if plan_only:
        return "\n".join(f"{name:20} {' '.join(options)}" for name, options in methods.items())
    run_methods(comparison, methods, choose_methods(comparison, methods, only))
    table = write_comparison(comparison, list(methods))
    if table is None:
        return f"\nthe results are in {comparison.results}; the table also needs {PLAIN}, the reference of the others"
    return f"\n{table}\n\nin {out}: comparison.md, comparison.png, results/*.json"


def check_comparison(comparison: Comparison) -> None:
    """Raise UserError if a file is missing."""
    for path in (comparison.test, Path(comparison.general), Path(comparison.train)):
        if not path.exists():
            raise UserError(f"{path} does not exist")
    if not comparison.test.is_file():
        raise UserError(f"--test {comparison.test} is a directory; give the file with the examples")


def plan_methods(
    comparison: Comparison,
    low: float,
    shares: Sequence[float],
    strengths: Sequence[float],
    both: Sequence[tuple[float, float]],
) -> dict[str, list[str]]:
    """Method name -> the config overrides of its run, in the order of the runs.

    low: the low learning rate relative to the config's. shares, strengths: one replay method per share, one EWC method
    per strength. both: one combined method per (share, strength). Plain training comes first. The run with the first
    strength estimates the Fisher diagonal and comes before the runs that reuse it. Raises UserError if a number is out
    of range.
    """
    if not low > 0:
        raise UserError(f"--low must be above 0, not {low:g}")
    if bad := [x for x in [*strengths, *(strength for _, strength in both)] if not x > 0]:
        raise UserError(f"a strength of EWC must be above 0, not {bad[0]:g}")

    def replay(share: float) -> list[str]:
        return [f"data.mix=replay:{share:g}:{comparison.general}"]

    def ewc(strength: float) -> list[str]:
        first = strengths[0] if strengths else strength
        if strength == first:
            return [f"ewc.strength={strength:g}", f"ewc.data={comparison.general}"]
        return [f"ewc.strength={strength:g}", f"ewc.fisher={comparison.out / f'ewc-{first:g}' / 'ewc'}"]

    methods = {PLAIN: [], "low-lr": [f"optimizer.learning_rate={comparison.learning_rate * low:g}"]}
    methods |= {f"replay-{100 * share:g}": replay(share) for share in shares}
    methods |= {f"ewc-{strength:g}": ewc(strength) for strength in strengths}
    for share, strength in both:
        methods[f"replay-{100 * share:g}-ewc-{strength:g}"] = replay(share) + ewc(strength)
    return methods


def choose_methods(comparison: Comparison, methods: dict[str, list[str]], only: Sequence[str] | None) -> list[str]:
    """The names in `only`, or of all methods, in the order of the runs.

    Raises UserError for an unknown name, or if a method reuses a Fisher diagonal that does not exist and is not going
    to be estimated.
    """
    if unknown := [name for name in only or () if name not in methods]:
        raise UserError(f"--only {unknown[0]}: the methods are {', '.join(methods)}")
    chosen = [name for name in methods if not only or name in only]
    for name in chosen:
        for setting in methods[name]:
            if setting.startswith("ewc.fisher="):
                fisher = Path(setting.removeprefix("ewc.fisher="))
                estimator = fisher.parent.name
                if estimator not in chosen and not (fisher / "settings.json").is_file():
                    raise UserError(
                        f"{name} takes the Fisher diagonal of {estimator}, which has not run; add {estimator} to --only"
                    )
    return chosen


def run_methods(comparison: Comparison, methods: dict[str, list[str]], chosen: Sequence[str]) -> None:
    """Train and evaluate the chosen methods, and evaluate the base. Skips what is finished.

    Raises UserError if earlier results in `out` do not belong to this comparison, or if a launch fails.
    """
    prepare_output(comparison.result("base", "task"))
    check_results(comparison)
    evaluate(comparison, comparison.base, "base")
    for name in chosen:
        run = (f"run.directory={comparison.out}", f"run.name={name}")
        overrides = (*comparison.overrides, *methods[name], *run)
        launch(comparison.processes, "train.py", comparison.config, *overrides)
        evaluate(comparison, str(comparison.out / name / "export"), name)


def evaluate(comparison: Comparison, model: str, name: str) -> None:
    """Evaluate a model on the task and, unless it is the base, on general text. Skips results that exist."""
    task, general = comparison.result(name, "task"), comparison.result(name, "general")
    if not task.is_file():
        options = ("--data", comparison.test, "--train", comparison.train, "--json", task, "--show", 0)
        launch(comparison.processes, "scripts/evaluate.py", model, *options)
    if model != comparison.base and not general.is_file():
        options = ("forgetting", comparison.base, model, "--json", general)
        launch(comparison.processes, "scripts/measure.py", *options)


def launch(processes: int, script: str, *options: object) -> None:
    """Run a script of the project, with torchrun if there are several processes. Raises UserError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    print("\n==", script, *options, flush=True)
    if subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, options)]).returncode:
        raise UserError(
            f"{script} failed, see its output above; run the same command again to continue after what is finished"
        )


def check_results(comparison: Comparison) -> None:
    """Raise UserError if a result in `out` was measured on other test examples or against another base."""
    test_sha256 = hashlib.sha256(comparison.test.read_bytes()).hexdigest()
    for path in sorted(comparison.results.glob("*.json")):
        if path.name.endswith("-task.json") and read_result(path)["data_sha256"] != test_sha256:
            raise UserError(
                f"{path} was measured on other examples than {comparison.test}; remove it or choose another --out"
            )
        if path.name.endswith("-general.json"):
            base = json.loads(path.read_text(encoding="utf-8"))["base"]
            if base != comparison.base:
                raise UserError(
                    f"{path} was measured against {base}, not {comparison.base}; remove it or choose another --out"
                )


def read_methods(comparison: Comparison, names: Sequence[str]) -> list[Method]:
    """Those of `names` that have been evaluated, with their results."""
    evaluated = [name for name in names if comparison.result(name, "general").is_file()]
    tasks, generals = (
        [json.loads(comparison.result(name, kind).read_text(encoding="utf-8")) for name in evaluated]
        for kind in ("task", "general")
    )
    return compare_methods(evaluated, tasks, generals)


def write_comparison(comparison: Comparison, methods: Sequence[str]) -> str | None:
    """Write comparison.md and comparison.png for all evaluated methods, and return the table.

    None, without writing anything, as long as plain training, the reference of the others, has not been evaluated.
    """
    evaluated = read_methods(comparison, list(methods))
    if not evaluated or evaluated[0].name != PLAIN:
        return None
    table = markdown(evaluated, json.loads(comparison.result("base", "task").read_text(encoding="utf-8")))
    write_durably(comparison.out / "comparison.md", table + "\n")
    plot_methods(evaluated, comparison.out / "comparison.png")
    return table
