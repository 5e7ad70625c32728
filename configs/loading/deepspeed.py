"""Apply a DeepSpeed JSON file to a config, with a log line for each setting that it changes or that is ignored.

There are three kinds of keys. Some have a counterpart and become settings of ours. Some change only speed, memory or
logging and are ignored. Some would change the result of training and have no counterpart; these are refused. The value
"auto", which Hugging Face fills in from its own arguments, keeps our value. configs/loading/deepspeed_file.py has all keys.
"""

import dataclasses
from pathlib import Path
from typing import Any

from common.errors import UserError
from configs.config import Config
from configs.loading.checks import check_config
from configs.loading.deepspeed_file import (
    IGNORED,
    ONLY_OFF,
    DeepSpeedFile,
    choice,
    is_number,
    number,
    read_deepspeed,
    show,
    typed_params,
    unpack_params,
)

# An fp32 norm is at most the square root of 3.4e38, about 2e19, so this never clips. Infinity is not valid JSON.
NO_CLIPPING = 1e30
MICRO, ACCUMULATION, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


def from_deepspeed(config: Config, path: str | Path, world_size: int) -> tuple[Config, list[str]]:
    """Apply the settings of a DeepSpeed JSON file. Returns the new config and one log line per change or ignored key.

    The number of examples per step on `world_size` ranks stays that of the file. Raises UserError with file and key for
    a key that is unknown, has the wrong type, contradicts another, or changes the result and has no counterpart here.
    """
    file = read_deepspeed(Path(path))
    notes: list[str] = []
    config = _sharding(config, file, world_size, notes)
    config = _offload(config, file, notes)
    config = _batch(config, file, world_size, notes)
    config = _precision(config, file, notes)
    config = _clipping(config, file, notes)
    config = _optimizer(config, file, notes)
    config = _scheduler(config, file, notes)
    given = [*file.values, *file.auto]
    ignored = dict.fromkeys("fp16" if n.startswith("fp16.") else n for n in given if n in IGNORED | ONLY_OFF)
    if ignored:
        notes.append(f"ignored, because the result of training does not depend on it: {', '.join(ignored)}")
    automatic = [name for name in file.auto if name not in IGNORED | ONLY_OFF]
    if automatic:
        notes.append(f'"auto", so our value stays: {", ".join(automatic)}')
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, notes


def _sharding(config: Config, file: DeepSpeedFile, world_size: int, notes: list[str]) -> Config:
    """Apply ZeRO stages (arXiv:1910.02054), MiCS (arXiv:2205.00119) and hpZ of ZeRO++ (arXiv:2306.10209)."""
    name, mics_name, hpz_name = (
        f"zero_optimization.{k}" for k in ("stage", "mics_shard_size", "zero_hpz_partition_size")
    )
    stage = choice(file, name, (0, 1, 2, 3))
    mics = number(file, mics_name, at_least=-1, whole=True) or -1
    hpz = number(file, hpz_name, at_least=0, whole=True) or 1
    grouped = stage == 3 and 0 < mics < world_size
    if grouped and world_size % mics:
        raise UserError(
            f"{file.path}: {mics_name}={mics} does not divide the number of ranks, {world_size}; set it to a divisor"
        )
    if grouped:
        config = _set(config, "sharding", strategy="hybrid", shard_size=mics)
        notes.append(
            f"{mics_name}={mics} -> sharding.strategy=hybrid, sharding.shard_size={mics}: sharded within groups of {mics} "
            f"ranks, replicated over the {world_size // mics} groups"
        )
    elif stage is not None:
        strategy = {0: "none", 1: "grad_op", 2: "grad_op", 3: "full"}[stage]
        config = _set(config, "sharding", strategy=strategy, shard_size=None)
        more = ", which also shards gradients: same result, less memory" if stage == 1 else ""
        notes.append(f"{name}={stage} -> sharding.strategy={strategy}{more}")
    elif name not in file.auto:
        ours = config.sharding.strategy
        notes.append(
            f"no {name}: DeepSpeed would not shard, but sharding.strategy={ours} stays; the result is the same"
        )
    if mics > 0 and not grouped:
        notes.append(f"{mics_name}={mics} is ignored: it requires stage 3 and more than {mics} ranks")
    if hpz > 1:
        notes.append(
            f"{hpz_name}={hpz} is ignored: it keeps a second copy of the weights in each group of ranks for speed; the "
            "closest setting here is sharding.strategy=hybrid, which also replicates gradients and optimizer state and so "
            "needs more memory"
        )
    return config


