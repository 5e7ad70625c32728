"""The plan of a run: its memory, time and disk on a cluster, and which settings fit. Nothing is trained, no weights are read.

Memory is that of model/memory.py for the largest micro-batch that occurs, time that of scripts/plan/step_time.py for the steps that
the ranks of such a run compute. "Cheapest" is defined as follows, because bf16 weights and moments change what is trained, and
no other setting here does:

1. The user's own setting, if it fits.
2. Else, of the settings that fit and store at least as many bytes per parameter as the user's, the one with the highest
   expected tokens per second; of those within 1% of it the one that needs the least memory. Where none fits without
   `sharding.cpu_offload`, twice as many ranks share a micro-batch (`sharding.context`), then twice as many again.
3. Else the same of 14N, then of 12N, 8N and 6N: as little precision as possible is given up.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from common.dtypes import DTYPES, has_native_bf16
from common.errors import UserError
from configs.config import KEYS, Batch, Config, Data, Model, Optimizer, Run, Sharding
from configs.load import check_config, check_world, override
from configs.load import replace as with_value
from data.dealing import Dealer, balance
from data.examples import Documents
from data.files import check_paths_exist
from data.tokens import load_tokenizer
from distributed.disks import ALSO_KEPT
from distributed.host_memory import free_bytes
from distributed.optimizer import parameter_dtype
from distributed.process_group import world_size_from_environment
from distributed.sharding import local_shape
from eval.comparison.arms import metric_rows
from eval.forgetting import TASK_TOKENS, TEXT_BYTES
from model.architectures import check_model_directory, read_model_config
from model.build import build_to_train, model_config_of
from model.flops import PAIR_WEIGHTS, data_sheet_peak, document_costs, measured_flops, step_flops
from model.hub import HUB_TIMEOUT, asking_the_hub
from model.memory import (
    Layout,
    ModelShape,
    count_activations,
    ewc_bytes,
    gradient_itemsize,
    largest_rows,
    layout_of,
    moment_bytes,
    optimizer_bytes,
    rows_of_auto,
    shape_of,
    step_memory,
    trained_elements,
)
from model.rope import check_length, scaled_config
from scripts.plan.machines import Cluster, cluster_of, cpu_cluster, found_device
from scripts.plan.step_time import Speed, StepWork, expected_speed
from training.anchor import planned_bytes
from training.chat_settings import settle_chat_settings
from training.description import schedule_warnings
from training.inputs import Inputs, read_inputs
from training.micro_batch import largest_useful, with_rows
from training.record import newest_start

STRATEGIES = ("full", "grad_op", "hybrid", "none")
MEMORIES = ("16N", "14N", "12N", "8N", "6N")
# (model.activation_checkpointing, model.checkpoint_every), the least recomputation first
CHECKPOINTING = (("none", 1), ("selective", 1), ("full", 4), ("full", 2), ("full", 1), ("offload", 1))
MOST_ROWS = 1024  # no larger micro-batch is tried
WORTH_IT = 1.05  # a faster setting is proposed if it is at least so many times as fast
AS_FAST = 0.99  # settings at least so many times as fast as another are as fast
WORTH_THE_PRECISION = 1.25  # and one with fewer bytes per parameter only then
MOST_DEALS = 2000  # steps that are dealt in search of the worst micro-batch
MOST_ITEMS = 150_000  # documents of these steps together: about ten seconds
MOST_STEPS = 200  # steps whose work is kept
# Of what a CPU process holds, over its tensors: pages of mapped weights and data, libraries, what the allocator keeps.
CPU_EXCESS = 2.2
DOCUMENT_BYTES = 64  # of a rank's lists for each document while it starts; later half of it (data/examples.py)
BYTES_PER_TOKEN = 4  # of English, on average, in the vocabularies of today's models

# Shapes by name, for a plan before any model has been chosen. Sources: the config.json of each model.
SHAPE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
    *("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),  # only of models with experts
)
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "3B": (3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2 3B
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2 7B
    "8B": (4096, 14336, 32, 32, 8, 128256, False),  # Llama 3.1 8B
    "13B": (5120, 13824, 40, 40, 40, 32000, False),  # Llama 2 13B
    "70B": (8192, 28672, 80, 64, 8, 128256, False),  # Llama 3.1 70B
    "30B-A3B": (2048, 6144, 48, 32, 4, 151936, False, 128, 128, 8, 768),  # Qwen3-30B-A3B
}
# A run before there is data, as scripts/plan.py --model assumes it: option -> (its value, what it stands for).
ASSUMED: dict[str, tuple[int, str]] = {
    "sequence": (4096, "data.sequence_length"),
    "examples": (5000, "number of examples"),
    "length": (0, "tokens of each example"),
    "epochs": (3, "optimizer.epochs"),
    "global_examples": (64, "batch.global_examples"),
    "micro_batch": (1, "batch.micro_batch"),
}


# ---- What the ranks of a run compute -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Forward and backward of one micro-batch on one rank. lengths: of its documents, in tokens. step: 0-based."""

    lengths: tuple[int, ...]
    targets: int
    step: int = 0
    rank: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Workload:
    """steps: those that were looked at, evenly spaced over `total_steps`. worst: the micro-batch with the most tokens."""

    total_steps: int
    steps: Sequence[StepWork]
    worst: Load
    is_exact: bool  # whether all steps were looked at for `worst`

    @property
    def mean_tokens(self) -> float:
        """Tokens of a mean step, over all ranks."""
        return sum(step.tokens for step in self.steps) / len(self.steps)

    @property
    def tokens(self) -> float:
        """Tokens of the whole run."""
        return self.mean_tokens * self.total_steps


