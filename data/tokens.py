"""Encode chats and documents as token ids and a loss mask.

The loss mask of a chat comes from the structure of the chat template, never from a search for marker strings:

1. A template with `{% generation %}` blocks marks the tokens that the assistant wrote (`return_assistant_tokens_mask`
   in transformers).
2. Any other template is rendered turn by turn. The text before an assistant turn, including the generation prompt, must
   be a prefix of the text after that turn. A template that rewrites earlier turns violates this, and the example is
   refused.

In the second case each turn is tokenised separately. The prompt at generation time therefore has exactly the tokens
that preceded the answer in training.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UserError

# For base models without a chat template. Documented in docs/models.md.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


# Files that hold a vocabulary; besides these, sentencepiece's *.model and *.tiktoken.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub id. If it has no chat template, it gets `PLAIN_CHAT_TEMPLATE`.

    Raises UserError if there is no tokenizer or it has no `eos_token`, without which the model could not learn to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # damaged files raise many kinds, `Exception` itself among them
        raise UserError(f"cannot load a tokenizer from {path}: {_why_not_loaded(Path(path), error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no eos_token; set it in tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def _why_not_loaded(path: Path, error: Exception) -> str:
    """The reason why a tokenizer could not be loaded, and what to do, in place of transformers' own explanation."""
    mend = "copy the tokenizer files of the model into it"
    if path.is_file():
        return "it is a file; name the directory of a model"
    if not path.is_dir():
        fetch = "python scripts/fetch_base_model.py ORGANISATION/NAME downloads a model"
        return f"there is no such directory, nor a downloaded model of that name; {fetch}"
    if not any(file.name in VOCABULARY_FILES or file.suffix in (".model", ".tiktoken") for file in path.iterdir()):
        return f"it has no tokenizer.json; {mend}"
    for file in sorted(path.glob("*token*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            return f"{file.name} is damaged ({problem}); {mend} again"
    return f"{type(error).__name__}: {' '.join(str(error).split())}; {mend} again"


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat and their loss mask: True for the tokens that the assistant wrote, including EOS.

    Raises UserError if the template does not allow telling which tokens the assistant wrote.
    """
    if _marks_generation(tokenizer.get_chat_template()):
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = cast(Mapping[str, list[int]], rendered)
        ids, is_target = list(rendered["input_ids"]), [bool(flag) for flag in rendered["assistant_masks"]]
    else:
        ids, is_target = _encode_turn_by_turn(tokenizer, messages)
    return _learn_eos(ids, is_target, _eos(tokenizer), ends_with_answer=messages[-1]["role"] == "assistant")


def encode_example(tokenizer: PreTrainedTokenizerBase, example: dict) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of an example, by `encode_chat` if it has `messages`, else by `encode_document`."""
    if "messages" in example:
        return encode_chat(tokenizer, example["messages"])
    return encode_document(tokenizer, example["text"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Token ids of a chat up to the beginning of the assistant's next answer. A final assistant message is ignored."""
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if _marks_generation(tokenizer.get_chat_template()):
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(cast(Mapping[str, list[int]], rendered)["input_ids"])
    segments = _segments(tokenizer, messages + [{"role": "assistant", "content": ""}])[:-1]
    return [token for text, _ in segments for token in tokenizer.encode(text, add_special_tokens=False)]


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """Token ids of a text followed by EOS, and their loss mask, which is True everywhere.

    The first token has no context, so callers exclude it from the loss.
    """
    ids = tokenizer.encode(text, add_special_tokens=False) + [_eos(tokenizer)]
    return ids, [True] * len(ids)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.eos_token_id)  # load_tokenizer refuses a tokenizer without it


def _marks_generation(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\b", template) is not None


def _segments(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[tuple[str, bool]]:
    """Split a rendered chat into consecutive (text, is_by_assistant) segments."""

    def render(upto: int, prompt: bool) -> str:
        if upto == 0 and not prompt:
            return ""
        text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)
        return cast(str, text)

    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, prompt=True), render(i + 1, prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "the chat template rewrites earlier turns, so the tokens that the assistant wrote cannot be identified; "
                "give the tokenizer a template with {% generation %} blocks"
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    rest = render(len(messages), prompt=False)
    if len(rest) > len(done):
        segments.append((rest[len(done) :], False))
    return segments


def _encode_turn_by_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    ids, is_target = [], []
    for text, by_assistant in _segments(tokenizer, messages):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        flags = [by_assistant] * len(tokens)
        if by_assistant and tokenizer.eos_token_id in tokens:
            # What the template adds after the end of the turn, such as a newline, is not part of the answer.
            end = len(tokens) - tokens[::-1].index(tokenizer.eos_token_id)
            flags[end:] = [False] * (len(tokens) - end)
        ids += tokens
        is_target += flags
    return ids, is_target


def _learn_eos(ids: list[int], is_target: list[bool], eos: int, ends_with_answer: bool) -> tuple[list[int], list[bool]]:
    """Make the EOS after each answer a target, and append EOS to a final answer without it: the model learns to stop."""
    for i in range(1, len(ids)):
        if ids[i] == eos and is_target[i - 1]:
            is_target[i] = True
    if ends_with_answer and any(is_target):
        last = len(is_target) - 1 - is_target[::-1].index(True)
        if ids[last] != eos:
            ids, is_target = ids[: last + 1] + [eos], is_target[: last + 1] + [True]
    return ids, is_target
