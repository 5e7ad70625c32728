"""The settings of a run as frozen dataclasses, and checks of every value.

A config file is Python code that ends with `config = Config(...)`; configs/loading/config_file.py reads it. All values
are checked before a process group starts. A mistake raises a `UserError` with one sentence that names the key.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError


@dataclass(frozen=True)
class Model:
    path: str  # a Hugging Face model directory; scripts/fetch_base_model.py downloads one to artifacts/models/NAME
    layer_class: str | None = None  # class name of the decoder layers, to shard by; None: as declared by the model
    compute_dtype: str = "bf16"  # bf16 | fp32; gradients are reduced in fp32 either way
    # none | full | selective | offload (distributed/activation_checkpointing.py)
    activation_checkpointing: str = "none"
    checkpoint_every: int = 1  # checkpoint every k-th decoder layer only
    compile: bool = False  # torch.compile each decoder layer; worthwhile on CUDA
    # To extend the model's context window (docs/long_context.md)
    rope_type: str | None = None  # linear | yarn | llama3 | longrope | default (model/rope.py); None: as in config.json
    rope_factor: float | None = None  # the window is multiplied by this
    rope_original_length: int | None = None  # window in tokens before any scaling; None: as in config.json


@dataclass(frozen=True)
class Source:
    name: str  # its curves are train/loss/NAME, train/share/NAME and validation/loss/NAME
    paths: tuple[str, ...]  # like Data.train
    share: float  # fraction of the target tokens of every step; 0.05 is 5%
    validation: tuple[str, ...] = ()  # like Data.validation


@dataclass(frozen=True)
class Data:
    # The main source: .jsonl or .parquet files with `messages` (chats) or `text` (documents), or .txt files of one
    # document each, all optionally compressed (.gz, .zst). Or one directory: a token store (scripts/build_tokens.py)
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    # Sources to mix in; the main source gets the remaining share. On the command line:
    # data.mix=NAME:SHARE:FILE,FILE[:VALIDATION FILES];NAME:...
    mix: tuple[Source, ...] = ()
    sequence_length: int = 2048  # maximum number of tokens in a packed row, and therefore in an example
    # drop | truncate | error: what to do with longer chats; they are counted. Longer texts are cut into several
    # examples
    too_long: str = "drop"
    packing: bool = True  # False: one example per row


@dataclass(frozen=True)
class Batch:
    # Set exactly one of these two. Examples of the main source per optimizer step, over all ranks (what papers call the
    # batch size); examples of mixed-in sources come on top
    global_examples: int | None = None
    global_tokens: int | None = (
        None  # or: maximum number of target tokens per optimizer step, over all sources and ranks
    )
    micro_batch: int = 1  # packed rows per forward pass on one rank; gradient accumulation follows from it


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float  # peak
    epochs: int = 3
    max_steps: int | None = None  # stop after this many steps; the schedule is computed for this number
    warmup_ratio: float = 0.05  # fraction of all steps
    warmup_steps: int | None = None  # number of steps; overrides warmup_ratio
    min_lr_ratio: float = 0.1  # the cosine decay ends at this fraction of the peak
    weight_decay: float = 0.1  # on matrices only, not on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    memory: str = "16N"  # bytes per parameter: 16N | 14N | 12N | 8N | 6N (distributed/optimizer.py)
    stage: str = "fine-tuning"  # fine-tuning | pre-training: which range of learning rates is considered usual


@dataclass(frozen=True)
class EWC:
    # Elastic weight consolidation (docs/ewc.md). lambda: how many nats per new-domain token one nat per old-domain
    # token is worth. 0: off
    strength: float = 0.0
    data: tuple[str, ...] = ()  # old-domain files, like Data.train, from which the Fisher diagonal is estimated
    fisher: str | None = None  # or: runs/NAME/ewc of another run, whose Fisher diagonal and reference are reused
    documents: int = 1024  # number of documents sampled from the data
    # Documents per squared gradient, over all ranks. The relative error is about sqrt(2 x batch / documents)
    batch: int = 4
    # model: labels sampled from the model | empirical: the labels in the data (model/ewc/fisher.py)
    estimator: str = "model"
    dtype: str = "fp32"  # fp32 | bf16: of the stored Fisher diagonal and reference
    device: str = "device"  # where the two are stored. device: with the parameters | cpu: in host memory
    seed: int = 0


@dataclass(frozen=True)
class Sharding:
    # full: ZeRO-3 | grad_op: like ZeRO-2, parameters stay gathered until the last micro-batch
    # | hybrid: shard within a node, replicate across nodes | none: replicate everything (DDP)
    strategy: str = "full"
    shard_size: int | None = None  # hybrid: number of ranks that share one copy of the model; None: the ranks of a node
    cpu_offload: bool = False  # keep parameters, gradients and moments in host memory and run AdamW there


@dataclass(frozen=True)
class Run:
    name: str  # everything is written to runs/NAME/
    directory: str = "runs"
    seed: int = 0
    log_every: int = 1  # steps; on CUDA a logged step waits for the device
    eval_every: int = 0  # steps; 0: only before the first step and after the last
    eval_general: bool = False  # each evaluation also measures forgetting against the base model (docs/forgetting.md)
    save_every: int = 0  # steps; 0: only at the end and on a signal
    keep_last: int = 2  # number of checkpoints to keep, in addition to the best by validation loss
    resume: str = "auto"  # auto: continue from the last checkpoint | never: refuse to touch an existing run
    deterministic: bool = False  # resume bit-identically on CUDA too; slower
    export: str = "last"  # last | best: which checkpoint is exported as a Hugging Face directory


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    run: Run
    sharding: Sharding = field(default_factory=Sharding)
    ewc: EWC = field(default_factory=EWC)


CHOICES = {
    "model.compute_dtype": ("bf16", "fp32"),
    "data.too_long": ("drop", "truncate", "error"),
    "model.activation_checkpointing": ("none", "full", "selective", "offload"),
    "optimizer.memory": ("16N", "14N", "12N", "8N", "6N"),
    "optimizer.stage": ("fine-tuning", "pre-training"),
    "ewc.estimator": ("model", "empirical"),
    "ewc.dtype": ("fp32", "bf16"),
    "ewc.device": ("device", "cpu"),
    "sharding.strategy": ("full", "grad_op", "hybrid", "none"),
    "run.resume": ("auto", "never"),
    "run.export": ("last", "best"),
}
ABOVE_ZERO = (
    "batch.global_examples",
    "batch.global_tokens",
    "batch.micro_batch",
    "model.checkpoint_every",
    "sharding.shard_size",
    "data.sequence_length",
    "optimizer.learning_rate",
    "optimizer.epochs",
    "optimizer.max_steps",
    "optimizer.max_grad_norm",
    "optimizer.eps",
    "ewc.documents",
    "ewc.batch",
    "run.log_every",
    "run.keep_last",
)
ZERO_OR_MORE = (
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "ewc.strength",
    "run.eval_every",
    "run.save_every",
)


def as_dict(config: Config) -> dict:
    """The config as nested dictionaries of JSON types: section -> key -> value."""
    return dataclasses.asdict(config)


def get(config: Config, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def check_sections(config: Config) -> None:
    """Check that each section of a config has its class. Raises UserError."""
    for name, section in typing.get_type_hints(Config).items():
        value = getattr(config, name)
        if type(value) is not section:
            raise UserError(f"{name} must be {section.__name__}(...), not {value!r}")


def check_config(config: Config) -> None:
    """Check types, choices and ranges. Raises UserError for the first wrong value."""
    check_sections(config)
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        hints = typing.get_type_hints(type(values))
        for key in dataclasses.fields(values):
            name, value = f"{section.name}.{key.name}", getattr(values, key.name)
            if not has_type(value, hints[key.name]):
                raise UserError(f"{name} must be {type_name(hints[key.name])}, not {value!r}")
            if name in CHOICES and value not in CHOICES[name]:
                raise UserError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    batch, optimizer, run = config.batch, config.optimizer, config.run
    if (batch.global_examples is None) == (batch.global_tokens is None):
        raise UserError(
            "set exactly one of batch.global_examples (examples per step) and batch.global_tokens (target tokens per step), "
            "and the other to None"
        )
    if not config.data.train:
        raise UserError("data.train is empty; name at least one file")
    _check_mix(config.data.mix)
    for name in ABOVE_ZERO:
        value = get(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, not {value!r}")
    for name in ZERO_OR_MORE:
        value = get(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} must be 0 or more, not {value!r}")
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(optimizer, name) <= 1:
            raise UserError(f"optimizer.{name} must be between 0 and 1, not {getattr(optimizer, name)!r}")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas must be in [0, 1), not {optimizer.betas!r}")
    if not run.name or "/" in run.name or run.name.startswith("."):
        raise UserError(f"run.name must be a plain directory name, not {run.name!r}")
    if config.sharding.shard_size is not None and config.sharding.strategy != "hybrid":
        raise UserError(
            "sharding.shard_size applies to sharding.strategy=hybrid only; remove it or set sharding.strategy=hybrid"
        )
    if run.export == "best" and not config.data.validation:
        raise UserError(
            "run.export=best needs data.validation, because the best checkpoint is the one with the lowest validation loss"
        )
    if config.ewc.strength and bool(config.ewc.data) == bool(config.ewc.fisher):
        raise UserError(
            "ewc.strength above 0 needs either ewc.data (old-domain files) or ewc.fisher (runs/NAME/ewc of another run)"
        )


def _check_mix(mix: tuple[Source, ...]) -> None:
    for source in mix:
        for key, hint in typing.get_type_hints(Source).items():
            if not has_type(getattr(source, key), hint):
                raise UserError(
                    f"data.mix: `{key}` of a Source must be {type_name(hint)}, not {getattr(source, key)!r}"
                )
        if not re.fullmatch(r"[\w.-]+", source.name) or source.name == "main":
            raise UserError(
                f"data.mix: {source.name!r} is not a valid source name; use letters, digits, `_`, `.` and `-`, but not the "
                "name main"
            )
        if not source.paths:
            raise UserError(f"data.mix: source {source.name} has no files; name at least one")
        if not 0 < source.share < 1:
            raise UserError(f"data.mix: the share of {source.name} must be between 0 and 1, not {source.share!r}")
    names = [source.name for source in mix]
    if len(set(names)) < len(names):
        raise UserError(f"data.mix: the source names must be different from each other: {', '.join(names)}")
    if sum(source.share for source in mix) >= 1:
        raise UserError("data.mix: the shares must add up to less than 1; data.train gets the rest")


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Check settings that depend on the number of ranks. Raises UserError.

    Under `hybrid` all copies of the model must have the same number of ranks. Without packing a step must fill every
    micro-batch on every rank.
    """
    shard_size = config.sharding.shard_size or ranks_per_node
    if config.sharding.strategy == "hybrid" and world_size % shard_size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"sharding.strategy=hybrid: {world_size} ranks cannot be divided into groups of sharding.shard_size={shard_size}; "
            f"set it to one of {divisors}"
        )
    rows = world_size * config.batch.micro_batch
    examples = config.batch.global_examples
    if not config.data.packing and examples is not None and examples % rows:
        raise UserError(
            f"data.packing=False: batch.global_examples={examples} is not divisible by {world_size} ranks x batch.micro_batch="
            f"{config.batch.micro_batch}; set it to {max(1, examples // rows) * rows}, for example"
        )


def has_type(value: object, hint: object) -> bool:
    """Whether a value has the type of a field. A bool is not an int, an int is a float, tuple items are checked."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(has_type(item, kinds[0]) for item in value)
        return len(value) == len(kinds) and all(has_type(item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def type_name(hint: object) -> str:
    """The type of a field in words, for error messages."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        inner = type_name(kinds[0]).split()[-1]
        return f"a tuple of {inner}s" if kinds[-1] is Ellipsis else f"a tuple of {len(kinds)} {inner}s"
    names = {
        Source: "a Source",
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "True or False",
        type(None): "None",
    }
    return names[hint]
