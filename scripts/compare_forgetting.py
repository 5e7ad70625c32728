"""Ways against forgetting on one task, side by side: plain | low lr | replay | EWC | both. The same base, examples, order and steps.

    python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
    python scripts/compare_forgetting.py configs/laptop.py data.mix=none --test artifacts/quickstart/test.jsonl \\
        --general artifacts/replay/topics.jsonl --out runs/comparison

Each method is a run of train.py in --out, evaluated on --test and against the base on general text that no method reads.
Started again it skips what is finished and continues what is not. At the end stand the table (also comparison.md) and the
picture (comparison.png); --only NAMES does a part, e.g. on another machine, and shows what is there. How to read them:
docs/forgetting.md.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

from common.errors import UserError, run_script
from configs.config import Config
from configs.loading.config_file import load_config, override
from eval.compare_methods import Method, compare_methods, figures, markdown
from eval.results import prepare_output, read_result

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain"


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config that trains plainly: without data.mix and ewc")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for every run, e.g. run.eval_every=0"
    )
    parser.add_argument("--test", type=Path, required=True, help="examples of the task that no run trains on")
    parser.add_argument("--general", required=True, help="text of the old domain: for replay and the Fisher diagonal")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument(
        "--low", type=float, default=1 / 3, help="the low learning rate, of the config's (%(default).2g)"
    )
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.25], help="of replay (%(default)s)")
    parser.add_argument("--strengths", type=float, nargs="*", default=[1, 10, 100], help="of EWC: the first estimates the Fisher diagonal for all (%(default)s)")  # fmt: skip
    parser.add_argument("--both", type=float, nargs=2, action="append", metavar=("SHARE", "STRENGTH"), help="replay and EWC together; may be repeated (default: 0.05 10 and 0.05 100)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="of training and evaluation (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the methods, e.g. plain replay-5")
    parser.add_argument("--list", action="store_true", help="print the methods and their overrides, and do nothing")
    arguments = parser.parse_intermixed_args()
    if arguments.processes < 1:
        raise UserError(f"--processes must be 1 or more, not {arguments.processes}")
    if not arguments.low > 0:
        raise UserError(f"--low must be above 0, not {arguments.low:g}")
    if bad := [x for x in [*arguments.strengths, *(pair[1] for pair in arguments.both or ())] if not x > 0]:
        raise UserError(f"a strength of EWC must be above 0, not {bad[0]:g}")
    return arguments


def methods(arguments: argparse.Namespace, learning_rate: float) -> dict[str, list[str]]:
    """Name -> what it overrides in the config. Plain comes first, and EWC's first strength before all that use its diagonal."""

    def replay(share: float) -> list[str]:
        return [f"data.mix=replay:{share:g}:{arguments.general}"]

    def ewc(strength: float) -> list[str]:
        first = arguments.strengths[0] if arguments.strengths else strength
        if strength == first:
            return [f"ewc.strength={strength:g}", f"ewc.data={arguments.general}"]
        return [f"ewc.strength={strength:g}", f"ewc.fisher={arguments.out / f'ewc-{first:g}' / 'ewc'}"]

    found = {PLAIN: [], "low-lr": [f"optimizer.learning_rate={learning_rate * arguments.low:g}"]}
    found |= {f"replay-{100 * share:g}": replay(share) for share in arguments.shares}
    found |= {f"ewc-{strength:g}": ewc(strength) for strength in arguments.strengths}
    for share, strength in arguments.both or [(0.05, 10), (0.05, 100)]:
        found[f"replay-{100 * share:g}-ewc-{strength:g}"] = replay(share) + ewc(strength)
    return found