def _offload(config: Config, file: DeepSpeedFile, notes: list[str]) -> Config:
    moved, off = {}, []
    for what, old in (("offload_optimizer", "cpu_offload"), ("offload_param", "cpu_offload_param")):
        device = choice(file, f"zero_optimization.{what}.device", ("none", "cpu", "nvme"))
        if choice(file, f"zero_optimization.{old}", (True, False)):
            device = device or "cpu"
        if device in ("cpu", "nvme"):
            moved[f"zero_optimization.{what}"] = device
        elif device == "none":
            off.append(f"zero_optimization.{what}")
    stage = file.values.get("zero_optimization.stage", 3 if "zero_optimization.stage" in file.auto else 0)
    applies = stage == 3 or (stage > 0 and "zero_optimization.offload_optimizer" in moved)
    if moved and not applies:
        notes.append(f"{' and '.join(moved)} is ignored: DeepSpeed does not offload it at stage {stage}")
    if off and not moved and config.sharding.cpu_offload:
        notes.append(f"{' and '.join(off)} set to none -> sharding.cpu_offload=False")
        return _set(config, "sharding", cpu_offload=False)
    if not moved or not applies:
        return config
    settings = " and ".join(f"{what} to {device}" for what, device in moved.items())
    more = "" if len(moved) == 2 else ", which moves parameters, gradients and optimizer state; the result is the same"
    more += "; host memory is used instead of nvme" if "nvme" in moved.values() else ""
    notes.append(f"{settings} -> sharding.cpu_offload=True{more}")
    return _set(config, "sharding", cpu_offload=True)


def _batch(config: Config, file: DeepSpeedFile, world_size: int, notes: list[str]) -> Config:
    micro, accumulation, total = (number(file, n, at_least=1, whole=True) for n in (MICRO, ACCUMULATION, TOTAL))
    if micro and accumulation:
        product = micro * accumulation * world_size
        if total not in (None, product):
            raise UserError(
                f"{file.path}: {TOTAL}={total} is not {MICRO}={micro} x {ACCUMULATION}={accumulation} x {world_size} ranks "
                f"= {product}; correct one of them, or remove {TOTAL}"
            )
        total = product
        notes.append(
            f"{MICRO}={micro} x {ACCUMULATION}={accumulation} x {world_size} ranks -> batch.global_examples={total}"
        )
    elif total:
        if total % ((micro or accumulation or 1) * world_size):
            given = f"{MICRO}={micro} x " if micro else f"{ACCUMULATION}={accumulation} x " if accumulation else ""
            raise UserError(
                f"{file.path}: {TOTAL}={total} is not divisible by {given}{world_size} ranks; correct one of them"
            )
        micro = micro or (accumulation and total // accumulation // world_size)
        notes.append(f"{TOTAL}={total} -> batch.global_examples={total}")
    elif micro or accumulation:
        key = "global_examples" if config.batch.global_examples else "global_tokens"
        given, missing = (MICRO, ACCUMULATION) if micro else (ACCUMULATION, MICRO)
        notes.append(
            f"{given} is set, but neither {missing} nor {TOTAL}: batch.{key}={getattr(config.batch, key)} stays, and gradient "
            "accumulation follows from it"
        )
    if total:
        config = _set(config, "batch", global_examples=total, global_tokens=None)
    if micro:
        config = _set(config, "batch", micro_batch=micro)
        packed = (
            " x data.sequence_length; examples are packed, so there may be fewer accumulation steps, but the number of examples "
            "per step is the same"
        )
        notes.append(
            f"micro-batches of {micro} -> batch.micro_batch={micro}{packed if config.data.packing else ' examples'}"
        )
    return config


def _precision(config: Config, file: DeepSpeedFile, notes: list[str]) -> Config:
    bf16, fp16 = (choice(file, f"{name}.enabled", (True, False)) for name in ("bf16", "fp16"))
    if fp16:
        raise UserError(
            f"{file.path}: fp16.enabled=true has no counterpart here (no loss scaling); set it to false and bf16.enabled to true"
        )
    if bf16 is None and {"bf16", "bf16.enabled", "fp16", "fp16.enabled"} & set(file.auto):
        return config
    dtype = "bf16" if bf16 else "fp32"
    reason = "bf16.enabled=true" if bf16 else "neither bf16 nor fp16 is enabled"
    more = "; gradients are reduced in fp32, while DeepSpeed's default is bf16" if bf16 else ""
    notes.append(f"{reason} -> model.compute_dtype={dtype}{more}")
    return _set(config, "model", compute_dtype=dtype)


def _clipping(config: Config, file: DeepSpeedFile, notes: list[str]) -> Config:
    name = "gradient_clipping"
    norm = number(file, name, at_least=0)
    if norm is None:
        if name not in file.auto:
            notes.append(
                f"no {name}: optimizer.max_grad_norm={config.optimizer.max_grad_norm:g} stays (without the key, "
                "DeepSpeed before 0.19 does not clip)"
            )
        return config
    ours, more = (float(norm), "") if norm > 0 else (NO_CLIPPING, ", which no norm reaches, so nothing is clipped")
    notes.append(f"{name}={norm} -> optimizer.max_grad_norm={ours:g}{more}")
    return _set(config, "optimizer", max_grad_norm=ours)


def _optimizer(config: Config, file: DeepSpeedFile, notes: list[str]) -> Config:
    kind, params = typed_params(file, "optimizer")
    if kind is None:
        return config
    if kind.lower() not in ("adam", "adamw"):
        raise UserError(f"{file.path}: optimizer.type={kind} has no counterpart here; use AdamW")
    ours = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
    only_as = {"bias_correction": True, "amsgrad": False, "maximize": False, "fp32_optimizer_states": True}
    if kind.lower() == "adam":  # AdamW decouples weight decay whatever adam_w_mode is
        only_as["adam_w_mode"] = True
    unpack_params(file, "optimizer", params, (*ours, *only_as, "adam_w_mode", "torch_adam", "foreach", "fused"))
    for key, harmless in only_as.items():
        value = file.values.get(f"optimizer.params.{key}", harmless)
        if value != harmless:
            raise UserError(
                f"{file.path}: optimizer.params.{key}={show(value)} changes the result and has no counterpart here; "
                f"set it to {show(harmless)}"
            )
    for key, our_key in ours.items():
        name = f"optimizer.params.{key}"
        value = file.values.get(name)
        if value is None:
            if name not in file.auto:
                notes.append(f"no {name}: optimizer.{our_key}={getattr(config.optimizer, our_key)} stays")
            continue
        if not _is_valid(key, value):
            wanted = {"betas": "two numbers in [0, 1)", "weight_decay": "a number that is 0 or more"}
            raise UserError(f"{file.path}: {name} must be {wanted.get(key, 'a number above 0')}, not {show(value)}")
        config = _set(config, "optimizer", **{our_key: tuple(map(float, value)) if key == "betas" else float(value)})
        decays = key == "weight_decay" and value > 0
        more = (
            ", on matrices only; DeepSpeed decays norms and biases too, so the weights will differ slightly"
            if decays
            else ""
        )
        notes.append(f"{name}={show(value)} -> optimizer.{our_key}={getattr(config.optimizer, our_key)}{more}")
    return config


def _is_valid(key: str, value: Any) -> bool:
    """Whether a value is in the range of its AdamW parameter."""
    if key == "betas":
        return isinstance(value, list) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)
    return is_number(value) and (value > 0 or (value == 0 and key == "weight_decay"))


