"""The time model against published speeds: `python -m planner.published` prints every row, its error, and the band."""

import statistics
from dataclasses import dataclass
from functools import cache

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from model.flops import step_flops
from planner.cluster import cluster_of
from planner.published_rows import BLIND_ROWS, LEFT_OUT, ROWS, SHAPES, Row
from planner.shape import ModelShape, llama_config, shape_of
from planner.step_time import Speed, expected_speed
from planner.workload import Load, StepWork, Workload

MARKS = {"fitted": " ", "held out": "h", "blind": "b"}


@dataclass(frozen=True)
class Compared:
    """A row and what the model says of it."""

    row: Row
    speed: Speed
    # fitted: the constants of planner/assumptions.py were fitted to it | held out: not, but its error was seen while terms
    # were chosen | blind: looked at only when the model was finished
    group: str

    @property
    def error(self) -> float:
        """Of the middle, relative to what was published: 0.1 is 10% too fast."""
        return self.speed.middle / self.row.published - 1

    def error_without(self, part: str) -> float:
        """The error if `part` of the step took no time (and nothing were fitted again)."""
        seconds = sum(self.speed.parts.values())
        return (1 + self.error) * seconds / (seconds - self.speed.parts[part]) - 1

    @property
    def is_inside(self) -> bool:
        """Whether the range holds what was published."""
        low, high = self.speed.tokens_per_second
        return low <= self.row.published <= high


@dataclass(frozen=True)
class Band:
    """Errors of several rows, as absolute values."""

    rows: int
    median: float
    worst: float
    inside: float  # share of the rows whose range holds what was published


def predicted(row: Row) -> Speed:
    """The speed of the run of a row."""
    shape = _shape(row.model)
    nodes = max(1, row.gpus // row.per_node)
    cluster = cluster_of(row.gpus, nodes, row.gpu, row.network if nodes > 1 else None)
    documents = int(row.gpus * row.rows * row.micro_batches)
    tokens = documents * row.sequence
    flops = step_flops(shape.work, [row.sequence] * documents, tokens)
    step = StepWork(0, tokens, float(tokens), flops, row.micro_batches, 1.0)
    worst = Load((row.sequence,), row.sequence)
    return expected_speed(shape, _config(row), cluster, Workload(1, (step,), worst, is_exact=True))


def compare() -> list[Compared]:
    """All rows. Of `ROWS` every second one of a source is held out from the fit."""
    seen: dict[str, int] = {}
    compared = []
    for row in ROWS:
        seen[row.source] = seen.get(row.source, 0) + 1
        compared.append(Compared(row, predicted(row), "fitted" if seen[row.source] % 2 else "held out"))
    return compared + [Compared(row, predicted(row), "blind") for row in BLIND_ROWS]


def band(compared: list[Compared]) -> Band:
    """The errors of these rows together."""
    errors = [abs(one.error) for one in compared]
    inside = sum(one.is_inside for one in compared) / len(compared)
    return Band(len(compared), statistics.median(errors), max(errors), inside)


@cache
def _shape(name: str) -> ModelShape:
    return shape_of(name, llama_config(SHAPES[name]))


def _config(row: Row) -> Config:
    """Our settings of a row. `half` is every second layer."""
    model = Model(
        path="",
        activation_checkpointing="none" if row.checkpointing == "none" else "full",
        checkpoint_every=2 if row.checkpointing == "half" else 1,
        compile=row.is_compiled,
    )
    return Config(
        model=model,
        data=Data(train=(), sequence_length=row.sequence),
        batch=Batch(),
        optimizer=Optimizer(learning_rate=1e-5, memory=row.memory),
        run=Run(name="published"),
        sharding=Sharding(strategy=row.strategy, reduce_dtype=row.reduce_dtype),
    )


def report() -> list[str]:
    """The table, the bands and what was left out, as lines."""
    compared = compare()
    lines = [
        "tokens per second and GPU; h: held out from the fit; b: blind; ac: activation checkpointing; c: torch.compile",
        f"  {'model':<14} {'tokens':>6} {'GPUs':>15}  {'batch':>8} {'ac':<5}   {'published':>9}  {'low - high':>15}  {'error':>6}",
    ]
    source = ""
    for one in compared:
        row = one.row
        if row.source != source:
            source = row.source
            lines.append(source)
        low, high = one.speed.tokens_per_second
        batch = f"{row.rows:g} x {row.micro_batches}"
        lines.append(
            f"{MARKS[one.group]} {row.model:<14} {row.sequence:>6} {row.gpus:>4} x {row.gpu:<9} {batch:>8} "
            f"{row.checkpointing:<5}{' c' if row.is_compiled else '  '} {row.published:>9,.0f} "
            f"{f'{low:,.0f} - {high:,.0f}':>17}  {one.error:>+6.0%}{'' if one.is_inside else '  outside'}"
        )
    for name in (*MARKS, "all"):
        chosen = [one for one in compared if name in (one.group, "all")]
        result = band(chosen)
        lines.append(
            f"{name:>8}: {result.rows} rows, error of the middle {result.median:.1%} in the median, {result.worst:.0%} at worst; "
            f"{result.inside:.0%} inside the range"
        )
    for part in ("attention", "memory", "communication"):
        errors = [one.error_without(part) for one in compared]
        median = statistics.median(map(abs, errors))
        lines.append(f"without {part}: {median:.1%} in the median, {max(errors, key=abs):+.0%} at worst")
    return lines + ["not compared:"] + [f"  {what}: {why}" for what, why in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(report()))
