"""Extend a model directory with new tokens: weights, config and tokenizer, in a new directory from which train.py starts.

**Tokenizer.** Encoding and decoding a text gives the same text as before. Byte-level BPE (Llama 3, Qwen, SmolLM) splits a text
into words and numbers before merging, so no merge can produce a token such as " v1.0 of". New tokens are therefore added
tokens, which are matched before the text is split.

**Rows.** The directory has exactly one row of embedding and head per token. Padding to a multiple, so that the rows divide
over the ranks, exists during training only: config.json has the multiple (`make_vocab_size_divisible_by`, the name of
Megatron-LM's option), `build_on_meta` adds the rows, and the export cuts them off. Padding rows stay zero, because no softmax
includes them. They are never predicted, because no exported model has them.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PretrainedConfig

from common.errors import UserError
from data.control_tokens import MARKUP
from data.tokens import read_tokenizer
from model.architectures import FETCHED, NEW_TOKENS, copy_licences
from model.language_model import build_on_meta, parameter_names, stored_form
from model.new_tokens import NewToken
from model.quantized_files import dequantized
from model.weight_files import INDEX, stored_tensors
from model.weights import Weights, weights_of_directory, write_weights

NOISE = 0.1  # standard deviation of the noise in new rows, as a fraction of the old rows' standard deviation
MULTIPLE = 64  # training pads the vocabulary to a multiple of this
# Files that are not copied. The first three repeat tokenizer.json without the new tokens; the rest describes the old model.
STALE = ("vocab.json", "merges.txt", "added_tokens.json", FETCHED, INDEX, "export.json", "certificate.json", "bom.json")
COPIED = (".json", ".jinja", ".txt", ".md")
CHUNK_ROWS = 256  # new rows per chunk of noise: 256 x 151,936 x 4 bytes = 156 MB


# --- The tokenizer ------------------------------------------------------------------------------------------------------


def read_base_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a model directory. Raise UserError unless it is byte-level BPE."""
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no valid tokenizer: {str(error).splitlines()[0]}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    splits = json.dumps(settings.get("pre_tokenizer"))
    if backend is None or settings["model"].get("type") != "BPE" or '"ByteLevel"' not in splits:
        raise UserError(f"{path}: only byte-level BPE (Llama 3, Qwen, SmolLM) can be extended")
    if '"add_prefix_space": true' in splits:
        raise UserError(f"{path}: a tokenizer that adds a space before every word cannot be extended")
    return backend


def first_new_id(base: Tokenizer) -> int:
    """Return the id of the first new token."""
    return max(base.get_vocab(with_added_tokens=True).values()) + 1


