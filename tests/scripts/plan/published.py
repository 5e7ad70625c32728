"""Compare scripts/plan/step_time.py with published speeds of full training in bf16 (published_rows.csv), and fit its constants.

    python -m tests.scripts.plan.published            print the errors by card, length and source (docs/planning.md, docs/LOG.md)
    python -m tests.scripts.plan.published fit        fit the middle of ASSUMPTIONS["cuda"] to the rows whose role is `fit`
    python -m tests.scripts.plan.published rows       print every row with its error

Every row is a run with sharded data parallelism alone (FSDP), as the planner plans it. Documents fill the sequence, all tokens
are targets, and attention sees the whole sequence. Some columns of a row:

    checkpointed    fraction of the layers whose forward runs twice
    code, head      implementation of norms, RoPE and activation (code) and of the loss (head): our eager code (`eager`), fused
                    kernels (`fused`), fused norms alone (`fused_norm`), an MPT block (`mpt`)
    kernel          attention kernel, `flash1` to `flash3` (cuDNN's counts as the third); ours is the second
    role            fit | held_out. The constants are not fitted to held-out rows. Held out are whole sources, and of llm-foundry
                    the sizes 760M, 3B and 13B and the lengths 1,024 and 16,384
    seen            yes: the row was in an earlier list, so its error was known while the terms were chosen
"""

import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from model.flops import step_flops
from model.language_model import build_on_meta
from model.memory import ModelShape, shape_of
from scripts.plan import step_time
from scripts.plan.machines import Cluster, cluster_of, named_device
from scripts.plan.models import SHAPE_KEYS
from scripts.plan.step_time import Speed, StepWork, expected_speed, layer_elements

ROWS = Path(__file__).with_name("published_rows.csv")
# Values of SHAPE_KEYS. An MPT block has two matrices of 4 h x h
# in its MLP; as a Llama block with three it has as many elements with an intermediate size of 8/3 h.
SHAPES = {
    "MPT 125M": (768, 2048, 12, 12, 12, 50368, True),
    "MPT 350M": (1024, 2731, 24, 16, 16, 50368, True),
    "MPT 760M": (1536, 4096, 24, 12, 12, 50368, True),
    "MPT 1B": (2048, 5461, 24, 16, 16, 50368, True),
    "MPT 3B": (2560, 6827, 32, 20, 20, 50368, True),
    "MPT 7B": (4096, 10923, 32, 32, 32, 50368, True),
    "MPT 13B": (5120, 13653, 40, 40, 40, 50368, True),
    "MPT 30B": (7168, 19115, 48, 56, 56, 50368, True),
    "MPT 70B": (8192, 21845, 80, 64, 64, 50368, True),
    "Llama 2 7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama 2 13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Llama 2 34B": (8192, 22016, 48, 64, 8, 32000, False),
    "Llama 2 70B": (8192, 28672, 80, 64, 8, 32000, False),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama 3 14.8B": (5120, 17920, 40, 40, 8, 128256, False),
    "Llama 3 70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128256, True),
    "OLMo 1B": (2048, 5632, 18, 16, 16, 100352, False),
    "OLMo 7B": (4096, 11008, 32, 32, 32, 100352, False),
    "OLMo Llama 8B": (4096, 14336, 32, 32, 8, 100352, False),
    "OLMo 13B": (5120, 13824, 40, 40, 40, 100352, False),
    "TinyLlama 1.1B": (2048, 5632, 22, 32, 4, 32000, False),
    "Qwen3 4B": (2560, 9728, 36, 32, 8, 151936, True, 128),
}
# Speed relative to FlashAttention-2: the first one is half as fast (arXiv:2307.08691, abstract), the third 1.5 to 2 times as
# fast (arXiv:2407.08608, abstract; it needs an H100 or later).
KERNELS = {"flash1": 0.5, "flash2": 1.0, "flash3": 1.75}
# Elements per token and layer that an MPT block moves, in units of the hidden size: two norms in bf16 (2 each), two dropouts (2.5)
# and residual additions (3), GELU (8), attention (4), and taking padding out of queries, keys, values and output (8).
MPT_ELEMENTS = 35
CARDS = {"A": "A100", "H": "H100, H200", "B": "B300"}  # by the first letter
LENGTHS = {1024: "up to 1,024", 2048: "2,048", 8192: "4,096 and 8,192", math.inf: "16,384 and more"}
# Some operators cap an SXM H100 at 500 W instead of 700 W, which lowers its clock. It is assumed that products slow down with
# the square root of the power.
SLOWER = (500 / 700) ** 0.5
FUSED_NORM = 2 * (16 - 2)  # in the same unit, what two fused norms save
# A fused loss writes logits (2), reads them (2), writes their gradient in place (2) for two products (4).
FUSED_LOGIT_BYTES = 10


