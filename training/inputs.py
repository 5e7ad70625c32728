"""The inputs of a run: the corpora and the plan of its steps, validation, and the old domain of EWC.

They are read before a process group starts, so that a mistake in a file ends in one sentence.
"""

import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Optimizer
from configs.load import replace as with_setting
from data.batches import MicroBatch, StepBatch, TrainingPlan, collate, plan_pass, plan_training, prefetch
from data.cache import Cache
from data.chat_template import ChatSettings
from data.dealing import Costs, Deal, Dealer, Items
from data.encoding import ExampleEncoder
from data.examples import Documents
from data.files import Reading, check_paths_exist, is_elsewhere, reading_of
from data.reader import Reader, with_shared_examples_reported
from data.sources import Corpus, Windows
from distributed.process_group import Ranks, world_size_from_environment
from model.architectures import first_new_row
from model.dtypes import DTYPES
from model.flops import count_work, document_costs
from model.language_model import PackedLanguageModel, num_base_parameters
from model.rope import window
from training.auto import length_of, settle_rate
from training.chat_settings import chat_settings, settle_chat_settings
from training.identity import Identity, digest_of_row, hash_files

# The rate rises by at most 1/4 of the peak in a step, unless optimizer.warmup_steps is set. AdamW's first updates have the
# size of the rate in every weight, whatever the gradient.
WARMUP_FLOOR = 4
MICRO_BATCHES_DEALT = 8  # micro-batches of a validation whose documents are dealt together


@dataclass(frozen=True)
class Questions:
    """The examples of run.eval_generate, with their prompts as token ids: the same at every evaluation, on any number of ranks.

    metric: scores the answers, on rank 0 alone, whose scores all ranks get. ideal: the scores of the references. line:
    describes the choice of examples, for the log.
    """

    examples: list[dict]
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    metric: Callable[[list[str], list[dict]], dict[str, float]] | None
    line: str
    ideal: dict[str, float]

    def digest(self) -> str:
        """Return a hash of all prompts, the length limit and the stop tokens, by which the ranks compare them."""
        return hashlib.sha256(repr((self.prompts, self.max_new_tokens, sorted(self.stop_ids))).encode()).hexdigest()

    def cost_line(self, parameters: int, dtype: str) -> str:
        """Return a line on the tokens and the memory of each evaluation. dtype: bf16 | fp32, in which the model computes."""
        tokens, prompts = len(self.prompts) * self.max_new_tokens, sum(map(len, self.prompts))
        ideal = ", ".join(f"{name} {value:.4g}" for name, value in self.ideal.items())
        return (
            f"{self.line}: {prompts:,} tokens of prompts and at most {tokens:,} of answers ({self.max_new_tokens} each); "
            f"meanwhile each rank holds the whole model in {dtype}, {parameters * DTYPES[dtype].itemsize / 2**30:.2f} GiB"
            + (f"; the references score {ideal}" if ideal else "")
        )


