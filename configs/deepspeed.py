"""Apply a DeepSpeed JSON file to a config, with a line for each setting that it changes or that is ignored.

Some keys have a counterpart and become settings of ours. Some change only speed, memory or logging and are ignored. Some
would change the result of training and have no counterpart; these are refused. The value "auto", which Hugging Face fills
in from its own arguments, keeps our value. The keys are those of DeepSpeed 0.19
(https://www.deepspeed.ai/docs/config-json/) and of older versions.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from common.errors import UserError
from configs.config import Config
from configs.load import check_config, nearest, replace

# An fp32 norm is at most the square root of 3.4e38, about 2e19, so this never clips. Infinity is not valid JSON.
NO_CLIPPING = 1e30
MICRO, ACCUMULATION, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
ZERO, ADAM, COSINE = "zero_optimization", "optimizer.params", "scheduler.params"
OFFLOADS = (f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param")
# Blocks whose keys are read one by one, as BLOCK.KEY. Any other block is one value.
BLOCKS = ("optimizer", ADAM, "scheduler", COSINE, "bf16", "fp16", "data_types", ZERO, *OFFLOADS)
RENAMED = {"bfloat16": "bf16"}

# Keys that become settings of ours.
MAPPED = f"""
    {MICRO} {ACCUMULATION} {TOTAL} gradient_clipping bf16.enabled optimizer.type scheduler.type
    {ZERO}.stage {ZERO}.mics_shard_size {ZERO}.cpu_offload {ZERO}.cpu_offload_param
    {ZERO}.offload_optimizer.device {ZERO}.offload_param.device
    {ADAM}.lr {ADAM}.betas {ADAM}.eps {ADAM}.weight_decay {ADAM}.adam_w_mode
    {COSINE}.total_num_steps {COSINE}.warmup_num_steps {COSINE}.cos_min_ratio {COSINE}.warmup_type
""".split()

# Keys that affect only speed, memory, logging or saving: any value gives the same result.
IGNORED = f"""
    steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level timers flops_profiler comms_logger
    tensorboard wandb csv_monitor comet checkpoint load_universal_checkpoint nebula datastates aio activation_checkpointing
    compile graph_harvesting disable_allgather disable_python_gc sparse_gradients fp32_allreduce vocabulary_size
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer seq_parallel_communication_data_type
    managed_gradient_accumulation optimizer.legacy_fusion {ADAM}.torch_adam {ADAM}.foreach {ADAM}.fused
    bf16.immediate_grad_update bf16.check_grad_overflow fp16.auto_cast fp16.loss_scale fp16.initial_scale_power
    fp16.loss_scale_window fp16.hysteresis fp16.consecutive_hysteresis fp16.min_loss_scale
    fp16.fp16_master_weights_and_grads fp16.opt_level
""".split()
_ZERO = """
    contiguous_gradients overlap_comm reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size
    use_multi_rank_bucket_allreduce load_from_fp32_weights elastic_checkpoint sub_group_size cpu_offload_use_pin_memory
    ignore_unused_parameters legacy_stage1 round_robin_gradients mics_hierarchical_params_gather memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module parameter_alignment zero_hpz_partition_size
    stage3_gather_fp16_weights_on_model_save
"""
_ZERO_WITH_OR_WITHOUT_STAGE3 = """
    prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
    module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential partition_stream_chunk_size
    gather_16bit_weights_on_model_save
"""
_OFFLOAD = """
    pin_memory nvme_path buffer_count buffer_size max_in_cpu fast_init pipeline pipeline_read pipeline_write ratio
    super_offload cpuadam_cores_perc