@dataclass(frozen=True)
class Row:
    """One published run."""

    framework: str
    model: str
    card: str
    gpus: int
    per_node: int
    network: str  # Gb/s of a node; "": the network of the DGX
    sequence: int  # tokens
    rows: float  # sequences of a micro-batch on one GPU
    micro_batches: int
    checkpointed: str
    code: str
    head: str
    kernel: str
    strategy: str
    reduce_dtype: str
    memory: str
    published: float  # tokens per second and GPU
    role: str
    seen: str
    source: str
    note: str

    @property
    def every(self) -> int:
        """Return k if every k-th layer is checkpointed, or 0 without checkpointing."""
        return 0 if self.checkpointed == "0" else int(self.checkpointed.rpartition("/")[2])

    @property
    def cluster(self) -> Cluster:
        """Return the machines. torchtitan's H100 of 2024 had 500 W and HBM2e with 2.4 TB/s."""
        device = named_device(self.card.removesuffix("-500W-HBM2e"))
        if self.card.endswith("-500W-HBM2e"):
            products, attention = SLOWER * device.sustained, SLOWER * device.attention
            device = dataclasses.replace(device, bandwidth=2.4e12, sustained=products, attention=attention)
        device = dataclasses.replace(device, attention=device.attention * KERNELS[self.kernel])
        return cluster_of(
            self.gpus, max(1, self.gpus // self.per_node), device, float(self.network) if self.network else None
        )

    @property
    def config(self) -> Config:
        """Return the equivalent settings of train.py."""
        mode, code = "full" if self.every else "none", self.code == "fused"
        return Config(
            Model("", activation_checkpointing=mode, checkpoint_every=self.every or 1, compile=code),
            Data((), sequence_length=self.sequence),
            Batch(),
            Optimizer(1e-5, memory=self.memory),
            Run("published"),
            sharding=Sharding(strategy=self.strategy, reduce_dtype=self.reduce_dtype),
        )


def published_rows() -> list[Row]:
    """Read all rows of the file."""
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    with ROWS.open(newline="") as lines:
        return [Row(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(lines)]


@cache
def shape(name: str) -> ModelShape:
    """Return the shape of a model of `SHAPES`."""
    return shape_of_equal_layers(LlamaConfig(**dict(zip(SHAPE_KEYS, SHAPES[name], strict=False))))


def shape_of_equal_layers(config: LlamaConfig) -> ModelShape:
    """Return `shape_of` a model whose layers are equal, from a model of one layer: building 80 layers takes a second."""
    count, short = config.num_hidden_layers, LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1})
    shape = shape_of(build_on_meta(short), short)
    work = dataclasses.replace(shape.work, per_token=count * shape.work.per_token, windows=((None, count),))
    return dataclasses.replace(shape, config=config, layers=count * shape.layers, work=work)


@contextmanager
def code_of(row: Row) -> Iterator[None]:
    """Change the time model to the row's implementation of norms, loss and layers inside the block."""
    changed = {}
    if row.head == "fused":
        changed["LOGIT_BYTES"] = FUSED_LOGIT_BYTES
    if row.code == "mpt":
        changed["layer_elements"] = lambda config, is_compiled: MPT_ELEMENTS * config.hidden_size
    if row.code == "fused_norm":
        changed["layer_elements"] = lambda config, is_compiled: (
            layer_elements(config, False) - FUSED_NORM * config.hidden_size
        )
    before = {name: getattr(step_time, name) for name in changed}
    vars(step_time).update(changed)
    try:
        yield
    finally:
        vars(step_time).update(before)


@cache
def _run(row: Row) -> tuple[ModelShape, Config, Cluster, list[StepWork]]:
    """Return the arguments of the time model for a row, as a run of one step."""
    documents = int(row.gpus * row.rows * row.micro_batches)
    tokens = documents * row.sequence
    flops = step_flops(shape(row.model).work, [row.sequence] * documents, tokens)
    step = StepWork(0, tokens, float(tokens), flops, row.micro_batches, 1.0)
    return shape(row.model), row.config, row.cluster, [step]


def _predict(row: Row) -> Speed:
    with code_of(row):
        return expected_speed(*_run(row), total_steps=1)


@cache
def predicted(row: Row) -> Speed:
    """Return the expected speed of a row."""
    return _predict(row)


