"""New tokens in a pretrained tokenizer, so that every text decodes to what it decoded to before.

Byte-level BPE (Llama 3, Qwen, SmolLM) cuts a text into words and numbers before it merges, so that no merge could make a
token of " r0010 c0010". There a new token is an added one, found in the text before it is cut.

A sentencepiece BPE (Llama 2, Mistral, Gemma) writes spaces as U+2581 and puts one before a text. An added token would
have each part of the text around it begin anew, with a space that nobody wrote. There the text is cut at the new tokens
after its spaces are written, and they are entries of the vocabulary proper; in tokenizer.model, user-defined pieces.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space
BYTE_TOKEN = "<(?=0x[0-9A-F]{2}>)"  # cut after "<": a text that spells <0x0A> must not become the token of that byte


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer that can be extended."""

    backend: Tokenizer
    byte_level: bool  # else sentencepiece's BPE

    @property
    def size(self) -> int:
        """The first id that is free."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def read_base_tokenizer(path: str | Path) -> BaseTokenizer:
    """The tokenizer of a model directory. Raises UserError for one that is neither byte-level nor sentencepiece BPE."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {path}: {str(error).splitlines()[0]}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    cuts = [part["type"] for part in _steps(settings.get("pre_tokenizer"), "pretokenizers")]
    byte_level = "ByteLevel" in cuts
    if settings["model"].get("type") != "BPE" or not (byte_level or settings["model"].get("byte_fallback")):
        raise UserError(f"{path}: only byte-level BPE and sentencepiece BPE with bytes can be extended")
    steps = _steps(settings.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") or step.get("split") for step in steps):
        raise UserError(f"{path}: a tokenizer that puts a space before every word cannot be extended")
    return BaseTokenizer(backend, byte_level)


def sub_tokens(base: BaseTokenizer, text: str) -> list[int]:
    """The ids of a string as it is encoded in the middle of a text."""
    if base.byte_level:
        return base.backend.encode(text, add_special_tokens=False).ids
    return [token.id for token in base.backend.model.tokenize(text.replace(" ", SPACE))]


def can_be_token(base: BaseTokenizer, text: str) -> bool:
    """Whether a string could be told from its token again.

    An added token of letters that byte-level BPE uses as signs for bytes (é, without a space beside it) would be decoded
    as those bytes; a normalizer may write a string in another way (NFC).
    """
    if base.byte_level and " " not in text and not text.isascii():
        return False
    return base.backend.decode(sub_tokens(base, "x" + text), skip_special_tokens=False) == "x" + text


def extend_tokenizer(base: BaseTokenizer, texts: list[str]) -> Tokenizer:
    """A tokenizer with `texts` as tokens `base.size`, `base.size + 1`, and so on. The base stays as it is."""
    first = base.size
    if base.byte_level:
        extended = Tokenizer.from_str(base.backend.to_str())
        extended.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    else:
        settings = json.loads(base.backend.to_str())
        written = [text.replace(" ", SPACE) for text in texts]
        settings["model"]["vocab"] |= {piece: first + i for i, piece in enumerate(written)}
        settings["model"]["ignore_merges"] = True  # a part of the text that is an entry is that token, without merges
        cut = {"Regex": f"{prefix_regex(written)}|{BYTE_TOKEN}"}
        steps = _steps(settings.get("pre_tokenizer"), "pretokenizers")
        steps.append({"type": "Split", "pattern": cut, "behavior": "Isolated", "invert": False})
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        extended = Tokenizer.from_str(json.dumps(settings))
    for i, text in enumerate(texts):
        found = extended.encode("x" + text, add_special_tokens=False).ids
        if found[-1:] != [first + i]:
            raise ValueError(f"the new token {text!r} is not found in a text: it is encoded as {found}")
    return extended


def prefix_regex(strings: list[str]) -> str:
    """A regular expression of these strings, the longest first, in which common beginnings stand once.

    A thousand alternatives in a row would each be tried at every character.
    """
    tree: dict = {}
    for string in strings:
        node = tree
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}

    def expression(node: dict) -> str:
        ways = [re.escape(character) + expression(child) for character, child in node.items() if character]
        if not ways:
            return ""
        together = ways[0] if len(ways) == 1 and "" not in node else f"(?:{'|'.join(ways)})"
        return together + "?" if "" in node else together

    return expression(tree)


def write_tokenizer(extended: Tokenizer, base: BaseTokenizer, texts: list[str], directory: Path) -> None:
    """Replace the tokenizer's files in a copy of the base's directory."""
    extended.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # The classes of single models build their tokenizer anew from vocabulary and merges, and would lose the cuts.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (directory / "tokenizer.model").is_file() and not base.byte_level:
        _extend_sentencepiece(directory / "tokenizer.model", base, texts)


def _extend_sentencepiece(path: Path, base: BaseTokenizer, texts: list[str]) -> None:
    """The same tokens as user-defined pieces: sentencepiece too finds them first, the longest at each place."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    kinds = model.SentencePiece
    # Tokens that the directory has beside its sentencepiece model take the ids up to the first new one.
    for i in range(len(model.pieces), base.size):
        model.pieces.add(piece=base.backend.id_to_token(i) or f"<unused_{i}>", score=0.0, type=kinds.CONTROL)
    for text in texts:
        model.pieces.add(piece=text.replace(" ", SPACE), score=0.0, type=kinds.USER_DEFINED)
    path.write_bytes(model.SerializeToString())


def tokenizer_texts(tokenizer: PreTrainedTokenizerBase, first: int) -> list[str]:
    """The texts of the tokens from id `first` on, as an extended tokenizer has them."""
    return [tokenizer.decode([i]) for i in range(first, len(tokenizer))]


def _steps(part: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, which is one, a sequence of them, or none."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if part["type"] == "Sequence" else [part]
