"""Methods against forgetting on a user's own config: plain training, a low learning rate, replay, EWC, and replay with EWC.

They share the base model, the examples, their order and the number of steps. Each is a run of train.py, whose model is evaluated
on a test and, against the base, on general text that no method trains on. One seed per method describes and decides nothing:
the intervals are over examples, texts or questions, not over runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from common.durable_files import write_durably
from common.errors import UserError
from common.sha256 import sha256
from configs.load import load_config, override
from eval.comparison.measures import GENERAL, general_terms, measure_of
from eval.intervals import Terms, change, interval, terms_of
from experiment.commands import Command, check_options, run_commands
from experiment.contrasts import in_words, table

PLAIN = "plain"
COLUMNS = ("f1", "rouge_l", "loss", *GENERAL)


def compare_methods(
    config: str,
    overrides: Sequence[str],
    test: Path,
    general: Path,
    out: Path,
    low: float,
    shares: Sequence[float],
    strengths: Sequence[float],
    both: Sequence[tuple[float, float]] | None,
    processes: int,
    only: Sequence[str] | None,
    plan_only: bool,
) -> str:
    """The options of `scripts/measure.py methods`, which documents them. Returns what is to be printed.

    Raises UserError for a mistake in any of them before the first run.
    """
    loaded = load_config(config, overrides)
    if loaded.data.mix or loaded.ewc.strength:
        raise UserError(
            f"{config} has data.mix or ewc.strength, which the methods set: add data.mix=none ewc.strength=0"
        )
    for path in (test, general, Path(loaded.data.train[0])):
        if not path.is_file():
            raise UserError(f"{path} is not a file")
    methods = plan_methods(out, str(general), loaded.optimizer.learning_rate * low, shares, strengths, both)
    for settings in methods.values():  # a mistake in the last method must not show only after hours of the others
        override(loaded, settings)
    if unknown := [name for name in only or () if name not in methods]:
        raise UserError(f"--only {unknown[0]}: the methods are {', '.join(methods)}")
    if plan_only:
        return "\n".join(f"{name:20} {' '.join(settings)}" for name, settings in methods.items())
    base, train = loaded.model.path, loaded.data.train[0]
    digest = sha256(test)[:8]  # scores on another test are others
    files = {
        name: (out / "results" / f"{name}-task-{digest}.json", out / "results" / f"{name}-general.json")
        for name in ("base", *methods)
    }

    def command(name: str, kind: str, script: str, output: Path, options: Sequence[object], *needs: Path) -> Command:
        return Command(f"{name}/{kind}", kind, script, tuple(map(str, options)), output, needs, processes=processes)

    def score(name: str, model: Path | str, *needs: Path) -> Command:
        output = files[name][0]
        options = (model, "--data", test, "--train", train, "--json", output, "--show", 0)
        return command(name, "task", "scripts/evaluate.py", output, options, *needs)

    commands = [score("base", base)]
    for name in [name for name in methods if not only or name in only]:
        model, general_file = out / name / "export", files[name][1]
        settings = (config, *overrides, *methods[name], f"run.directory={out}", f"run.name={name}")
        fisher = [Path(text.partition("=")[2]) / "settings.json" for text in methods[name] if "ewc.fisher=" in text]
        forgotten = ("forgetting", base, model, "--json", general_file)
        exported = model / "export.json"
        commands += [
            command(name, "train", "train.py", exported, settings, *fisher),
            score(name, model, exported),
            command(name, "general", "scripts/measure.py", general_file, forgotten, exported),
        ]
    check_options(commands, out)
    run_commands(lambda: commands, out)
    measured = [name for name in methods if all(path.is_file() for path in files[name])]
    results = {name: [json.loads(path.read_text(encoding="utf-8")) for path in files[name]] for name in measured}
    text = methods_table(results, json.loads(files["base"][0].read_text(encoding="utf-8")))
    write_durably(out / "comparison.md", text + "\n")
    return f"\n{text}\n\nin {out}: comparison.md, results/*.json"


def plan_methods(
    out: Path,
    general: str,
    low: float,
    shares: Sequence[float],
    strengths: Sequence[float],
    both: Sequence[tuple[float, float]] | None,
) -> dict[str, list[str]]:
    """Method name -> the config overrides of its run, in the order of the runs.

    low: the low learning rate. shares, strengths: one replay method per share, one EWC method per strength. both: one combined
    method per (share, strength). The run with the first strength estimates the Fisher diagonal, which the others reuse. Raises
    UserError if a number is out of range.
    """
    both = [(0.05, 10), (0.05, 100)] if both is None else both
    if bad := [x for x in [*strengths, *(strength for _, strength in both)] if not x > 0]:
        raise UserError(f"a strength of EWC must be above 0, not {bad[0]:g}")

    def ewc(strength: float) -> list[str]:
        first = strengths[0] if strengths else strength
        source = f"ewc.data={general}" if strength == first else f"ewc.fisher={out / f'ewc-{first:g}' / 'ewc'}"
        return [f"ewc.strength={strength:g}", source]

    replay = {share: f"data.mix=replay:{share:g}:{general}" for share in [*shares, *(share for share, _ in both)]}
    methods = {PLAIN: [], "low-lr": [f"optimizer.learning_rate={low:g}"]}
    methods |= {f"replay-{100 * share:g}": [replay[share]] for share in shares}
    methods |= {f"ewc-{strength:g}": ewc(strength) for strength in strengths}
    return methods | {f"replay-{100 * a:g}-ewc-{b:g}": [replay[a], *ewc(b)] for a, b in both}


def methods_table(found: dict[str, list[dict]], base: dict) -> str:
    """Values, and changes with 95% intervals, as Markdown. found: method -> [result on the task, result on general text].

    The changes of F1, ROUGE-L and loss are from plain training, those of perplexity and questions from the base.
    """
    terms = {name: terms_of(task) | general_terms(general, "tuned") for name, (task, general) in found.items()}
    general = next((general for _, general in found.values()), None)
    start = terms_of(base) | (general_terms(general, "base") if general else {})
    rows = [["", *(measure_of(name).heading for name in COLUMNS)], ["base", *(_cell(name, start) for name in COLUMNS)]]
    for method, own in terms.items():
        plain = {} if method == PLAIN else terms.get(PLAIN, {})
        rows.append([method, *(_cell(name, own, start if name in GENERAL else plain) for name in COLUMNS)])
    return table(rows)


def _cell(name: str, terms: dict[str, Terms], before: dict[str, Terms] | None = None) -> str:
    """The value of a metric, and its change from `before` with the interval; that of KL, which is a change, with its own."""
    if name not in terms:
        return ""
    digits = measure_of(name).digits
    text = f"{terms[name].value:.{digits}f}"
    if name == "kl":
        return f"{text} ({in_words(interval(terms[name]), digits)})"
    if not before or name not in before:
        return text
    moved = change(before[name], terms[name])
    return f"{text} ({moved.value:+.{digits}f}; {in_words(moved, digits)})"
