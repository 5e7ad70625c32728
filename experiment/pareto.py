"""What a remedy against forgetting costs on the task: F1 against KL to the base, for eight ways to train and eight seeds.

    python -m experiment.pareto --list
    python -m experiment.pareto --parallel 2        # interrupted anywhere, the same command goes on
    python -m experiment.pareto --report            # the table and the picture of what is done

Every seed draws its training reports from one pool; validation and test are the same for all. Every arm has the same reports in
the same steps, 68 of 8. Every trained model is measured whole, and averaged with the base at alpha 0.5 and 0.75. KL is that of
texts that no arm trains on. The contrasts, declared here before the runs: F1 of each arm less that of `plain`, paired by seed,
equivalent if its 90% interval lies within 0.05.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

from common.command_line import add_number, new_parser
from common.durable_files import write_durably
from common.errors import run_script
from experiment.commands import Command, list_commands, run_commands
from experiment.drawn import BASE, OUT, chosen_rate, f1_of, pool, run_of, score, train, tuning
from experiment.launch import Interrupted
from experiment.settle import result_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOPICS, SELF = OUT / "replay" / "topics.jsonl", OUT / "replay" / "self.jsonl"
SEEDS = 8
ALPHAS = ("1", "0.75", "0.5")
BUDGETS = (0.1, 0.2, 0.4)  # nats per token
MARGIN = 0.05  # of F1
FISHER = ("ewc.documents=64", "ewc.batch=4", f"ewc.data={TOPICS}")
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "low rate": (),
    "L2 to the start": ("ewc.strength=0.01", "ewc.estimator=l2"),
    "EWC 10": ("ewc.strength=10", *FISHER),
    "EWC 100": ("ewc.strength=100", *FISHER),
    "replay": (f"data.mix=topics:0.05:{TOPICS}",),
    "self-replay": (f"data.mix=self:0.05:{SELF}",),
    "anchored self-replay": (f"data.mix=self:0.05:{SELF}:anchor",),
}


def name_of(arm: str, seed: int) -> str:
    """The name of a run and of its results."""
    return f"{arm.replace(' ', '-').lower()}-s{seed}"


def results_of(arm: str, seed: int, alpha: str) -> tuple[Path, Path]:
    """The files with the scores on the test, and with what was forgotten."""
    if (arm, alpha) == ("plain", "1"):
        return result_of("full", seed), OUT / "results" / f"full-s{seed}-general.json"
    name = f"{name_of(arm, seed)}-a{alpha}"
    return OUT / "results" / f"{name}-test.json", OUT / "results" / f"{name}-general.json"


def commands(far: list[Path]) -> list[Command]:
    """What is known to be needed, seed by seed, so that a part of it is a result."""
    topics = ("replay", "--source", "topics", "--out", str(TOPICS))
    own = (
        "replay",
        "--source",
        "model",
        "--model",
        BASE,
        "--documents",
        "160",
        "--max-tokens",
        "256",
        "--out",
        str(SELF),
    )
    found = [
        *(pool(), *tuning("full")),
        Command("topics", "topics", "scripts/data.py", topics, TOPICS),
        Command("self", "self", "scripts/data.py", own, SELF),
    ]
    rate = chosen_rate("full")
    if rate:
        found += [command for seed in range(SEEDS) for arm in ARMS for command in _of_run(arm, seed, rate, far)]
    return found


def _of_run(arm: str, seed: int, rate: float, far: list[Path]) -> list[Command]:
    name = name_of(arm, seed)
    run = run_of("full", rate, seed) if arm == "plain" else OUT / name  # the run of experiment.settle
    exported = run / "export" / "export.json"
    found = [train(run, arm, seed, rate / 3 if arm == "low rate" else rate, ARMS[arm], (TOPICS, SELF))]
    before = exported
    for alpha in ALPHAS:
        model = run / "export"
        task, general = results_of(arm, seed, alpha)
        if alpha != "1":
            model = OUT / "models" / f"{name}-a{alpha}"
            options = (str(run), "--average-with-base", alpha, "--out", str(model))
            last = (run / "checkpoints",) if alpha == ALPHAS[-1] else ()
            done = model / "export.json"
            found.append(Command(f"{name}/a{alpha}", "average", "scripts/export.py", options, done, (before,), last))
            before = done  # one after the other: the last one frees the checkpoints
        forgotten = ("forgetting", BASE, str(model), "--texts", *map(str, far), "--json", str(general))
        weights = (model / "model.safetensors",)
        found += [
            score(model, "test", task),
            Command(f"{general.stem}", "general", "scripts/measure.py", forgotten, general, (task,), weights),
        ]
    return found


def measured() -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """(arm, alpha) -> seed -> (F1 on the test, KL to the base in nats per token), of what is done."""
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for arm in ARMS:
        for alpha in ALPHAS:
            for seed in range(SEEDS):
                task, general = results_of(arm, seed, alpha)
                f1 = f1_of(task)
                if f1 is not None and general.is_file():
                    kl = json.loads(general.read_text(encoding="utf-8"))["kl"]["value"]
                    found.setdefault((arm, alpha), {})[seed] = f1, kl
    return found


def table(found: dict[tuple[str, str], dict[int, tuple[float, float]]]) -> str:
    """Means over seeds, the paired contrast with `plain`, and how many seeds keep each budget."""
    rows = [
        "| arm | alpha | seeds | F1 | KL | F1 less plain's, 90% interval | within 0.05 | KL at most 0.1, 0.2, 0.4 |",
        "|" + "---|" * 8,
    ]
    plain = found.get(("plain", "1"), {})
    for (arm, alpha), values in found.items():
        f1, kl = np.array(list(values.values())).T
        shared = [seed for seed in values if seed in plain]
        contrast, verdict = "", ""
        if (arm, alpha) != ("plain", "1") and len(shared) > 1:
            differences = np.array([values[seed][0] - plain[seed][0] for seed in shared])
            half = stats.t.ppf(0.95, len(shared) - 1) * differences.std(ddof=1) / len(shared) ** 0.5
            low, high = differences.mean() - half, differences.mean() + half
            contrast = f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"
            verdict = (
                "yes" if low > -MARGIN and high < MARGIN else "lower" if high < 0 else "higher" if low > 0 else "open"
            )
        kept = ", ".join(str(sum(value <= budget for value in kl)) for budget in BUDGETS)
        rows.append(
            f"| {arm} | {alpha} | {len(values)} | {f1.mean():.3f} | {kl.mean():.3f} | {contrast} | {verdict} | {kept} |"
        )
    return "\n".join(rows)


def picture(found: dict[tuple[str, str], dict[int, tuple[float, float]]], path: Path) -> None:
    """F1 against KL: a colour for each arm, a point for each seed, a line through the means of the alphas."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, arm in enumerate(ARMS):
        colour, means = f"C{number}", []
        for alpha in ALPHAS:
            points = np.array(list(found.get((arm, alpha), {}).values()))
            if len(points):
                axes.scatter(points[:, 1], points[:, 0], s=9, color=colour, alpha=0.35, linewidths=0)
                means.append(points.mean(axis=0))
        if means:
            f1, kl = np.array(means).T
            axes.plot(kl, f1, marker="o", color=colour, label=arm)
    for budget in BUDGETS:
        axes.axvline(budget, color="grey", linewidth=0.5, linestyle=":")
    axes.set_xlabel("KL to the base on far text, nats per token")
    axes.set_ylabel("F1 of violations on the test")
    axes.legend(title="alpha 1, 0.75, 0.5 from right to left", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """List, run or report."""
    parser = new_parser(__doc__, "python -m experiment.pareto")
    add_number(parser, "--parallel", "commands at once, each with one process", 1, least=1)
    far, about = (
        sorted(Path("eval/texts").glob("*.jsonl")),
        "texts that no arm trains on (default: those of eval/texts)",
    )
    parser.add_argument("--far", nargs="+", type=Path, default=far, metavar="FILE", help=about)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the commands and what is left, and exit")
    what.add_argument("--report", action="store_true", help="write the table and the picture of what is done, and exit")
    options = parser.parse_args()
    if options.list:
        print(list_commands(commands(options.far), OUT, options.parallel))
        return 0
    if not options.report:
        try:
            run_commands(lambda: commands(options.far), OUT, options.parallel)
        except Interrupted as signal:
            print("stopped; start again to continue")
            return signal.exit_code
    found = measured()
    write_durably(OUT / "pareto.md", table(found) + "\n")
    picture(found, OUT / "pareto.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    run_script(main)