def sub_tokens(base: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a string that stands in the middle of a text."""
    return base.encode(text, add_special_tokens=False).ids


def can_be_token(base: Tokenizer, text: str) -> bool:
    """Return whether a token with this text decodes to the same text and contains no control token.

    A token `<|im_start|>user`, from a corpus of rendered chats, would be matched before `<|im_start|>` in every prompt.
    Byte-level BPE represents bytes by letters such as é, so an added token of non-ASCII letters without a space would be
    decoded as the bytes for which the letters stand. A normalizer (NFC) may change the text.
    """
    if " " not in text and not text.isascii():
        return False
    for token in base.get_added_tokens_decoder().values():
        if token.content in text and (token.special or MARKUP.fullmatch(token.content)):
            return False
    return base.decode(sub_tokens(base, "x" + text), skip_special_tokens=False) == "x" + text


def extend_tokenizer(base: Tokenizer, texts: list[str]) -> Tokenizer:
    """Return a copy of the tokenizer with `texts` as new tokens, in this order, from `first_new_id` on.

    Raise ValueError if the copy does not encode a new token's text as this token.
    """
    extended, first = Tokenizer.from_str(base.to_str()), first_new_id(base)
    extended.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    for i, text in enumerate(texts):
        ids = sub_tokens(extended, "x" + text)
        if ids[-1:] != [first + i]:
            raise ValueError(f"the new token {text!r} is not found in a text, which is encoded as {ids}")
    return extended


def write_tokenizer(extended: Tokenizer, directory: Path) -> None:
    """Replace the tokenizer files in `directory`, a copy of the base model's directory, by the files of `extended`."""
    extended.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Model-specific classes rebuild the tokenizer from vocabulary and merges, and would lose the new tokens.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- Rows of embedding and head -----------------------------------------------------------------------------------------


def new_rows(old: torch.Tensor, sub_tokens: list[list[int]], noise: float = NOISE, seed: int = 0) -> torch.Tensor:
    """Return rows for new tokens, fp32 `(new tokens, hidden)`, made from the trained rows `old` `(old tokens, hidden)`.

    The row of token i is the mean of the rows `sub_tokens[i]`, the old tokens that encode its text, plus noise with noise^2
    times the covariance of the old rows, because tokens with equal rows would stay equal (Mundra et al., arXiv:2407.05841).
    """
    old, generator = old.float(), torch.Generator().manual_seed(seed)
    rows = torch.stack([old[torch.tensor(ids)].mean(0) for ids in sub_tokens])
    # A random combination of the centred rows has their covariance, without factorising the covariance matrix.
    centred = (old - old.mean(0)) / max(1, len(old) - 1) ** 0.5
    for part in rows.split(CHUNK_ROWS):
        part += noise * torch.randn(len(part), len(old), generator=generator) @ centred
    return rows


# --- The directory ------------------------------------------------------------------------------------------------------


def write_extension(
    source: Path, target: Path, config: PretrainedConfig, base: Tokenizer, tokens: list[NewToken]
) -> Tokenizer:
    """Write the model directory `source`, extended with `tokens`, into the empty directory `target`. Return the new tokenizer.

    `config` and `base` are the configuration and tokenizer of `source`. `new_tokens.json` lists the new tokens. Embedding and
    head are both extended, tied or not. Rows of the old model beyond its tokenizer (Qwen's vocabulary is padded) were never
    trained, so they are replaced or dropped. Weights are read and written file by file, in their dtype, or in fp32 if they have
    several dtypes. Raise UserError if the tokenizer has more tokens than the model has rows.
    """
    first, texts, model = first_new_id(base), [token.text for token in tokens], build_on_meta(config)
    if first > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has {first} tokens, but the model has only {config.vocab_size} rows")
    extended, spelled = extend_tokenizer(base, texts), [sub_tokens(base, text) for text in texts]
    old, num_tokens = weights_of_directory(source, model), first + len(texts)
    shapes = {n: (num_tokens, *shape[1:]) if n in old.vocabulary else shape for n, shape in old.shapes.items()}

    def read(name: str) -> torch.Tensor:
        tensor = old.read(name)
        if name not in old.vocabulary:
            return tensor
        is_head = parameter_names(model)[name] is not model.embedding.weight  # an untied head gets noise of its own
        rows = new_rows(tensor[:first], spelled, seed=int(is_head))
        return torch.cat([tensor[:first], rows.to(tensor.dtype)])

    kinds = {tensor.dtype for tensor in dequantized(stored_tensors(source), source).values()}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop()) if len(kinds) == 1 else None
    write_weights(
        target, Weights(shapes, read, old.vocabulary, old.buffers), dtype or torch.float32, form=stored_form(config)
    )
    for path in (*source.iterdir(), *source.glob("*/*.jinja")):  # additional chat templates are in a folder
        copy = target / path.relative_to(source)
        if path.is_file() and path.suffix in COPIED and path.name not in STALE:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    copy_licences(source, target)
    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
    settings |= {"vocab_size": num_tokens, "make_vocab_size_divisible_by": MULTIPLE}
    settings.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(extended, target)
    record = {"base": str(source), "first_id": first, "tokens": []}
    if (earlier := source / NEW_TOKENS).is_file():  # `source` is itself an untrained extension: its new rows stay new
        record = json.loads(earlier.read_text(encoding="utf-8"))
    record["tokens"] += [dataclasses.asdict(token) for token in tokens]
    (target / NEW_TOKENS).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return extended