def launch(processes: int, script: str, *options: object) -> None:
    """A script of the project, on one process or by torchrun. It says itself what went wrong."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, options)]
    print("\n==", script, *command[command.index(str(ROOT / script)) + 1 :], flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"{script} failed, see above; started again, what is finished is skipped")


def evaluate(arguments: argparse.Namespace, config: Config, model: str, name: str) -> None:
    """The results of a model on the task and, but for the base, on general text, where they are not there yet."""
    task, general = (arguments.out / "results" / f"{name}-{what}.json" for what in ("task", "general"))
    if not task.is_file():
        options = ("--data", arguments.test, "--train", config.data.train[0], "--json", task, "--show", 0)
        launch(arguments.processes, "scripts/evaluate.py", model, *options)
    if model != config.model.path and not general.is_file():
        launch(arguments.processes, "scripts/evaluate_forgetting.py", config.model.path, model, "--json", general)


def check_results(arguments: argparse.Namespace, base: str) -> None:
    """What lies in --out from before is of the same test and the same base. Raises UserError."""
    wanted = hashlib.sha256(arguments.test.read_bytes()).hexdigest()
    for path in sorted((arguments.out / "results").glob("*.json")):
        if path.name.endswith("-task.json") and read_result(path)["data_sha256"] != wanted:
            raise UserError(f"{path} is of other examples than {arguments.test}: remove it or choose another --out")
        if path.name.endswith("-general.json"):
            before = json.loads(path.read_text(encoding="utf-8"))["base"]
            if before != base:
                raise UserError(f"{path} is against {before}, not {base}: remove it or choose another --out")


def read_methods(results: Path, names: list[str]) -> list[Method]:
    """Those of `names` that have been evaluated."""
    there = [name for name in names if (results / f"{name}-general.json").is_file()]
    found = [
        [json.loads((results / f"{name}-{what}.json").read_text(encoding="utf-8")) for name in there]
        for what in ("task", "general")
    ]
    return compare_methods(there, *found)


def draw(compared: list[Method], path: Path) -> None:
    """Learning against forgetting: the loss on held-out answers, which does not saturate as F1 does, over KL and perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = compared[0].general["perplexity_per_byte"]["base"]["value"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for i, method in enumerate(compared):
        found = figures(method)
        y, label = found["loss"], method.name + (f" (F1 {found['f1'].value:.3f})" if "f1" in found else "")
        for axes, x in zip(panels, (found.get("kl"), found["perplexity"]), strict=True):
            if x:
                across, up = [[x.value - x.low], [x.high - x.value]], [[min(y.value - y.low, 0.9 * y.value)], [y.high - y.value]]  # fmt: skip
                axes.errorbar(x.value, y.value, up, across, fmt="os^Dv<>*P"[i % 9], color=f"C{i % 10}", capsize=2, label=label)  # fmt: skip
    panels[0].set(
        xlabel="forgetting: KL(base || tuned) on general text, nats a token",
        ylabel="learning: loss on held-out answers, nats a token",
        yscale="log",
    )
    panels[0].invert_yaxis()
    panels[1].set(xlabel="forgetting: perplexity per byte of general text (line: the base's)")
    panels[1].axvline(base, color="grey", linewidth=0.8)
    panels[1].legend(fontsize=8)
    figure.suptitle("better is up and to the left")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train, evaluate, compare."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if config.data.mix or config.ewc.strength:
        raise UserError(
            f"{arguments.config} has data.mix or ewc.strength, which the methods set: add data.mix=none ewc.strength=0"
        )
    for path in (arguments.test, Path(arguments.general), Path(config.data.train[0])):
        if not path.exists():
            raise UserError(f"{path} does not exist")
    if not arguments.test.is_file():
        raise UserError(f"--test {arguments.test} is a folder; name the file with its examples")
    known = methods(arguments, config.optimizer.learning_rate)
    for options in known.values():  # a mistake in the last method must not show after hours of the others
        override(config, options)
    chosen = arguments.only or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"--only {unknown[0]}: the methods are {', '.join(known)}")
    if arguments.list:
        print("\n".join(f"{name:20} {' '.join(options)}" for name, options in known.items()))
        return 0
    estimator = f"ewc-{arguments.strengths[0]:g}" if arguments.strengths else PLAIN
    needs = [n for n in chosen if any(option.startswith("ewc.fisher=") for option in known[n])]
    if needs and estimator not in chosen and not (arguments.out / estimator / "ewc" / "settings.json").is_file():
        raise UserError(f"{needs[0]} takes the Fisher diagonal of {estimator}, which has not run: add it to --only")
    results = arguments.out / "results"
    prepare_output(results / "base-task.json")
    check_results(arguments, config.model.path)
    evaluate(arguments, config, config.model.path, "base")
    for name in (name for name in known if name in chosen):
        where = (f"run.directory={arguments.out}", f"run.name={name}")
        launch(arguments.processes, "train.py", arguments.config, *arguments.overrides, *known[name], *where)
        evaluate(arguments, config, str(arguments.out / name / "export"), name)
    compared = read_methods(results, list(known))
    if compared[0].name != PLAIN:
        print(
            f"\nthe results are in {results}; the table comes once {PLAIN}, which all are compared with, is there too"
        )
        return 0
    text = markdown(compared, json.loads((results / "base-task.json").read_text(encoding="utf-8")))
    (arguments.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    draw(compared, arguments.out / "comparison.png")
    print(f"\n{text}\n\nin {arguments.out}: comparison.md, comparison.png, results/*.json")
    return 0


if __name__ == "__main__":
    run_script(main)
