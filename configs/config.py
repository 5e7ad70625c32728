"""What a run can be told: small frozen dataclasses, and the loader of `configs/NAME.py` with `section.key=value` overrides.

A config file is Python that ends with `config = Config(...)`. Everything is checked before a process group starts; a
mistake is a `UserError`, one sentence that names the key and the nearest name that exists.
"""

import ast
import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError


@dataclass(frozen=True)
class Model:
    path: str  # a Hugging Face directory, or a hub id that scripts/fetch_base_model.py brought to artifacts/models/
    layer_class: str | None = None  # the decoder layer to shard by; None: found from the model (transformer auto-wrap)
    compute_dtype: str = "bf16"  # bf16 | fp32; master weights and reductions are fp32 either way
    activation_checkpointing: str = "none"  # none | full | selective | offload; see distributed/sharding.py
    checkpoint_every: int = 1  # checkpoint every k-th decoder layer: between full and none
    compile: bool = False  # torch.compile each decoder layer; pays on CUDA
    # A longer window than the model's own: docs/long_context.md. None: RoPE as the model has it
    rope_type: str | None = None  # linear | yarn | llama3 | longrope | default; see model/rope.py
    rope_factor: float | None = None  # the window becomes this many times as long
    rope_original_length: int | None = None  # tokens of the window before any scaling; None: as config.json says


@dataclass(frozen=True)
class Source:
    name: str  # its curves are train/loss/NAME, train/share/NAME and validation/loss/NAME
    paths: tuple[str, ...]  # as Data.train
    share: float  # of the target tokens of every step, 0.05 for 5%
    validation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    # The main source: files with `messages` (chat) or `text` (documents): .jsonl, .parquet; .txt is one document; each also
    # .gz or .zst. Or one folder: a token store by scripts/build_tokens.py
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    # Mixed in; the main source has the rest of the shares. Here: data.mix=NAME:SHARE:FILE,FILE[:VALIDATION FILES];NAME:...
    mix: tuple[Source, ...] = ()
    sequence_length: int = 2048  # tokens a packed row holds at most; no example may be longer
    # drop | truncate | error: what becomes of longer chats; counted and printed. Longer texts are cut into several examples
    too_long: str = "drop"
    packing: bool = True  # False: one example a row


@dataclass(frozen=True)
class Batch:
    # Examples of the main source in one optimizer step, over all ranks: what papers call the batch size. What is mixed in
    # comes on top
    global_examples: int | None = None
    global_tokens: int | None = None  # or: target tokens in one step, of all sources. Exactly one of the two is given
    micro_batch: int = 1  # packed rows on one rank in one forward; accumulation follows from it


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    epochs: int = 3
    max_steps: int | None = None  # ends earlier; the schedule is computed for it
    warmup_ratio: float = 0.05  # of all steps
    warmup_steps: int | None = None  # instead of the ratio
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.1  # on matrices only: not on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    memory: str = "16N"  # bytes per parameter: 16N | 14N | 12N | 8N | 6N; see distributed/optimizer.py
    stage: str = "fine-tuning"  # fine-tuning | pre-training: which range of learning rates is usual


@dataclass(frozen=True)
class EWC:
    # Elastic weight consolidation: docs/ewc.md. strength is lambda: nats a target token of the training data that one nat a
    # target token of the old data is worth. 0: off
    strength: float = 0.0
    data: tuple[str, ...] = ()  # of the old domain, as Data.train: the Fisher diagonal is estimated from it
    fisher: str | None = None  # or: runs/NAME/ewc of another run, whose Fisher diagonal and reference are taken
    documents: int = 1024  # drawn from the data
    batch: int = 4  # documents a square, over all ranks: the relative error is about sqrt(2 x batch / documents)
    estimator: str = "model"  # model: labels sampled from the model | empirical: the data's labels; model/ewc/fisher.py
    dtype: str = "fp32"  # fp32 | bf16: what Fisher diagonal and reference are kept in
    device: str = "device"  # device: beside the parameters | cpu: in host memory
    seed: int = 0


