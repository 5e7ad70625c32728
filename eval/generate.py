"""Greedy and sampled answers to batches of prompts, by transformers' `generate`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.random_bits import hash64_tensor, sample_labels
from distributed.process_group import StopSignal
from eval.packed_weights import pack_weights
from model.text_part import load_causal_lm

PADDING = 0  # the token id left of a short prompt, which the attention mask hides


def load_for_generation(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the Hugging Face model of a directory in eval mode. An adapter is merged into its base model.

    Raises UserError if the directory has no causal language model.
    """
    transformers_logging.disable_progress_bar()
    is_adapter, base = Path(path, "adapter_config.json").is_file(), path
    if is_adapter:
        from model.lora import base_of_adapter  # peft is imported for adapters only

        base = str(base_of_adapter(Path(path)))
    try:
        model: Any = load_causal_lm(base, dtype=dtype)
        if is_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    return pack_weights(model.to(device).eval())


def with_own_stops(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Give a model that was built from config.json alone the stop tokens of the generation_config.json in `path`."""
    if Path(path, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def stop_tokens(model: PreTrainedModel, taught: Iterable[int]) -> set[int]:
    """Return the tokens that end an answer: `taught` by training (`ExampleEncoder.stop_ids`) and the model's own."""
    stops = model.generation_config.eos_token_id
    return {*taught, *(stops if isinstance(stops, list) else [] if stops is None else [stops])}


@dataclass(frozen=True)
class Sampling:
    """The options of sampling. With temperature 1 and top_p 1, tokens follow the model's own distribution.

    top_p: sample from the smallest set of most probable tokens whose probabilities add up to at least top_p
    (nucleus sampling, Holtzman et al., arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class SeededSampling(LogitsProcessor):
    """Sample one token per row, and leave no other token for the greedy choice that follows.

    The random bits of a token depend only on (seed, sample number, step), not on its row, its batch or its rank.
    """

    def __init__(self, sampling: Sampling, sample_numbers: Sequence[int], prompt_width: int) -> None:
        self.sampling, self.sample_numbers, self.prompt_width = sampling, sample_numbers, prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids` (rows, columns), `scores` (rows, vocabulary) -> scores of -inf, and 0 for the sampled token."""
        logits: Any = scores / self.sampling.temperature
        if self.sampling.top_p < 1:
            logits = TopPLogitsWarper(self.sampling.top_p)(input_ids, logits)
        numbers = torch.tensor(self.sample_numbers, device=scores.device)
        steps = torch.full_like(numbers, input_ids.shape[1] - self.prompt_width)
        tokens = sample_labels(logits, hash64_tensor(self.sampling.seed, numbers, steps))
        only: Any = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return only


class StopOnSignal(StoppingCriteria):
    """End all rows of this rank's batch once this process has received a signal.

    The rows are then cut short. The ranks must agree on the signal after the batch (`eval.over_ranks.signal_on_any`),
    and use no answer of it. A launcher passes a signal on to all ranks, which therefore stop within a token. If only one
    rank has received it, the other ranks generate their batch to its end first: they agree after a batch, not after each
    token, because they generate different numbers of tokens.
    """

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **options: object) -> torch.BoolTensor:  # noqa: ANN401
        """Return bool (rows,): true for all rows or for none."""
        self.stop.ranks.watch.tick()
        is_over: Any = torch.full(input_ids.shape[:1], self.stop.name is not None, device=input_ids.device)
        return is_over


def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    stop: StopSignal | None = None,
) -> list[list[int]]:
    """Decode a batch of prompts greedily. A collective if the model is sharded.

    prompts: token ids. Returns the token ids of each answer, up to a stop token (not included) or `max_new_tokens`. All
    ranks of a sharded model must call this equally often; a rank without prompts passes an empty list. stop: see
    `StopOnSignal`.

    In fp32 an answer does not depend on the other prompts of the batch, unless two tokens are equally probable to the last
    digits. In bf16 another batch is rounded differently, which occasionally changes a token.
    """
    return _generate(model, prompts, stop_ids, max_new_tokens, stop=stop)


def sampled_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    sample_numbers: Sequence[int],
    stop_ids: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: StopSignal | None = None,
) -> list[list[int]]:
    """Sample an answer to each prompt of a batch. A collective if the model is sharded, like `greedy_answers`.

    sample_numbers: one number per prompt. The random bits of a token depend only on (seed, sample number, step), so it
    does not matter which process generates it. The same batch always gives the same answers. In another batch the
    logits are rounded differently, which occasionally changes a token. stop: see `StopOnSignal`.
    """
    return _generate(model, prompts, stop_ids, max_new_tokens, sampling, sample_numbers, stop)


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    sample_numbers: Sequence[int] = (),
    stop: StopSignal | None = None,
) -> list[list[int]]:
    # FSDP2 gathers the parameters in every forward, for which all ranks are needed. `generate` does not see this itself.
    is_sharded = isinstance(model, FSDPModule)
    if not (prompts or is_sharded):
        return []
    if len(prompts) > 1 and not _accepts_padding(model):
        numbers = [[number] for number in sample_numbers] or [[]] * len(prompts)
        rows = zip(prompts, numbers, strict=True)
        return [_generate(model, [p], stop_ids, max_new_tokens, sampling, n, stop)[0] for p, n in rows]
    ids, mask = left_padded(prompts or [[PADDING]], model.device)
    width = ids.shape[1]
    settings = GenerationConfig(
        # A rank without prompts ends after one token, and then runs forwards for as long as another rank needs them.
        max_new_tokens=max_new_tokens if prompts else 1,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=PADDING,
    )
    own_settings, model.generation_config = model.generation_config, settings  # no repetition penalty of the model's
    try:
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=[SeededSampling(sampling, sample_numbers, width)] if sampling and prompts else None,
            stopping_criteria=[StopOnSignal(stop)] if stop else None,
            synced_gpus=is_sharded,
        )
    finally:
        model.generation_config = own_settings
    answers = output[: len(prompts), width:].tolist()
    return [answer[: next((i for i, t in enumerate(answer) if t in stop_ids), None)] for answer in answers]


def left_padded(sequences: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, each int64 `(batch, longest)`. Every sequence ends in the last column."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[PADDING] * (width - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def _accepts_padding(model: PreTrainedModel) -> bool:
    """Whether all layers of the model's cache are keys and values, from which the attention mask hides padding.

    Other layers, e.g. of linear attention, would read the padding. No model with such layers is sharded
    (`model.architectures.read_model_config`).
    """
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
