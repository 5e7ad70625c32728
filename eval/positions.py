"""Measure the mean loss by position in the document: does a model use its context up to the end of its window, and beyond?

It runs the packed model, with one document per forward, because the memory of its attention grows only linearly with the
length, for every architecture. In transformers, SDPA ignores Gemma 2's softcap, and eager attention over 12,288 tokens would
need gigabytes per layer.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.durable_files import write_json
from common.errors import UserError
from data.tokens import bos_ids, load_tokenizer
from distributed.process_group import StopSignal, read_on_first, start_process_group
from eval.forgetting import as_documents, visit_documents
from eval.general_text import SOURCE, read_texts, training_texts
from eval.load_over_ranks import agreed_dtype, is_sharded, load_packed
from eval.over_ranks import TIMEOUT_MINUTES, compute_over_ranks
from eval.results import prepare_output
from model.architectures import read_model_config
from model.dtypes import dtype_name
from model.language_model import PackedLanguageModel


def measure_positions(
    model: str,
    data: Sequence[Path] | None,
    length: int,
    bucket: int,
    documents: int,
    rope_type: Sequence[str],
    rope_factor: float | None,
    rope_original_length: int | None,
    dtype: str,
    sharding: str,
    json: Path | None,
) -> str | None:
    """Measure a model directory by position, with its own RoPE and with each `rope_type`. Return a table on rank 0.

    The arguments are the options of `scripts/measure.py positions`, which documents them. Starts and ends the process group.
    Raises UserError, on all ranks, for a mistake in the options or in the files. A signal ends all ranks with
    KeyboardInterrupt.
    """
    if (rope_factor, rope_original_length) != (None, None) and not rope_type:
        raise UserError("--rope-factor and --rope-original-length need a --rope-type")
    ranks = start_process_group(TIMEOUT_MINUTES)

    def read() -> tuple[dict[str, PretrainedConfig], list[list[int]]]:
        if json:
            prepare_output(json)
        configs = {"as it is": read_model_config(model)}
        for name in rope_type:
            config = read_model_config(model, name, rope_factor, rope_original_length)
            configs[f"{name} x{rope_factor:g}"] = config
        return configs, read_long_documents(data, load_tokenizer(model), length, documents)

    configs, documents_read = read_on_first(read, ranks)
    compute_dtype = agreed_dtype(dtype, ranks)
    sharded = is_sharded(sharding, [model], ranks)
    stop, columns = StopSignal(ranks), {}
    tokens = [len(document) for document in documents_read]
    for name, config in configs.items():
        packed = load_packed(config, model, compute_dtype, sharded, ranks)
        measure = functools.partial(document_losses, packed, device=ranks.device)
        # One document per forward, or none on a rank without a document.
        losses = compute_over_ranks(measure, documents_read, tokens, ranks, name, stop, max_items=1)
        columns[name] = buckets(losses, bucket)
        del packed, measure  # before the next model is loaded
    dist.destroy_process_group()
    if ranks.rank != 0:
        return None
    result = {
        "model": model,
        "source": ", ".join(map(str, data)) if data else SOURCE,
        "length": length,
        "documents": len(documents_read),
        "dtype": dtype_name(compute_dtype),
        "windows": {name: config.max_position_embeddings for name, config in configs.items()},
        "buckets": columns,
    }
    if json:
        write_json(json, result)
    windows = ", ".join(f"{name} {window}" for name, window in result["windows"].items())
    where = f"{len(documents_read)} documents of {length} tokens from {result['source']} ({result['dtype']})"
    return f"{model} on {where}\nwindows: {windows}\n{table(columns)}"


def read_long_documents(
    paths: Sequence[Path] | None, tokenizer: PreTrainedTokenizerBase, length: int, max_documents: int
) -> list[list[int]]:
    """Return at most `max_documents` documents of exactly `length` tokens. Each starts with BOS if the tokenizer adds one.

    The texts of each file at `paths` are joined to one long text. Without paths, the training part of
    eval/general_text.py is used. Raises UserError if no text is long enough.
    """
    texts = ["\n\n".join(texts) for texts in (map(read_texts, paths) if paths else [training_texts()])]
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    per_text, bos = -(-max_documents // len(texts)), bos_ids(tokenizer)
    documents = [document for ids in encoded for document in cut_documents(ids, length, per_text, bos)]
    if not documents:
        longest = max(map(len, encoded))
        raise UserError(f"no text has --length={length} tokens, the longest has {longest}; provide more with --data")
    return documents[:max_documents]


def cut_documents(ids: Sequence[int], length: int, max_documents: int, prefix: Sequence[int] = ()) -> list[list[int]]:
    """Cut at most `max_documents` documents of exactly `length` tokens from a long text, evenly spread and without overlap.

    prefix: the first tokens of each document, e.g. BOS. Returns an empty list if the text is too short.
    """
    body = length - len(prefix)
    fit = len(ids) // body
    count = min(max_documents, fit)
    starts = [i * fit // count * body for i in range(count)]
    return [[*prefix, *ids[start : start + body]] for start in starts]


def document_losses(
    model: PackedLanguageModel, documents: Sequence[Sequence[int]], device: torch.device
) -> list[torch.Tensor]:
    """Return the nats of each token of each document but its first token, fp64 `(length - 1,)`, from one forward.

    Documents may be longer than the window. All ranks of a sharded model must call this equally often; a rank without a
    document passes an empty list.
    """
    packed = as_documents([(list(ids), [False] + [True] * (len(ids) - 1)) for ids in documents])
    parts = [torch.zeros(0, dtype=torch.float64)]

    def add(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        parts.append(F.cross_entropy(logits, target_ids, reduction="none").double().cpu())

    visit_documents(model, packed, range(len(documents)), device, add)
    return list(torch.cat(parts).split([len(ids) - 1 for ids in documents]))


def buckets(losses: Sequence[torch.Tensor], width: int) -> list[dict]:
    """Group the losses of all documents by position, `width` positions to a bucket.

    Each bucket holds the positions `start` to `end - 1`: the sum of their losses in `nats`, the number of `tokens` and the
    `mean`. Position 0 is never predicted. The mean of no tokens is NaN.
    """
    longest = max((len(loss) + 1 for loss in losses), default=0)
    result = []
    for start in range(0, longest, width):
        part = torch.cat([loss[max(0, start - 1) : start + width - 1] for loss in losses])
        sums = {"nats": part.sum().item(), "tokens": len(part), "mean": part.mean().item()}
        result.append({"start": start, "end": min(start + width, longest)} | sums)
    return result


def table(columns: dict[str, list[dict]]) -> str:
    """Return a text table of nats per token by position, with a column for each RoPE."""
    lines = [f"{'positions':>15} {'tokens':>7}" + "".join(f"{name:>14}" for name in columns)]
    for row in zip(*columns.values(), strict=True):
        positions = f"{row[0]['start']}-{row[0]['end'] - 1}"
        means = "".join(f"{bucket['mean']:>14.3f}" for bucket in row)
        lines.append(f"{positions:>15} {row[0]['tokens']:>7}{means}")
    return "\n".join(lines)
