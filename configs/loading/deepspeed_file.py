"""Read and validate a DeepSpeed JSON file: the known keys, and which of them change the result of training.

The keys are those of DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/) and of older versions.
configs/loading/deepspeed.py applies them to a config.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from configs.loading.names import nearest

# Blocks that are flattened to dotted names. The `params` of optimizer and scheduler are not, because their keys depend
# on the type.
_TOP = ("optimizer", "scheduler", "bf16", "fp16", "data_types", "zero_optimization")
BLOCKS = (*_TOP, "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
RENAMED = {"bfloat16": "bf16"}

# Keys that become settings of ours.
_MAPPED = """
    train_micro_batch_size_per_gpu gradient_accumulation_steps train_batch_size gradient_clipping
    bf16.enabled fp16.enabled optimizer.type optimizer.params scheduler.type scheduler.params
    zero_optimization.stage zero_optimization.mics_shard_size zero_optimization.zero_hpz_partition_size
    zero_optimization.cpu_offload zero_optimization.cpu_offload_param
    zero_optimization.offload_optimizer.device zero_optimization.offload_param.device
"""

# Keys that affect only speed, memory, logging or saving: any value gives the same result.
_IGNORED = """
    steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level timers flops_profiler comms_logger
    tensorboard wandb csv_monitor comet checkpoint load_universal_checkpoint nebula datastates aio activation_checkpointing
    compile graph_harvesting disable_allgather disable_python_gc sparse_gradients fp32_allreduce vocabulary_size
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer seq_parallel_communication_data_type
    managed_gradient_accumulation optimizer.legacy_fusion bf16.immediate_grad_update bf16.check_grad_overflow
    fp16.auto_cast fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis
    fp16.consecutive_hysteresis fp16.min_loss_scale fp16.fp16_master_weights_and_grads fp16.opt_level
"""
_IGNORED_ZERO = """
    contiguous_gradients overlap_comm reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size
    use_multi_rank_bucket_allreduce load_from_fp32_weights elastic_checkpoint sub_group_size cpu_offload_use_pin_memory
    ignore_unused_parameters legacy_stage1 round_robin_gradients mics_hierarchical_params_gather memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module parameter_alignment
    prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
    model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
    max_reuse_distance stage3_max_reuse_distance module_granularity_threshold stage3_module_granularity_threshold
    use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
    stage3_allgather_sequential partition_stream_chunk_size stage3_partition_stream_chunk_size
    gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save
    offload_param.pin_memory offload_param.nvme_path offload_param.buffer_count offload_param.buffer_size
    offload_param.max_in_cpu offload_optimizer.pin_memory offload_optimizer.nvme_path offload_optimizer.buffer_count
    offload_optimizer.buffer_size offload_optimizer.fast_init offload_optimizer.pipeline
    offload_optimizer.pipeline_read offload_optimizer.pipeline_write offload_optimizer.ratio
    offload_optimizer.super_offload offload_optimizer.cpuadam_cores_perc
"""

# Key -> (the value with which it has no effect, what to do about any other value).
ONLY_AS = {
    "communication_data_type": ("fp32", "remove it; sharding.reduce_dtype says in which dtype gradients are reduced"),
    "prescale_gradients": (False, "the loss is divided once, by the target tokens of the step; remove it"),
    "gradient_predivide_factor": (1, "the loss is divided once, by the target tokens of the step; remove it"),
    "gradient_allreduce_op": ("mean", "the loss of a step is the mean over its target tokens; remove it"),
    "dataloader_drop_last": (False, "the last, smaller step of an epoch is not dropped; set it to false"),
    "sequence_parallel_size": (1, "a sequence stays on one rank; set it to 1"),
    "use_data_before_expert_parallelism": (False, "experts are not spread over ranks; remove it"),
    "bf16.bf16_master_weights_and_grads": (False, "set it to false and choose optimizer.memory=12N"),
    "bf16.bf16_optimizer_states": (False, "set it to false and choose optimizer.memory=8N"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32; remove it or choose optimizer.memory=12N"),
    "data_types.param_dtype": ("fp32", "remove it; model.compute_dtype and optimizer.memory determine the dtypes"),
    "data_types.buffer_dtype": ("fp32", "buffers stay fp32; remove it"),
    "data_types.keep_in_fp32_modules": ([], "every module computes in model.compute_dtype; remove it"),
    "zero_optimization.zero_quantized_weights": (False, "weights are gathered unquantized; set it to false"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "all weights are trained; set it to false"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are reduced in fp32; set it to false"),
}  # fmt: skip

# Blocks that are accepted only if they are switched off.
_ONLY_OFF = """
    amp torch_autocast sparse_attention compression_training weight_quantization quantize_training
    progressive_layer_drop eigenvalue curriculum_learning data_efficiency elasticity autotuning pipeline tensor_parallel
    expert_parallel hybrid_engine zero_optimization.zenflow zero_optimization.zeropp_loco_param
