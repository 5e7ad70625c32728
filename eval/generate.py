"""Greedy and sampled generation in batches: when a row ends, the next prompt takes its place (continuous batching)."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TopPLogitsWarper
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.random_bits import hash64_tensor, sample_labels
from eval.constrained import Grammar, most_probable_allowed
from eval.packed_weights import pack_weights
from eval.row_cache import RowCache, bytes_per_token, holds_rows, smallest_window

PREFILL_TOKENS = 4096  # of prompts that are read in one forward, with padding; bounds the memory of the activations
LEAST_SHARED = 16  # tokens at the start of all prompts from which on they are read only once
MEMORY_SHARE = 0.25  # of the memory of the GPU, or of the host divided by its processes, for keys and values
# (logits (rows, vocabulary), index of each row's prompt, tokens so far of each row) -> next token of each row (rows,)
SelectTokens = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]
Advance = Callable[[int], object]


def no_progress(tokens: int) -> None:
    """An `Advance` that shows nothing."""


def load_for_generation(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The Hugging Face model of a directory in eval mode; of an adapter, merged into its base. Raises UserError if it cannot be loaded."""
    transformers_logging.disable_progress_bar()
    is_adapter, base = Path(path, "adapter_config.json").is_file(), path
    if is_adapter:
        from model.lora import base_of_adapter  # needed for adapters alone

        base = str(base_of_adapter(Path(path)))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if is_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    return pack_weights(model.to(device).eval())


