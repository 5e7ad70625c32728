"""Content is text: no word of a message, a report or a tool's result may become a control token of the model.

Control tokens are the special tokens of the tokenizer, and the other added tokens that stand in the chat template, or in what it
renders, and look like markup, such as `<|user|>`. A tokenizer finds them anywhere in a text, whoever wrote it. Here it gets them under secret names:
the encoder's `<|im_end|>` is called NAME<|im_end|>, and the name is written before those control tokens of a rendered chat that
the template wrote. They are told from the content's because every control token in a content gets a mark inside before the chat
is rendered; the marks are taken out again before the text is encoded. So the ids differ from those of `apply_chat_template`
only where a content has a control token.

transformers from 5.24 on has `sanitize_control_tokens`, which does the same for the ids of one prompt; it knows no answers, no
plain texts, and no batches.
"""

import ast
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from data.tokens import backend

MARKUP = re.compile(r"[<\[{|].*[>\]}|]")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # by these a tokenizer spells what it has no other token for
# An assistant's own turn may spell these tags itself: <think>, </tool_call>, [THINK].
OWN_TAGS = re.compile(r"</?[\w:]+>")
# A template may take a word out of a content, such as /no_think; what stood around it may be a control token then.
TAKEN_OUT = re.compile(r"""\breplace\(\s*('[^']+'|"[^"]+")\s*,\s*(?:''|"")\s*\)""")
THINKING_TAGS = re.compile(r"[<\[]/?(?:\w+:)?(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)


class ControlTokens:
    """The control tokens of a tokenizer with its chat template, and an encoder that makes them of their secret names only.

    texts: the control tokens as they are written. own: those that an answer of the assistant may spell. encoder: adds no BOS or
    EOS, does not pad or truncate.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Of letters and digits, which no template changes or escapes, and new each time, so that no content can have them. The
        # encoder has the name inside: an object that is sent to another rank takes both along.
        self.name, self.mark = f"own{secrets.token_hex(8)}", f"mark{secrets.token_hex(8)}"
        source = _written_by(tokenizer)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special and not BYTE.fullmatch(text)}
        special |= {*tokenizer.all_special_tokens}
        markup = {text for text in added if text not in special and MARKUP.fullmatch(text) and text in source}
        # A mark breaks a token of two characters or more, unless the mark itself has it.
        texts = {text for text in special | markup if len(text) > 1 and text not in self.name + self.mark}
        self.texts = tuple(sorted(texts, key=lambda text: (-len(text), text)))  # a pattern finds the longest
        self.own = {text for text in texts if THINKING_TAGS.fullmatch(text)}
        self.own |= {text for text in markup if OWN_TAGS.fullmatch(text)}
        self._all = _any_of(self.texts)
        self._foreign = _any_of([text for text in self.texts if text not in self.own])  # to an answer of the assistant
        self._taken_out = _any_of([ast.literal_eval(text) for text in TAKEN_OUT.findall(source)])
        self.encoder = renamed(tokenizer, self.texts, self.name)

    def found_in(self, text: str) -> list[str]:
        """The control tokens in a text that is all content."""
        return self._all.findall(text)

    def marked(self, messages: Sequence[dict], tools: list | None) -> tuple[list[dict], list | None, list[str]]:
        """(messages, tools, the control tokens in them), with a mark inside each of these tokens."""
        found: list[str] = []
        messages = [self._marked(m, self._foreign if m["role"] == "assistant" else self._all, found) for m in messages]
        return messages, self._marked(tools, self._all, found), found

    def _marked(self, value: Any, pattern: re.Pattern, found: list[str]) -> Any:
        if isinstance(value, str):
            while tokens := pattern.findall(value):  # tokens may overlap
                found += tokens
                value = pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], value)
            left = value
            while (shorter := self._taken_out.sub("", left)) != left:  # what is taken out may be nested
                left = shorter
                if tokens := pattern.findall(left):
                    found += tokens
                    value = self._taken_out.sub(rf"{self.mark}\g<0>", value)
                    break
        elif isinstance(value, dict):
            return {self._marked(k, pattern, found): self._marked(v, pattern, found) for k, v in value.items()}
        elif isinstance(value, list):
            return [self._marked(item, pattern, found) for item in value]
        return value

    def named(self, text: str) -> str:
        """What the encoder gets for a part of a rendered chat: secret names before the template's own tokens, no marks."""
        return self._all.sub(rf"{self.name}\g<0>", text).replace(self.mark, "")


def _written_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the template, and what it writes: some write a token in parts, such as '<|' + message.role + '|>'."""
    texts = [str(tokenizer.chat_template)]
    for roles in ("user assistant user", "system user", "developer user", "user assistant tool"):
        with suppress(Exception):  # a template may refuse a role, or an order of roles
            chat = [{"role": role, "content": "text"} for role in roles.split()]
            texts.append(cast(str, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)))
    return "".join(texts)


def _any_of(texts: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def renamed(tokenizer: PreTrainedTokenizerBase, control: Iterable[str], name: str) -> Tokenizer:
    """The tokenizer's backend with `name` before each of these tokens, in the added tokens and in the vocabulary of the model.

    It adds no BOS or EOS, and does not pad or truncate.
    """
    parts, new = json.loads(backend(tokenizer).to_str()), {text: name + text for text in control}
    parts |= {"post_processor": None, "padding": None, "truncation": None}
    for token in parts["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model = parts["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # some vocabularies have merges that would make `</s>` of `</` and `s>`
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in new]
    return Tokenizer.from_str(json.dumps(parts))