"""

IGNORED = frozenset(_IGNORED.split()) | {f"zero_optimization.{key}" for key in _IGNORED_ZERO.split()}
ONLY_OFF = frozenset(_ONLY_OFF.split())
KNOWN = (*BLOCKS, *_MAPPED.split(), *sorted(IGNORED), *ONLY_AS, *sorted(ONLY_OFF), *RENAMED)


@dataclass(frozen=True)
class DeepSpeedFile:
    """The settings of a file by dotted names. Keys with null are left out; keys with "auto" are only in `auto`."""

    path: Path
    values: dict[str, Any]
    auto: list[str]


def read_deepspeed(path: Path) -> DeepSpeedFile:
    """Read a DeepSpeed JSON file.

    Raises UserError if it is not valid JSON or a key is unknown or changes the result and has no counterpart.
    """
    if not path.is_file():
        raise UserError(f"DeepSpeed file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_finite)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        at_comment = text[error.pos :].lstrip().startswith(("//", "#", "/*"))
        reason = "JSON does not allow comments; remove it" if at_comment else error.msg
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {reason}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must contain one JSON object of settings, not {show(tree)}")
    file = DeepSpeedFile(path, {}, [])
    _flatten(file, tree, "")
    _refuse_without_counterpart(file)
    return file


def number(file: DeepSpeedFile, name: str, at_least: float, whole: bool = False) -> int | float | None:
    """The number at a dotted name, or None if it is absent or "auto". Raises UserError for anything else."""
    value = file.values.get(name)
    if value is not None and (not is_number(value) or value < at_least or (whole and type(value) is not int)):
        kind = "an integer" if whole else "a number"
        raise UserError(f"{file.path}: {name} must be {kind} that is {at_least} or more, not {show(value)}")
    return value


def choice(file: DeepSpeedFile, name: str, choices: tuple) -> Any:
    """The value at a dotted name, or None if it is absent or "auto". Raises UserError if it is not one of `choices`."""
    value = file.values.get(name)
    if value is not None and not any(value == c and type(value) is type(c) for c in choices):
        raise UserError(f"{file.path}: {name} must be {' or '.join(map(show, choices))}, not {show(value)}")
    return value


def typed_params(file: DeepSpeedFile, block: str) -> tuple[str | None, dict]:
    """(type, params) of the optimizer or scheduler block; (None, {}) if there is none. Raises UserError."""
    kind, params = file.values.get(f"{block}.type"), file.values.get(f"{block}.params", {})
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{file.path}: {block}.type must be a string, not {show(kind)}")
    if not isinstance(params, dict):
        raise UserError(f"{file.path}: {block}.params must be a block {{...}}, not {show(params)}")
    if kind is None and params:
        raise UserError(f"{file.path}: {block}.params is set, but {block}.type is missing")
    return kind, params


def unpack_params(file: DeepSpeedFile, block: str, params: dict, known: tuple[str, ...]) -> None:
    """Add `params` to the settings of the file by dotted names. Raises UserError for a key that is not in `known`."""
    for key, value in params.items():
        if key not in known:
            raise UserError(f"{file.path}: unknown key {block}.params.{key}{nearest(key, list(known))}")
        if value == "auto":
            file.auto.append(f"{block}.params.{key}")
        elif value is not None:
            file.values[f"{block}.params.{key}"] = value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. Booleans are not numbers."""
    return type(value) in (int, float) and math.isfinite(value)


def show(value: object) -> str:
    """A value as JSON text, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    block = dict(pairs)
    if len(block) < len(pairs):
        names = [key for key, _ in pairs]
        raise UserError(f"{max(names, key=names.count)} occurs twice in one block; remove one of them")
    return block


def _finite(text: str) -> None:
    raise UserError(f"{text} is not a JSON number; write a finite number")


def _flatten(file: DeepSpeedFile, block: dict[str, Any], prefix: str) -> None:
    for key, value in block.items():
        name = RENAMED.get(prefix + key, prefix + key)
        if name not in KNOWN:
            elsewhere = [known for known in KNOWN if known.endswith(f".{key}")]
            similar = nearest(name, list(KNOWN), "no known key has a similar name, remove it")
            hint = f"; did you mean {elsewhere[0]}?" if elsewhere else similar
            raise UserError(f"{file.path}: unknown key {name}{hint}")
        if value is None:
            continue
        if value == "auto":
            file.auto.append(name)
        elif name not in BLOCKS:
            file.values[name] = value
        elif isinstance(value, dict):
            _flatten(file, value, f"{name}.")
        else:
            raise UserError(f"{file.path}: {name} must be a block {{...}}, not {show(value)}")


def _refuse_without_counterpart(file: DeepSpeedFile) -> None:
    for name, (harmless, advice) in ONLY_AS.items():
        value = file.values.get(name, harmless)
        if value != harmless:
            raise UserError(
                f"{file.path}: {name}={show(value)} changes the result and has no counterpart here: {advice}"
            )
    for name in file.values:
        if name in ONLY_OFF and _is_on(file.values[name]):
            raise UserError(f"{file.path}: {name} changes the result and has no counterpart here; remove it")


def _is_on(block: object) -> bool:
    """Whether a block is switched on. It is off if it is empty or false, or if all of its switches are off."""
    if not isinstance(block, dict):
        return bool(block)
    switches = _switches(block)
    return any(switches) if switches else bool(block)


def _switches(block: dict) -> list[bool]:
    if "enabled" in block:
        return [block["enabled"] not in (False, None, "auto")]
    if "autotp_size" in block:
        return [block["autotp_size"] not in (0, 1, None, "auto")]
    return [switch for inner in block.values() if isinstance(inner, dict) for switch in _switches(inner)]
