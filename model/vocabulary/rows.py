"""Rows for new tokens in embedding and head, written to a new model directory from which train.py starts.

The model directory has exactly one row per token. Padding to a multiple, so that the rows divide over the ranks, exists
during training only: config.json names the multiple (`make_vocab_size_divisible_by`, the name of Megatron-LM's option),
`build_on_meta` adds the rows, and the export cuts them off. Padding rows stay zero, because no softmax includes them, and
since no exported model has them they are never predicted.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from common.errors import UserError
from model.language_model import build_on_meta
from model.weight_files import tensor_files

METHODS = ("subtokens", "mean", "random")
NOISE = 0.1
# The first three repeat what is in tokenizer.json and would lack the new tokens; the last describes the old model.
STALE = ("vocab.json", "merges.txt", "added_tokens.json", "fetched.json")
COPIED = (".json", ".jinja", ".model", ".txt", ".md")
CHUNK_ROWS = 256  # new rows per chunk of noise: 256 x 151,936 x 4 bytes = 156 MB


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """How rows of new tokens are initialised; see `new_rows`. Raises UserError for an unknown method."""

    method: str = "subtokens"  # one of METHODS
    noise: float = NOISE  # standard deviation of the noise relative to that of the old rows
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"initialisation {self.method!r} is unknown; choose one of {', '.join(METHODS)}")


def new_rows(
    old: torch.Tensor,
    sub_tokens: list[list[int]],
    init: Initialisation = Initialisation(),  # noqa: B008 (immutable)
    random_std: float = 0.02,
) -> torch.Tensor:
    """Rows for new tokens, fp32 `(new tokens, hidden)`, from the trained rows `old` `(old tokens, hidden)`.

    - `subtokens`: the mean of the rows `sub_tokens[i]`, the old tokens that encode the text of token i.
    - `mean`: the mean of all old rows (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
    - `random`: normal with standard deviation `random_std`, as in a model that is trained from scratch.

    `subtokens` and `mean` add noise whose covariance is noise^2 times that of the old rows, because tokens with equal rows
    would stay equal (Mundra et al., arXiv:2407.05841).
    """
    generator = torch.Generator().manual_seed(init.seed)
    if init.method == "random":
        return random_std * torch.randn(len(sub_tokens), old.shape[1], generator=generator)
    old = old.float()
    mean = old.mean(0)
    if init.method == "mean":
        rows = mean.repeat(len(sub_tokens), 1)
    else:
        rows = torch.stack([old[torch.tensor(ids)].mean(0) for ids in sub_tokens])
    if init.noise:
        # A random combination of the centred rows has their covariance without the need to factorise it.
        centred = (old - mean) / max(1, len(old) - 1) ** 0.5
        for part in rows.split(CHUNK_ROWS):
            part += init.noise * torch.randn(len(part), len(old), generator=generator) @ centred
    return rows


def write_extended_model(
    source: Path,
    target: Path,
    config: PretrainedConfig,
    first_id: int,
    sub_tokens: list[list[int]],
    init: Initialisation = Initialisation(),  # noqa: B008 (immutable)
    multiple: int = 64,
) -> None:
    """Copy the model directory `source` into the empty `target`, with one more row per new token in embedding and head.

    first_id: the first id that the old tokenizer leaves free; the new tokens are `first_id`, `first_id + 1`, ... Rows of the
    old model from there on (Qwen's vocabulary is padded) were never trained, so they are replaced or dropped. sub_tokens:
    old token ids that encode each new token. multiple: training pads the vocabulary to it. Embedding and head are both
    extended, tied or not. Weights are read and written file by file, and every tensor keeps its dtype. The tokenizer files
    are copied unchanged.
    """
    if first_id > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {first_id} tokens, but the model has only {config.vocab_size} rows"
        )
    vocabulary = vocabulary_tensors(config)
    names_of_file: dict[Path, list[str]] = {}
    for name, file in tensor_files(source).items():
        names_of_file.setdefault(file, []).append(name)
    added_bytes = 0
    for file, names in names_of_file.items():
        if not set(names) & set(vocabulary):
            shutil.copyfile(file, target / file.name)
            continue
        with safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in names}
            metadata = reader.metadata()
        for name in set(names) & set(vocabulary):
            old = tensors[name]
            own_init = dataclasses.replace(init, seed=init.seed + vocabulary[name])
            rows = new_rows(old[:first_id], sub_tokens, own_init, config.initializer_range)
            tensors[name] = torch.cat([old[:first_id], rows.to(old.dtype)])
            added_bytes += tensors[name].nbytes - old.nbytes
        save_file(tensors, target / file.name, metadata=metadata)
        (target / file.name).chmod(0o644)  # safetensors creates files that only their owner can read
    for path in source.iterdir():
        copied = path.suffix in COPIED or path.name.startswith("LICENSE")
        if path.is_file() and copied and path.name not in STALE:
            shutil.copyfile(path, target / path.name)
    _update_json(target, first_id + len(sub_tokens), multiple, added_bytes)


def _update_json(directory: Path, num_tokens: int, multiple: int, added_bytes: int) -> None:
    """Set the number of tokens in config.json, and the total size in the index of a model with several files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        contents = json.loads(index.read_text(encoding="utf-8"))
        if "total_size" in contents.get("metadata", {}):
            contents["metadata"]["total_size"] += added_bytes
        index.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings |= {"vocab_size": num_tokens, "make_vocab_size_divisible_by": multiple}
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary_tensors(config: PretrainedConfig) -> dict[str, int]:
    """Names of the tensors of embedding (value 0) and head (value 1); a tied head has value 0, since it is the embedding."""
    model = build_on_meta(config)
    embedding, head = model.embedding.weight, model.head.weight
    named = model.causal_lm.named_parameters(remove_duplicate=False)
    return {name: int(p is not embedding) for name, p in named if p is embedding or p is head}


def first_new_row(model_path: str | Path) -> int | None:
    """Index of the first row of a new token, or None if scripts/extend_vocabulary.py did not make the model."""
    record = Path(model_path) / "new_tokens.json"
    return json.loads(record.read_text(encoding="utf-8"))["first_id"] if record.is_file() else None
