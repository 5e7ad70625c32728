"""Everything a run reads: the corpora and the plan of its steps, validation, and the old domain of EWC.

It is read before a process group starts, so that a mistake in a file ends in one sentence.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from configs.config import Config
from data.batches import Plan, TrainingPlan, plan_pass, plan_training
from data.dealing import Costs, Deal, Dealer
from data.encoding import ExampleEncoder
from data.examples import Documents
from data.files import check_paths_exist
from data.formats import Reading
from data.reader import Reader, with_shared_examples_reported
from data.sources import Corpus, Windows
from training.asked import Asked, read_asked
from training.chat_settings import chat_settings

MICRO_BATCHES_DEALT = 8  # micro-batches of a validation whose documents are dealt together


@dataclass(frozen=True)
class Inputs:
    """The data of a run. `total_steps` and `warmup_steps` are optimizer steps."""

    train: Corpus
    plan: TrainingPlan
    total_steps: int
    warmup_steps: int
    validation: Corpus | None
    validation_plan: Plan | None
    dealer: Dealer
    deal: Callable[[int], Deal]  # step -> its documents, dealt to the ranks
    old_domain: Documents | Windows | None  # of ewc.data: what EWC estimates its Fisher diagonal from
    asked: Asked | None = None  # what run.eval_generate answers


def read_inputs(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    costs: Costs,
    world_size: int,
    show_progress: bool,
) -> Inputs:
    """Read and tokenize all files of a config, and plan the steps.

    The processes of a node share the work in data.cache. The one that tokenises draws a progress bar; `show_progress` says
    whether this process prints that it waits for another one. `vocab_size` is the number of rows of the model's embedding,
    `costs` are the FLOPs of documents (`model.flops.Work.costs`). The deals depend on `world_size`, and so do the steps of
    validation; nothing else does. Raises UserError for a missing or bad file.
    """
    data, batch, ewc = config.data, config.batch, config.ewc
    old_files = ewc.data if ewc.strength else ()
    mixed_in = [path for source in data.mix for path in (*source.paths, *source.validation)]
    check_paths_exist([*data.train, *data.validation, *old_files, *mixed_in])
    reader = Reader(
        tokenizer,
        vocab_size,
        data.sequence_length,
        data.too_long,
        show_progress=True,  # of the process that tokenises, whichever rank it is
        encoder=ExampleEncoder(tokenizer, chat_settings(data)),
        cache=data.cache,
        reading=Reading(data.format, data.fields, data.on_bad),
        validation_share=data.validation_share,
        say=functools.partial(print, file=sys.stderr, flush=True) if show_progress else lambda text: None,
    )
    train = reader.training(data.train, data.mix)
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
    warmup_steps = config.optimizer.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(config.optimizer.warmup_ratio * total_steps)
    tokens = batch.rows * data.sequence_length  # of one micro-batch
    dealer = Dealer(tokens if data.packing else batch.rows, costs, data.packing)
    old_domain = reader.source(old_files, "the old domain") if old_files else None
    validation_plan = None
    if validation:
        validation_plan = plan_pass(validation, MICRO_BATCHES_DEALT * world_size * tokens)

    @functools.lru_cache(maxsize=16)  # called by the thread that makes micro-batches, then by the training loop
    def deal(step: int) -> Deal:
        return dealer.deal(plan.batch(step).items, train, world_size)

    asked = read_asked(config, reader, train.sources[0], is_first=show_progress) if config.run.eval_generate else None
    return Inputs(train, plan, total_steps, warmup_steps, validation, validation_plan, dealer, deal, old_domain, asked)
