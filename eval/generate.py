"""Greedy answers in batches: left padding, sorted by length, each row leaves its batch when it ends."""

import inspect
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens for which a cache layer makes room at a time


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
        batch = _greedy_batch(model, [prompts[i] for i in chosen], stop_ids, max_new_tokens, advance)
        for i, answer in zip(chosen, batch, strict=True):
            answers[i] = answer
    return answers


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
def _greedy_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
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
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument: cache},
        ).logits[:, -1]
        tokens = logits.argmax(-1)
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
