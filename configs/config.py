"""The settings of a run: small frozen dataclasses, and the check of every value.

A config file is Python that ends with `config = Config(...)` (configs/loading/config_file.py reads it). Everything is
checked before a process group starts. A mistake is a `UserError`: one sentence that names the key.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field

from common.errors import UserError


@dataclass(frozen=True)
class Model:
    path: str  # a Hugging Face model directory; scripts/fetch_base_model.py downloads one to artifacts/models/NAME
    layer_class: str | None = None  # class of the decoder layers to shard by; None: declared by the model (auto-wrap)
    compute_dtype: str = "bf16"  # bf16 | fp32; reductions are fp32 either way
    activation_checkpointing: str = (
        "none"  # none | full | selective | offload (distributed/activation_checkpointing.py)
    )
    checkpoint_every: int = 1  # checkpoint every k-th decoder layer: between `none` and `full`
    compile: bool = False  # torch.compile each decoder layer; worthwhile on CUDA
    # A context window longer than the model's (docs/long_context.md). None: RoPE as in config.json
    rope_type: str | None = None  # linear | yarn | llama3 | longrope | default (model/rope.py)
    rope_factor: float | None = None  # multiplies the window
    rope_original_length: int | None = None  # window in tokens before any scaling; None: as in config.json


@dataclass(frozen=True)
class Source:
    name: str  # of its curves: train/loss/NAME, train/share/NAME and validation/loss/NAME
    paths: tuple[str, ...]  # like Data.train
    share: float  # of the target tokens of every step; 0.05 is 5%
    validation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    # The main source: files with `messages` (chats) or `text` (documents), .jsonl or .parquet; a .txt file is one document;
    # all also as .gz or .zst. Or one directory: a token store made by scripts/build_tokens.py
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    # Sources mixed in; the main source has the remaining share. On the command line:
    # data.mix=NAME:SHARE:FILE,FILE[:VALIDATION FILES];NAME:...
    mix: tuple[Source, ...] = ()
    sequence_length: int = 2048  # maximum number of tokens in a packed row, and so in an example
    # drop | truncate | error: what happens to longer chats; counted and printed. Longer texts are cut into several examples
    too_long: str = "drop"
    packing: bool = True  # False: one example per row


@dataclass(frozen=True)
class Batch:
    # Examples of the main source in one optimizer step, over all ranks: what papers call the batch size. Examples of
    # mixed-in sources come on top
    global_examples: int | None = None
    global_tokens: int | None = None  # or target tokens in one step, of all sources. Set exactly one of the two
    micro_batch: int = 1  # packed rows in one forward on one rank; gradient accumulation follows from it


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float  # peak
    epochs: int = 3
    max_steps: int | None = None  # stop earlier; the schedule is computed for this number of steps
    warmup_ratio: float = 0.05  # of all steps
    warmup_steps: int | None = None  # overrides warmup_ratio
    min_lr_ratio: float = 0.1  # the cosine ends at this fraction of the peak
    weight_decay: float = 0.1  # on matrices only, not on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    memory: str = "16N"  # bytes per parameter: 16N | 14N | 12N | 8N | 6N (distributed/optimizer.py)
    stage: str = "fine-tuning"  # fine-tuning | pre-training: selects the usual range of learning rates for a warning


@dataclass(frozen=True)
class EWC:
    # Elastic weight consolidation (docs/ewc.md). lambda: how many nats per new-domain token one nat per old-domain token is
    # worth. 0: off
    strength: float = 0.0
    data: tuple[str, ...] = ()  # old-domain files, like Data.train, from which the Fisher diagonal is estimated
    fisher: str | None = None  # or runs/NAME/ewc of another run, whose Fisher diagonal and reference are reused
    documents: int = 1024  # number of documents drawn from the data
    batch: int = (
        4  # documents per squared gradient, over all ranks: the relative error is about sqrt(2 x batch / documents)
    )
    estimator: str = (
        "model"  # model: labels sampled from the model | empirical: the data's labels (model/ewc/fisher.py)
    )
    dtype: str = "fp32"  # fp32 | bf16: of the stored Fisher diagonal and reference
    device: str = "device"  # device: where the parameters are | cpu: in host memory
    seed: int = 0


@dataclass(frozen=True)
class Sharding:
    # full: ZeRO-3 | grad_op: like ZeRO-2, parameters stay gathered until the last micro-batch
    # | hybrid: shard within a node, replicate across nodes | none: replicate everything (DDP)
    strategy: str = "full"
    shard_size: int | None = None  # hybrid: number of ranks that share one copy of the model; None: the ranks of a node
    cpu_offload: bool = False  # parameters, gradients and moments live in host memory, and AdamW runs there


@dataclass(frozen=True)
class Run:
    name: str  # everything is written to runs/<name>/
    directory: str = "runs"
    seed: int = 0
    log_every: int = 1  # steps; on CUDA a logged step waits for the device
    eval_every: int = 0  # steps; 0: only before the first step and after the last
    eval_general: bool = False  # each evaluation also measures forgetting against the base model (docs/forgetting.md)
    save_every: int = 0  # steps; 0: only at the end and on a signal
    keep_last: int = 2  # number of checkpoints to keep, besides the best by validation loss
    resume: str = "auto"  # auto: continue from the last checkpoint | never: refuse to touch an existing run
    deterministic: bool = False  # bitwise resume on CUDA; slower
    export: str = "last"  # last | best: which weights the exported Hugging Face directory has


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
    """The resolved config as plain JSON types, section by section."""
    return dataclasses.asdict(config)


def get(config: Config, key: str) -> object:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def check_config(config: Config) -> None:
    """Check types, choices and ranges. Raises UserError at the first wrong value."""
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
        raise UserError("set exactly one of batch.global_examples (examples per step) and batch.global_tokens")
    if not config.data.train:
        raise UserError("data.train names no file")
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
            "sharding.shard_size applies to sharding.strategy=hybrid only; remove it, or set sharding.strategy=hybrid"
        )
    if run.export == "best" and not config.data.validation:
        raise UserError("run.export=best needs data.validation, because the best checkpoint is chosen by its loss")
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
            raise UserError(f"data.mix: a source needs a plain name other than main, not {source.name!r}")
        if not source.paths:
            raise UserError(f"data.mix: source {source.name} names no file")
        if not 0 < source.share < 1:
            raise UserError(f"data.mix: the share of {source.name} must be between 0 and 1, not {source.share!r}")
    names = [source.name for source in mix]
    if len(set(names)) < len(names):
        raise UserError(f"data.mix: source names must be different, not {', '.join(names)}")
    if sum(source.share for source in mix) >= 1:
        raise UserError("data.mix: the shares must add up to less than 1; data.train gets the rest")


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Check what must divide by the number of ranks. Raises UserError.

    Without packing a step must fill every micro-batch on every rank. Under `hybrid` all copies of the model must have the
    same number of ranks.
    """
    shard_size = config.sharding.shard_size or ranks_per_node
    if config.sharding.strategy == "hybrid" and world_size % shard_size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"sharding.strategy=hybrid: {world_size} ranks do not divide into copies of the model on sharding.shard_size="
            f"{shard_size} ranks each; set it to one of {divisors}"
        )
    rows = world_size * config.batch.micro_batch
    examples = config.batch.global_examples
    if not config.data.packing and examples is not None and examples % rows:
        raise UserError(
            f"batch.global_examples={examples} does not divide by {world_size} ranks x batch.micro_batch="
            f"{config.batch.micro_batch} rows, which data.packing=False requires; the nearest that does is "
            f"{max(1, examples // rows) * rows}"
        )


def has_type(value: object, hint: object) -> bool:
    """Whether a value has the type of a field: bool is not an int, an int is a float, tuples are checked by element."""
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
    """The type of a field in words, for a message."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        inner = type_name(kinds[0])
        return f"a list of {inner}s" if kinds[-1] is Ellipsis else f"{len(kinds)} numbers ({inner})"
    names = {
        Source: "Source",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        type(None): "None",
    }
    return names[hint]