def planned_workload(
    inputs: Inputs,
    shape: ModelShape,
    rows: int,
    sequence_length: int,
    ranks: int,
    kind: str = "cuda",
    context: int = 1,
) -> Workload:
    """The workload of a run's real plan, dealt to `ranks` ranks with micro-batches of `rows * sequence_length` tokens.

    The plan does not depend on the number of ranks; the deals do, and they are what the ranks of such a run will compute.
    kind: of the planned device, whose cost of attention decides the deals (`model.flops.PAIR_WEIGHTS`). context: so many
    ranks share a micro-batch. Without packing a micro-batch has `rows` documents. All steps are looked at where that is
    cheap, else evenly spaced ones.
    """
    packs, corpus, total = inputs.dealer.packing, inputs.train, inputs.total_steps
    costs = functools.partial(shape.work.costs, pair_weight=PAIR_WEIGHTS[kind])
    dealer = Dealer(rows * sequence_length if packs else rows, costs, packs, context)
    items_per_step = max(1, len(inputs.plan.batch(0).items))
    looked_at = _evenly_spaced(total, min(MOST_DEALS, max(20, MOST_ITEMS // items_per_step)))
    kept = {looked_at[i] for i in _evenly_spaced(len(looked_at), MOST_STEPS)}
    steps: list[StepWork] = []
    most, worst = -1, (0, 0, ())  # tokens; step, rank, items
    for step in looked_at:
        batch = inputs.plan.batch(step)
        deal = dealer.deal(batch.items, corpus, ranks)
        for micro_batch in deal.items:
            tokens = [sum(map(corpus.num_tokens, items)) for items in micro_batch]
            rank = int(np.argmax(tokens))
            if tokens[rank] > most:  # of equal ones the first
                most, worst = tokens[rank], (step, rank * context, micro_batch[rank])
        if step in kept:
            targets, tokens = sum(batch.targets_by_source), sum(batch.document_lengths)
            flops = step_flops(shape.work, batch.document_lengths, targets)
            steps.append(StepWork(step, tokens, targets, flops, len(deal.items), balance([deal])))
    step, rank, items = worst
    lengths = tuple(length for item in items for length in corpus.document_lengths(item))
    targets = sum(int(np.count_nonzero(corpus.get(item)[1])) for item in items)
    return Workload(total, steps, Load(lengths, targets, step, rank), is_exact=len(looked_at) == total)


def uniform_workload(
    shape: ModelShape, examples: int, length: int, global_examples: int, epochs: int, rows: int, ranks: int
) -> Workload:
    """A workload before there is data: `examples` documents of `length` tokens, all of them targets.

    rows: documents of one micro-batch on one rank; ranks: that have micro-batches of their own. As in training, an epoch ends
    with a smaller step, and a step has the fewest micro-batches that hold it, with documents spread as evenly as possible.
    """
    whole, rest = divmod(examples, global_examples)
    epoch = [global_examples] * whole + [rest] * bool(rest)

    def micro_batches(documents: int) -> int:
        return -(-documents // (rows * ranks))

    fullest = [-(-documents // (micro_batches(documents) * ranks)) for documents in epoch]
    most = max(fullest)  # a smaller step in fewer micro-batches may have the fullest of them
    steps = []
    for step in _evenly_spaced(len(epoch) * epochs, MOST_STEPS):
        documents = epoch[step % len(epoch)]
        count, tokens = micro_batches(documents), documents * length
        less, more = divmod(documents, count * ranks)  # the first `more` of the parts have one document more
        flops = step_flops(shape.work, [length] * documents, tokens)
        slowest = count * less + -(-more // ranks)
        steps.append(StepWork(step, tokens, tokens, flops, count, documents / ranks / slowest))
    worst = Load((length,) * most, most * length, fullest.index(most))
    return Workload(len(epoch) * epochs, steps, worst, is_exact=True)


def _evenly_spaced(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of the numbers below `count`, the first one and the last one among them."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]


# ---- What is planned -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A run and its machine. lines: about its data, in words.

    workload_of: `batch.micro_batch` and `sharding.context` -> what the ranks compute. documents: of which every rank has lists.
    anchor: bytes of runs/NAME/anchor.
    """

    config: Config
    shape: ModelShape
    cluster: Cluster
    workload_of: Callable[[int, int], Workload]
    lines: list[str]
    documents: int = 0
    anchor: int = 0


def read_subject(config: Config, cluster: Cluster) -> Subject:
    """A config whose model directory has config.json and a tokenizer; weights are not read. Raises UserError."""
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
    check_length(config.data.sequence_length, model_config, model.path)
    shape = _shape(config, model_config)
    config = settle_chat_settings(config, tokenizer, Path(config.run.directory) / config.run.name)
    # The plan of steps is the same for any number of ranks and any micro-batch; only the deals differ.
    readable = config if isinstance(config.batch.micro_batch, int) else with_rows(config, 1)
    inputs = read_inputs(readable, tokenizer, model_config.vocab_size, document_costs(shape.work), 1, True)

    @functools.cache
    def workload_of(rows: int, context: int) -> Workload:
        kind, length = cluster.device.kind, config.data.sequence_length
        return planned_workload(inputs, shape, rows, length, cluster.devices, kind, context)

    lines = [*inputs.train.lines("train", inputs.plan.passes(inputs.total_steps)), *inputs.plan.warnings]
    lines += inputs.validation.lines("validation") if inputs.validation else []
    warnings = schedule_warnings(config, shape.num_parameters, inputs.total_steps, inputs.warmup_steps)
    lines += [f"warning: {warning}" for warning in warnings]
    documents = sum(len(source) for source in inputs.train.sources if isinstance(source, Documents))
    return Subject(config, shape, cluster, workload_of, lines, documents, planned_bytes(inputs))


def assumed_subject(name: str, overrides: list[str], cluster: Cluster, **given: int) -> Subject:
    """A model by its size (`SHAPES`), directory or id on the hub, with examples of equal length. Raises UserError.

    given: values in place of those of ASSUMED.
    """
    assumed = {option: value for option, (value, _) in ASSUMED.items()} | given
    config = Config(
        # Checkpointing is what every run of this size starts from; without it activations dwarf all other terms.
        model=Model(path=name, activation_checkpointing="full"),
        data=Data(train=("-",), sequence_length=assumed["sequence"]),
        batch=Batch(global_examples=assumed["global_examples"], micro_batch=assumed["micro_batch"]),
        optimizer=Optimizer(learning_rate=2e-5, epochs=assumed["epochs"]),
        sharding=Sharding(),
        run=Run(name="plan"),
    )
    config = override(config, overrides)
    check_world(config, cluster.devices, cluster.per_node)
    model_config = _model_config(config.model)
    sequence, of_step = config.data.sequence_length, config.batch.global_examples
    check_length(sequence, model_config, name)
    shape, examples, length = _shape(config, model_config), assumed["examples"], assumed["length"] or sequence
    if length > sequence:
        raise UserError(f"--length {length} is longer than --sequence {sequence}; lower it")
    if of_step is None:
        raise UserError("batch.global_tokens needs data; with --model set --global-examples")

    @functools.cache
    def workload_of(rows: int, context: int) -> Workload:
        fitting = max(1, rows * sequence // length) if config.data.packing else rows
        numbers = examples, length, of_step, config.optimizer.epochs
        return uniform_workload(shape, *numbers, fitting, cluster.devices // context)

    lines = [f"assumed: {examples:,} examples of {length:,} tokens, all targets"]
    return Subject(config, shape, cluster, workload_of, lines)


def _shape(config: Config, model_config: PretrainedConfig) -> ModelShape:
    return shape_of(build_to_train(config, model_config), model_config, config.model.layer_class)


def named_config(name: str) -> PretrainedConfig:
    """The configuration of one of `SHAPES`, in any case. Raises UserError for another name."""
    known = {size.lower(): numbers for size, numbers in SHAPES.items()}
    if name.lower() not in known:
        raise UserError(
            f"{name} is neither a model directory, nor an id on the hub (ORG/NAME), nor one of {', '.join(SHAPES)}"
        )
    numbers = dict(zip(SHAPE_KEYS, known[name.lower()], strict=False)) | {"max_position_embeddings": 131072}
    return (Qwen3MoeConfig if "num_experts" in numbers else LlamaConfig).from_dict(numbers)


def _model_config(model: Model) -> PretrainedConfig:
    """Of a name in `SHAPES`, of a directory, or of a model on the hub, of which only config.json is fetched."""
    name, rope = model.path, (model.rope_type, model.rope_factor, model.rope_original_length)
    if Path(name).is_dir():
        return read_model_config(name, *rope)
    if "/" not in name:
        return scaled_config(named_config(name), *rope)
    from huggingface_hub import hf_hub_download

    unreachable = (
        f"{name} is not a directory here, and its config.json cannot be fetched, because the Hugging Face hub cannot "
        f"be reached ({{reason}}); give a directory with a config.json, or one of {', '.join(SHAPES)}"
    )
    with asking_the_hub(name, unreachable):
        directory = Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT)).parent
    return read_model_config(str(directory), *rope)


def this_machine(config: Config) -> tuple[Config, Cluster]:
    """The config as this machine computes it, and the ranks that torchrun has started here, or one.

    A CPU's FLOP/s are those of a measured product, and so are those of a GPU without a data sheet.
    """
    ranks, per_node = world_size_from_environment()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if not has_native_bf16(device):  # all ranks then compute in fp32 (training/start.py: agree_on_dtype)
        config = replace(config, model=replace(config.model, compute_dtype="fp32"))
    dtype = DTYPES[config.model.compute_dtype]
    if not on_cuda:  # all processes share the cores
        return config, cpu_cluster(ranks, measured_flops(device, dtype, 1024), free_bytes(device, 1))
    card = torch.cuda.get_device_properties(device)
    flops = data_sheet_peak(card.name) or measured_flops(device, dtype, 8192)
    gpu = found_device(card.name, card.total_memory, flops)
    return config, cluster_of(ranks, max(1, ranks // per_node), gpu)


# ---- The plan of one setting ---------------------------------------------------------------------------------------------


class Plan:
    """One setting of a run and what it needs. config: with a number in `batch.micro_batch`, of which `largest_rows` would fit.

    memory: of the fullest rank's device, at the peak of the step with the worst micro-batch. host: bytes of one node's host
    beside its processes, by what they are for. needed: bytes of device memory, at least and at most: on a CPU a process holds
    more than its tensors. fits_host: True if the host's memory is unknown.
    """

    def __init__(self, subject: Subject, config: Config, largest_rows: int = 0) -> None:
        self.subject, self.config, self.largest_rows = subject, config, largest_rows
        self.shape, self.cluster, self.layout = subject.shape, subject.cluster, _layout(config, subject.cluster)
        self.workload = subject.workload_of(config.batch.rows, config.sharding.context)
        worst, device = self.workload.worst, self.cluster.device
        self.memory = step_memory(self.shape, config, self.layout, worst.lengths, worst.targets)
        self.needed = self.memory.total, round((1 if self.layout.on_cuda else CPU_EXCESS) * self.memory.total)
        self.host = host_bytes(self)
        self.fits_device = self.needed[1] <= device.memory
        self.fits_host = not self.cluster.host_memory or sum(self.host.values()) <= self.cluster.host_memory
        self.fits = self.fits_device and self.fits_host
        self.bytes_per_parameter = int(config.optimizer.memory.removesuffix("N"))

    @cached_property
    def speed(self) -> Speed:
        """Expected, whether it fits or not."""
        workload = self.workload
        return expected_speed(self.shape, self.config, self.cluster, workload.steps, workload.total_steps)

    @property
    def rate(self) -> float:
        """Expected tokens per second of one device, in the middle of the range; 0 if it does not fit."""
        return self.speed.middle if self.fits else 0.0

    @property
    def gpu_hours(self) -> list[float]:
        """Hours of all devices together, short and long."""
        return [self.cluster.devices * hours for hours in self.speed.hours]

    @property
    def disk(self) -> dict[str, int]:
        """Bytes on the run's disk of one checkpoint, of the export, and of the whole run: all checkpoints that are kept, the
        one being written, EWC's anchor, the base's predictions and the export (distributed/disks.py: check_room_for_run)."""
        shape, run = self.shape, self.config.run
        checkpoint = _saved_bytes(shape, self.config, 1)
        frozen = shape.num_parameters - shape.num_trained  # adapters are merged into the export
        export = (frozen or shape.num_parameters) * shape.stored_dtype.itemsize
        kept = (run.keep_last + ALSO_KEPT) * checkpoint
        of_run = kept + max(checkpoint, export) + ewc_bytes(shape, self.config, 1) + self.subject.anchor
        return {"checkpoint": checkpoint, "run": of_run, "export": export}

    @property
    def overrides(self) -> list[str]:
        """The `section.key=value` that turn the user's config into this one."""
        own, base = ({key: attrgetter(key)(config) for key in KEYS} for config in (self.config, self.subject.config))
        return [f"{key}={value}" for key, value in own.items() if value != base[key]]


def _layout(config: Config, cluster: Cluster) -> Layout:
    return layout_of(config, cluster.devices, cluster.per_node, cluster.device.kind)


def host_bytes(plan: Plan) -> dict[str, int]:
    """`Plan.host`. On a CPU nothing is counted again that is counted as the device's."""
    shape, config, layout, ranks = plan.shape, plan.config, plan.layout, plan.cluster.per_node
    on_host = layout.on_cuda and (config.ewc.device == "cpu" or layout.offloads)
    worst = plan.workload.worst.lengths
    counted = count_activations(shape, config.model, config.lora, layout.kind, worst, layout.context)
    tokens = TEXT_BYTES // BYTES_PER_TOKEN
    if config.data.validation or config.data.validation_share:
        tokens += TASK_TOKENS
    tokens = -(-tokens // plan.cluster.nodes)  # the texts are dealt to all ranks
    listed = ranks * DOCUMENT_BYTES * plan.subject.documents
    return {
        "offload": ranks * _pinned_bytes(shape, config, layout.shards) if layout.offloads else 0,
        "activations": ranks * counted.on_host,
        "ewc": ranks * ewc_bytes(shape, config, layout.shards) if on_host else 0,
        "async_save": ranks * _saved_bytes(shape, config, layout.shards) if config.run.async_save else 0,
        "data": listed if layout.on_cuda and listed >= 2**30 else 0,
        # The base's distributions: fp16 log-probabilities and an int64 a token.
        "forgetting": tokens * (2 * shape.num_tokens + 8) if config.run.eval_general else 0,
    }


def _saved_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """Trained weights and moments of a rank: what a checkpoint holds."""
    memory = config.optimizer.memory
    weights = trained_elements(shape, shards) * parameter_dtype(memory).itemsize
    return weights + moment_bytes(shape, memory, shards)


def _pinned_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """Host memory of one rank under sharding.cpu_offload. Weights and gradients are pinned, moments are not.

    torch rounds every pinned tensor up to a power of two (pytorch#150517).
    """
    memory, trained = config.optimizer.memory, Counter(shape.trained)
    frozen = Counter(one for unit in shape.units for one in unit.shapes) - trained
    total = optimizer_bytes(shape, memory, shards)
    itemsizes = (parameter_dtype(memory).itemsize, gradient_itemsize(memory))
    for tensors, itemsize in ((frozen, shape.frozen_itemsize), *((trained, itemsize) for itemsize in itemsizes)):
        sizes = {one: local_shape(one, shards).numel() * itemsize for one in tensors}
        total += sum(tensors[one] << (size - 1).bit_length() for one, size in sizes.items() if size)
    return total


def plan_of(config: Config, cluster: Cluster | None = None, rows: int | None = None) -> Plan:
    """The plan of a run as its config says, without a search; its data is read. Raises UserError.

    cluster: None is this machine (`this_machine`). rows: what `batch.micro_batch=auto` stands for; None: what a run would
    take.
    """
    if cluster is None:
        config, cluster = this_machine(config)
    subject = read_subject(config if rows is None else with_rows(config, rows), cluster)
    return plan_setting(subject, subject.config, as_written=True)


def plan_setting(subject: Subject, config: Config, as_written: bool = False) -> Plan:
    """The plan of a setting with the micro-batch of the config, or the largest that fits if that is smaller.

    as_written: with the micro-batch of the config, whether it fits or not; of `auto` with the one that a run takes.
    """
    cluster, rows, layout = subject.cluster, config.batch.micro_batch, _layout(config, subject.cluster)
    available = cluster.device.memory / (1 if layout.on_cuda else CPU_EXCESS)
    useful = min(MOST_ROWS, largest_useful(config, cluster.devices))
    at_most = max(useful, rows) if isinstance(rows, int) else useful
    largest = largest_rows(subject.shape, config, layout, lambda memory: memory.total <= available, at_most)
    if not isinstance(rows, int):  # auto
        rows = rows_of_auto(subject.shape, config, layout, cluster.device.memory, useful)
        rows = max(1, rows if as_written else min(rows, largest))
    elif not (as_written or largest >= rows or Plan(subject, config).fits_device):
        rows = next(iter(_accepted_rows(config, range(max(1, largest), 0, -1), cluster)), 1)
    return Plan(subject, with_rows(config, rows), largest)


def _accepted_rows(config: Config, rows: range, cluster: Cluster) -> list[int]:
    """Those of `rows` with which a run starts: without packing a step fills all of its micro-batches."""
    return [one for one in rows if config.data.packing or _is_accepted(with_rows(config, one), cluster)]


def _is_accepted(config: Config, cluster: Cluster) -> bool:
    """Whether a run starts with these settings on so many ranks."""
    try:
        check_config(config)
        check_world(config, cluster.devices, cluster.per_node)
    except UserError:
        return False
    return True


# ---- The search ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The result of a search. faster, lighter: further proposals, with the same and with fewer bytes per parameter.

    If nothing fits, nearest is the setting that needs least of a device, devices how many of them would hold one (None if 64
    times as many are too few), and with_more_host what would fit if the host had its memory.
    """

    own: Plan
    plans: list[Plan]  # of all candidates
    cheapest: Plan | None = None
    faster: Plan | None = None
    lighter: Plan | None = None
    nearest: Plan | None = None
    devices: int | None = None
    with_more_host: Plan | None = None


def search(subject: Subject) -> Found:
    """Plan the user's setting and all candidates, and choose."""
    config, plans, fitting = subject.config, list[Plan](), list[Plan]()
    own = plan_setting(subject, config, as_written=True)
    for context in contexts(subject):
        shared = with_value(config, "sharding.context", context)
        plans += [plan_setting(subject, one) for one in candidates(shared, subject.cluster)]
        fitting = [plan for plan in plans if plan.fits]
        on_device = [plan for plan in fitting if plan.config.sharding.cpu_offload <= config.sharding.cpu_offload]
        if own.fits or any(plan.bytes_per_parameter >= own.bytes_per_parameter for plan in on_device):
            break
    if not fitting and not own.fits:
        return _nothing_fits(own, plans)
    best, least = own, own.bytes_per_parameter
    if not own.fits:
        least = min(least, max(plan.bytes_per_parameter for plan in fitting))
        best = _fastest([plan for plan in fitting if plan.bytes_per_parameter >= least])
    faster = _fastest([plan for plan in fitting if plan.bytes_per_parameter >= best.bytes_per_parameter])
    faster = faster if faster.rate >= WORTH_IT * best.rate else None
    sizes = sorted(
        {plan.bytes_per_parameter for plan in fitting if plan.bytes_per_parameter < best.bytes_per_parameter}
    )
    fewer = (_fastest([plan for plan in fitting if plan.bytes_per_parameter == size]) for size in reversed(sizes))
    enough = WORTH_THE_PRECISION * (faster or best).rate
    return Found(own, plans, best, faster, next((plan for plan in fewer if plan.rate >= enough), None))


def contexts(subject: Subject) -> list[int]:
    """The user's `sharding.context`, then twice, four times and eight times as many, where a run accepts them."""
    config, heads = subject.config, subject.shape.config.num_attention_heads
    own, *more = (factor * config.sharding.context for factor in (1, 2, 4, 8))
    shared = {one: with_value(config, "sharding.context", one) for one in more if heads % one == 0}
    return [own, *(one for one in shared if _is_accepted(shared[one], subject.cluster))]


def candidates(config: Config, cluster: Cluster) -> list[Config]:
    """The user's config first, then every other combination that differs on this cluster and that a run accepts."""
    own, on_cuda = config.sharding, cluster.device.kind == "cuda"
    differs = {"full": True, "hybrid": cluster.nodes > 1}  # from `full` on this cluster
    found = [config]
    for strategy, offload, memory, (mode, every) in product(STRATEGIES, (False, True), MEMORIES, CHECKPOINTING):
        if strategy != own.strategy and not differs.get(strategy, cluster.devices > 1):
            continue
        if not on_cuda and (offload != own.cpu_offload or mode == "offload"):
            continue
        sharding = replace(
            own,
            strategy=strategy,
            cpu_offload=offload,
            shard_size=own.shard_size if strategy == "hybrid" else None,
            reduce_dtype="fp32" if strategy in ("hybrid", "none") else own.reduce_dtype,
        )
        optimizer = replace(config.optimizer, memory=memory)
        model = replace(config.model, activation_checkpointing=mode, checkpoint_every=every)
        other = replace(config, model=model, optimizer=optimizer, sharding=sharding)
        if other != config and _is_accepted(other, cluster):
            found.append(other)
    return found


def _fastest(plans: Iterable[Plan]) -> Plan:
    """Of the plans that are as fast as the fastest, the one that needs the least memory, with the best micro-batch; where
    fewer ranks share one, that of the fewest.

    A larger micro-batch gains the more, the more each one copies and gathers. So one setting of every kind of checkpointing
    and offload is tried with larger ones, and not only those that are fast with the user's.
    """
    of_kind: dict[tuple, Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.rate):
        model, layout = plan.config.model, plan.layout
        of_kind[model.activation_checkpointing, model.checkpoint_every, layout.offloads, layout.context] = plan
    larger = [_with_larger_rows(plan) for plan in of_kind.values()]
    enough = AS_FAST * max(plan.rate for plan in larger)
    as_fast = [plan for plan in larger if plan.rate >= enough]
    return min(as_fast, key=lambda plan: (plan.layout.context, plan.memory.total))


def _with_larger_rows(plan: Plan) -> Plan:
    """With a larger micro-batch if that is faster: fewer micro-batches gather the parameters less often."""
    best, cluster, config, rows = plan, plan.cluster, plan.config, plan.config.batch.rows
    at_most = min(plan.largest_rows, largest_useful(config, cluster.devices))
    while max(step.micro_batches for step in plan.subject.workload_of(rows, config.sharding.context).steps) > 1:
        more = _accepted_rows(config, range(rows + 1, at_most + 1), cluster)
        if not more:
            break
        rows = next((larger for larger in more if larger >= 2 * rows), more[-1])
        larger = Plan(plan.subject, with_rows(config, rows), plan.largest_rows)
        if larger.rate >= WORTH_IT * best.rate:
            best = larger
    return best


def _nothing_fits(own: Plan, plans: list[Plan]) -> Found:
    """What comes closest to fitting, with the user's bytes per parameter or more."""
    kept = [plan for plan in plans if plan.bytes_per_parameter >= own.bytes_per_parameter]
    closest = min(kept, key=lambda plan: (not plan.fits_host, plan.memory.total))
    on_device = [plan for plan in kept if plan.fits_device]
    more_host = min(on_device, key=lambda plan: sum(plan.host.values()), default=None)
    # The same micro-batch: what more devices change is the part of the model that each one holds.
    same = Workload(1, [], closest.workload.worst, True)
    cluster = own.cluster
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        devices = factor * cluster.devices  # nodes of up to 8 of them, then more nodes; of a CPU more nodes
        is_full = cluster.nodes > 1 or cluster.per_node >= 8 or cluster.device.kind == "cpu"
        per_node = cluster.per_node if is_full else min(8, devices)
        nodes = -(-devices // per_node)
        larger = replace(cluster, devices=nodes * per_node, nodes=nodes)
        subject = replace(own.subject, cluster=larger, workload_of=lambda rows, context: same)
        if any(Plan(subject, plan.config).fits for plan in kept):
            return Found(own, plans, nearest=closest, devices=larger.devices, with_more_host=more_host)
    return Found(own, plans, nearest=closest, with_more_host=more_host)


# ---- A plan beside a run -------------------------------------------------------------------------------------------------


def plan_of_run(config: Config, run: Path) -> Plan:
    """The plan of a config on the machine of the run's last start, as its config.json records it. Raises UserError."""
    record = newest_start(run)
    if not {"world_size", "devices"} <= record.keys():
        raise UserError(f"{run}/config.json says nothing of the run's machine; give a run of train.py")
    ranks, devices = record["world_size"], record["devices"]
    nodes, name = len({one["host"] for one in devices}), devices[0]["device"]
    rows = record["config"]["batch"]["micro_batch"] if config.batch.micro_batch == "auto" else None
    if name.startswith("cpu"):
        config, here = this_machine(config)
        return plan_of(config, cpu_cluster(ranks, here.device.flops * here.devices, here.host_memory), rows)
    return plan_of(config, cluster_of(ranks, nodes, name), rows)


def measured(run: Path) -> dict[str, float]:
    """steps, tokens per second and GiB of rank 0's peak, by the rows of a run's metrics.jsonl. Raises UserError.

    The first row of the run is left out: it holds what happens only once.
    """
    rows = [row for row in metric_rows(run) if "train/tokens_per_second" in row]
    if len(rows) < 2:
        raise UserError(
            f"{run}/metrics.jsonl has {len(rows)} rows of steps, and the comparison needs two; give the directory of a run"
        )
    tokens, seconds = (sum(each) for each in zip(*timed_steps(rows), strict=True))
    return {
        "steps": rows[-1]["step"] - rows[0]["step"],
        "tokens_per_second": tokens / seconds,
        "memory_gib": max(row["train/memory_gib"] for row in rows),
    }


def timed_steps(rows: list[dict]) -> list[tuple[int, float]]:
    """(tokens, seconds) of each row of a training step after the first, which has what happens only once."""
    found = [row for row in rows if row.get("train/tokens_per_second")]
    tokens = [after["train/tokens"] - before["train/tokens"] for before, after in zip(found, found[1:], strict=False)]
    return [(count, count / row["train/tokens_per_second"]) for count, row in zip(tokens, found[1:], strict=True)]