def _scheduler(config: Config, file: DeepSpeedFile, notes: list[str]) -> Config:
    """Apply WarmupCosineLR (deepspeed/runtime/lr_schedules.py): warm-up, then cosine decay to `cos_min_ratio` x peak."""
    kind, params = typed_params(file, "scheduler")
    where = "scheduler.params"
    if kind is None:
        return config
    known = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
    if kind not in known:
        raise UserError(
            f"{file.path}: scheduler.type={kind} is not a DeepSpeed scheduler; these are {', '.join(known)}"
        )
    if params and all(value == "auto" for value in params.values()):
        file.auto.append(where)
        notes.append(
            f'scheduler.type={kind} has only "auto" values: our schedule stays, linear warm-up and cosine decay'
        )
        return config
    if kind != "WarmupCosineLR":
        raise UserError(
            f"{file.path}: scheduler.type={kind} has no counterpart here; use WarmupCosineLR or remove the block"
        )
    ours = {"total_num_steps": "max_steps", "warmup_num_steps": "warmup_steps", "cos_min_ratio": "min_lr_ratio"}
    unpack_params(file, "scheduler", params, (*ours, "warmup_min_ratio", "warmup_type"))
    kind_of_warmup = choice(file, f"{where}.warmup_type", ("linear", "log"))
    if kind_of_warmup != "linear" and f"{where}.warmup_type" not in file.auto:
        raise UserError(
            f'{file.path}: {where}.warmup_type must be "linear"; "log", which is DeepSpeed\'s default, has no counterpart here'
        )
    if number(file, f"{where}.warmup_min_ratio", at_least=0):
        raise UserError(f"{file.path}: {where}.warmup_min_ratio has no counterpart here; set it to 0")
    for key, our_key in ours.items():
        name = f"{where}.{key}"
        ratio = key == "cos_min_ratio"
        value = number(file, name, at_least=0 if ratio else 1, whole=not ratio)
        if value is None:
            if name not in file.auto:
                notes.append(f"no {name}: optimizer.{our_key}={getattr(config.optimizer, our_key)} stays")
            continue
        if ratio and value > 1:
            raise UserError(f"{file.path}: {name} must be between 0 and 1, not {value}")
        before = getattr(config.optimizer, our_key)
        if key == "total_num_steps" and before not in (None, value):
            raise UserError(
                f"{file.path}: {name}={value}, but optimizer.max_steps={before}; set both to the same number"
            )
        config = _set(config, "optimizer", **{our_key: float(value) if ratio else value})
        more = {
            "total_num_steps": ", or fewer if the epochs end earlier; the cosine ends at the last step",
            "warmup_num_steps": "; the first step has 1/warmup_steps of the peak rate, while DeepSpeed's first two have 0",
        }.get(key, "")
        notes.append(f"{name}={value} -> optimizer.{our_key}={value}{more}")
    return config


def _set(config: Config, section: str, **values: object) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
