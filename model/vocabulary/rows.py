"""Rows for new tokens in embedding and head, in a new model directory that train.py then trains: before any sharding.

A directory holds one row for each token and no more. Padding to a multiple that divides over the ranks is a matter of
training alone: config.json names the multiple (`make_vocab_size_divisible_by`, as Megatron-LM does), building on meta adds
the rows, no softmax sees them, so they stay zero, and the export leaves them out. What is not there is never predicted.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from common.errors import UserError
from model.language_model import build_on_meta, tensor_files

INITIALISATIONS = ("subtokens", "mean", "random")
NOISE = 0.1
# tokenizer.json has all that the first three hold, and these would lack the new tokens; the last is of the old model.
STALE = ("vocab.json", "merges.txt", "added_tokens.json", "fetched.json")
KEPT = (".json", ".jinja", ".model", ".txt", ".md")
CHUNK_ROWS = 256  # new rows whose noise is drawn together: 256 x 151,936 x 4 bytes = 156 MB


def new_rows(
    old: torch.Tensor,
    sub_tokens: list[list[int]],
    how: str = "subtokens",
    noise: float = NOISE,
    random_std: float = 0.02,
    seed: int = 0,
) -> torch.Tensor:
    """Rows for new tokens, fp32 `(new tokens, hidden)`, from the trained rows `old` `(old tokens, hidden)`.

    subtokens: the mean of the rows of `sub_tokens[i]`, the old tokens that spelled token i. mean: that of all old rows
    (Hewitt, "Initializing new word embeddings for pretrained language models", 2021). Both get noise whose covariance is
    noise^2 times the old rows', since tokens of equal rows would stay equal (Mundra et al., arXiv:2407.05841). random:
    normal with standard deviation `random_std`, as a model that is trained from nothing begins.
    """
    if how not in INITIALISATIONS:
        raise UserError(f"there is no initialisation {how!r}; choose one of {', '.join(INITIALISATIONS)}")
    generator = torch.Generator().manual_seed(seed)
    if how == "random":
        return random_std * torch.randn(len(sub_tokens), old.shape[1], generator=generator)
    old = old.float()
    mean = old.mean(0)
    if how == "mean":
        rows = mean.repeat(len(sub_tokens), 1)
    else:
        rows = torch.stack([old[torch.tensor(ids)].mean(0) for ids in sub_tokens])
    if noise:
        # A mix of centred rows with independent weights has their covariance, and needs no factor of it.
        centred = (old - mean) / max(1, len(old) - 1) ** 0.5
        for part in rows.split(CHUNK_ROWS):
            part += noise * torch.randn(len(part), len(old), generator=generator) @ centred
    return rows


def write_extended_model(
    source: Path,
    target: Path,
    config: PretrainedConfig,
    first: int,
    sub_tokens: list[list[int]],
    how: str = "subtokens",
    noise: float = NOISE,
    multiple: int = 64,
    seed: int = 0,
) -> None:
    """Copy the model directory `source` into the empty `target`, with a row for each of the tokens `first`, `first + 1`, ...

    first: the first id that the old tokenizer leaves free. Rows from there on that the old model may have (Qwen's
    vocabulary is padded) were never trained: they are taken, or left out. Input and output rows are both extended, tied
    or not. Weights are read and written file by file, each tensor in its dtype. The tokenizer is not touched.
    """
    if first > config.vocab_size:
        raise UserError(f"{source}: its tokenizer has {first} tokens, its model only {config.vocab_size} rows")
    names = vocabulary_tensors(config)
    files = tensor_files(source)
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    grown = 0
    for file, present in by_file.items():
        if not set(present) & set(names):
            shutil.copyfile(file, target / file.name)
            continue
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in present}
            metadata = stored.metadata()
        for name in set(present) & set(names):
            whole = tensors[name]
            rows = new_rows(whole[:first], sub_tokens, how, noise, config.initializer_range, seed + names[name])
            tensors[name] = torch.cat([whole[:first], rows.to(whole.dtype)])
            grown += (tensors[name].numel() - whole.numel()) * whole.itemsize
        save_file(tensors, target / file.name, metadata=metadata)
        (target / file.name).chmod(0o644)
    for path in source.iterdir():
        kept = path.suffix in KEPT or path.name.startswith("LICENSE")
        if path.is_file() and kept and path.name not in STALE:
            shutil.copyfile(path, target / path.name)
    index = target / "model.safetensors.index.json"
    if index.is_file():
        contents = json.loads(index.read_text(encoding="utf-8"))
        if "total_size" in contents.get("metadata", {}):
            contents["metadata"]["total_size"] += grown
        index.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
    settings |= {"vocab_size": first + len(sub_tokens), "make_vocab_size_divisible_by": multiple}
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary_tensors(config: PretrainedConfig) -> dict[str, int]:
    """The stored names of embedding and head -> 0 and 1, the head's 0 too where it is tied: its rows are the same."""
    causal_lm = build_on_meta(config).causal_lm
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    named = causal_lm.named_parameters(remove_duplicate=False)
    return {name: int(p is not embedding) for name, p in named if p is embedding or p is head}


def first_new_row(model_path: str | Path) -> int | None:
    """Index of the first row that belongs to a new token, in a model made by scripts/extend_vocabulary.py; else None."""
    record = Path(model_path) / "new_tokens.json"
    return json.loads(record.read_text(encoding="utf-8"))["first_id"] if record.is_file() else None
