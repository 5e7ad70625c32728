"""Add new tokens to a pretrained tokenizer such that encoding and decoding a text gives the same text as before.

Byte-level BPE (Llama 3, Qwen, SmolLM) splits a text into words and numbers before merging, so no merge can produce a token
such as " r0010 c0010". New tokens are therefore added tokens, which are matched before the text is split.

Sentencepiece BPE (Llama 2, Mistral, Gemma) replaces spaces by U+2581 and prepends one to the text. With an added token, each
part of the text around it would be treated as a new text and get an extra space. New tokens are therefore entries of the
vocabulary itself, and the pre-tokenizer isolates them after the spaces are replaced. In tokenizer.model they are
user-defined pieces.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from common.errors import UserError

SPACE = "\u2581"  # the character with which sentencepiece writes a space
BYTE_TOKEN = (
    "<(?=0x[0-9A-F]{2}>)"  # split after "<", so that the literal text <0x0A> is not encoded as that byte's token
)


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer that can be extended."""

    backend: Tokenizer
    byte_level: bool  # else sentencepiece BPE

    @property
    def size(self) -> int:
        """The first free id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def read_base_tokenizer(path: str | Path) -> BaseTokenizer:
    """The tokenizer of a model directory. Raises UserError unless it is byte-level BPE or sentencepiece BPE."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
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
    """The token ids of a string in the middle of a text."""
    if base.byte_level:
        return base.backend.encode(text, add_special_tokens=False).ids
    return [token.id for token in base.backend.model.tokenize(text.replace(" ", SPACE))]


def can_be_token(base: BaseTokenizer, text: str) -> bool:
    """Whether a token with this text would decode to the same text.

    Byte-level BPE represents bytes by letters such as é, so an added token of non-ASCII letters without a space would be
    decoded as those bytes. A normalizer (NFC) may change the text.
    """
    if base.byte_level and " " not in text and not text.isascii():
        return False
    return base.backend.decode(sub_tokens(base, "x" + text), skip_special_tokens=False) == "x" + text


def extend_tokenizer(base: BaseTokenizer, texts: list[str]) -> Tokenizer:
    """A copy of the tokenizer with `texts` as tokens `base.size`, `base.size + 1`, ...

    Raises ValueError if a new token is not found in a text.
    """
    first = base.size
    if base.byte_level:
        extended = Tokenizer.from_str(base.backend.to_str())
        extended.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    else:
        settings = json.loads(base.backend.to_str())
        pieces = [text.replace(" ", SPACE) for text in texts]
        settings["model"]["vocab"] |= {piece: first + i for i, piece in enumerate(pieces)}
        settings["model"]["ignore_merges"] = (
            True  # an isolated part that is in the vocabulary becomes its token at once
        )
        pattern = {"Regex": f"{prefix_regex(pieces)}|{BYTE_TOKEN}"}
        steps = _steps(settings.get("pre_tokenizer"), "pretokenizers")
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        extended = Tokenizer.from_str(json.dumps(settings))
    for i, text in enumerate(texts):
        found = extended.encode("x" + text, add_special_tokens=False).ids
        if found[-1:] != [first + i]:
            raise ValueError(f"the new token {text!r} is not found in a text, which is encoded as {found}")
    return extended


def prefix_regex(strings: list[str]) -> str:
    """A regular expression that matches the longest of these strings, with common prefixes factored out (a trie).

    A plain alternation of thousands of strings would try each of them at every character.
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
    """Replace the tokenizer files in `directory`, a copy of the base model's directory, by those of `extended`."""
    extended.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Model-specific classes rebuild the tokenizer from vocabulary and merges, and would lose the new splits.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (directory / "tokenizer.model").is_file() and not base.byte_level:
        _extend_sentencepiece(directory / "tokenizer.model", base, texts)


def _extend_sentencepiece(path: Path, base: BaseTokenizer, texts: list[str]) -> None:
    """Add the tokens to tokenizer.model as user-defined pieces, which sentencepiece also matches first and longest first."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (generated at import)
    model.ParseFromString(path.read_bytes())
    kinds = model.SentencePiece
    # Added tokens outside the sentencepiece model have the ids up to the first new one.
    for i in range(len(model.pieces), base.size):
        model.pieces.add(piece=base.backend.id_to_token(i) or f"<unused_{i}>", score=0.0, type=kinds.CONTROL)
    for text in texts:
        model.pieces.add(piece=text.replace(" ", SPACE), score=0.0, type=kinds.USER_DEFINED)
    path.write_bytes(model.SerializeToString())


def _steps(part: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, flattened: it may be a single step, a nested sequence, or None."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if part["type"] == "Sequence" else [part]
