"""Read a run before its first step, and check its data: the tokens before an answer, and the token that ends it."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Data
from data.encoding import ExampleEncoder, Outcome
from data.examples import Documents
from data.show import one_line, run_text
from data.sources import MAIN
from distributed.optimizer import check_memory
from eval.asked_examples import has_answer
from model.build import build
from model.dtypes import DTYPES, has_native_bf16
from model.flops import count_work, document_costs
from scripts.check.result import FAILS, OK, SKIPPED, Result
from training.chat_settings import chat_settings, settle_chat_settings
from training.inputs import Inputs, read_inputs
from training.micro_batch import settle_micro_batch
from training.show_data import examples_of

NUM_PROMPTS = 256  # examples of a source whose prompts are compared
STEPS = 200  # first steps whose documents are read
COMPARED = 20_000  # documents that are read, at most

Sampled = tuple[str, dict, Outcome]  # ("FILE, line 3", example, its encoding)


# ---- The run -------------------------------------------------------------------------------------------------------------


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
    config = settle_chat_settings(config, tokenizer, run_directory)
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


# ---- Its data ------------------------------------------------------------------------------------------------------------


def check_data(run: RunInputs) -> list[Result]:
    """Return the lines of the group `data`."""
    data = run.inputs.local.data  # with paths on this machine
    encoder = ExampleEncoder(run.tokenizer, chat_settings(data))
    samples = {name: _sample(data, encoder, name) for name in (MAIN, *(source.name for source in data.mix))}
    chats = {name for name, items in samples.items() if items and all("messages" in item[1] for item in items)}
    results = {
        "prompt": check_prompts(samples[MAIN], encoder, data.chat_template_options),
        "EOS": check_ends(run.inputs, run.config.data.sequence_length, chats, encoder),
    }
    return [replace(result, group="data", name=name) for name, result in results.items()]


def _sample(data: Data, encoder: ExampleEncoder, name: str) -> list[Sampled]:
    """Encode the first examples of a source. A token store has none."""
    try:
        examples = list(itertools.islice(examples_of(data, name), NUM_PROMPTS))
    except UserError:
        return []
    outcomes = encoder.encode([example for _, example in examples])
    return [(*item, outcome) for item, outcome in zip(examples, outcomes, strict=True) if not outcome.error]


def check_prompts(samples: list[Sampled], encoder: ExampleEncoder, options: dict[str, object]) -> Result:
    """Check that the tokens before the last answer equal the prompt of evaluation and of `apply_chat_template`."""
    num_chats, different, doubled = 0, [], 0
    bos = encoder.tokenizer.bos_token_id
    for where, example, outcome in samples:
        answered = [sequence for sequence in outcome.sequences if sequence.spans]
        weighted = any("weight" in message for message in example.get("messages", ()))
        # transformers makes a control token of a text that looks like one, and we do not.
        if not answered or weighted or "control" in outcome.notes or not has_answer(example):
            continue
        num_chats += 1
        trained = answered[-1].ids[: answered[-1].spans[-1].start].tolist()
        doubled += bos is not None and trained[:2] == [bos, bos]
        prompts = _prompts(example, encoder, options)
        different += [(where, trained, prompt) for prompt in prompts if prompt != trained][:1]
    if not num_chats:
        return Result(SKIPPED, "no chat with an answer in the sample of data.train")
    if doubled:
        text = f"{doubled} of {num_chats} examples begin with BOS twice: remove bos_token from the chat template or the data"
        return Result(FAILS, text)
    if not different:
        return Result(OK, f"training and generation have the same tokens before the answer in {num_chats} examples")
    where, trained, prompt = different[0]
    pairs = enumerate(zip(trained, prompt, strict=False))
    num_equal = next((i for i, (a, b) in pairs if a != b), min(len(trained), len(prompt)))
    training, generation = (
        one_line(run_text(encoder.tokenizer, ids, max(0, num_equal - 1), min(len(ids), num_equal + 4)))
        for ids in (trained, prompt)
    )
    text = (
        f"in {len(different)} of {num_chats} examples training and generation begin the answer after other tokens "
        f"({one_line(where)}: training '...{training}', generation '...{generation}'); let the chat template end its prompt "
        "where the answer's first token begins"
    )
    return Result(FAILS, text)


def _prompts(example: dict, encoder: ExampleEncoder, options: dict[str, object]) -> Iterator[list[int]]:
    """Yield the prompt of scripts/evaluate.py and, if the template writes no date, the prompt of transformers alone."""
    messages, tools = example["messages"], example.get("tools")
    yield encoder.prompt(messages, tools)
    if encoder.settings.date or any(message["role"] == "developer" for message in messages):
        return
    arguments: dict[str, Any] = {"tools": tools, "tokenize": True, "return_dict": False, **options}
    ids: Any = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **arguments)
    yield ids


def check_ends(inputs: Inputs, length: int, chats: set[str], encoder: ExampleEncoder) -> Result:
    """Check that the last target of every answer is a stop token, in the documents of the first steps as training reads them.

    Every answer of the sources `chats` counts, and the last target of a prompt with completion or of a text. A document of
    `length` tokens may lack its end: it is a piece of a long text, or was cut off, which train.py counts and prints.
    """
    train, plan, stops = inputs.train, inputs.plan, {*encoder.stop_ids}
    names = ", ".join(one_line(str(encoder.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    # A step may hold only a part of a document of a mixed-in source. `locate` leads to the whole document.
    items = (item for step in range(min(STEPS, inputs.total_steps)) for item in plan.batch(step).items)
    places = list(dict.fromkeys(map(train.locate, itertools.islice(items, COMPARED))))
    documents = answers = 0
    unended: list[str] = []
    for number, index in places:
        source, name = train.sources[number], train.names[number]
        if not isinstance(source, Documents):
            continue
        ids, weights = source.get(index)
        ends = _ends_of_runs(weights)
        ends = ends if name in chats else ends[-1:]
        missed = [end for end in ends if int(ids[end - 1]) not in stops]
        documents, answers = documents + 1, answers + len(ends)
        if missed and not (len(ids) >= length and missed == [len(ids)]):
            tail = one_line(run_text(encoder.tokenizer, ids.tolist(), max(0, missed[0] - 8), missed[0]))
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


def _ends_of_runs(weights: np.ndarray) -> list[int]:
    """Return the position after each run of target tokens. weights: `(tokens,)`."""
    is_target = np.append(weights != 0, False)
    return (np.flatnonzero(is_target[:-1] & ~is_target[1:]) + 1).tolist()
