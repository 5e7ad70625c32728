"""Greedy and sampled answers in batches: left padding, each row leaves its batch when it ends."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.random_bits import hash64_tensor
from model.label_sampling import sample_labels

ROOM = 64  # tokens for which a cache layer makes room at a time
Pick = Callable[
    [torch.Tensor, list[int], int], torch.Tensor
]  # (logits, which prompt each row is, step) -> tokens (rows,)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 1 and top_p 1: from the model's own distribution."""

    temperature: float = 1.0
    top_p: float = (
        1.0  # only from the most probable tokens that together reach it (nucleus: Holtzman et al., arXiv:1904.09751)
    )
    seed: int = 0


def greedy_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], object] = lambda finished: None,
) -> list[list[int]]:
    """The most probable token at each step, until a stop token (left out) or `max_new_tokens`.

    prompts: token ids each; the answers, token ids too, come in the same order. advance: called with the number of
    prompts just answered, e.g. a progress bar's `update`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of one length need little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _answers(model, [prompts[i] for i in chosen], stop_ids, max_new_tokens, _most_probable, advance)
        for i, answer in zip(chosen, batch, strict=True):
            answers[i] = answer
    return answers


def sampled_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    numbers: list[int],
    stop_ids: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    advance: Callable[[int], object] = lambda finished: None,
) -> list[list[int]]:
    """One batch of sampled answers, as `greedy_answers` gives them.

    numbers: of each prompt, what its answer is drawn by: (seed, number, step) alone decides each token, so that it does not
    matter which process writes it. The same prompts in one batch give the same answers; beside others the logits are
    rounded in another way, which now and then decides otherwise.
    """

    def pick(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        logits = nucleus(logits.float() / sampling.temperature, sampling.top_p)
        number = torch.tensor([numbers[row] for row in rows], device=logits.device)
        return sample_labels(logits, hash64_tensor(sampling.seed, number, torch.full_like(number, step)))

    return _answers(model, prompts, stop_ids, max_new_tokens, pick, advance)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logits, -inf for all tokens but the most probable ones that together have at least `top_p`; never none of them."""
    if top_p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    left_out = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)


def _most_probable(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
    return logits.argmax(-1)


def left_padded(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions, each `(batch, longest)`; every sequence ends in the last column."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences], device=device)  # which id pads is masked away
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, `(batch, heads, tokens, head size)`, in memory with room behind them.

    DynamicLayer copies all that it holds at each token; with 32 short reports that was half of the time on a CPU.
    """

    buffers: list[torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        """Append the new tokens; returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            held = [self.keys, self.values] if length else [key_states[..., :0, :], value_states[..., :0, :]]
            self.buffers = [
                torch.cat([h, h.new_empty(*h.shape[:2], end - length + ROOM, h.shape[-1])], -2) for h in held
            ]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self.buffers = None  # made anew around the rows that are left


@torch.inference_mode()
def _answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    pick: Pick,
    advance: Callable[[int], object],
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch answers
    input_ids, mask, positions = left_padded(prompts, model.device)
    cache = DynamicCache(config=model.config)
    # Sliding-window layers keep their own kind.
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    # transformers renamed the argument on its way from 5.17 to 5.24.
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
        tokens = pick(logits, rows, step)
        going = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        if len(going) < len(rows):
            advance(len(rows) - len(going))
            rows = [rows[row] for row in going]
            if not rows:
                break
            kept = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    else:
        advance(len(rows))
    return answers
