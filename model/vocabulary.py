"""Extend a model directory with new tokens: weights, config and tokenizer, in a new directory from which train.py starts.

**Tokenizer.** Encoding and decoding a text gives the same text as before. Byte-level BPE (Llama 3, Qwen, SmolLM) splits a
text into words and numbers before merging, so no merge can produce a token such as " v1.0 of". New tokens are therefore
added tokens, which are matched before the text is split. Sentencepiece BPE (Llama 2, Mistral, Gemma) replaces spaces by
U+2581 and prepends a U+2581 to the text. With an added token, each part of the text around it would be treated as a new text
and get an extra space. New tokens are therefore entries of the vocabulary itself, and the pre-tokenizer isolates them after the
spaces are replaced. In tokenizer.model they are user-defined pieces.

**Rows.** The directory has exactly one row of embedding and head per token. Padding to a multiple, so that the rows divide
over the ranks, exists during training only: config.json has the multiple (`make_vocab_size_divisible_by`, the name of
Megatron-LM's option), `build_on_meta` adds the rows, and the export cuts them off. Padding rows stay zero, because no softmax
includes them. They are never predicted, because no exported model has them.
"""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
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
from model.weight_files import INDEX, stored_tensors
from model.weights import Weights, weights_of_directory, write_weights

METHODS = ("subtokens", "mean", "random")
NOISE = 0.1
# Files that are not copied. The first three repeat tokenizer.json without the new tokens; the rest describes the old model.
STALE = ("vocab.json", "merges.txt", "added_tokens.json", FETCHED, INDEX, "export.json", "certificate.json", "bom.json")
COPIED = (".json", ".jinja", ".model", ".txt", ".md")
CHUNK_ROWS = 256  # new rows per chunk of noise: 256 x 151,936 x 4 bytes = 156 MB
SPACE = "\u2581"  # the character with which sentencepiece writes a space
BYTE_TOKEN = "<(?=0x[0-9A-F]{2}>)"  # split after "<": the literal text <0x0A> is not encoded as that byte's token


# --- The tokenizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer that can be extended: byte-level BPE or sentencepiece BPE."""

    backend: Tokenizer
    byte_level: bool  # else sentencepiece BPE

    @property
    def size(self) -> int:
        """The id of the first new token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def read_base_tokenizer(path: str | Path) -> BaseTokenizer:
    """Read the tokenizer of a model directory. Raises UserError unless it is byte-level BPE or sentencepiece BPE."""
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no valid tokenizer: {str(error).splitlines()[0]}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    steps = _steps(settings.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    is_bpe = settings["model"].get("type") == "BPE"
    if backend is None or not is_bpe or not (byte_level or settings["model"].get("byte_fallback")):
        raise UserError(f"{path}: only byte-level BPE and sentencepiece BPE with byte fallback can be extended")
    if any(step.get("add_prefix_space") or step.get("split") for step in steps):
        raise UserError(f"{path}: a tokenizer that adds a space before every word cannot be extended")
    return BaseTokenizer(backend, byte_level)


def sub_tokens(base: BaseTokenizer, text: str) -> list[int]:
    """Return the token ids of a string that stands in the middle of a text."""
    if base.byte_level:
        return base.backend.encode(text, add_special_tokens=False).ids
    return [token.id for token in base.backend.model.tokenize(text.replace(" ", SPACE))]


def can_be_token(base: BaseTokenizer, text: str) -> bool:
    """Return whether a token with this text decodes to the same text and contains no control token.

    A token `<|im_start|>user`, from a corpus of rendered chats, would be matched before `<|im_start|>` in every prompt.
    Byte-level BPE represents bytes by letters such as é, so an added token of non-ASCII letters without a space would be
    decoded as the bytes for which the letters stand. A normalizer (NFC) may change the text.
    """
    if base.byte_level and " " not in text and not text.isascii():
        return False
    for token in base.backend.get_added_tokens_decoder().values():
        if token.content in text and (token.special or MARKUP.fullmatch(token.content)):
            return False
    return base.backend.decode(sub_tokens(base, "x" + text), skip_special_tokens=False) == "x" + text


def extend_tokenizer(base: BaseTokenizer, texts: list[str]) -> Tokenizer:
    """Return a copy of the tokenizer with `texts` as tokens `base.size`, `base.size + 1`, ...

    Raises ValueError if the copy does not encode a new token's text as this token.
    """
    first = base.size
    if base.byte_level:
        extended = Tokenizer.from_str(base.backend.to_str())
        extended.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    else:
        settings = json.loads(base.backend.to_str())
        pieces = [text.replace(" ", SPACE) for text in texts]
        settings["model"]["vocab"] |= {piece: first + i for i, piece in enumerate(pieces)}
        settings["model"]["ignore_merges"] = True  # an isolated part that is in the vocabulary becomes a single token
        pattern = {"Regex": f"{prefix_regex(pieces)}|{BYTE_TOKEN}"}
        steps = _steps(settings.get("pre_tokenizer"), "pretokenizers")
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        extended = Tokenizer.from_str(json.dumps(settings))
    for i, text in enumerate(texts):
        ids = extended.encode("x" + text, add_special_tokens=False).ids
        if ids[-1:] != [first + i]:
            raise ValueError(f"the new token {text!r} is not found in a text, which is encoded as {ids}")
    return extended


def prefix_regex(strings: list[str]) -> str:
    """Return a regular expression that matches the longest string of a list. Common prefixes are factored out (a trie).

    A plain alternation of thousands of strings would be tried string by string at every character of a text.
    """
    tree: dict = {}
    for string in strings:
        node = tree
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}

    def expression(node: dict) -> str:
        branches = [re.escape(character) + expression(child) for character, child in node.items() if character]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return joined + "?" if "" in node else joined  # "" marks the end of a string

    return expression(tree)


def write_tokenizer(extended: Tokenizer, base: BaseTokenizer, texts: list[str], directory: Path) -> None:
    """Replace the tokenizer files in `directory`, a copy of the base model's directory, by the files of `extended`."""
    extended.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Model-specific classes rebuild the tokenizer from vocabulary and merges, and would lose the new splits.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (directory / "tokenizer.model").is_file() and not base.byte_level:
        _extend_sentencepiece(directory / "tokenizer.model", base, texts)


