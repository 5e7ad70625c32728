"""Read a run before its first step, and check the tokens that end its answers."""

import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from configs.config import Config
from data.encoding import ExampleEncoder
from data.examples import Documents
from data.show import one_line, run_text
from data.sources import MAIN
from distributed.optimizer import check_memory
from model.build import build
from model.dtypes import DTYPES, has_native_bf16
from model.flops import count_work, document_costs
from scripts.check.result import FAILS, OK, SKIPPED, Result
from training.chat_settings import chat_settings
from training.inputs import Inputs, read_inputs, settle_settings
from training.micro_batch import settle_micro_batch

STEPS = 200  # first steps whose documents are read
COMPARED = 20_000  # documents that are read, at most


@dataclass(frozen=True)
class RunInputs:
    """The config, tokenizer, data and code of a run, and where the check computes."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    inputs: Inputs
    device: torch.device  # of the check: the first GPU, or the CPU
    compute_dtype: torch.dtype  # of the run on this device
    code: ModuleType  # the run's train.py


def read_run(config: Config, world_size: int, device: torch.device, train: Path) -> RunInputs:
    """Read config, tokenizer, headers of the weights and data, in the order of train.py. Not a collective. Raise UserError.

    world_size: ranks of the run, which decide how a step is dealt to micro-batches. train: the run's train.py.
    """
    run_directory = Path(config.run.directory) / config.run.name
    check_memory(config.optimizer.memory)
    model, model_config, tokenizer = build(config)
    config = settle_settings(config, model, model_config, tokenizer, show_progress=False)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, lambda text: None)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[config.model.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as train.py decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype, load_code(train))


def load_code(path: Path) -> ModuleType:
    """Import a train.py, of which the check calls `token_losses`."""
    spec = importlib.util.spec_from_file_location("train_of_the_run", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_ends(run: RunInputs) -> Result:
    """Check that the last target of every answer is a stop token, in the documents of the first steps as training reads them.

    A document of data.sequence_length tokens may lack its end: it is a piece of a long text, or was cut off, which train.py
    counts and prints.
    """
    train, plan, length = run.inputs.train, run.inputs.plan, run.config.data.length
    stops = {*ExampleEncoder(run.tokenizer, chat_settings(run.inputs.local.data)).stop_ids}
    names = ", ".join(one_line(str(run.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    # A step may hold only a part of a document of a mixed-in source. `locate` leads to the whole document.
    items = (item for step in range(min(STEPS, run.inputs.total_steps)) for item in plan.batch(step).items)
    places = list(dict.fromkeys(map(train.locate, itertools.islice(items, COMPARED))))
    documents = answers = 0
    unended: list[str] = []
    for number, index in places:
        source, name = train.sources[number], train.names[number]
        if not isinstance(source, Documents):
            continue
        ids, weights = source.get(index)
        is_target = np.append(weights != 0, False)
        ends = (np.flatnonzero(is_target[:-1] & ~is_target[1:]) + 1).tolist()
        missed = [end for end in ends if int(ids[end - 1]) not in stops]
        documents, answers = documents + 1, answers + len(ends)
        if missed and not (len(ids) >= length and missed == [len(ids)]):
            tail = one_line(run_text(run.tokenizer, ids.tolist(), max(0, missed[0] - 8), missed[0]))
            source_name = "data.train" if name == MAIN else name
            unended.append(f"sequence {index} of {source_name} ends an answer with '...{tail}'")
    if not documents:
        return Result(SKIPPED, "data.train is a token store, whose documents end as they were built")
    if not unended:
        return Result(
            OK, f"the last target of {answers:,} answers in {documents:,} documents is an end token ({names})"
        )
    text = (
        f"{len(unended):,} of {documents:,} documents of the first steps have an answer whose end token ({names}) is no target "
        f"({unended[0]}): correct the chat template or the labels, or the model will not learn where to stop"
    )
    return Result(FAILS, text)
