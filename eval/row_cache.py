"""The keys and values of several prompts that are answered at once; a row that has ended makes place for the next prompt.

All rows end in the same column, that of the newest token, so a model sees what it would see of a batch that is padded on the
left. transformers' DynamicCache copies everything for each token, and for each row that ends.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE_COLUMNS = 64  # the columns are moved to the front once in so many steps


def left_padded(
    sequences: Sequence[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and position ids, each `(batch, longest)`. Every sequence ends in the last column."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences], device=device)  # the mask hides the padding
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass
class Region:
    """The part of the buffers that the next forward reads, and to whose end it appends: some rows, some columns."""

    first: int = 0
    rows: int = 0
    start: int = 0
    end: int = 0

    @property
    def chosen_rows(self) -> slice:
        return slice(self.first, self.first + self.rows)


class RowLayer(DynamicLayer):
    """The keys and values of one layer in two buffers, `(rows, heads, columns, head size)`. `window`: that of the layer."""

    def __init__(self, region: Region, rows: int, columns: int, window: int | None) -> None:
        super().__init__()
        self.region, self.rows, self.columns = region, rows, columns
        self.sliding_window = window
        self.is_sliding = window is not None  # transformers asks such a layer for the sizes of the mask
        self.buffers: list[torch.Tensor] = []
        self.prefix: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        """Append the keys and values of new tokens; return those of all tokens that the new ones may see."""
        if not self.buffers:
            # Zeros: a masked column has the weight 0, and 0 times NaN is NaN.
            self.buffers = [
                states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[-1])
                for states in (key_states, value_states)
            ]
            self.is_initialized = True
        region, length = self.region, key_states.shape[-2]
        end = region.end + length
        start = end - self.get_mask_sizes(length)[0]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[region.chosen_rows, :, region.end : end] = states
        self.keys, self.values = (buffer[region.chosen_rows, :, start:end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The number of columns before the new tokens."""
        return self.region.end - self.region.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that the new tokens may see, columns before these)."""
        past = self.get_seq_length()
        hidden = max(0, past - self.sliding_window + 1) if self.sliding_window else 0
        return past + query_length - hidden, hidden


class RowCache:
    """At most `max_rows` prompts and their answers, each of at most `max_columns` tokens."""

    def __init__(self, model: PreTrainedModel, max_rows: int, max_columns: int) -> None:
        self.model, self.columns = model, max_columns + SPARE_COLUMNS
        self.region, self.prefix_length = Region(), 0
        self.lengths: list[int] = []  # columns of each row
        self.layers: list[RowLayer] = []
        self.mask = torch.zeros(max_rows, self.columns, dtype=torch.bool, device=model.device)
        self.cache = DynamicCache(config=model.config)
        self.holds_rows = holds_rows(model)
        if self.holds_rows:
            windows = [getattr(layer, "sliding_window", None) for layer in self.cache.layers]
            self.layers = [RowLayer(self.region, max_rows, self.columns, window) for window in windows]
            self.cache.layers[:] = self.layers
        # transformers 5.24 renamed this argument.
        self.argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def read_prefix(self, ids: list[int]) -> None:
        """Compute the keys and values of the tokens that all prompts begin with. Before the first `admit`."""
        self.prefix_length = len(ids)
        self.region.rows, self.region.end = 1, 0
        self.mask[0, : len(ids)] = True
        tokens = torch.tensor([ids], device=self.mask.device)
        self._forward(tokens, torch.arange(len(ids), device=self.mask.device)[None])
        for layer in self.layers:
            layer.prefix = [buffer[:1, :, : len(ids)].clone() for buffer in layer.buffers]

    def admit(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Read prompts into free rows; the logits of the tokens after them, `(prompts, vocabulary)`.

        Each begins with the prefix and has at least one more token. Unless the cache is empty, none may be longer than the
        prompts before.
        """
        prefix, region, first = self.prefix_length, self.region, len(self.lengths)
        ids, mask, positions = left_padded([prompt[prefix:] for prompt in prompts], self.mask.device)
        width = ids.shape[1]
        if not first:
            region.end = prefix + width
            if not self.holds_rows:
                self.cache = DynamicCache(config=self.model.config)
        end = region.end
        region.first, region.rows, region.start, region.end = first, len(prompts), end - width - prefix, end - width
        self.mask[region.chosen_rows] = False
        self.mask[region.chosen_rows, region.start : region.end] = True
        self.mask[region.chosen_rows, region.end : end] = mask.bool()
        if prefix:
            for layer in self.layers:
                for buffer, states in zip(layer.buffers, layer.prefix, strict=True):
                    buffer[region.chosen_rows, :, region.start : region.end] = states
        # Between the prefix and a short prompt is padding, so each of these rows takes all of the columns.
        self.lengths += [prefix + width if prefix else len(prompt) for prompt in prompts]
        return self._forward(ids, positions + prefix)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token `(rows,)` to each row; the logits of the tokens after them, `(rows, vocabulary)`."""
        region, longest, rows = self.region, max(self.lengths), len(self.lengths)
        if region.end == self.columns:
            self._move_to_front(longest)
        region.first, region.rows, region.start = 0, rows, region.end - longest
        positions = self.mask[:rows, region.start : region.end].sum(-1, keepdim=True)  # as many tokens as stand before
        self.mask[:rows, region.end] = True
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(tokens[:, None], positions)

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Free these rows. Returns the former number of each row that is left: the last rows move into the gaps."""
        gone, left = set(ended), len(self.lengths) - len(ended)
        order = list(range(left))
        gaps = [row for row in order if row in gone]
        moved = [row for row in range(left, len(self.lengths)) if row not in gone]
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        if gaps:
            to, source = (torch.tensor(rows, device=self.mask.device) for rows in (gaps, moved))
            columns = slice(self.region.end - max(self.lengths[row] for row in moved), self.region.end)
            for buffer in self._buffers():
                buffer[to, :, columns] = buffer[source, :, columns]
            self.mask[to] = self.mask[source]
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits after the last of the new tokens, and the columns that now belong to the region."""
        region, end = self.region, self.region.end + ids.shape[1]
        mask = self.mask[region.chosen_rows, region.start : end]
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.argument: self.cache},
        ).logits[:, -1]
        region.end = end
        return logits

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self.layers for buffer in layer.buffers]

    def _move_to_front(self, columns: int) -> None:
        rows, end = len(self.lengths), self.region.end
        for buffer in self._buffers():
            buffer[:rows, :, :columns] = buffer[:rows, :, end - columns : end].clone()
        self.mask[:rows, :columns] = self.mask[:rows, end - columns : end].clone()
        self.region.end = columns


def holds_rows(model: PreTrainedModel) -> bool:
    """Whether all layers of the model's cache are keys and values. Others, e.g. of linear attention, take one prompt at a time."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in known for layer in DynamicCache(config=model.config).layers)


def smallest_window(model: PreTrainedModel) -> float:
    """The fewest columns that a layer sees; infinite if no layer has a window."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return min(filter(None, windows), default=math.inf)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of the keys and values of one token in all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