def _extend_sentencepiece(path: Path, base: BaseTokenizer, texts: list[str]) -> None:
    """Add `texts` to tokenizer.model as user-defined pieces, which sentencepiece matches first, the longest before shorter ones."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
    model.ParseFromString(path.read_bytes())
    kinds = model.SentencePiece
    # Added tokens outside the sentencepiece model have the ids between its last piece and the first new token.
    for i in range(len(model.pieces), base.size):
        model.pieces.add(piece=base.backend.id_to_token(i) or f"<unused_{i}>", score=0.0, type=kinds.CONTROL)
    for text in texts:
        model.pieces.add(piece=text.replace(" ", SPACE), score=0.0, type=kinds.USER_DEFINED)
    path.write_bytes(model.SerializeToString())


def _steps(part: dict | None, key: str) -> list[dict]:
    """Return the flat list of steps of a pre-tokenizer, which may be a single step, a nested sequence, or None."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if part["type"] == "Sequence" else [part]


# --- Rows of embedding and head -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initialisation:
    """The initialisation of the rows of new tokens; see `new_rows`."""

    method: str = "subtokens"  # a name in METHODS
    noise: float = NOISE  # standard deviation of the noise, as a fraction of the old rows' standard deviation
    seed: int = 0


def new_rows(
    old: torch.Tensor,
    sub_tokens: list[list[int]],
    init: Initialisation = Initialisation(),  # noqa: B008 (immutable)
    random_std: float = 0.02,
) -> torch.Tensor:
    """Return rows for new tokens, fp32 `(new tokens, hidden)`, made from the trained rows `old` `(old tokens, hidden)`.

    - `subtokens`: the mean of the rows `sub_tokens[i]`, the old tokens that encode the text of token i.
    - `mean`: the mean of all old rows (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
    - `random`: normal with standard deviation `random_std`, as in a model that is trained from scratch.

    `subtokens` and `mean` add noise with noise^2 times the covariance of the old rows, because tokens with equal rows would stay
    equal (Mundra et al., arXiv:2407.05841).
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
        # A random combination of the centred rows has their covariance, without factorising the covariance matrix.
        centred = (old - mean) / max(1, len(old) - 1) ** 0.5
        for part in rows.split(CHUNK_ROWS):
            part += init.noise * torch.randn(len(part), len(old), generator=generator) @ centred
    return rows


# --- The directory ------------------------------------------------------------------------------------------------------


def write_extension(
    source: Path,
    target: Path,
    config: PretrainedConfig,
    base: BaseTokenizer,
    tokens: list[NewToken],
    init: Initialisation = Initialisation(),  # noqa: B008 (immutable)
    multiple: int = 64,
) -> Tokenizer:
    """Write the model directory `source`, extended with `tokens`, into the empty directory `target`. Return the new tokenizer.

    `config` and `base` are the configuration and tokenizer of `source`. Training pads the vocabulary to a multiple of `multiple`.
    `new_tokens.json` lists the new tokens and the initialisation of their rows. Embedding and head are both extended, tied or
    not. Rows of the old model beyond its tokenizer (Qwen's vocabulary is padded) were never trained, so they are replaced or
    dropped. Weights are read and written file by file, in their dtype, or in fp32 if they have several dtypes. Raises UserError
    if the tokenizer has more tokens than the model has rows.
    """
    first, texts, model = base.size, [token.text for token in tokens], build_on_meta(config)
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
        own_init = dataclasses.replace(init, seed=init.seed + is_head)
        rows = new_rows(tensor[:first], spelled, own_init, config.initializer_range)
        return torch.cat([tensor[:first], rows.to(tensor.dtype)])

    kinds = {tensor.dtype for tensor in stored_tensors(source).values()}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop()) if len(kinds) == 1 else None
    write_weights(target, Weights(shapes, read, old.vocabulary), dtype or torch.float32, form=stored_form(config))
    for path in (*source.iterdir(), *source.glob("*/*.jinja")):  # additional chat templates are in a folder
        copy = target / path.relative_to(source)
        if path.is_file() and path.suffix in COPIED and path.name not in STALE:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    copy_licences(source, target)
    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
    settings |= {"vocab_size": num_tokens, "make_vocab_size_divisible_by": multiple}
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(extended, base, texts, target)
    record = {"base": str(source), "first_id": first, "tokens": []}
    if (earlier := source / NEW_TOKENS).is_file():  # `source` is itself an untrained extension: its new rows stay new
        record = json.loads(earlier.read_text(encoding="utf-8"))
    record |= {"init": init.method, "noise": init.noise, "seed": init.seed}
    record["tokens"] += [dataclasses.asdict(token) for token in tokens]
    (target / NEW_TOKENS).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return extended
