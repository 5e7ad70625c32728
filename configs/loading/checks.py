"""Checks of every value of a config. A mistake raises a `UserError` with one sentence that names the key."""

import dataclasses
import datetime
import re
import types
import typing

from common.errors import UserError
from configs.config import Config, Data, LoRA, Source
from configs.loading.names import check_fields
from configs.loading.watching import check_watching

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "completion", "text")
CHOICES = {
    "model.compute_dtype": ("bf16", "fp32"),
    "data.too_long": ("drop", "truncate", "error"),
    "data.format": FORMATS,
    "data.on_bad": ("error", "skip"),
    "data.train_on": ("all", "last"),
    "model.activation_checkpointing": ("none", "full", "selective", "offload"),
    "optimizer.memory": ("16N", "14N", "12N", "8N", "6N"),
    "optimizer.stage": ("fine-tuning", "pre-training"),
    "ewc.estimator": ("model", "empirical"),
    "ewc.dtype": ("fp32", "bf16"),
    "ewc.device": ("device", "cpu"),
    "sharding.reduce_dtype": ("fp32", "bf16"),
    "sharding.strategy": ("full", "grad_op", "hybrid", "none"),
    "run.resume": ("auto", "changed", "previous", "never"),
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
    "optimizer.skip_spikes",
    "lora.alpha",
    "ewc.documents",
    "ewc.batch",
    "eval.max_new_tokens",
    "run.log_every",
    "run.keep_last",
    "run.timeout_minutes",
)
ZERO_OR_MORE = (
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "ewc.strength",
    "lora.rank",
    "run.eval_every",
    "run.eval_generate",
    "run.save_every",
    "run.save_minutes",
    "run.stop_after_no_gain",
)


MAX_TIMEOUT = 7 * 24 * 60  # minutes


def check_sections(config: Config) -> None:
    """Check that each section of a config has its class. Raises UserError."""
    for name, section in typing.get_type_hints(Config).items():
        value = getattr(config, name)
        if type(value) is not section:
            raise UserError(f"{name} must be {section.__name__}(...), not {value!r}")


def check_config(config: Config) -> None:
    """Check types, choices and ranges. Raises UserError for the first wrong value."""
    check_sections(config)
    if type(config.batch.micro_batch) is not int and config.batch.micro_batch != "auto":
        raise UserError(f'batch.micro_batch must be an integer or "auto", not {config.batch.micro_batch!r}')
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        hints = typing.get_type_hints(type(values))
        for key in dataclasses.fields(values):
            name, value = f"{section.name}.{key.name}", getattr(values, key.name)
            if not has_type(value, hints[key.name]):
                comma = f"; write ({value!r},)" if has_type((value,), hints[key.name]) else ""
                raise UserError(f"{name} must be {type_name(hints[key.name])}, not {value!r}{comma}")
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
    if config.sharding.reduce_dtype != "fp32" and config.sharding.strategy in ("none", "hybrid"):
        raise UserError(
            f"sharding.reduce_dtype={config.sharding.reduce_dtype} needs sharding.strategy=full or grad_op: under "
            f"{config.sharding.strategy} the gradients of a step's micro-batches would be added up in it too"
        )
    for name in ABOVE_ZERO:
        value = _get(config, name)
        if value is not None and value != "auto" and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, not {value!r}")
    for name in ZERO_OR_MORE:
        value = _get(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} must be 0 or more, not {value!r}")
    for name in ("run.seed", "ewc.seed"):
        if not 0 <= _get(config, name) < 2**63:
            raise UserError(f"{name} must be at least 0 and below 2^63, not {_get(config, name)!r}")
    _check_data(config.data)
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(optimizer, name) <= 1:
            raise UserError(f"optimizer.{name} must be between 0 and 1, not {getattr(optimizer, name)!r}")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas must be in [0, 1), not {optimizer.betas!r}")
    if run.timeout_minutes > MAX_TIMEOUT:
        raise UserError(f"run.timeout_minutes must be at most {MAX_TIMEOUT} (a week), not {run.timeout_minutes!r}")
    if not run.name or "/" in run.name or run.name.startswith(".") or len(run.name) > 200 or not run.name.isprintable():
        raise UserError(f"run.name must be a plain directory name, not {run.name!r}")
    if config.sharding.shard_size is not None and config.sharding.strategy != "hybrid":
        raise UserError(
            "sharding.shard_size applies to sharding.strategy=hybrid only; remove it or set sharding.strategy=hybrid"
        )
    _check_lora(config)
    check_watching(config)
    if config.ewc.strength and bool(config.ewc.data) == bool(config.ewc.fisher):
        raise UserError(
            "ewc.strength above 0 needs either ewc.data (old-domain files) or ewc.fisher (runs/NAME/ewc of another run)"
        )


def _check_data(data: Data) -> None:
    check_fields(data.fields, "data.fields")
    if data.cache == "":
        raise UserError("data.cache is empty; name a directory, or set it to None")
    if not 0 <= data.validation_share < 1:
        raise UserError(f"data.validation_share must be at least 0 and below 1, not {data.validation_share!r}")
    if data.validation_share and data.validation:
        raise UserError("set data.validation (files) or data.validation_share (a part of data.train), not both")
    if data.chat_date is not None:
        try:
            datetime.date.fromisoformat(data.chat_date)
        except ValueError as error:
            raise UserError(f"data.chat_date must be a date like 2026-01-31, not {data.chat_date!r}") from error


def _check_lora(config: Config) -> None:
    lora, off = config.lora, LoRA()
    if not lora.rank:
        for name in ("alpha", "dropout", "targets"):
            if getattr(lora, name) != getattr(off, name):
                raise UserError(f"lora.{name} applies to LoRA only; set lora.rank above 0, or remove lora.{name}")
        return
    if not 0 <= lora.dropout < 1:
        raise UserError(f"lora.dropout must be at least 0 and below 1, not {lora.dropout!r}")
    if lora.dropout and config.model.activation_checkpointing != "none":
        raise UserError(
            f"lora.dropout={lora.dropout:g} needs model.activation_checkpointing=none, because the second forward would drop "
            "other elements; set one of the two back"
        )
    if config.ewc.strength:
        raise UserError(
            "ewc.strength above 0 needs lora.rank=0: the penalty holds trained weights at the base model's, and LoRA trains "
            "none of the base model's weights"
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
        if source.format not in FORMATS:
            raise UserError(
                f"data.mix: `format` of {source.name} must be one of {', '.join(FORMATS)}, not {source.format!r}"
            )
        check_fields(source.fields, f"data.mix: `fields` of {source.name}")
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
    examples = config.batch.global_examples
    if config.data.packing or examples is None or config.batch.micro_batch == "auto":
        return
    rows = world_size * config.batch.rows
    if examples % rows:
        raise UserError(
            f"data.packing=False: batch.global_examples={examples} is not divisible by {world_size} ranks x batch.micro_batch="
            f"{config.batch.micro_batch}; set it to {max(1, examples // rows) * rows}, for example"
        )


def has_type(value: object, hint: object) -> bool:
    """Whether a value has the type of a field. A bool is not an int, an int is a float, tuple items are checked."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        kinds = typing.get_args(hint)
        return isinstance(value, dict) and all(
            has_type(key, kinds[0]) and has_type(item, kinds[1]) for key, item in value.items()
        )
    if hint is object:
        return True
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
    if typing.get_origin(hint) is dict:
        return "a dictionary of names and values"
    names = {
        Source: "a Source",
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "True or False",
        type(None): "None",
    }
    return names[hint]


def _get(config: Config, key: str) -> typing.Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
