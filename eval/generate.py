"""Greedy and sampled generation in batches: prompts are padded on the left, and a row leaves its batch when it ends."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.random_bits import hash64_tensor
from eval.constrained import Grammar, most_probable_allowed
from model.label_sampling import sample_labels

CACHE_GROWTH = 64  # tokens by which the buffers of a cache layer grow
# (logits (rows, vocabulary), index of each row's prompt, step) -> next token of each row (rows,)
SelectTokens = Callable[[torch.Tensor, list[int], int], torch.Tensor]


def load_for_generation(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The Hugging Face model of a directory in eval mode. Raises UserError if it cannot be loaded."""
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


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
    advance: Callable[[int], object] = lambda finished: None,
    grammar: Grammar | None = None,
) -> list[list[int]]:
    """Greedy decoding of each prompt, up to a stop token (not included) or `max_new_tokens`.

    prompts: token ids. Returns the token ids of the answers in the order of the prompts. advance: called with the
    number of prompts that have just been finished, e.g. a progress bar's `update`. grammar: only tokens that it allows
    are taken (`eval.constrained`).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        select = most_probable_allowed(grammar) if grammar else _most_probable
        batch = _generate(model, [prompts[i] for i in chosen], stop_ids, max_new_tokens, select, advance)
        for i, answer in zip(chosen, batch, strict=True):
            answers[i] = answer
    return answers


def sampled_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sample_numbers: list[int],
    stop_ids: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    advance: Callable[[int], object] = lambda finished: None,
) -> list[list[int]]:
    """Sampled answers for one batch of prompts. Arguments and result are otherwise those of `greedy_answers`.

    sample_numbers: one number per prompt. The random bits of a token depend only on (seed, sample number, step), so it
    does not matter which process generates it. The same batch always gives the same answers. In another batch the
    logits are rounded differently, which occasionally changes a token.
    """

    def select(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        logits = nucleus(logits.float() / sampling.temperature, sampling.top_p)
        number = torch.tensor([sample_numbers[row] for row in rows], device=logits.device)
        return sample_labels(logits, hash64_tensor(sampling.seed, number, torch.full_like(number, step)))

    return _generate(model, prompts, stop_ids, max_new_tokens, select, advance)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logits with -inf for all tokens outside the nucleus of `top_p`. The most probable token is always kept."""
    if top_p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    left_out = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)


def _most_probable(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
    return logits.argmax(-1)


def left_padded(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and position ids, each `(batch, longest)`. Every sequence ends in the last column."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences], device=device)  # the mask hides the padding
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


class PreallocatedLayer(DynamicLayer):
    """The KV cache of one layer, `(batch, heads, tokens, head size)`, in buffers with free space for further tokens.

    DynamicLayer copies the whole cache for every new token. With 32 short reports on a CPU that took half of the time.
    """

    buffers: list[torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        """Append the keys and values of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            cached = [self.keys, self.values] if length else [key_states[..., :0, :], value_states[..., :0, :]]
            self.buffers = [
                torch.cat([c, c.new_empty(*c.shape[:2], end - length + CACHE_GROWTH, c.shape[-1])], -2) for c in cached
            ]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        super().batch_select_indices(indices)
        self.buffers = None  # the next update allocates buffers for the remaining rows


@torch.no_grad()  # as in distributed.sharding.evaluating, because the model may be sharded
def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    select: SelectTokens,
    advance: Callable[[int], object],
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # index of the prompt of each row in the shrinking batch
    input_ids, mask, positions = left_padded(prompts, model.device)
    cache = DynamicCache(config=model.config)
    # Layers of another type, e.g. for a sliding window, stay as they are.
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    # transformers renamed this argument between 5.17 and 5.24.
    cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for step in range(max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument: cache},
        ).logits[:, -1]
        tokens = select(logits, rows, step)
        unfinished = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        if len(unfinished) < len(rows):
            advance(len(rows) - len(unfinished))
            rows = [rows[row] for row in unfinished]
            if not rows:
                break
            kept = torch.tensor(unfinished, device=mask.device)
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    else:
        advance(len(rows))
    return answers
