"""A DeepSpeed JSON file is converted exactly, or refused with one sentence that names the file and the key."""

import dataclasses
import json
from operator import attrgetter
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import KEYS, Batch, Config, Data, Model, Optimizer, Run, Sharding
from configs.deepspeed import IGNORED, NO_CLIPPING, ONLY_AS, from_deepspeed
from configs.load import check_config

OURS = Config(
    model=Model("m", compute_dtype="fp32"),
    data=Data(("a.jsonl",)),
    batch=Batch(global_tokens=5000, micro_batch=7),
    optimizer=Optimizer(1e-4, max_grad_norm=0.5),
    run=Run("r"),
    sharding=Sharding("hybrid", shard_size=2),
)


def apply(folder: Path, tree: object, world_size: int = 4, ours: Config = OURS) -> tuple[Config, str]:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    config, notes = from_deepspeed(ours, path, world_size)
    assert all(isinstance(note, str) and "\n" not in note for note in notes)
    check_config(config)
    before_and_after = [
        f"{key}: {attrgetter(key)(ours)} -> {attrgetter(key)(config)} ("
        for key in KEYS
        if attrgetter(key)(ours) != attrgetter(key)(config)
    ]
    lines = [line for line in before_and_after if not any(note.startswith(line) for note in notes)]
    assert lines == [], notes  # the file changes nothing silently
    return config, "\n".join(notes)


def changed(config: Config) -> dict[str, object]:
    """Return the settings that differ, by dotted name."""
    settings = {name: (attrgetter(name)(config), attrgetter(name)(OURS)) for name in KEYS}
    return {name: now for name, (now, before) in settings.items() if now != before}


USUAL = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 2,
}


def test_the_usual_file(tmp_path) -> None:
    config, notes = apply(tmp_path, USUAL, world_size=4)
    assert config == Config(
        model=Model("m", compute_dtype="bf16"),
        data=OURS.data,
        batch=Batch(global_examples=64, global_tokens=None, micro_batch=2),
        optimizer=Optimizer(1e-4, max_grad_norm=1.0),
        run=OURS.run,
        sharding=Sharding("full", shard_size=None, cpu_offload=True),
    )
    (ignored,) = [note for note in notes.splitlines() if note.startswith("ignored")]
    zero = USUAL["zero_optimization"]
    hints = {f"zero_optimization.{key}" for key in zero if key != "stage" and not key.startswith("offload")}
    hints |= {"zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory"}
    assert set(ignored.split(": ")[1].split(", ")) == hints
    assert '"auto"' not in notes  # the "auto" sizes are listed among the ignored keys
    assert "batch.global_examples: None -> 64 (" in notes and "2 x gradient_accumulation_steps=8 x 4 ranks)" in notes


def test_auto_file_for_zero_2_changes_only_sharding(tmp_path) -> None:
    automatic = "auto"
    file = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": automatic, "betas": automatic, "eps": automatic, "weight_decay": automatic},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": automatic, "warmup_max_lr": automatic, "warmup_num_steps": automatic},
        },
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": automatic,
        "gradient_clipping": automatic,
        "train_batch_size": automatic,
        "train_micro_batch_size_per_gpu": automatic,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    config, notes = apply(tmp_path, file)
    assert changed(config) == {
        "sharding.strategy": "grad_op",
        "sharding.shard_size": None,
        "sharding.cpu_offload": True,
    }
    assert "moves parameters, gradients and optimizer state" in notes
    assert "stays: fp16.enabled, optimizer.params.lr" in notes and "scheduler.type=WarmupLR" in notes


FULL = {"sharding.strategy": "full", "sharding.shard_size": None}
ZERO_2 = {"sharding.strategy": "grad_op", "sharding.shard_size": None}
OFFLOADED = {"sharding.cpu_offload": True}
OF_64 = {"batch.global_examples": 64, "batch.global_tokens": None}
BF16 = {"model.compute_dtype": "bf16"}


def zero(**keys: object) -> dict:
    return {"zero_optimization": keys}


def batch(micro: object, accumulation: object, total: object) -> dict:
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return dict(zip(keys, (micro, accumulation, total), strict=True))


