"""Chat templates of public models, from clones of the repositories that collect them: read, checked by hash, with tokenizers.

The templates belong to their models and are not part of this repository. tests/data/templates.json lists them: repository,
commit, licence of the repository, path and SHA-256 of each. To judge them:

    git clone https://github.com/huggingface/trl clones/trl        # and the others; --filter=blob:none makes it quick
    python -m tests.real_templates clones real_templates           # clones/NAME for each repository OWNER/NAME
    REAL_TEMPLATES=real_templates python -m pytest tests/data/test_labels.py
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.chat_families import trained

SOURCES = json.loads((Path(__file__).parent / "data/templates.json").read_text(encoding="utf-8"))
REPOSITORIES = tuple(SOURCES)
# (a text in a template, EOS and the other tokens at which generation of its family ends): the first that is found counts.
STOPS = (
    ("<|calls|>", ("<|endoftext|>", "<|end|>", "<|calls|>")),
    ("add_thoughts", ("<|end|>",)),
    ("<|begin_assistant|>", ("<|end|>",)),
    ("eom_str", ("<|eom|>",)),
    ("<|startoftext|>", ("<|im_end|>",)),
    ("<|header_start|>", ("<|eot|>", "<|eom|>")),
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
# Tokens that the tokenizers of these families have as ordinary ones.
ORDINARY = re.compile(
    r"</?(?:think|tool_call|tool_response|tool_calls|minimax:tool_call|arg_key|arg_value)>|<｜(?:User|Assistant|tool.*)｜>"
)


def read(folder: Path, repository: str) -> dict[str, str]:
    """The templates of a repository by their names. Fails if one is another than that of the list."""
    templates = {}
    for path, digest in SOURCES[repository]["files"].items():
        content = (folder / repository.replace("/", "+") / Path(path).name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, f"{path} of {repository} is not that of the list"
        source = content.decode()
        if repository == "chujiezheng/chat_templates":  # written to be read: its page says what is to be taken out
            source = source.replace("    ", "").replace("\n", "")
        templates[Path(path).stem] = source
    return templates


def tokenizer_of(source: str) -> tuple[PreTrainedTokenizerFast, tuple[str, ...]]:
    """(a byte-level tokenizer with the tokens that a template writes, what ends an answer: EOS first)."""
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


def main(clones: Path, out: Path) -> None:
    """Write the listed files of each clone to `out`."""
    for repository, source in SOURCES.items():
        folder = out / repository.replace("/", "+")
        folder.mkdir(parents=True, exist_ok=True)
        for path in source["files"]:
            show = ["git", "-C", str(clones / repository.partition("/")[2]), "show", f"{source['commit']}:{path}"]
            (folder / Path(path).name).write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
    print(sum(len(read(out, repository)) for repository in SOURCES), "templates")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