@dataclass(frozen=True)
class Sharding:
    # full: ZeRO-3 | grad_op: like ZeRO-2, parameters stay gathered until the last micro-batch
    # | hybrid: shard within a node, replicate across nodes | none: replicate everything (DDP)
    strategy: str = "full"
    shard_size: int | None = None  # hybrid: ranks that share one copy of the model; None: those of a node
    cpu_offload: bool = False  # parameters, gradients and moments live in host memory; AdamW steps there


@dataclass(frozen=True)
class Run:
    name: str  # runs/<name>/ holds everything the run writes
    directory: str = "runs"
    seed: int = 0
    log_every: int = 1  # steps; on CUDA a logged step waits for the device
    eval_every: int = 0  # steps; 0: only before the first step and after the last
    eval_general: bool = False  # at each evaluation also what is forgotten, against the base: docs/forgetting.md
    save_every: int = 0  # steps; 0: only at the end and on a signal
    keep_last: int = 2  # checkpoints; the best by validation loss is kept besides
    resume: str = "auto"  # auto: continue where the run stopped | never: refuse to touch a run that exists
    deterministic: bool = False  # CUDA: bitwise resume, slower
    export: str = "last"  # last | best: which weights the exported Hugging Face directory holds


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    run: Run
    sharding: Sharding = field(default_factory=Sharding)
    ewc: EWC = field(default_factory=EWC)


