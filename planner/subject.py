"""What is planned: a config with its model's shape and its data, or a model's name before there is either."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from configs.loading.config_file import override
from data.files import check_paths_exist
from data.tokens import load_tokenizer
from model.architectures import check_model_directory, read_model_config
from model.flops import document_costs
from model.hub import HUB_TIMEOUT, HubUnreachable, explain
from model.rope import check_length, scaled_config
from planner.search import Workloads
from planner.shape import SHAPES, ModelShape, named_config, shape_of_run
from planner.workload import planned_workload, uniform_workload
from training.chat_settings import settle_chat_settings
from training.inputs import Inputs, read_inputs
from training.micro_batch import with_rows

WITHOUT_DATA = (
    "or plan without it: scripts/plan.py --model ID_OR_DIRECTORY_OR_SIZE --sequence TOKENS in place of the config"
)


@dataclass(frozen=True)
class Subject:
    """workloads: number of ranks, kind of device -> `Workloads`. data: what is trained on, in words."""

    config: Config
    shape: ModelShape
    workloads: Callable[[int, str], Workloads]
    data: str


@dataclass(frozen=True)
class Assumed:
    """A run before there is data. length: tokens of each example; None: as many as the sequence."""

    sequence: int = 4096
    examples: int = 5000
    length: int | None = None
    epochs: int = 3
    global_examples: int = 64
    micro_batch: int = 1


def from_config(config: Config) -> Subject:
    """A config whose model directory has config.json and a tokenizer; weights are not read. Raises UserError."""
    model = config.model
    try:
        check_model_directory(model.path, "model.path")
        check_paths_exist(config.data.train)
    except UserError as error:
        raise UserError(f"{error}; {WITHOUT_DATA}") from error
    model_config = read_model_config(model.path, model.rope_type, model.rope_factor, model.rope_original_length)
    tokenizer = load_tokenizer(model.path, config.data.chat_template)
    check_length(config.data.sequence_length, model_config, model.path)
    shape = shape_of_run(config, model_config)
    config = settle_chat_settings(config, tokenizer, Path(config.run.directory) / config.run.name, world_size=1)
    # The plan is the same for any number of ranks and any micro-batch; only the deals differ.
    readable = config if isinstance(config.batch.micro_batch, int) else with_rows(config, 1)
    inputs = read_inputs(readable, tokenizer, model_config.vocab_size, document_costs(shape.work), 1, True)
    return of_inputs(config, shape, inputs)


def of_inputs(config: Config, shape: ModelShape, inputs: Inputs) -> Subject:
    """A run whose data has been read."""

    def workloads(ranks: int, kind: str) -> Workloads:
        @functools.cache
        def of_rows(rows: int):  # noqa: ANN202
            return planned_workload(inputs, shape, rows, config.data.sequence_length, ranks, kind)

        return of_rows

    return Subject(
        config, shape, workloads, f"{', '.join(config.data.train)}: {inputs.train.sources[0].report.splitlines()[0]}"
    )


def from_name(name: str, assumed: Assumed, overrides: list[str]) -> Subject:
    """A model by its size (`planner.shape.SHAPES`), directory or id on the hub, with examples of equal length."""
    config = Config(
        # Checkpointing is what every run of this size starts from; without it activations dwarf all other terms.
        model=Model(path=name, activation_checkpointing="full"),
        data=Data(train=("-",), sequence_length=assumed.sequence),
        batch=Batch(global_examples=assumed.global_examples, micro_batch=assumed.micro_batch),
        optimizer=Optimizer(learning_rate=2e-5, epochs=assumed.epochs),
        sharding=Sharding(),
        run=Run(name="plan"),
    )
    config = override(config, overrides)
    model_config = _configuration(config.model)
    check_length(config.data.sequence_length, model_config, name)
    shape = shape_of_run(config, model_config)
    length = assumed.length or config.data.sequence_length
    if length > config.data.sequence_length:
        raise UserError(f"--length {length} is longer than --sequence {config.data.sequence_length}; lower it")
    global_examples, epochs = config.batch.global_examples, config.optimizer.epochs
    if global_examples is None:
        raise UserError("batch.global_tokens needs data; with --model set --global-examples")

    def workloads(ranks: int, kind: str) -> Workloads:
        @functools.cache
        def of_rows(rows: int):  # noqa: ANN202
            fitting = max(1, rows * config.data.sequence_length // length) if config.data.packing else rows
            return uniform_workload(shape, assumed.examples, length, global_examples, epochs, fitting, ranks)

        return of_rows

    return Subject(
        config, shape, workloads, f"assumed: {assumed.examples:,} examples of {length:,} tokens, all targets"
    )


def _configuration(model: Model) -> PretrainedConfig:
    """Of a name in `SHAPES`, of a directory, or of a model on the hub, of which only config.json is fetched."""
    name, rope = model.path, (model.rope_type, model.rope_factor, model.rope_original_length)
    if Path(name).is_dir():
        return read_model_config(name, *rope)
    if "/" in name:
        return read_model_config(_from_hub(name), *rope)
    known = {size.lower(): size for size in SHAPES}
    return scaled_config(named_config(known.get(name.lower(), name)), *rope)


def _from_hub(model_id: str) -> str:
    """The directory of a config.json."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model_id, "config.json", etag_timeout=HUB_TIMEOUT)
    except Exception as error:  # every HTTP client has its own exception classes
        reason = explain(error, model_id)
        if not isinstance(reason, HubUnreachable):
            raise reason from error
        raise UserError(
            f"{model_id} is not a directory here, and its config.json cannot be fetched, because the Hugging Face hub cannot "
            f"be reached ({reason}); give a directory with a config.json, or one of {', '.join(SHAPES)}"
        ) from error
    return str(Path(path).parent)
