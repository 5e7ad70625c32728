"""`train.py CONFIG --dry-run`: the config, the plan, its memory and its time; no weights are read, nothing is trained."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from transformers import PretrainedConfig

from common.dtypes import DTYPES
from common.durable_files import write_json
from configs.config import Config
from distributed.process_group import world_size_from_environment
from distributed.sharding import decoder_layers
from model.language_model import PackedLanguageModel
from planner.report import as_json, make_report
from planner.shape import shape_of_model
from planner.subject import of_inputs
from planner.table import text
from training.description import describe_run
from training.forecast import expected_peak, own_cluster
from training.inputs import Inputs

SAVE_BANDWIDTH = 1e9  # bytes/s, until a run has measured its disk


def show_plan(
    config: Config,
    inputs: Inputs,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    world_size: int,
    file: str | None,
    say: Callable[[str], None],
) -> int:
    """Print the plan; rank 0 writes it to `file` as JSON. `model` is on meta. Returns the exit code."""
    shape = shape_of_model(config.model.path, model, model_config, config.model.layer_class)
    layers = decoder_layers(model, config.model.layer_class)
    for line in changed_keys(config) + describe_run(config, inputs, model, layers, model_config, world_size):
        say(line)
    peak = expected_peak(DTYPES[config.model.compute_dtype], world_size)
    cluster = own_cluster(peak, world_size, world_size_from_environment()[1])
    report = make_report(of_inputs(config, shape, inputs), cluster, SAVE_BANDWIDTH)
    words = (
        text(report).replace(" (--save-bandwidth)", "").replace(" (--host-memory GiB)", "")
    )  # options of scripts/plan.py
    say(f"\n{words}\n\ndry run: no weights were read and nothing was trained")
    if file and int(os.environ.get("RANK", 0)) == 0:
        write_json(Path(file), as_json(report))
    return 0


def changed_keys(config: Config) -> list[str]:
    """`section.key=value` of each key that does not have its default, one section per line."""
    lines = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        changed = [
            f"{section.name}.{key.name}={getattr(values, key.name)!r}"
            for key in dataclasses.fields(values)
            if getattr(values, key.name) != _default(key)
        ]
        lines += ["config: " + " ".join(changed)] if changed else []
    return lines


def _default(key: dataclasses.Field) -> object:
    if key.default_factory is not dataclasses.MISSING:
        return key.default_factory()
    return key.default