"""
IGNORED += [f"{ZERO}.{key}" for key in _ZERO.split()]
IGNORED += [f"{ZERO}.{stage}{key}" for key in _ZERO_WITH_OR_WITHOUT_STAGE3.split() for stage in ("", "stage3_")]
IGNORED += [f"{block}.{key}" for block in OFFLOADS for key in _OFFLOAD.split()]

# Key -> (the value with which it has no effect, what to do about any other value).
ONLY_AS: dict[str, tuple[object, str]] = {
    "communication_data_type": ("fp32", "remove it; sharding.reduce_dtype says in which dtype gradients are reduced"),
    "prescale_gradients": (False, "the loss is divided once, by the target tokens of the step; remove it"),
    "gradient_predivide_factor": (1, "the loss is divided once, by the target tokens of the step; remove it"),
    "gradient_allreduce_op": ("mean", "the loss of a step is the mean over its target tokens; remove it"),
    "dataloader_drop_last": (False, "the last, smaller step of an epoch is not dropped; set it to false"),
    "sequence_parallel_size": (1, "a sequence stays on one rank; set it to 1"),
    "use_data_before_expert_parallelism": (False, "experts are not spread over ranks; remove it"),
    "bf16.bf16_master_weights_and_grads": (False, "set it to false and choose optimizer.memory=12N"),
    "bf16.bf16_optimizer_states": (False, "set it to false and choose optimizer.memory=8N"),
    "fp16.enabled": (False, "there is no loss scaling; set it to false and bf16.enabled to true"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32; remove it or choose optimizer.memory=12N"),
    "data_types.param_dtype": ("fp32", "remove it; model.compute_dtype and optimizer.memory determine the dtypes"),
    "data_types.buffer_dtype": ("fp32", "buffers stay fp32; remove it"),
    "data_types.keep_in_fp32_modules": ([], "every module computes in model.compute_dtype; remove it"),
    f"{ZERO}.zero_quantized_weights": (False, "weights are gathered unquantized; set it to false"),
    f"{ZERO}.zero_quantized_nontrainable_weights": (False, "all weights are trained; set it to false"),
    f"{ZERO}.zero_quantized_gradients": (False, "gradients are reduced in fp32; set it to false"),
    f"{ADAM}.bias_correction": (True, "set it to true"),
    f"{ADAM}.amsgrad": (False, "set it to false"),
    f"{ADAM}.maximize": (False, "set it to false"),
    f"{ADAM}.fp32_optimizer_states": (True, "set it to true"),
    f"{COSINE}.warmup_min_ratio": (0, "set it to 0"),
}  # fmt: skip

# Blocks that are accepted only if they are empty or their own `enabled` is false.
ONLY_OFF = f"""
    amp torch_autocast sparse_attention compression_training weight_quantization quantize_training
    progressive_layer_drop eigenvalue curriculum_learning data_efficiency elasticity autotuning pipeline tensor_parallel
    expert_parallel hybrid_engine {ZERO}.zenflow {ZERO}.zeropp_loco_param
