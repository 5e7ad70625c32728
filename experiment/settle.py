"""Whether full fine-tuning finds more violations than LoRA on the quickstart's task.

    python -m experiment.settle --list
    python -m experiment.settle --parallel 2       # interrupted anywhere, the same command goes on
    python -m experiment.settle --report

Declared before the runs. Primary: F1 on the test, full less LoRA of rank 8, twelve seeds each, learning rates tuned alike
(experiment/drawn.py). Welch's test, because the seeds of the two do not go together (their correlation was -0.62); the paired
analysis stands beside it. Four outcomes: full better or LoRA better (the 95% interval excludes 0), equivalent (the 90% interval
lies within 0.05), open. Rank 64 has four seeds at the rate of rank 8, and is descriptive: it trains 14.5% of the parameters of this
model; rank 64 of an 8B model trains 2.1%, which is rank 8 or 9 here.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from common.command_line import add_number, new_parser
from common.durable_files import write_durably
from common.errors import run_script
from experiment.commands import Command, list_commands, run_commands
from experiment.drawn import METHODS, OUT, chosen_rate, f1_of, pool, run_of, score, train, tuning, tuning_table
from experiment.launch import Interrupted

SEEDS = {"full": 12, "lora8": 12, "lora64": 4}
MARGIN = 0.05


def result_of(method: str, seed: int) -> Path:
    """The file with the scores on the test."""
    return OUT / "results" / f"{method}-s{seed}-test.json"


def commands() -> list[Command]:
    """What is known to be needed, seed by seed."""
    found = [pool(), *tuning("full"), *tuning("lora8")]
    rates = {method: chosen_rate(method.replace("64", "8")) for method in SEEDS}
    for seed in range(max(SEEDS.values())):
        for method, rate in rates.items():
            if rate is None or seed >= SEEDS[method]:
                continue
            run = run_of(method, rate, seed)
            # experiment.pareto averages the checkpoints of `full` and measures what they have forgotten.
            frees = (
                () if method == "full" else (run / "checkpoints", run / "export" / "model.safetensors", run / "adapter")
            )
            found += [
                train(run, method, seed, rate, METHODS[method]),
                score(run / "export", "test", result_of(method, seed), frees),
            ]
    return found


def report() -> str:
    """The tables as Markdown."""
    values = {
        method: {seed: value for seed in range(count) if (value := f1_of(result_of(method, seed))) is not None}
        for method, count in SEEDS.items()
    }
    rows = ["| method | seeds | F1, mean | standard deviation | each seed |", "|---|---|---|---|---|"]
    for method, found in values.items():
        if len(found) > 1:
            f1 = np.array(list(found.values()))
            each = ", ".join(f"{value:.3f}" for value in f1)
            rows.append(f"| {method} | {len(f1)} | {f1.mean():.3f} | {f1.std(ddof=1):.3f} | {each} |")
    return "\n\n".join(filter(None, (tuning_table(), "\n".join(rows), contrast(values["full"], values["lora8"]))))


def contrast(full: dict[int, float], lora: dict[int, float]) -> str:
    """The primary contrast in words; nothing with fewer than two seeds each."""
    if min(len(full), len(lora)) < 2:
        return ""
    a, b = np.array(list(full.values())), np.array(list(lora.values()))
    test = stats.ttest_ind(a, b, equal_var=False)
    wide, narrow = test.confidence_interval(0.95), test.confidence_interval(0.90)
    shared = sorted(full.keys() & lora.keys())
    pairs = np.array([(full[seed], lora[seed]) for seed in shared])
    paired = stats.ttest_rel(*pairs.T).confidence_interval(0.95)
    correlation = np.corrcoef(pairs.T)[0, 1]
    if wide.low > 0 or wide.high < 0:
        outcome = "full is better" if wide.low > 0 else "LoRA is better"
    else:
        outcome = "equivalent" if narrow.low > -MARGIN and narrow.high < MARGIN else "open"
    return (
        f"Full less LoRA of rank 8: {a.mean() - b.mean():+.3f}, Welch 95% {wide.low:+.3f} to {wide.high:+.3f}, 90% "
        f"{narrow.low:+.3f} to {narrow.high:+.3f}: **{outcome}**. Paired by seed ({len(shared)}, correlation {correlation:.2f}): 95% "
        f"{paired.low:+.3f} to {paired.high:+.3f}."
    )


def main() -> int:
    """List, run or report."""
    parser = new_parser(__doc__, "python -m experiment.settle")
    add_number(parser, "--parallel", "commands at once, each with one process", 1, least=1)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the commands and what is left, and exit")
    what.add_argument("--report", action="store_true", help="print the tables of what is done, and exit")
    options = parser.parse_args()
    if options.list:
        print(list_commands(commands(), OUT, options.parallel))
        return 0
    if not options.report:
        try:
            run_commands(commands, OUT, options.parallel)
        except Interrupted as signal:
            print("stopped; start again to continue")
            return signal.exit_code
        write_durably(OUT / "settle.md", report() + "\n")
    print(report())
    return 0


if __name__ == "__main__":
    run_script(main)
