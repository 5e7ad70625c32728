"""Answers to examples of data.validation while a model trains: generated, scored, and shown as curves."""

import gc
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from distributed.process_group import StopSignal, gather_objects, read_on_first
from eval.generate import greedy_answers, stop_tokens, with_own_stops
from eval.intervals import Terms, interval, ratio
from eval.metric import reference_of
from eval.over_ranks import BATCH_TOKENS, make_turns, signal_on_any
from eval.packed_weights import pack_weights
from model.language_model import PackedLanguageModel, merged, tensors_in_files, whole_copy
from training.inputs import Questions

BATCH_SIZE = 16  # answers that a rank generates at once
RESAMPLES = 200  # of the answers, for the interval of a score
SHOWN = 1500  # characters of each part of the sample
SAMPLE = "validation/sample"  # the name of its text in TensorBoard


@dataclass
class Answers:
    """The evaluation that adds scores of generated answers to `losses`. path: the base model. texts: the newest answers."""

    losses: Callable[[], dict | None]
    path: str
    asked: Questions
    model: PackedLanguageModel
    model_config: PretrainedConfig
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    stop: StopSignal
    say: Callable[[str], None]
    texts: list[str] = field(default_factory=list)

    def __call__(self) -> dict | None:
        """Return the curves of `losses`, the scores of the answers, and one answer as text. None after a signal. A collective.

        If the metric fails, a warning says so, its scores are missing, and training goes on.
        """
        figures = self.losses()
        if figures is None:
            return None
        begin = time.perf_counter()
        answers = self.generate()
        if answers is None:
            return None
        limit = self.asked.max_new_tokens
        self.texts = texts = self.decode(answers)
        cut = sum(len(answer) == limit for answer in answers)
        self.say(
            f"{len(answers)} answers of {sum(map(len, answers)):,} tokens in {time.perf_counter() - begin:.1f} s (limit {limit} "
            f"tokens, reached by {cut})"
        )
        scores, warning = read_on_first(lambda: self._score(texts), self.stop.ranks)
        if warning:
            self.say(warning)
        scores = {f"validation/{name}": value for name, value in scores.items()}
        return figures | scores | {SAMPLE: self._sample(texts[0])}

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95% interval, over examples, of a score of the newest answers. Call it on rank 0 only.

        A score that is the fraction of right answers has Wilson's interval, any other score a bootstrap's. None if the metric
        fails, or has no value for some of the samples.
        """
        metric, count = self.asked.metric, len(self.texts)
        assert metric is not None

        def score(drawn: list[int]) -> float:
            return metric([self.texts[i] for i in drawn], [self.asked.examples[i] for i in drawn])[name]

        try:
            each = np.array([score([i]) for i in range(count)])
            if np.isin(each, (0, 1)).all() and math.isclose(score([*range(count)]), each.mean()):
                right = interval(Terms(np.stack([each, np.ones(count)], axis=1), range(count), ratio))
                return right.low, right.high
            drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count)).tolist()
            scores = [*map(score, drawn)]
        except (UserError, KeyError):
            return None
        if np.isnan(scores).any():
            return None
        low, high = np.percentile(scores, (2.5, 97.5))
        return float(low), float(high)

    def _score(self, texts: list[str]) -> tuple[dict[str, float], str]:
        """Return (the scores, a warning). Only rank 0 calls it: a metric may take long, or give another value every time."""
        assert self.asked.metric is not None
        try:
            return self.asked.metric(texts, self.asked.examples), ""
        except UserError as error:
            return {}, f"warning: {error}; the scores of this evaluation are missing"

    def generate(self) -> list[list[int]] | None:
        """Return the token ids of all answers, on every rank. None after a signal. A collective."""
        if self.stop.agreed():
            return None
        parameters, device = tensors_in_files(self.model), self.stop.ranks.device
        model = whole_copy(self.model_config, parameters, self.dtype, device, merged(self.model))
        try:
            return self._answer(pack_weights(with_own_stops(model, self.path)))
        finally:
            del model
            gc.collect()  # the garbage collector is off while a model trains (train.py)

    def decode(self, answers: list[list[int]]) -> list[str]:
        """Return the answers as texts, as the metric gets them."""
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]

    def _answer(self, model: PreTrainedModel) -> list[list[int]] | None:
        ranks, prompts, limit = self.stop.ranks, self.asked.prompts, self.asked.max_new_tokens
        stop_ids = stop_tokens(model, self.asked.stop_ids)
        tokens = [len(prompt) + limit for prompt in prompts]
        answers: dict[int, list[int]] = {}
        for turn in make_turns(
            tokens, ranks.world_size, BATCH_SIZE, BATCH_TOKENS
        ):  # every rank gets the same number of turns
            numbers = turn[ranks.rank :: ranks.world_size]
            batch = greedy_answers(model, [prompts[i] for i in numbers], stop_ids, limit, self.stop)
            if signal_on_any(self.stop):  # the batch may have been cut short
                return None
            answers |= zip(numbers, batch, strict=True)
        every = {number: answer for part in gather_objects(answers, ranks) for number, answer in part.items()}
        return [every[number] for number in range(len(prompts))]

    def _sample(self, answer: str) -> str:
        """Format the first example, the same at every evaluation, as Markdown."""
        prompt = self.tokenizer.decode(self.asked.prompts[0])[-SHOWN:]
        parts = {"End of the prompt": prompt, "Reference": reference_of(self.asked.examples[0]), "Answer": answer}
        return "\n\n".join(
            f"**{title}**\n\n{textwrap.indent(text[:SHOWN], '    ', lambda line: True)}"
            for title, text in parts.items()
        )
