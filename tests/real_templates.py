"""Chat templates of public models, and tokenizers for them. They belong to the models, and none is part of this repository.

TRL's templates are in its package, which requirements-dev.txt installs. Three more collections are judged if they are cloned:

    git clone --filter=blob:none --no-checkout https://github.com/axolotl-ai-cloud/axolotl clones/axolotl      # and the others
    TEMPLATES=clones python -m pytest tests/data/test_labels.py
"""

import importlib.metadata
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import IO, cast

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.chat_families import trained

TRL = "huggingface/trl"
# repository -> (its version or commit, the folder of the templates). Apache-2.0 covers the first two, MIT the others.
COLLECTIONS = {
    TRL: ("v1.16.0", "trl/chat_templates"),
    "axolotl-ai-cloud/axolotl": (
        "067b021c8b87a9e5e380b9173c704cf7340e30f5",
        "src/axolotl/utils/chat_templates/templates",
    ),
    "carlosfundora/llama.cpp-1-bit-turbo": ("94ba2002bf44fa8e1ca0ddf1122bb51e7748406f", "models/templates"),
    "chujiezheng/chat_templates": ("11c495621569969f264ee70b5c8bb49ba7a1a410", "chat_templates"),
}
# (a text in a template, EOS and the other tokens at which its family ends generation): the first match counts.
STOPS = (
    ("<|calls|>", ("<|endoftext|>", "<|end|>", "<|calls|>")),
    ("add_thoughts", ("<|end|>",)),
    ("<|begin_assistant|>", ("<|end|>",)),
    ("eom_str", ("<|eom|>",)),
    ("<|startoftext|>", ("<|im_end|>",)),
    ("<|header_start|>", ("<|eot|>", "<|eom|>")),
    ("<atem:invoke", ("<|eot|>",)),
    ("<|end_of_turn|>", ("<|end_of_turn|>",)),
    ("<sep>", ("<sep>",)),
    ("<turn|>", ("<eos>", "<turn|>", "<|tool_response>")),
    ("<|return|>", ("<|return|>", "<|call|>")),
    ("<|tools_suffix|>", ("<|assistant_end|>", "<|tools_suffix|>")),
    ("<|observation|>", ("<|endoftext|>", "<|user|>", "<|observation|>")),
    ("<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",)),
    ("<|im_end|>", ("<|im_end|>",)),
    ("<|eot_id|>", ("<|eot_id|>", "<|eom_id|>")),
    ("<end_of_turn>", ("<eos>", "<end_of_turn>")),
    ("<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)),
    ("[e~[", ("[e~[",)),
    ("<|end|>", ("<|endoftext|>", "<|end|>")),
    ("<|end_of_text|>", ("<|end_of_text|>",)),
    ("<seed:eos>", ("<seed:eos>",)),
    ("<|message_sep|>", ("</s>", "<|message_sep|>")),
    ("[|endofturn|]", ("[|endofturn|]",)),
    ("", ("</s>",)),
)
BOS = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<BOS_TOKEN>", "<|startoftext|>", "<s>")
NAMES = (
    "start_of_turn|end_of_turn|think|seed:think|seed:eos|seed:bos|tool_call|tool_calls|tool_response|minimax:tool_call|arg_key|"
    "arg_value|sop|s|bos|eos|BOS_TOKEN|EOS_TOKEN|sep"
)
TOKENS = re.compile(
    rf"<\|[\w /\-]+\|>|<｜[^｜<>]+｜>|</?(?:{NAMES})>|<\|(?:turn|think|tool|tool_call|tool_response|channel)>|"
    r"<(?:turn|tool|tool_call|tool_response|channel)\|>|<\|\"\|>|\]~!?b[\[\]]|\[e~\[|\[\|\w+\|\]|"
    r"\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT|TOOL_CONTENT|CALL_ID|ARGS|THINK|gMASK)\]"
)
# Tokens that are ordinary tokens in the tokenizers of these families.
ORDINARY = re.compile(
    r"</?(?:think|tool_call|tool_response|tool_calls|minimax:tool_call|arg_key|arg_value)>|<｜(?:User|Assistant|tool.*)｜>"
)


def read(collection: str) -> dict[str, str]:
    """Return the templates of a collection by name. Skip the test if the collection is not available."""
    commit, folder = COLLECTIONS[collection]
    if collection == TRL:
        packages = [
            package for package in importlib.metadata.distributions(name="trl") if f"v{package.version}" == commit
        ]
        if not packages:
            pytest.skip(f"trl {commit} is not installed: pip install -r requirements-dev.txt")
        paths = sorted(Path(str(packages[0].locate_file(folder))).glob("*.jinja"))
        return {path.stem: path.read_text(encoding="utf-8") for path in paths}
    if not (clones := os.environ.get("TEMPLATES")):
        pytest.skip("TEMPLATES names no folder of clones (tests/real_templates.py)")
    git = ["git", "-C", str(Path(clones) / collection.partition("/")[2])]
    packed = subprocess.run([*git, "archive", commit, folder], check=True, capture_output=True).stdout
    templates = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        for member in files:
            if member.name.endswith(".jinja"):
                templates[Path(member.name).stem] = cast(IO[bytes], files.extractfile(member)).read().decode()
    if collection == "chujiezheng/chat_templates":  # laid out for readers; its page says what white space to remove
        return {name: source.replace("    ", "").replace("\n", "") for name, source in templates.items()}
    return templates


def tokenizer_of(source: str) -> tuple[PreTrainedTokenizerFast, tuple[str, ...]]:
    """Return (a byte-level tokenizer with the tokens that a template writes; the tokens that end an answer, EOS first)."""
    stops = next(stops for mark, stops in STOPS if mark in source)
    texts = sorted({*TOKENS.findall(source), *stops, "<s>"})
    tokenizer = Tokenizer.from_str(trained("byte"))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in texts if not ORDINARY.fullmatch(text)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts if ORDINARY.fullmatch(text)])
    bos = next(text for text in BOS if text in texts)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=stops[0], bos_token=bos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = source
    return fast, stops