@dataclass(frozen=True)
class Inputs:
    """The data of a run, the same on every rank. `total_steps` and `warmup_steps` are optimizer steps."""

    train: Corpus
    plan: TrainingPlan
    total_steps: int
    warmup_steps: int
    validation: Corpus | None
    validation_batches: tuple[StepBatch, ...]
    dealer: Dealer
    deal_of: Callable[[Items], Deal]  # the items of a step -> their deal to the ranks
    old_domain: Documents | Windows | None  # ewc.data, from which EWC estimates its Fisher diagonal
    local: Config  # the config with all data on this machine
    questions: Questions | None = None  # the examples of run.eval_generate
    keep: Questions | None = None  # the prompts of forgetting.keep
    kept: str = ""  # the SHA-256 of that file
    first_new_row: int | None = None  # of embedding and head: the first row of a token added to the vocabulary
    files: Identity = field(default_factory=dict)  # the part of the identity that `hash_files` returns
    chats: ChatSettings = ChatSettings()  # how chats are rendered
    stop_ids: tuple[int, ...] = ()  # the tokens that end an answer
    peak_share: float = 1.0  # the fraction of optimizer.learning_rate that the run reaches (`warm_up`)
    tokenizer_digest: str = ""  # identifies the tokenizer's token ids (data/tokens.py)
    # Deals of evaluations, which repeat: (whether the items are of `train`, the items of a batch) -> their deal
    dealt: dict[tuple[bool, Items], Deal] = field(default_factory=dict)
    # Adds the base's predictions for anchored targets to a micro-batch (training/anchor.py)
    add_base: Callable[[MicroBatch, Items], MicroBatch] = lambda micro_batch, items: micro_batch

    def deal(self, step: int) -> Deal:
        """Return the documents of a step, dealt to the ranks. It follows `plan` even if an edited train.py has replaced it."""
        return self.deal_of(self.plan.batch(step).items)

    def micro_batches(self, items: Items, corpus: Corpus, ranks: Ranks) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the documents `items`, on its device; the same number on every rank."""
        key = corpus is self.train, items
        deal = self.dealt.get(key) or self.dealt.setdefault(key, self.dealer.deal(items, corpus, ranks.world_size))
        for dealt in deal.of_rank(ranks.rank):
            yield deal.part_of_rank(collate(dealt, corpus), ranks.rank).to(ranks.device)

    def steps(self, first: int, ranks: Ranks) -> Iterator[tuple[int, Iterator[tuple[MicroBatch, bool]]]]:
        """Yield each step from `first` on: its number, and an iterator of this rank's (micro_batch, is_last).

        A step has the same number of micro-batches on every rank. A thread prepares them in advance while the device computes.
        """

        def all_micro_batches() -> Iterator[tuple[MicroBatch, bool]]:
            for step in range(first, self.total_steps):
                deal, divisor = self.deal(step), self.plan.batch(step).num_target_tokens
                dealt = deal.of_rank(ranks.rank)
                for number, items in enumerate(dealt, 1):
                    batch = self.add_base(collate(items, self.train), items)
                    yield deal.part_of_rank(replace(batch, divisor=divisor), ranks.rank), number == len(dealt)

        upcoming = prefetch(all_micro_batches())

        def of_step(step: int) -> Iterator[tuple[MicroBatch, bool]]:
            for micro_batch, is_last in upcoming:
                if micro_batch.divisor != self.plan.batch(step).num_target_tokens:
                    problem = f"the micro-batches of step {step + 1} are not of the documents that data.plan names now"
                    raise UserError(
                        f"train.py: {problem}; take all of a step, and let a plan depend on its number alone"
                    )
                yield micro_batch.to(ranks.device), is_last
                if is_last:
                    return

        return ((step, of_step(step)) for step in range(first, self.total_steps))


def open_data(
    config: Config,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    script: str,
) -> tuple[Config, Inputs]:
    """Return the config, now with the date of its chats and a number for each `auto`, and the data of the run.

    model: on meta. script: train.py, whose code is hashed before the data is read, because this process does not run later
    edits. Raise UserError for a missing or bad file. With batch.micro_batch=auto every process of torchrun must call this.
    """
    directory, (world_size, _) = Path(config.run.directory, config.run.name), world_size_from_environment()
    is_first = int(os.environ.get("RANK", 0)) == 0
    say = print if is_first else lambda text: None
    files = hash_files(config, script, say)
    config = settle_settings(config, model, model_config, tokenizer, is_first)
    if config.batch.micro_batch == "auto":
        from training.micro_batch import settle_micro_batch

        config = settle_micro_batch(config, model, model_config, directory, world_size, say)
    costs = document_costs(count_work(model, model_config))
    data = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=is_first)
    return config, replace(data, files=files)


def settle_settings(
    config: Config,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    show_progress: bool,
) -> Config:
    """Return the config with the date of its chats, and with numbers in optimizer.learning_rate and data.sequence_length.

    model: on meta. With `show_progress` a line is printed for each `auto`. data.sequence_length=auto reads the training data.
    """
    config = settle_chat_settings(config, tokenizer, Path(config.run.directory, config.run.name))
    config = settle_rate(config, num_base_parameters(model), print if show_progress else lambda text: None)
    return settle_length(config, model_config, tokenizer, show_progress)


def settle_length(
    config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, show_progress: bool
) -> Config:
    """Return the config with a number in data.sequence_length. `auto` reads the training data (training/auto.py)."""
    if config.data.sequence_length != "auto":
        return config
    positions = window(model_config)
    whole = with_setting(config, "data.sequence_length", positions)
    local, reader = local_reader(whole, tokenizer, model_config.vocab_size, show_progress)
    length = length_of(reader, local.data, positions, print if show_progress else lambda text: None)
    return with_setting(config, "data.sequence_length", length)


def local_reader(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int, show_progress: bool
) -> tuple[Config, Reader]:
    """Return the config with all data on this machine, and the reader of its sources. Raise UserError for a missing file."""
    say = functools.partial(print, file=sys.stderr, flush=True) if show_progress else lambda text: None
    paths = data_paths(config)
    check_paths_exist(paths)
    if any(map(is_elsewhere, paths)):
        from data.remote import with_local_files

        config = with_local_files(config, say)
    data = config.data
    reader = Reader(
        ExampleEncoder(tokenizer, chat_settings(data)),
        vocab_size,
        data.length,
        data.too_long,
        cache=Cache(Path(data.cache), say, data.cache_gib) if data.cache else None,
        reading=reading_of(data, data.on_bad),
        digest_of_row=digest_of_row,
    )
    return config, reader


def read_inputs(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    costs: Costs,
    world_size: int,
    show_progress: bool,
) -> Inputs:
    """Read and tokenise all files of a config, and plan the steps.

    vocab_size: the rows of the model's embedding. costs: the FLOPs of documents (`model.flops.Work.costs`). The processes of a
    node share the work in data.cache: one tokenises and draws a progress bar, and with `show_progress` this process prints that
    it waits for another. Only the deals and the batches of validation depend on `world_size`. Raise UserError for a missing or
    bad file.
    """
    config, reader = local_reader(config, tokenizer, vocab_size, show_progress)
    data, batch, ewc = config.data, config.batch, config.ewc
    old_files = ewc.data if ewc.strength else ()
    train = reader.training(data.train, data.mix, config.forgetting.anchor_weight)
    validation = reader.validation(data.validation, data.mix, data.train)
    if validation:
        validation = with_shared_examples_reported(validation, train)
    plan = plan_training(
        train,
        epochs=config.optimizer.epochs,
        seed=config.run.seed,
        global_examples=batch.global_examples,
        global_tokens=batch.global_tokens,
    )
    total_steps = min(plan.num_steps, config.optimizer.max_steps or plan.num_steps)
    warmup_steps, peak_share = warm_up(config.optimizer, total_steps)
    tokens = batch.rows * data.length  # of one micro-batch
    context = config.sharding.context
    dealer = Dealer(tokens if data.packing else batch.rows, costs, data.packing, context)
    old_domain = reader.read(old_files, "the old domain", Reading(on_bad=data.on_bad)) if old_files else None
    validation_batches = ()
    if validation:
        validation_batches = plan_pass(validation, MICRO_BATCHES_DEALT * max(1, world_size // context) * tokens)

    @functools.lru_cache(maxsize=16)  # the thread that makes micro-batches calls it first, then the training loop
    def deal_of(items: Items) -> Deal:
        return dealer.deal(items, train, world_size)

    questions, keep, kept = None, None, ""
    if config.run.eval_generate:
        from training.questions import choose_questions

        questions = choose_questions(config, reader, train.sources[0], is_first=show_progress)
    if config.forgetting.keep:
        from training.questions import prompts_to_keep

        keep, kept = prompts_to_keep(config, reader.encoder, is_first=show_progress)
    new_row = first_new_row(config.model.path)
    return Inputs(
        train,
        plan,
        total_steps,
        warmup_steps,
        validation,
        validation_batches,
        dealer,
        deal_of,
        old_domain,
        config,
        questions,
        keep,
        kept,
        new_row,
        chats=chat_settings(data),
        stop_ids=reader.encoder.stop_ids,
        peak_share=peak_share,
        tokenizer_digest=reader.encoder.tokenizer_digest,
    )


def warm_up(optimizer: Optimizer, total_steps: int) -> tuple[int, float]:
    """Return (steps of the warm-up, fraction of optimizer.learning_rate that the run reaches).

    A warm-up by `warmup_ratio` has at least WARMUP_FLOOR steps, or half of a shorter run. Such a run reaches only as many
    quarters of the rate as its warm-up has steps. `warmup_steps`, and a ratio of 0, are obeyed.
    """
    if optimizer.warmup_steps is not None or not optimizer.warmup_ratio:
        return optimizer.warmup_steps or 0, 1.0
    floor = min(WARMUP_FLOOR, -(-total_steps // 2))
    steps = max(floor, math.ceil(optimizer.warmup_ratio * total_steps))
    return steps, min(1.0, steps / WARMUP_FLOOR)


def data_paths(config: Config) -> list[str]:
    """Return all data paths that a run with `config` reads."""
    data, ewc = config.data, config.ewc
    mixed_in = [path for source in data.mix for path in (*source.paths, *source.validation)]
    return [*data.train, *data.validation, *(ewc.data if ewc.strength else ()), *mixed_in]