def cosine(**params: object) -> dict:
    return {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "linear", **params}}}


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        (zero(stage=0), {"sharding.strategy": "none", "sharding.shard_size": None}, "stage=0"),
        (zero(stage=1), ZERO_2, "also shards gradients"),
        (zero(stage=2), ZERO_2, "grad_op"),
        (zero(stage=3), FULL, "full"),
        (
            zero(stage=3, mics_shard_size=1),
            {"sharding.shard_size": 1},
            "sharding.strategy: stays hybrid (zero_optimization.mics_shard_size=1)",
        ),
        (zero(stage="auto"), {}, '"auto"'),
        (
            zero(stage=3, offload_param={"device": "cpu"}),
            FULL | OFFLOADED,
            "cpu_offload: False -> True (offload_param to cpu, which moves",
        ),
        (zero(stage=2, cpu_offload=True), ZERO_2 | OFFLOADED, "offload_optimizer to cpu"),
        (
            zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
            FULL | OFFLOADED,
            "sharding.cpu_offload: False -> True (offload_optimizer to nvme, which moves",
        ),
        (batch(2, 8, None), OF_64 | {"batch.micro_batch": 2}, "x data.sequence_length tokens"),
        (batch(2, "auto", 64), OF_64 | {"batch.micro_batch": 2}, "train_batch_size=64"),
        (batch(None, 8, 64), OF_64, "train_batch_size=64"),
        (batch(16, None, None), OF_64 | {"batch.micro_batch": 16}, "16 x gradient_accumulation_steps=1 x 4 ranks"),
        (batch(2, "auto", None), {"batch.micro_batch": 2}, '"auto"'),
        (batch(2, None, "auto"), {"batch.micro_batch": 2}, '"auto"'),
        (batch("auto", 8, "auto"), {}, "ignored: gradient_accumulation_steps=8, which follows"),
        (batch(None, None, None), {}, ""),
        ({"bf16": {"enabled": True}}, BF16, "DeepSpeed's default is bf16"),
        ({"bfloat16": {"enabled": True}, "fp16": {"enabled": "auto"}}, BF16, "bf16"),
        ({"fp16": {"enabled": False}}, {}, "model.compute_dtype: stays fp32 (neither bf16 nor fp16 is enabled)"),
        ({"fp16": {"enabled": "auto"}}, {}, "stays: fp16.enabled"),
        ({"gradient_clipping": 2}, {"optimizer.max_grad_norm": 2.0}, "gradient_clipping=2"),
        ({"gradient_clipping": 0}, {"optimizer.max_grad_norm": NO_CLIPPING}, "nothing is clipped"),
        (
            cosine(total_num_steps=900, warmup_num_steps=45, cos_min_ratio=0.2),
            {"optimizer.max_steps": 900, "optimizer.warmup_steps": 45, "optimizer.min_lr_ratio": 0.2},
            "first two have 0",
        ),
        (
            cosine(total_num_steps="auto", warmup_num_steps=45, warmup_min_ratio=0),
            {"optimizer.warmup_steps": 45},
            "scheduler.params.total_num_steps",
        ),
    ],
)
def test_each_block_changes_its_settings(tmp_path, file, settings, words) -> None:
    config, notes = apply(tmp_path, file)
    assert changed(config) == settings and words in notes


def test_missing_precision_means_fp32_auto_keeps_ours(tmp_path) -> None:
    ours = dataclasses.replace(OURS, model=Model("m", compute_dtype="bf16"))
    for file, dtype in (({"fp16": {"enabled": False}}, "fp32"), ({"fp16": {"enabled": "auto"}}, "bf16")):
        assert apply(tmp_path, file, ours=ours)[0].model.compute_dtype == dtype


def test_keys_without_effect_are_accepted(tmp_path) -> None:
    """All ignored keys, all keys with a single accepted value, unknown keys of ZeRO, and blocks that are switched off."""
    file: dict = {}
    values = dict.fromkeys(IGNORED, 1) | ONLY_AS | {"zero_optimization.some_new_bucket": 1}
    values |= {"optimizer.type": "AdamW", "scheduler.type": "WarmupCosineLR"}
    for name, value in values.items():
        block = file
        *outer, key = name.split(".")
        for part in outer:
            block = block.setdefault(part, {})
        block[key] = value
    config, notes = apply(tmp_path, file)
    assert config == OURS
    (ignored,) = [note for note in notes.splitlines() if note.startswith("ignored")]
    assert set(ignored.split(": ")[1].split(", ")) == set(values) - {"optimizer.type", "scheduler.type"}
    off = {
        "compression_training": {},
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "prescale_gradients": False,
        "data_types": {"keep_in_fp32_modules": []},
        "zero_optimization": {"zenflow": None, "zero_quantized_gradients": False},
    }
    config, notes = apply(tmp_path, off)
    assert config == OURS and "data_efficiency.enabled, prescale_gradients" in notes


@pytest.mark.parametrize(
    "file, words",
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled=true has no counterpart here; use bf16"),
        ({"communication_data_type": "bf16"}, 'communication_data_type="bf16"'),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "optimizer.memory=12N"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "remove it, and choose optimizer.memory=12N for bf16"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum"'),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow.topk_ratio=0.1 may change the result"),
        ({"amp": {"enabled": True}}, "amp.enabled=true may change the result and has no counterpart here; remove it"),
        ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 1}}}, "optimizer.type=Lamb"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode=false"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, 'optimizer.params.lr="fast": optimizer.learning_rate must be a number or auto, not'),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1]}}}, "optimizer.betas must be in [0, 1), not (0.9, 1)"),
        ({"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0}}}, "optimizer.params.weigth_decay=0 may change the result and has no counterpart here; did you mean optimizer.params.weight_decay?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler.type=WarmupLR"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}, 'warmup_type must be "linear"'),
        ({"train_batch_size": 60, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8},
         "train_batch_size=60 is not train_micro_batch_size_per_gpu=2 x gradient_accumulation_steps=8 x 4 ranks = 64"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0: batch.micro_batch must be above 0, not 0"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be one of 0, 1, 2, 3, not 4"),
        ([1], "must contain one JSON object"),
        ('{"train_batch_size": 8, "train_batch_size": 8}', "train_batch_size occurs twice"),
        ('{\n "train_batch_size": 8, // examples\n}', "is not a JSON file, which has no comments and no trailing commas: Expecting property name enclosed in double quotes: line 2"),
    ],
)  # fmt: skip
def test_a_refusal_is_a_one_line_error(tmp_path, file, words) -> None:
    with pytest.raises(UserError) as error:
        apply(tmp_path, file)
    sentence = str(error.value)
    assert words in sentence and "ds.json" in sentence and "\n" not in sentence
