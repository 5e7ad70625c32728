"""Replay documents: Python's language reference, or text that a model writes itself, without what evaluation uses.

A model with a chat template is given the start of a user turn; it writes a question and then the answer (Xu et al.,
arXiv:2406.08464). Any other model writes documents after BOS or EOS. Training on such text is self-synthesized
rehearsal (Huang et al., arXiv:2403.01244).

Each document is sampled with (seed, its index), in batches that do not depend on the number of processes. On identical
hardware any number of processes therefore writes the same documents. Finished batches are stored in OUT.parts/, so that
an interrupted command can resume.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from common.durable_files import write_json, write_json_lines
from common.errors import UserError
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder
from data.formats import example_text, read_files
from data.replay_filters import EvaluationTexts, filter_sampled, normalize
from data.tokens import bos_ids, load_tokenizer, plain_template
from distributed.process_group import Ranks, StopSignal, barrier, call_on_all, read_on_first, start_process_group
from eval.general_text import CERTIFICATE, SELECTION, SOURCE, held_out_texts, training_texts
from eval.generate import Sampling, sampled_answers
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import TIMEOUT_MINUTES, in_turns, signal_on_any, stop_all
from eval.questions import read_questions
from eval.results import prepare_output
from model.architectures import check_model_directory

PLACEHOLDER = "here the user's words begin"  # marks the start of the user's message in a rendered chat template


def texts_to_exclude(exclude: Sequence[Path]) -> EvaluationTexts:
    """Return the texts that replay must not overlap: held-out text, questions with answers, texts of a budget, `exclude`."""

    def texts() -> Iterator[str]:
        yield from held_out_texts()
        yield from (question.prompt + question.options[0] for question in read_questions())
        for path in (SELECTION, CERTIFICATE, *exclude):
            yield from (example_text(example) for _, example in read_files([path]))

    return EvaluationTexts(texts())


def topic_texts(evaluation: EvaluationTexts) -> tuple[list[str], int]:
    """Return (topics that are not held out, number of their paragraphs dropped because they overlap with evaluation)."""
    kept, num_dropped = [], 0
    for text in training_texts():
        paragraphs = text.split("\n\n")
        allowed = [paragraph for paragraph in paragraphs if not evaluation.overlaps(normalize(paragraph))]
        num_dropped += len(paragraphs) - len(allowed)
        kept += ["\n\n".join(allowed)] if allowed else []
    return kept, num_dropped


@dataclass(frozen=True)
class SamplingOptions:
    """The options of `scripts/data.py replay`, which documents them."""

    model: str | None
    documents: int = 1000
    form: str = "auto"
    start: str | None = None
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 32
    dtype: str = "auto"


class ReplaySampler:
    """The sampler of one output file, which resumes after the batches that an earlier call has finished.

    Creating it needs no process group, so that a mistake is reported before the work. Raises UserError for an option out of
    range, if `options.model` is not a model directory, or if OUT.parts/ was written with different settings.
    """

    def __init__(self, options: SamplingOptions, out: Path) -> None:
        if options.model is None:
            raise UserError("--source model needs a --model")
        if not options.temperature > 0:
            raise UserError(f"--temperature must be above 0, not {options.temperature}")
        if not 0 < options.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {options.top_p}")
        if options.form == "chat" and options.start is not None:
            raise UserError(
                "--start goes with --form text: a chat is sampled after what its template writes before a question"
            )
        check_model_directory(options.model, "--model")
        self.options, self.model = options, options.model
        self.tokenizer = load_tokenizer(self.model)
        self.encoder = ExampleEncoder(self.tokenizer, read_chat_settings(self.model))
        self.form = options.form
        if self.form == "auto":
            has_template = self.tokenizer.chat_template != plain_template(self.tokenizer)
            self.form = "chat" if has_template and options.start is None else "text"
        self.start = self._start()
        # Everything that determines the documents.
        self.settings = asdict(options) | {"form": self.form, "start": self.start}
        self.parts = out.with_name(out.name + ".parts")
        path = self.parts / "settings.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self.settings
        if different := [name for name, value in self.settings.items() if earlier.get(name) != value]:
            raise UserError(
                f"{self.parts} was made with another {', '.join(different)}; use the same value or remove it"
            )

    def _start(self) -> list[int]:
        """Return the token ids after which every document is sampled. Raises UserError if there are none."""
        text = self.options.start
        if self.form == "chat":
            rendered = self.encoder.template.render([{"role": "user", "content": PLACEHOLDER}])
            text = rendered[: rendered.index(PLACEHOLDER)]
        if text is None:
            eos: Any = self.tokenizer.eos_token_id
            return bos_ids(self.tokenizer) or [eos]
        start = self.tokenizer.encode(text, add_special_tokens=False)
        if not start:
            raise UserError(f"--start {text!r} has no tokens; give at least one, e.g. {self.tokenizer.eos_token!r}")
        return start

    def sample(self, ranks: Ranks, sharding: str = "auto") -> list[dict] | None:
        """Return all documents in order on rank 0, and None on the other ranks. A collective.

        Each has `text` or `messages`, and `finished`: False if it reached the length limit. sharding: the value of
        `--sharding` (eval/load_over_ranks.py), which does not change the documents.
        """
        options = self.options
        dtype, sharded = agreed_dtype(options.dtype, ranks), is_sharded(sharding, [self.model], ranks)
        model, stop = load_causal_lm(self.model, dtype, sharded, ranks)

        every = range(options.documents)
        batches = [every[start : start + options.batch_size] for start in every[:: options.batch_size]]
        files = {self.parts / f"{batch[0]:09}.jsonl": batch for batch in batches}

        def missing_files() -> list[Path]:
            self.parts.mkdir(parents=True, exist_ok=True)
            write_json(self.parts / "settings.json", self.settings)
            return [path for path in files if not path.exists()]

        missing = read_on_first(missing_files, ranks)
        # One batch in each turn; in the last turn some ranks have none.
        turns = [missing[first + ranks.rank :][:1] for first in range(0, len(missing), ranks.world_size)]
        tokens = [options.batch_size * options.max_tokens * len(turn) for turn in turns]
        for turn in in_turns(turns, tokens, "sampling", ranks, stop=None):  # this loop checks `stop`, before it writes
            documents = self.sample_batch(model, files[turn[0]] if turn else [], stop)
            if stop and signal_on_any(stop):  # the batch may have been cut short
                stop_all(ranks)
            for path in turn:
                write_json_lines(path, documents)
        barrier(ranks)
        if ranks.rank != 0:
            return None
        # Not splitlines(), because texts may contain other Unicode line separators.
        lines = (line for path in files for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        return [json.loads(line) for line in lines]

    def sample_batch(self, model: PreTrainedModel, indices: Sequence[int], stop: StopSignal | None) -> list[dict]:
        """Return the documents with these indices, generated in one batch, before any filter.

        A collective if the model is sharded: ranks generate equally often, also without indices or without questions. After
        a signal to `stop` the documents are cut short, and must not be used.
        """
        first = self._generate(model, [self.start] * len(indices), [2 * index for index in indices], stop)
        if self.form == "text":
            return [{"text": text, "finished": finished} for text, finished in first]
        answered = [i for i, (text, finished) in enumerate(first) if text and finished]
        prompts = [self.encoder.prompt([{"role": "user", "content": first[i][0]}]) for i in answered]
        answers = self._generate(model, prompts, [2 * indices[i] + 1 for i in answered], stop)
        replies, documents = dict(zip(answered, answers, strict=True)), []
        for i, (question, _) in enumerate(first):
            text, finished = replies.get(i, ("", False))
            turns = ("user", question), ("assistant", text)
            messages = [{"role": role, "content": content} for role, content in turns]
            documents.append({"messages": messages, "finished": finished})
        return documents

    def _generate(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        sample_numbers: list[int],
        stop: StopSignal | None,
    ) -> list[tuple[str, bool]]:
        """Return (text, finished) for each prompt."""
        options, tokenizer = self.options, self.tokenizer
        sampling = Sampling(options.temperature, options.top_p, options.seed)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        stop_ids = special | set(self.encoder.stop_ids)
        answers = sampled_answers(model, prompts, sample_numbers, stop_ids, options.max_tokens, sampling, stop)
        return [(str(tokenizer.decode(answer)).strip(), len(answer) < options.max_tokens) for answer in answers]


def write_topics(out: Path, exclude: Sequence[Path]) -> str:
    """Write the topics that are not held out to a JSONL file. Returns the counts, as a sentence."""
    prepare_output(out)
    texts, num_dropped = topic_texts(texts_to_exclude(exclude))
    write_json_lines(out, [{"text": text} for text in texts])
    return (
        f"{out}: {len(texts)} documents, {sum(map(len, texts)):,} characters, {SOURCE}; dropped: {num_dropped} "
        "paragraphs that overlap with evaluation"
    )


def write_samples(
    options: SamplingOptions, min_characters: int, out: Path, exclude: Sequence[Path], sharding: str
) -> str | None:
    """Sample documents on all ranks, and write those that pass the filters to a JSONL file. A collective.

    sharding: the value of `--sharding`, which does not change the documents. Returns the counts, as sentences, on rank 0.
    Raises UserError if nothing passes.
    """
    prepare_output(out)
    ranks = start_process_group(TIMEOUT_MINUTES)
    sampler = read_on_first(lambda: ReplaySampler(options, out), ranks)
    # Only rank 0 filters. The files are read now, so that a mistake in them is reported before the work.
    evaluation = call_on_all(lambda: texts_to_exclude(exclude) if ranks.rank == 0 else None, ranks)
    sampled = sampler.sample(ranks, sharding)
    report = None
    if sampled is not None and evaluation is not None:  # on rank 0
        documents, dropped, num_truncated = filter_sampled(sampled, min_characters, evaluation)
        write_json_lines(out, documents)
        shutil.rmtree(sampler.parts)
        characters = sum(len(example_text(document)) for document in documents)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"
        report = f"{out}: {len(documents)} of {len(sampled)} documents, {characters:,} characters; dropped: {reasons}"
        if num_truncated:
            report += f"\n{num_truncated} texts reached --max-tokens and end with their last complete sentence"
    dist.destroy_process_group()
    return report