def with_own_stops(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model, which was built from config.json alone, with the tokens of generation_config.json that end its answers."""
    if Path(path, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def stop_tokens(model: PreTrainedModel, taught: Iterable[int]) -> set[int]:
    """The tokens that end an answer: those that training teaches (`ExampleEncoder.stop_ids`) and the model's own."""
    stops = model.generation_config.eos_token_id
    return {*taught, *(stops if isinstance(stops, list) else [] if stops is None else [stops])}


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. With temperature 1 and top_p 1 they follow the model's own distribution.

    top_p: sample only from the smallest set of most probable tokens whose probabilities add up to at least top_p
    (nucleus sampling, Holtzman et al., arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def greedy_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = no_progress,
    grammar: Grammar | None = None,
) -> list[list[int]]:
    """Greedy decoding of each prompt, up to a stop token (not included) or `max_new_tokens`.

    prompts: token ids. Returns the token ids of the answers in the order of the prompts. batch_size: prompts that are
    answered at once, fewer where memory holds no more. advance: called with the number of tokens of the `answer_work` that
    is now done, e.g. a progress bar's `update`. grammar: only tokens that it allows are taken (`eval.constrained`).

    In fp32 an answer does not depend on the other prompts, unless two tokens are equally probable to the last digits. In bf16
    the products of another batch are rounded differently, which occasionally changes a token.
    """
    select = most_probable_allowed(grammar) if grammar else _most_probable
    budget = cache_tokens(model)
    return _generate(model, prompts, stop_ids, max_new_tokens, select, batch_size, budget, advance)


def sampled_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sample_numbers: list[int],
    stop_ids: set[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    """Sampled answers for one batch of prompts. Arguments and result are otherwise those of `greedy_answers`.

    sample_numbers: one number per prompt. The random bits of a token depend only on (seed, sample number, step), so it
    does not matter which process generates it. The same batch always gives the same answers. In another batch the
    logits are rounded differently, which occasionally changes a token.
    """

    def select(logits: torch.Tensor, rows: list[int], steps: list[int]) -> torch.Tensor:
        logits = logits.float() / sampling.temperature
        logits = TopPLogitsWarper(sampling.top_p)(torch.LongTensor(rows), logits) if sampling.top_p < 1 else logits
        numbers = torch.tensor([sample_numbers[row] for row in rows], device=logits.device)
        return sample_labels(logits, hash64_tensor(sampling.seed, numbers, torch.tensor(steps, device=numbers.device)))

    return _generate(model, prompts, stop_ids, max_new_tokens, select, max(1, len(prompts)), None, no_progress)


def answer_work(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """The most tokens that each prompt takes: those of its answer, and its own behind the common start.

    An answer that ends early counts in full when it ends. Some of the prompts alone may have a longer common start, and take less.
    """
    shared = len(shared_prefix(model, prompts, max_new_tokens))
    return [len(prompt) - shared + max_new_tokens for prompt in prompts]


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens of prompts and answers may be in the cache at once: a fixed share of the machine's memory.

    It does not depend on what is free at the moment, because the batches, and with them the rounding, would.
    """
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = pages // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return int(MEMORY_SHARE * memory) // bytes_per_token(model)


def _most_probable(logits: torch.Tensor, rows: list[int], steps: list[int]) -> torch.Tensor:
    return logits.argmax(-1)


def shared_prefix(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """The tokens that all prompts begin with, if it pays to read them only once; each prompt has at least one more."""
    common = list(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if len(prompts) > 1 else []
    if len(common) < LEAST_SHARED or not holds_rows(model):
        return []
    # Between the prefix and the rest of a short prompt is padding. A window smaller than all columns would count it.
    columns = max(map(len, prompts)) + max_new_tokens
    return common if smallest_window(model) >= columns else []


class _Answers:
    """The answers of all prompts while they grow, and the number of the prompt in each row of the cache."""

    def __init__(
        self, prompts: list[list[int]], stop_ids: set[int], max_new_tokens: int, select: SelectTokens, advance: Advance
    ) -> None:
        self.prompts, self.stop_ids, self.max_new_tokens = prompts, stop_ids, max_new_tokens
        self.select, self.advance = select, advance
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows: list[int] = []

    def take(self, logits: torch.Tensor, first: int) -> tuple[torch.Tensor, list[int]]:
        """Choose the next token of the rows from `first` on; (the tokens `(rows,)`, the rows that have ended)."""
        rows = self.rows[first:]
        tokens = self.select(logits, rows, [len(self.answers[row]) for row in rows])
        ended, done = [], 0
        for row, (prompt, token) in enumerate(zip(rows, tokens.tolist(), strict=True), first):
            answer = self.answers[prompt]
            if token not in self.stop_ids:
                answer.append(token)
                done += 1
                if len(answer) < self.max_new_tokens:
                    continue
            ended.append(row)
            done += self.max_new_tokens - len(answer)
        self.advance(done)
        return tokens, ended


@torch.no_grad()  # as in distributed.sharding.evaluating, because the model may be sharded
def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    select: SelectTokens,
    most_rows: int,
    budget: int | None,
    advance: Advance,
) -> list[list[int]]:
    growing = _Answers(prompts, stop_ids, max_new_tokens, select, advance)
    # The longest first: no later prompt needs more columns.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    prefix, at_once = shared_prefix(model, prompts, max_new_tokens), most_rows if holds_rows(model) else 1

    def rows_for(columns: int) -> int:
        return min(at_once, len(prompts), max(1, budget // columns) if budget else at_once)

    while waiting:
        columns = len(prompts[waiting[0]]) + max_new_tokens
        cache = RowCache(model, rows_for(columns), columns)
        if prefix:
            cache.read_prefix(prefix)
        _fill_and_extend(cache, growing, waiting, rows_for)
    return growing.answers


def _fill_and_extend(cache: RowCache, growing: _Answers, waiting: deque[int], rows_for: Callable[[int], int]) -> None:
    """Answer prompts until none is left, or until those that wait are so short that another cache holds twice as many."""
    prompts, capacity = growing.prompts, len(cache.mask)
    tokens = torch.zeros(capacity, dtype=torch.int64, device=cache.mask.device)  # the newest of each row

    def take(logits: torch.Tensor, first: int) -> None:
        new, ended = growing.take(logits, first)
        tokens[first : first + len(new)] = new
        if ended:
            order = cache.drop(ended)
            tokens[: len(order)] = tokens[torch.tensor(order, dtype=torch.int64, device=tokens.device)]
            growing.rows = [growing.rows[row] for row in order]

    filling = True
    while growing.rows or waiting:
        free = capacity - len(growing.rows)
        # A few prompts are not read by themselves: the weights would be read for little.
        filling = bool(waiting) and free > 0 and (filling or not growing.rows or free >= capacity / 8)
        if filling and rows_for(len(prompts[waiting[0]]) + growing.max_new_tokens) < 2 * capacity:
            number = max(1, PREFILL_TOKENS // (len(prompts[waiting[0]]) - cache.prefix_length))
            group = [waiting.popleft() for _ in range(min(number, free, len(waiting)))]
            first = len(growing.rows)
            growing.rows += group
            logits = cache.admit([prompts[i] for i in group])
            growing.advance(sum(len(prompts[i]) - cache.prefix_length for i in group))
            take(logits, first)
        elif growing.rows:
            filling = False
            take(cache.extend(tokens[: len(growing.rows)]), 0)
        else:
            return
