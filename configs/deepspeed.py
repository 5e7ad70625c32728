"""Apply a DeepSpeed JSON file to a config.

A key with a counterpart becomes our setting. A key that changes only speed, memory, logging or saving is ignored. Any other
key may change the result of training and is refused, unless its value turns the feature off: null, false, an empty block, or
a block whose `enabled` is false. For the value "auto", which Hugging Face fills in from its own arguments, our value stays.
The keys are from DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/) and older versions.
"""

import difflib
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from configs.config import KEYS, Config
from configs.load import check_config, has_type, replace, type_name, wrong_value

# An fp32 norm is at most the square root of 3.4e38, about 2e19, so this never clips. Infinity is not valid JSON.
NO_CLIPPING = 1e30
MICRO, ACCUMULATION, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
ZERO, ADAM, COSINE = "zero_optimization", "optimizer.params", "scheduler.params"

# Key -> (our key of the same meaning, addition to the note). The functions below apply all other keys with a counterpart.
SAME = {
    "gradient_clipping": ("optimizer.max_grad_norm", ""),
    f"{ADAM}.lr": ("optimizer.learning_rate", ""),
    f"{ADAM}.betas": ("optimizer.betas", ""),
    f"{ADAM}.eps": ("optimizer.eps", ""),
    f"{ADAM}.weight_decay": (
        "optimizer.weight_decay",
        ", which acts on matrices only; DeepSpeed decays norms and biases too, so the weights will differ slightly",
    ),
    f"{COSINE}.total_num_steps": ("optimizer.max_steps", "; the cosine ends at the last step"),
    f"{COSINE}.warmup_num_steps": (
        "optimizer.warmup_steps",
        "; the first step has 1/warmup_steps of the peak rate, while DeepSpeed's first two have 0",
    ),
    f"{COSINE}.cos_min_ratio": ("optimizer.min_lr_ratio", ""),
}

