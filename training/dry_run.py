"""`train.py CONFIG --dry-run`: the config, the plan, its memory and its time; no weights are read, nothing is trained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from planner.table import disk_lines, host_lines, memory_lines
from transformers import PretrainedConfig

from common.dtypes import DTYPES
from common.durable_files import write_json
from configs.config import Config, as_dict
from distributed.sharding import decoder_layers
from model.language_model import PackedLanguageModel
from planner.memory import disk, host_memory
from planner.shape import shape_of_model
from training.description import describe_run
from training.forecast import expected_peak, make_forecast
from training.inputs import Inputs


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
    peak = expected_peak(DTYPES[config.model.compute_dtype], world_size)
    forecast = make_forecast(config, inputs, model_config, peak, world_size)
    layers = decoder_layers(model, config.model.layer_class)
    for line in changed_keys(config) + describe_run(config, inputs, model, layers, model_config, world_size):
        say(line)
    host = host_memory(shape, config, forecast.cluster, forecast.workload.worst)
    for line in memory_lines(forecast.memory) + host_lines(host) + disk_lines(disk(shape, config)) + forecast.lines():
        say(line)
    say("dry run: no weights were read and nothing was trained")
    if file and say is print:
        write_json(Path(file), {"config": as_dict(config), **forecast.as_json()})
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