def error(row: Row) -> float:
    """Return the error of the range's middle relative to the published speed: 0.1 is 10% too fast."""
    return predicted(row).middle / row.published - 1


def is_inside(row: Row) -> bool:
    """Return whether the published speed is in the range."""
    low, high = predicted(row).tokens_per_second
    return low <= row.published <= high


@dataclass(frozen=True)
class Band:
    """The errors of several rows."""

    rows: int
    bias: float  # median of the signed errors
    median: float  # median of the absolute errors
    worst: float  # largest absolute error
    inside: float  # fraction of the rows inside the range


def band(rows: Sequence[Row]) -> Band:
    """Summarise the errors of rows."""
    errors = [error(row) for row in rows]
    inside = sum(map(is_inside, rows)) / len(rows)
    absolute = [abs(value) for value in errors]
    return Band(len(rows), statistics.median(errors), statistics.median(absolute), max(absolute), inside)


def bands(rows: Sequence[Row]) -> dict[str, Band]:
    """Summarise the errors of all rows, then by card, by length and by source."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        length = next(name for bound, name in LENGTHS.items() if row.sequence <= bound)
        for name in ("all", CARDS[row.card[0]], f"{length} tokens", row.framework):
            groups.setdefault(name, []).append(row)
    return {name: band(group) for name, group in groups.items()}


def report(rows: Sequence[Row]) -> str:
    """Return the errors as a table in Markdown."""
    lines = [
        "| rows of | rows | median error | of the middle | worst | inside the range |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, band in bands(rows).items():
        errors = f"{band.median:.1%} | {band.bias:+.1%} | {band.worst:.0%} | {band.inside:.0%}"
        lines.append(f"| {name} | {band.rows} | {errors} |")
    return "\n".join(lines)


# The fitted fields of Assumptions and constants, the factors by which the fit moves them one after the other, and upper limits.
FITTED = ("attention", "bandwidth", "link", "contention", "NODE_LATENCY")
STEPS = (1.2, 1.05, 1.01)
LIMITS = {"bandwidth": 0.95, "link": 0.95, "contention": 1.0}


def constants() -> dict[str, float]:
    """Return the current values of `FITTED`."""
    middle = step_time.ASSUMPTIONS["cuda"][1]
    return {name: getattr(step_time if name.isupper() else middle, name) for name in FITTED}


def loss(rows: Sequence[Row], values: dict[str, float]) -> float:
    """Return the mean absolute error of the logarithm of the speed with these values of `FITTED`."""
    fields = {name: value for name, value in values.items() if not name.isupper()}
    middle = dataclasses.replace(step_time.ASSUMPTIONS["cuda"][1], **fields)
    before = step_time.NODE_LATENCY, step_time.ASSUMPTIONS
    step_time.NODE_LATENCY, step_time.ASSUMPTIONS = values["NODE_LATENCY"], {"cuda": (middle,) * 3}
    try:
        return statistics.fmean(abs(math.log(_predict(row).middle / row.published)) for row in rows)
    finally:
        step_time.NODE_LATENCY, step_time.ASSUMPTIONS = before


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Return the constants with the least loss, found by moving one after the other in ever smaller steps.

    It takes about two minutes.
    """
    values, best = constants(), loss(rows, constants())
    for factor in STEPS:
        before = math.inf
        while best < before - 1e-5:
            before = best
            for name in FITTED:
                for change in (factor, 1 / factor):
                    while True:
                        moved = min(values[name] * change, LIMITS.get(name, math.inf))
                        if moved == values[name] or (tried := loss(rows, values | {name: moved})) >= best:
                            break
                        values[name], best = moved, tried
    return values | {"loss": best}


def main(arguments: list[str]) -> None:
    """Print the errors, the fit or the rows."""
    rows = {role: [row for row in published_rows() if row.role == role] for role in ("fit", "held_out")}
    if arguments == ["fit"]:
        print(fit(rows["fit"]))
        return
    for role, chosen in rows.items():
        print(f"{role}\n\n{report(chosen)}\n")
        for row in chosen if arguments == ["rows"] else ():
            low, high = predicted(row).tokens_per_second
            print(
                f"{row.framework:18} {row.model:14} {row.sequence:>6} {row.gpus:>4} {row.card:10} {row.rows:>5g} x "
                f"{row.micro_batches:<2} {row.checkpointed:>4} {row.published:>9,.0f} {low:>9,.0f} - {high:<9,.0f} "
                f"{error(row):+.0%}{'' if is_inside(row) else ' outside'}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