""".split()
KNOWN = (*BLOCKS, *MAPPED, *IGNORED, *ONLY_AS, *ONLY_OFF, *RENAMED)


def from_deepspeed(config: Config, path: str | Path, world_size: int) -> tuple[Config, list[str]]:
    """Apply the settings of a DeepSpeed JSON file. Returns the new config and one log line per change or ignored key.

    The number of examples per step on `world_size` ranks stays that of the file. Raises UserError with file and key for
    a key that is unknown, has the wrong type, contradicts another, or changes the result and has no counterpart here.
    """
    tree = _read_json(Path(path))
    try:
        file = _File(tree, config, world_size)
        file.apply()
        check_config(file.config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return file.config, file.notes


def _read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError with the line for anything else."""
    if not path.is_file():
        raise UserError(f"DeepSpeed file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        at_comment = text[error.pos :].lstrip().startswith(("//", "#", "/*"))
        reason = "JSON does not allow comments; remove it" if at_comment else error.msg
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {reason}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must contain one JSON object of settings, not {_show(tree)}")
    return tree


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    block = dict(pairs)
    if len(block) < len(pairs):
        names = [key for key, _ in pairs]
        raise UserError(f"{max(names, key=names.count)} occurs twice in one block; remove one of them")
    return block


def _flatten(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key of a file."""
    for key, value in block.items():
        name = RENAMED.get(prefix + key, prefix + key)
        if name not in BLOCKS or value is None or value == "auto":
            yield name, value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            raise UserError(f"{name} must be a block {{...}}, not {_show(value)}")


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in KNOWN:
            key = name.rpartition(".")[2]
            elsewhere = [known for known in KNOWN if known.endswith(f".{key}")]
            similar = nearest(name, KNOWN, "no known key has a similar name, remove it")
            raise UserError(f"unknown key {name}" + (f"; did you mean {elsewhere[0]}?" if elsewhere else similar))


def _show(value: object) -> str:
    """A value as JSON text, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number. Booleans are not numbers."""
    return type(value) in (int, float) and math.isfinite(value)


class _File:
    """The settings of a file by dotted names, and the config to which they are applied one after the other.

    Keys with null are left out; those with "auto" are only in `auto`. `notes` are the lines for the log.
    """

    def __init__(self, tree: dict, config: Config, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.notes: list[str] = []
        given = dict(_flatten(tree))
        self.auto = [name for name, value in given.items() if value == "auto"]
        self.values = {name: value for name, value in given.items() if value is not None and value != "auto"}
        # Which params are known depends on the type; `_optimizer` and `_scheduler` look at it first.
        _check_names(name for name in given if not name.startswith((f"{ADAM}.", f"{COSINE}.")))

    def apply(self) -> None:
        """Apply all settings. Raises UserError for what would change the result and has no counterpart."""
        for name, (harmless, advice) in ONLY_AS.items():
            value = self.values.get(name, harmless)
            if value != harmless:
                raise UserError(f"{name}={_show(value)} changes the result and has no counterpart here: {advice}")
        for name in ONLY_OFF:
            block = self.values.get(name)
            if block and (not isinstance(block, dict) or block.get("enabled", True) not in (False, None, "auto")):
                raise UserError(f"{name} changes the result and has no counterpart here; remove the block")
        self._sharding()
        self._offload()
        self._batch()
        self._precision()
        self._clipping()
        self._optimizer()
        self._scheduler()
        without_effect = {*IGNORED, *ONLY_OFF}
        given = [name for name in (*self.values, *self.auto) if name in without_effect]
        ignored = dict.fromkeys("fp16" if name.startswith("fp16.") else name for name in given)
        if ignored:
            self.notes.append(f"ignored, because the result of training does not depend on it: {', '.join(ignored)}")
        automatic = [name for name in self.auto if name not in without_effect]
        if automatic:
            self.notes.append(f'"auto", so our value stays: {", ".join(automatic)}')

    def _get(self, name: str, wanted: str, holds: Callable[[Any], bool]) -> Any:
        """The value of a key, or None if it is absent or "auto". Raises UserError if it is not what is `wanted`."""
        value = self.values.get(name)
        if value is not None and not holds(value):
            raise UserError(f"{name} must be {wanted}, not {_show(value)}")
        return value

    def _number(self, name: str) -> float | None:
        number = self._get(name, "a number that is 0 or more", lambda value: _is_number(value) and value >= 0)
        return None if number is None else float(number)

    def _integer(self, name: str, at_least: int = 1) -> int | None:
        wanted = f"an integer that is {at_least} or more"
        return self._get(name, wanted, lambda value: type(value) is int and value >= at_least)

    def _choice(self, name: str, *choices: object) -> Any:
        kinds = [(type(choice), choice) for choice in choices]  # true is not 1
        return self._get(name, " or ".join(map(_show, choices)), lambda value: (type(value), value) in kinds)

    def _type_of(self, block: str) -> str | None:
        """The type of the optimizer or the scheduler."""
        kind = self._get(f"{block}.type", "a string", lambda value: isinstance(value, str))
        if kind is None and any(name.startswith(f"{block}.params.") for name in (*self.values, *self.auto)):
            raise UserError(f"{block}.params is set, but {block}.type is missing")
        return kind

    def _set(self, ours: str, value: object, reason: str, more: str = "") -> None:
        """Make our key `ours` the value. The log says why, and `more`."""
        self.config = replace(self.config, ours, value)
        self.notes.append(f"{reason} -> {ours}={value}{more}")

    def _take(self, name: str, ours: str, value: object, more: str = "", absent: str = "") -> None:
        """Make our key `ours` the value, which the file has at `name`. If it is None, ours stays."""
        if value is not None:
            self._set(ours, value, f"{name}={_show(self.values[name])}", more)
        elif name not in self.auto:
            self.notes.append(f"no {name}: {ours}={attrgetter(ours)(self.config)} stays{absent}")

    def _sharding(self) -> None:
        """Apply ZeRO stages (arXiv:1910.02054) and MiCS (arXiv:2205.00119)."""
        name, mics = f"{ZERO}.stage", f"{ZERO}.mics_shard_size"
        stage, size = self._choice(name, 0, 1, 2, 3), self._integer(mics, -1) or -1
        grouped = stage == 3 and 0 < size < self.world_size
        if grouped and self.world_size % size:
            raise UserError(
                f"{mics}={size} does not divide the number of ranks, {self.world_size}; set it to a divisor"
            )
        if grouped:
            more = f", sharded within groups of {size} ranks, replicated over the {self.world_size // size} groups"
            self._set("sharding.strategy", "hybrid", f"{mics}={size}", more)
            self._set("sharding.shard_size", size, f"{mics}={size}")
        elif stage is not None:
            strategy = {0: "none", 1: "grad_op", 2: "grad_op", 3: "full"}[stage]
            more = ", which also shards gradients: same result, less memory" if stage == 1 else ""
            self._set("sharding.strategy", strategy, f"{name}={stage}", more)
            self.config = replace(self.config, "sharding.shard_size", None)
        elif name not in self.auto:
            ours = self.config.sharding.strategy
            self.notes.append(
                f"no {name}: DeepSpeed would not shard, but sharding.strategy={ours} stays; the result is the same"
            )
        if size > 0 and not grouped:
            self.notes.append(f"{mics}={size} is ignored: it requires stage 3 and more than {size} ranks")

    def _offload(self) -> None:
        """Apply ZeRO-Offload, whose keys are blocks, or switches in older versions."""
        devices = {}
        for block, old in zip(OFFLOADS, (f"{ZERO}.cpu_offload", f"{ZERO}.cpu_offload_param"), strict=True):
            switched_on = self._choice(old, True, False)
            devices[block] = self._choice(f"{block}.device", "none", "cpu", "nvme") or (switched_on and "cpu")
        moved = [f"{block} to {device}" for block, device in devices.items() if device in ("cpu", "nvme")]
        off = [f"{block} to none" for block, device in devices.items() if device == "none"]
        stage = self.values.get(f"{ZERO}.stage", 3 if f"{ZERO}.stage" in self.auto else 0)
        if moved and (stage == 3 or (stage > 0 and moved[0].startswith(OFFLOADS[0]))):
            more = ", which moves parameters, gradients and optimizer state to host memory; the result is the same"
            self._set("sharding.cpu_offload", True, " and ".join(moved), more)
        elif moved:
            self.notes.append(f"{' and '.join(moved)} is ignored: DeepSpeed does not offload it at stage {stage}")
        elif off and self.config.sharding.cpu_offload:
            self._set("sharding.cpu_offload", False, " and ".join(off))

    def _batch(self) -> None:
        """Apply the examples per step. DeepSpeed: they are micro-batch x accumulation x ranks."""
        micro, accumulation, total = (self._integer(name) for name in (MICRO, ACCUMULATION, TOTAL))
        product = (micro or 1) * (accumulation or 1) * self.world_size
        given = [f"{name}={number}" for name, number in ((MICRO, micro), (ACCUMULATION, accumulation)) if number]
        factors = " x ".join([*given, f"{self.world_size} ranks"])
        if total and len(given) == 2 and total != product:
            raise UserError(f"{TOTAL}={total} is not {factors} = {product}; correct one of them, or remove {TOTAL}")
        if total and total % product:
            raise UserError(f"{TOTAL}={total} is not divisible by {factors}; correct one of them")
        if total or len(given) == 2:
            reason = factors if len(given) == 2 else f"{TOTAL}={total}"
            self._set("batch.global_examples", total or product, reason)
            self.config = replace(self.config, "batch.global_tokens", None)
        elif given:
            stay = "batch.global_examples and batch.global_tokens stay"
            self.notes.append(f"{given[0]} alone does not say how many examples a step has: {stay}")
        if total and accumulation:
            micro = micro or total // product
        if micro:
            more = (
                " x data.sequence_length; examples are packed, so there may be fewer accumulation steps, but the number of "
                "examples per step is the same"
            )
            more = more if self.config.data.packing else " examples"
            self._set("batch.micro_batch", micro, f"micro-batches of {micro}", more)

    def _precision(self) -> None:
        bf16 = self._choice("bf16.enabled", True, False)
        if bf16 is None and {"bf16", "bf16.enabled", "fp16", "fp16.enabled"} & set(self.auto):
            return
        more = "; gradients are reduced in fp32, while DeepSpeed's default is bf16" if bf16 else ""
        reason = "bf16.enabled=true" if bf16 else "neither bf16 nor fp16 is enabled"
        self._set("model.compute_dtype", "bf16" if bf16 else "fp32", reason, more)

    def _clipping(self) -> None:
        norm = self._number("gradient_clipping")
        more = ", which no norm reaches, so nothing is clipped" if norm == 0 else ""
        absent = " (without the key, DeepSpeed before 0.19 does not clip)"
        self._take("gradient_clipping", "optimizer.max_grad_norm", NO_CLIPPING if norm == 0 else norm, more, absent)

    def _optimizer(self) -> None:
        kind = self._type_of("optimizer")
        if kind is None:
            return
        if kind.lower() not in ("adam", "adamw"):
            raise UserError(f"optimizer.type={kind} has no counterpart here; use AdamW")
        _check_names(name for name in (*self.values, *self.auto) if name.startswith(f"{ADAM}."))
        if kind.lower() == "adam" and self._choice(f"{ADAM}.adam_w_mode", True, False) is False:
            raise UserError(f"{ADAM}.adam_w_mode=false has no counterpart here: it is not AdamW; set it to true")
        betas = self._get(
            f"{ADAM}.betas",
            "two numbers",
            lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
        )
        decay = self._number(f"{ADAM}.weight_decay")
        more = ", on matrices only; DeepSpeed decays norms and biases too, so the weights will differ slightly"
        self._take(f"{ADAM}.lr", "optimizer.learning_rate", self._number(f"{ADAM}.lr"))
        self._take(f"{ADAM}.betas", "optimizer.betas", betas and tuple(map(float, betas)))
        self._take(f"{ADAM}.eps", "optimizer.eps", self._number(f"{ADAM}.eps"))
        self._take(f"{ADAM}.weight_decay", "optimizer.weight_decay", decay, more if decay else "")

    def _scheduler(self) -> None:
        """Apply WarmupCosineLR (deepspeed/runtime/lr_schedules.py): warm-up, then cosine decay to `cos_min_ratio` x peak."""
        kind = self._type_of("scheduler")
        given, auto = ([name for name in names if name.startswith(f"{COSINE}.")] for names in (self.values, self.auto))
        if kind is None:
            return
        if auto and not given:  # as the examples of Hugging Face, whose WarmupLR becomes what its own arguments say
            self.notes.append(
                f'scheduler.type={kind} has only "auto" values: our schedule stays, linear warm-up and cosine decay'
            )
            return
        if kind != "WarmupCosineLR":
            raise UserError(f"scheduler.type={kind} has no counterpart here; use WarmupCosineLR or remove the block")
        _check_names([*given, *auto])
        shape, steps, warmup = f"{COSINE}.warmup_type", f"{COSINE}.total_num_steps", f"{COSINE}.warmup_num_steps"
        if self._choice(shape, "linear", "log") != "linear" and shape not in self.auto:
            raise UserError(f'{shape} must be "linear"; "log", which is DeepSpeed\'s default, has no counterpart here')
        total, before = self._integer(steps), self.config.optimizer.max_steps
        if total and before not in (None, total):
            raise UserError(f"{steps}={total}, but optimizer.max_steps={before}; set both to the same number")
        more = ", or fewer if the epochs end earlier; the cosine ends at the last step"
        self._take(steps, "optimizer.max_steps", total, more)
        more = "; the first step has 1/warmup_steps of the peak rate, while DeepSpeed's first two have 0"
        self._take(warmup, "optimizer.warmup_steps", self._integer(warmup), more)
        self._take(f"{COSINE}.cos_min_ratio", "optimizer.min_lr_ratio", self._number(f"{COSINE}.cos_min_ratio"))
