"""Load and save tokenizers; find their BOS, their stop tokens, and a fingerprint of how they split text."""

import hashlib
import json
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import UserError
from data.chat_template import PLAIN_CHAT_TEMPLATE

# Vocabulary files, besides sentencepiece's *.model and *.tiktoken.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub id.

    chat_template: a file with a Jinja template to use instead of the tokenizer's own. A tokenizer without any template gets
    `PLAIN_CHAT_TEMPLATE`.

    Raise UserError if there is no tokenizer, if it has no `eos_token`, without which the model could not learn to stop, or if
    the template file cannot be read.
    """
    try:
        tokenizer = read_tokenizer(path)
    except Exception as error:  # damaged files raise many types, even `Exception` itself
        raise UserError(f"cannot load a tokenizer from {path}: {_why_not_loaded(Path(path), error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no eos_token; set it in tokenizer_config.json")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"the tokenizer in {path} has several chat templates and no default one ({names}); write the one to use to a file "
            "and name it in data.chat_template"
        ) from error
    return tokenizer


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory, with the text splits of its tokenizer.json.

    For byte-level BPE, transformers 5 builds the class that the files name (GPT2Tokenizer for SmolLM2) with the splits of that
    family. Line ends and spaces before a number would then have other ids than in pretraining
    (huggingface/transformers#45488). Such a tokenizer is loaded again from tokenizer.json alone.
    """
    # By default it asks on the terminal whether to run the code of the directory.
    tokenizer, file = AutoTokenizer.from_pretrained(path, trust_remote_code=False), Path(path, "tokenizer.json")
    is_built = isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer) is not PreTrainedTokenizerFast
    if not (is_built and file.is_file() and b'"ByteLevel"' in file.read_bytes()):
        return tokenizer
    is_same = _splits(Tokenizer.from_file(str(file))) == _splits(tokenizer.backend_tokenizer)
    return tokenizer if is_same else PreTrainedTokenizerFast.from_pretrained(path)


def _splits(tokenizer: Tokenizer) -> bytes:
    """Return a tokenizer's normalizer and pre-tokenizer as bytes, without `trim_offsets`, which changes no id."""
    steps = [step.__getstate__() for step in (tokenizer.normalizer, tokenizer.pre_tokenizer) if step]
    return re.sub(b'"trim_offsets":(true|false),?', b"", b"".join(steps))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files. Two names are replaced by their transformers 4 spelling, which many servers still need."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(text.replace('"extra_special_tokens": [', '"additional_special_tokens": ['), encoding="utf-8")


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `PLAIN_CHAT_TEMPLATE`, preceded by BOS if the tokenizer puts BOS before a text."""
    return ("{{ bos_token }}" if bos_ids(tokenizer) else "") + PLAIN_CHAT_TEMPLATE


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text at inference: BOS or nothing.

    Documents, token stores and evaluations begin with these tokens too, so that a text has the same ids as at inference.
    """
    # Encode a non-empty text, because some tokenizers add nothing to an empty one.
    text = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    starts = (i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text)
    start = next(starts, 0)
    return whole[:start]


def generation_stops(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return `eos_token_id` of generation_config.json in the tokenizer's directory: the tokens at which generation ends.

    Raise UserError if the file is damaged.
    """
    file = Path(tokenizer.name_or_path, "generation_config.json")
    if not file.is_file():
        return []
    try:
        stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it or copy it again") from error
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines the ids of a text.

    These are the vocabulary, merges, added tokens, normalizer, pre-tokenizer, BOS and EOS. Raise UserError for a tokenizer
    without a `tokenizers` backend.
    """
    parts = json.loads(backend(tokenizer).to_str())
    relevant = {name: parts.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    relevant["eos"], relevant["bos"] = tokenizer.eos_token_id, bos_ids(tokenizer)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the `tokenizers` object inside a fast tokenizer. Raise UserError for a slow one."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise UserError(
            f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), which tokenising data requires"
        )
    return inner


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: {path} cannot be read ({error}); name a file with a Jinja template"
        ) from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    """Explain why a tokenizer could not be loaded and what to do, instead of transformers' own explanation."""
    mend = "copy the tokenizer files of the model into it"
    if path.is_file():
        return "it is a file; name the directory of a model"
    if not path.is_dir():
        fetch = "python scripts/fetch_base_model.py ORGANISATION/NAME downloads a model"
        return f"there is no such directory, nor a downloaded model of that name; {fetch}"
    if not any(file.name in VOCABULARY_FILES or file.suffix in (".model", ".tiktoken") for file in path.iterdir()):
        if (path / "adapter_config.json").is_file():
            mend = "scripts/export.py RUN writes the adapter of a run with its tokenizer"
        return f"it has no tokenizer.json; {mend}"
    for file in sorted(path.glob("*token*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            return f"{file.name} is damaged ({problem}); {mend} again"
    return f"{type(error).__name__}: {' '.join(str(error).split())}; {mend} again"