_NOT_RUNS = ("__init__", "config", "deepspeed", "deepspeed_file")  # files of configs/ that are no configs
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


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a config file, apply `section.key=value` overrides and check every value. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the ones at hand: {_config_files(path)}")
    namespace: dict = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(path.read_text(), str(path), "exec"), namespace)
    except TypeError as error:
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        missing = re.match(r"(\w+)\.__init__\(\) missing .*?: (.*)", str(error))
        if unknown and unknown[1] in globals():
            names = [f.name for f in dataclasses.fields(globals()[unknown[1]])]
            raise UserError(f"{path}: {unknown[1]} has no key {unknown[2]!r}{_nearest(unknown[2], names)}") from error
        if missing:
            raise UserError(f"{path}: {missing[1]} needs a value for {missing[2]}") from error
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    config = namespace.get("config")
    if not isinstance(config, Config):
        raise UserError(f"{path} does not end with `config = Config(...)`")
    return override(config, overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """Apply `section.key=value` texts and check every value. Raises UserError."""
    for text in overrides:
        config = _override(config, text)
    check_config(config)
    return config


def as_dict(config: Config) -> dict:
    """The resolved config as plain JSON types, section by section."""
    return dataclasses.asdict(config)


def check_config(config: Config) -> None:
    """Types, choices and ranges of every value. Raises UserError at the first that is wrong."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        hints = typing.get_type_hints(type(values))
        for key in dataclasses.fields(values):
            name, value = f"{section.name}.{key.name}", getattr(values, key.name)
            if not _has_type(value, hints[key.name]):
                raise UserError(f"{name} must be {_type_name(hints[key.name])}, not {value!r}")
            if name in CHOICES and value not in CHOICES[name]:
                raise UserError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    batch, optimizer, run = config.batch, config.optimizer, config.run
    if (batch.global_examples is None) == (batch.global_tokens is None):
        raise UserError("give exactly one of batch.global_examples (examples a step) and batch.global_tokens")
    if not config.data.train:
        raise UserError("data.train names no file")
    _check_mix(config.data.mix)
    positive = {
        "batch.global_examples": batch.global_examples,
        "batch.global_tokens": batch.global_tokens,
        "batch.micro_batch": batch.micro_batch,
        "model.checkpoint_every": config.model.checkpoint_every,
        "sharding.shard_size": config.sharding.shard_size,
        "data.sequence_length": config.data.sequence_length,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.epochs": optimizer.epochs,
        "optimizer.max_steps": optimizer.max_steps,
        "optimizer.max_grad_norm": optimizer.max_grad_norm,
        "optimizer.eps": optimizer.eps,
        "ewc.documents": config.ewc.documents,
        "ewc.batch": config.ewc.batch,
        "run.log_every": run.log_every,
        "run.keep_last": run.keep_last,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, not {value!r}")
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(optimizer, name) <= 1:
            raise UserError(f"optimizer.{name} is a share between 0 and 1, not {getattr(optimizer, name)!r}")
    at_least_zero = {
        "optimizer.weight_decay": optimizer.weight_decay,
        "ewc.strength": config.ewc.strength,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "run.eval_every": run.eval_every,
        "run.save_every": run.save_every,
    }
    for name, value in at_least_zero.items():
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} must be 0 or more, not {value!r}")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas must lie in [0, 1), not {optimizer.betas!r}")
    if not run.name or "/" in run.name or run.name.startswith("."):
        raise UserError(f"run.name must be a plain folder name, not {run.name!r}")
    if config.sharding.shard_size is not None and config.sharding.strategy != "hybrid":
        raise UserError("sharding.shard_size is for sharding.strategy=hybrid alone; remove it or choose hybrid")
    if run.export == "best" and not config.data.validation:
        raise UserError("run.export=best needs data.validation, by whose loss the best is chosen")
    if config.ewc.strength and bool(config.ewc.data) == bool(config.ewc.fisher):
        raise UserError(
            "ewc.strength above 0 needs either ewc.data (files of the old domain) or ewc.fisher (runs/NAME/ewc of another run)"
        )


def _check_mix(mix: tuple[Source, ...]) -> None:
    for source in mix:
        hints = typing.get_type_hints(Source)
        for key, hint in hints.items():
            if not _has_type(getattr(source, key), hint):
                raise UserError(f"data.mix: {key} of a Source must be {_type_name(hint)}, not {getattr(source, key)!r}")
        if not re.fullmatch(r"[\w.-]+", source.name) or source.name == "main":
            raise UserError(f"data.mix: a source needs a plain name other than main, not {source.name!r}")
        if not source.paths:
            raise UserError(f"data.mix: source {source.name} names no file")
        if not 0 < source.share < 1:
            raise UserError(f"data.mix: the share of {source.name} lies between 0 and 1, not {source.share!r}")
    names = [source.name for source in mix]
    if len(set(names)) < len(names):
        raise UserError(f"data.mix: each source needs a name of its own, not {', '.join(names)}")
    if sum(source.share for source in mix) >= 1:
        raise UserError("data.mix: the shares must add up to less than 1; data.train has the rest")


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """What must divide by the number of ranks. Raises UserError where it does not.

    Without packing a step must fill every micro-batch of every rank; under `hybrid` every copy of the model has as many ranks.
    """
    shard_size = config.sharding.shard_size or ranks_per_node
    if config.sharding.strategy == "hybrid" and world_size % shard_size:
        raise UserError(
            f"sharding.strategy=hybrid: {world_size} ranks do not divide into copies of the model on sharding.shard_size="
            f"{shard_size} ranks; set it to one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    rows = world_size * config.batch.micro_batch
    examples = config.batch.global_examples
    if not config.data.packing and examples is not None and examples % rows:
        raise UserError(
            f"batch.global_examples={examples} does not divide into {world_size} ranks x batch.micro_batch="
            f"{config.batch.micro_batch} rows without packing; the nearest that does is {max(1, examples // rows) * rows}"
        )


def settings_lines(config: Config, rows: int, world_size: int, resolved: dict[str, str]) -> list[str]:
    """What a run prints of how it computes. rows: of its first step; resolved: what only the machine could tell."""
    batch, sharding, model = config.batch, config.sharding, config.model
    examples = f"{batch.global_examples} examples"
    if batch.global_tokens:
        examples = f"as many examples as hold {batch.global_tokens} target tokens"
    return [
        f"step: {examples}, the first packed into {rows} rows of {config.data.sequence_length} tokens, on {world_size} ranks x "
        f"micro-batches of {batch.micro_batch} rows: accumulation {-(-rows // (world_size * batch.micro_batch))}",
        f"sharding {sharding.strategy}{' on the host' if sharding.cpu_offload else ''}, "
        + ", ".join(f"{name} {value}" for name, value in resolved.items()),
        f"activation checkpointing {model.activation_checkpointing}"
        + (f", every {model.checkpoint_every}. layer" if model.checkpoint_every > 1 else "")
        + f"; compile {'on' if model.compile else 'off'}",
    ]


def schedule_warnings(config: Config, num_parameters: int, total_steps: int, warmup_steps: int) -> list[str]:
    """A sentence where the learning rate of a model above 1B parameters is outside the usual range of its stage, or is never reached."""
    rate, stage = config.optimizer.learning_rate, config.optimizer.stage
    warnings = []
    if num_parameters >= 1e9 and stage == "pre-training" and rate > 1e-5:
        warnings.append(
            f"learning rate {rate:g} is above 1e-5, the usual most for continual pre-training: expect forgetting"
        )
    if num_parameters >= 1e9 and stage == "fine-tuning" and not 1e-5 <= rate <= 5e-5:
        warnings.append(
            f"learning rate {rate:g} is outside 1e-5 to 5e-5, the usual range for full fine-tuning above 1B parameters"
        )
    if warmup_steps >= total_steps > 1:
        warnings.append(f"{warmup_steps} steps of warm-up in {total_steps}: the peak learning rate comes last or never")
    return warnings


def _override(config: Config, text: str) -> Config:
    match = re.fullmatch(r"([a-z_]+)\.([a-z_]+)=(.*)", text, re.DOTALL)
    if not match:
        raise UserError(f"{text!r} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-5")
    section, key, raw = match.groups()
    sections = {f.name: f for f in dataclasses.fields(Config)}
    every = [f"{s}.{f.name}" for s in sections for f in dataclasses.fields(type(getattr(config, s)))]
    if f"{section}.{key}" not in every:
        elsewhere = [name for name in every if name.endswith(f".{key}")]
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(f"{section}.{key}", every)
        raise UserError(f"unknown key {section}.{key}{hint}")
    values = getattr(config, section)
    hint = typing.get_type_hints(type(values))[key]
    return dataclasses.replace(
        config, **{section: dataclasses.replace(values, **{key: _parse(raw, hint, f"{section}.{key}")})}
    )


def _parse(raw: str, hint: object, name: str) -> object:
    """The text of an override as the type that the key has."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and raw.lower() in ("none", "null"):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is str:
        return raw
    if kind is bool and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is str:
        return _names(raw)
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is Source:
        return () if raw.lower() in ("none", "null") else tuple(_parse_source(part) for part in raw.split(";") if part)
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        value = raw
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer() and "e" in raw.lower():
        value = int(value)  # 1e6 tokens
    if not _has_type(value, kind):
        raise UserError(f"{name} must be {_type_name(hint)}, not {raw!r}")
    return value


def _parse_source(text: str) -> Source:
    name, share, paths, validation = (*text.split(":"), *[""] * 4)[:4]
    try:
        if text.count(":") not in (2, 3):
            raise ValueError
        return Source(name, _names(paths), float(share), _names(validation))
    except ValueError as error:
        raise UserError(
            f"data.mix: {text!r} is no source; write NAME:SHARE:FILE,FILE or NAME:SHARE:FILE,FILE:VALIDATION FILES, "
            "e.g. general:0.05:general.jsonl, and ; between sources"
        ) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _has_type(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(_has_type(item, kinds[0]) for item in value)
        return len(value) == len(kinds) and all(_has_type(item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _type_name(hint: object) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        inner = _type_name(kinds[0])
        return f"a list of {inner}s" if kinds[-1] is Ellipsis else f"{len(kinds)} numbers ({inner})"
    return {
        Source: "Source",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        type(None): "None",
    }[hint]


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(names)}"


def _config_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    files = sorted(str(f) for f in folder.glob("*.py") if f.stem not in _NOT_RUNS)
    return ", ".join(files) or f"none in {folder}"
