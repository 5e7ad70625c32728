"""The run that is planned: from a config and its data, or from the size of a model alone. No weights are read."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from configs.load import check_world, override
from data.files import check_paths_exist
from data.tokens import load_tokenizer
from model.architectures import check_model_directory, read_model_config
from model.build import build_to_train, model_config_of
from model.flops import document_costs
from model.hub import HUB_TIMEOUT, asking_the_hub
from model.language_model import num_base_parameters
from model.memory import ModelShape, shape_of
from model.rope import check_length, scaled_config
from scripts.plan.machines import Cluster
from scripts.plan.models import SIZES, known_config, named_config
from scripts.plan.workload import Workload, planned_workload, uniform_workload
from training.anchor import planned_bytes
from training.description import schedule_warnings
from training.inputs import read_inputs, settle_settings
from training.micro_batch import with_rows

# The options that go with --model, with their defaults and meanings.
ASSUMED: dict[str, tuple[int, str]] = {
    "sequence": (4096, "data.sequence_length"),
    "examples": (5000, "number of examples"),
    "length": (0, "tokens of each example"),
    "global_examples": (64, "batch.global_examples"),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A run and its machine.

    `workload_of` takes `batch.micro_batch` and `sharding.context`. `lines` describe the data. `anchor` is the size of
    runs/NAME/anchor in bytes. `with_model` plans another config and model on the same machine. It assumes that the other model
    splits the texts into as many tokens.
    """

    config: Config
    shape: ModelShape
    cluster: Cluster
    workload_of: Callable[[int, int], Workload]
    lines: list[str]
    anchor: int = 0
    with_model: "Callable[[Config, PretrainedConfig], Subject] | None" = None


def read_subject(config: Config, cluster: Cluster) -> Subject:
    """Read the data of a config whose model directory has config.json and a tokenizer. Raise UserError for mistakes."""
    model = config.model
    check_world(config, cluster.devices, cluster.per_node)
    try:
        check_model_directory(model.path, "model.path")
        check_paths_exist(config.data.train)
    except UserError as error:
        advice = "scripts/plan.py --model ID_OR_DIRECTORY_OR_SIZE --sequence TOKENS in place of the config"
        raise UserError(f"{error}; or plan without it: {advice}") from error
    model_config = model_config_of(model)
    tokenizer = load_tokenizer(model.path, config.data.chat_template)
    built = build_to_train(config, model_config)
    config = settle_settings(config, built, model_config, tokenizer, show_progress=True)
    check_length(config.data.length, model_config, model.path)
    shape = shape_of(built, model_config, config.model.layer_class)
    # The documents of a step are the same for any number of ranks and any micro-batch; `workload_of` deals them again.
    readable = config if isinstance(config.batch.micro_batch, int) else with_rows(config, 1)
    inputs = read_inputs(readable, tokenizer, model_config.vocab_size, document_costs(shape.work), 1, True)

    lines = [*inputs.train.lines("train", inputs.plan.passes(inputs.total_steps)), *inputs.plan.warnings]
    lines += inputs.validation.lines("validation") if inputs.validation else []
    warnings = schedule_warnings(config, num_base_parameters(built), inputs.total_steps, inputs.warmup_steps)
    lines += [f"warning: {warning}" for warning in warnings]

    def subject_of(config: Config, shape: ModelShape) -> Subject:
        @functools.cache
        def workload_of(rows: int, context: int) -> Workload:
            kind, length = cluster.device.kind, config.data.length
            return planned_workload(inputs, shape, rows, length, cluster.devices, kind, context)

        def with_model(config: Config, model_config: PretrainedConfig) -> Subject:
            return subject_of(config, _shape(config, model_config))

        return Subject(config, shape, cluster, workload_of, lines, planned_bytes(inputs), with_model)

    return subject_of(config, shape)


def assumed_subject(name: str, overrides: list[str], cluster: Cluster, **options: int) -> Subject:
    """Describe a run of a model by its size ("8B"), its directory or its hub id, assuming examples of equal length.

    `options` replace the defaults of `ASSUMED`. Raise UserError for mistakes.
    """
    assumed = {option: value for option, (value, _) in ASSUMED.items()} | options
    config = Config(
        # Full checkpointing is where a run of any size starts; without it activations dwarf the other terms.
        model=Model(path=name, activation_checkpointing="full"),
        data=Data(train=("-",), sequence_length=assumed["sequence"]),
        batch=Batch(global_examples=assumed["global_examples"]),
        optimizer=Optimizer(learning_rate=2e-5, epochs=3),
        sharding=Sharding(),
        run=Run(name="plan"),
    )
    if configs := [text for text in overrides if text.endswith(".py") and "=" not in text]:
        raise UserError(f"with --model, write settings such as lora.rank=64 in place of the config {configs[0]}")
    config = override(config, overrides)
    check_world(config, cluster.devices, cluster.per_node)
    model_config = _model_config(config.model)
    sequence, per_step = config.data.length, config.batch.global_examples
    check_length(sequence, model_config, name)
    examples, length = assumed["examples"], assumed["length"] or sequence
    if length > sequence:
        raise UserError(f"--length {length} is longer than --sequence {sequence}; lower it")
    if per_step is None:
        raise UserError("batch.global_tokens needs data; with --model set --global-examples")

    lines = [f"assumed: {examples:,} examples of {length:,} tokens, all targets"]

    def subject_of(config: Config, model_config: PretrainedConfig) -> Subject:
        shape = _shape(config, model_config)

        @functools.cache
        def workload_of(rows: int, context: int) -> Workload:
            documents = max(1, rows * sequence // length) if config.data.packing else rows
            ranks = cluster.devices // context
            return uniform_workload(shape, examples, length, per_step, config.optimizer.epochs, documents, ranks)

        return Subject(config, shape, cluster, workload_of, lines, with_model=subject_of)

    return subject_of(config, model_config)


def _shape(config: Config, model_config: PretrainedConfig) -> ModelShape:
    return shape_of(build_to_train(config, model_config), model_config, config.model.layer_class)


def _model_config(model: Model) -> PretrainedConfig:
    """Return the configuration of a size, a directory or a hub id. From the hub only an unknown model's config.json is fetched."""
    name, rope = model.path, (model.rope_type, model.rope_factor, model.rope_original_length)
    if Path(name).is_dir():
        return read_model_config(name, *rope)
    if "/" not in name or known_config(name):
        return scaled_config(named_config(name), *rope)
    from huggingface_hub import hf_hub_download

    unreachable = (
        f"{name} is not a directory here, and its config.json cannot be fetched, because the Hugging Face hub cannot "
        f"be reached ({{reason}}); give a directory with a config.json, or one of {', '.join(SIZES)}"
    )
    with asking_the_hub(name, unreachable):
        directory = Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT)).parent
    return read_model_config(str(directory), *rope)