# Keys and blocks that affect only speed, memory, logging or saving: any value gives the same result.
IGNORED = (
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
    *("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "nebula"),
    *("load_universal_checkpoint", "datastates", "aio", "activation_checkpointing", "compile", "graph_harvesting"),
    *("disable_allgather", "disable_python_gc", "sparse_gradients", "fp32_allreduce", "vocabulary_size"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "seq_parallel_communication_data_type"),
    *("managed_gradient_accumulation", "bf16.immediate_grad_update", "bf16.check_grad_overflow"),
    *("optimizer.legacy_fusion", f"{ADAM}.torch_adam", f"{ADAM}.foreach", f"{ADAM}.fused"),
)
# Blocks whose keys are all ignored: ZeRO moves state between ranks without changing the result, and fp16 must be off. ZeRO keys
# with a prefix in `CHANGES` are the exceptions.
IGNORED_BLOCKS = (f"{ZERO}.", "fp16.", *(f"{name}." for name in IGNORED))
CHANGES = (f"{ZERO}.zero_quantized", f"{ZERO}.zenflow", f"{ZERO}.zeropp_loco_param")
# Key -> its only value without effect. For any other key, false has no effect.
ONLY_AS: dict[str, object] = {
    "communication_data_type": "fp32",
    "gradient_predivide_factor": 1,
    "gradient_allreduce_op": "mean",
    "sequence_parallel_size": 1,
    "data_types.grad_accum_dtype": "fp32",
    "data_types.param_dtype": "fp32",
    "data_types.buffer_dtype": "fp32",
    f"{ADAM}.adam_w_mode": True,
    f"{ADAM}.bias_correction": True,
    f"{ADAM}.fp32_optimizer_states": True,
    f"{COSINE}.warmup_min_ratio": 0,
    f"{COSINE}.warmup_type": "linear",
}
# Key -> advice for a refused value. Without advice the user can only remove the key.
ADVICE = {
    "bf16.bf16_master_weights_and_grads": "set it to false and choose optimizer.memory=12N",
    "bf16.bf16_optimizer_states": "set it to false and choose optimizer.memory=8N",
    "data_types.grad_accum_dtype": "remove it, and choose optimizer.memory=12N for bf16",
    "communication_data_type": "remove it; sharding.reduce_dtype says in which dtype gradients are reduced",
}


def from_deepspeed(config: Config, path: str | Path, world_size: int) -> tuple[Config, list[str]]:
    """Apply a DeepSpeed JSON file. Return the new config and notes that list the changed and ignored keys.

    The number of examples per step on `world_size` ranks stays as in the file. Raise UserError with file and key if a key has
    the wrong type, contradicts another key, or may change the result and has no counterpart here.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_key_once)
        if not isinstance(tree, dict):
            raise UserError(f"the file must contain one JSON object of settings, not {json.dumps(tree)}")
        file = _File(config, dict(_flatten(tree)))
        _sharding(file, world_size)
        _batch(file, world_size)
        _precision(file)
        _optimizer_and_schedule(file)
        _rest(file)
        check_config(file.config)
    except OSError as error:
        raise UserError(f"DeepSpeed file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not a JSON file, which has no comments and no trailing commas: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return file.config, file.notes


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    names = [key for key, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)} occurs twice in one block; remove one of them")
    return dict(pairs)


def _flatten(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every key that is not null. A block that is off yields only its `enabled`."""
    for key, value in block.items():
        name = "bf16" if key == "bfloat16" else prefix + key
        if isinstance(value, dict):
            yield from _flatten(value if value.get("enabled", True) else {"enabled": False}, f"{name}.")
        elif value is not None:
            yield name, tuple(value) if isinstance(value, list) else value


class _File:
    """The settings of a DeepSpeed file that are still to be applied, and the config so far.

    `notes` are lines for the user. `auto` are the keys with the value "auto". `names` are all keys of the file.
    """

    def __init__(self, config: Config, settings: dict[str, Any]) -> None:
        self.config, self.settings = config, settings
        self.names, self.auto = tuple(settings), [name for name in settings if settings[name] == "auto"]
        self.taken: list[str] = []
        self.notes: list[str] = []

    def take(self, name: str, hint: object = object) -> Any:
        """Remove a key and return its value, or None if it is absent or "auto". Raise UserError for another type."""
        self.taken.append(name)
        value = self.settings.pop(name, None)
        if value is None or name in self.auto:
            return None
        if not has_type(value, hint):
            raise UserError(f"{name} must be {type_name(hint)}, not {json.dumps(value)}")
        return value

    def set(self, ours: str, value: Any, reason: str, more: str = "") -> None:
        """Set our key `ours` and note its value before and after. Raise UserError if the key cannot have this value."""
        if wrong := wrong_value(ours, KEYS[ours], value):
            raise UserError(f"{reason}: {wrong}")
        before = attrgetter(ours)(self.config)
        self.config = replace(self.config, ours, value)
        after = attrgetter(ours)(self.config)
        change = f"stays {after}" if after == before else f"{before} -> {after}"
        self.notes.append(f"{ours}: {change} ({reason}{more})")

    def clear(self, ours: str, reason: str) -> None:
        """Set our key `ours` to None because of another setting, and note it unless it is None already."""
        if attrgetter(ours)(self.config) is not None:
            self.set(ours, None, reason)


def _sharding(file: _File, world_size: int) -> None:
    """Apply ZeRO stages (arXiv:1910.02054), MiCS (arXiv:2205.00119) and ZeRO-Offload."""
    stage = file.take(f"{ZERO}.stage", Literal[0, 1, 2, 3])
    size = file.settings.get(f"{ZERO}.mics_shard_size")
    if stage == 3 and type(size) is int and 0 < size < world_size:
        reason = f"{ZERO}.mics_shard_size={file.take(f'{ZERO}.mics_shard_size', int)}"
        file.set("sharding.strategy", "hybrid", reason)
        file.set("sharding.shard_size", size, reason)
    elif stage is not None:
        more = ", which also shards gradients: same result, less memory" if stage == 1 else ""
        file.set("sharding.strategy", ("none", "grad_op", "grad_op", "full")[stage], f"{ZERO}.stage={stage}", more)
        file.clear("sharding.shard_size", f"{ZERO}.stage={stage}")
    devices = {}
    for block, old in (("offload_optimizer", "cpu_offload"), ("offload_param", "cpu_offload_param")):
        device = file.take(f"{ZERO}.{block}.device", Literal["none", "cpu", "nvme"])
        devices[block] = device or {True: "cpu", False: "none", None: None}[file.take(f"{ZERO}.{old}", bool)]
    requested = {block: device for block, device in devices.items() if device}
    if requested:
        offloads = bool(set(requested.values()) - {"none"})
        more = ", which moves parameters, gradients and optimizer state to host memory; the result is the same"
        reason = " and ".join(f"{block} to {device}" for block, device in requested.items())
        file.set("sharding.cpu_offload", offloads, reason, more if offloads else "")


def _batch(file: _File, world_size: int) -> None:
    """Apply the examples per step, which DeepSpeed counts as micro-batch x accumulation x ranks."""
    micro, accumulation, total = (file.take(name, int) for name in (MICRO, ACCUMULATION, TOTAL))
    reason = f"{TOTAL}={total}"
    if micro and accumulation is None and total is None and not {ACCUMULATION, TOTAL} & {*file.auto}:
        accumulation = 1  # DeepSpeed's default if a file has only the micro-batch
    if micro is not None and accumulation is not None:
        reason = f"{MICRO}={micro} x {ACCUMULATION}={accumulation} x {world_size} ranks"
        product = micro * accumulation * world_size
        if total not in (None, product):
            raise UserError(f"{TOTAL}={total} is not {reason} = {product}; correct one of them, or remove {TOTAL}")
        total = product
    if total is not None:
        file.set("batch.global_examples", total, reason)
        file.clear("batch.global_tokens", "batch.global_examples is set instead")
    if micro is not None:
        packed = file.config.data.packing
        more = " x data.sequence_length tokens, because examples are packed" if packed else " examples"
        file.set("batch.micro_batch", micro, f"{MICRO}={micro}", more)
    elif accumulation is not None:
        file.notes.append(f"ignored: {ACCUMULATION}={accumulation}, which follows from the examples of a step")


def _precision(file: _File) -> None:
    bf16, fp16 = file.take("bf16.enabled", bool), file.take("fp16.enabled", bool)
    if fp16:
        raise UserError("fp16.enabled=true has no counterpart here; use bf16, which needs no loss scaling")
    if bf16 is None and any(name.partition(".")[0] in ("bf16", "fp16") for name in file.auto):
        return
    more = "; gradients are reduced in fp32, while DeepSpeed's default is bf16" if bf16 else ""
    reason = "bf16.enabled=true" if bf16 else "neither bf16 nor fp16 is enabled"
    file.set("model.compute_dtype", "bf16" if bf16 else "fp32", reason, more)


def _optimizer_and_schedule(file: _File) -> None:
    """Apply AdamW and WarmupCosineLR (deepspeed/runtime/lr_schedules.py), and the keys of `SAME`."""
    optimizer, schedule = file.take("optimizer.type", str), file.take("scheduler.type", str)
    if optimizer and optimizer.lower() not in ("adam", "adamw"):
        raise UserError(f"optimizer.type={optimizer} has no counterpart here; use AdamW")
    of_schedule = [name for name in file.names if name.startswith(f"{COSINE}.")]
    if schedule and of_schedule and set(of_schedule) <= set(file.auto):
        # As in Hugging Face's examples, where "auto" turns WarmupLR into the schedule of their own arguments.
        file.notes.append(f'scheduler.type={schedule} has only "auto" values: our warm-up and cosine decay stay')
    elif schedule not in (None, "WarmupCosineLR"):
        raise UserError(f"scheduler.type={schedule} has no counterpart here; use WarmupCosineLR or remove the block")
    elif schedule and f"{COSINE}.warmup_type" not in file.names:
        raise UserError(f'{COSINE}.warmup_type must be "linear"; "log", DeepSpeed\'s default, has no counterpart here')
    if file.settings.get("gradient_clipping") == 0:
        file.settings["gradient_clipping"] = NO_CLIPPING
        file.notes.append(f"gradient_clipping=0 becomes {NO_CLIPPING:g}, which no norm reaches, so nothing is clipped")
    for name, (ours, more) in SAME.items():
        before, value = attrgetter(ours)(file.config), file.take(name)
        if value is not None and ours == "optimizer.max_steps" and before not in (None, value):
            raise UserError(f"{name}={value}, but optimizer.max_steps={before}; set both to the same number")
        if value is not None:
            file.set(ours, value, f"{name}={json.dumps(value)}", more if value else "")


def _rest(file: _File) -> None:
    """Note which of the remaining keys are ignored. Raise UserError for a key that may change the result."""
    ignored = []
    for name, value in file.settings.items():
        is_ignored = name in IGNORED or (name.startswith(IGNORED_BLOCKS) and not name.startswith(CHANGES))
        has_no_effect = value == ONLY_AS[name] if name in ONLY_AS else value is False or value == () or is_ignored
        if has_no_effect:
            ignored.append(name)
        elif name not in file.auto:
            raise UserError(_refusal(file, name, value))
    if ignored:
        file.notes.append(f"ignored, because the result does not depend on it: {', '.join(ignored)}")
    if automatic := [name for name in file.auto if name not in ignored]:
        file.notes.append(f'"auto", so our value stays: {", ".join(automatic)}')


def _refusal(file: _File, name: str, value: object) -> str:
    known = [*file.taken, *SAME, *IGNORED, *ONLY_AS, *ADVICE]
    similar = [key for key in known if key.endswith(f".{name}")] or difflib.get_close_matches(name, known, 1, 0.85)
    advice = f"set it to {json.dumps(ONLY_AS[name])} or remove it" if name in ONLY_AS else "remove it"
    if similar and name not in known:
        advice = f"did you mean {similar[0]}?"
    return f"{name}={json.dumps(value)} may change the result and has no counterpart here; {ADVICE.get(name, advice)}"
