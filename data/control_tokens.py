"""Keep content as text: no text of a message, a document or a tool result may become a control token of the model.

Control tokens are the tokenizer's special tokens, and the other added tokens that look like markup, such as `<|user|>`, and occur
in the chat template or in its output. A tokenizer recognises them anywhere in a text, whoever wrote it. This module gives them
secret names: the encoder knows `<|im_end|>` as NAME<|im_end|>, and NAME is inserted before the control tokens that the template
itself wrote. To tell these from content, every control token in a content gets a mark inside before the chat is rendered; the
marks are removed before the text is encoded. So the ids differ from those of `apply_chat_template` only if a content spells a
control token.

transformers 5.24 and later has `sanitize_control_tokens`, which does the same for the ids of one prompt, but not for answers,
plain texts or batches.
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
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a tokenizer's spelling of a byte for which it has no other token
# Tags that an assistant's own turn may spell: <think>, </tool_call>, [THINK].
OWN_TAGS = re.compile(r"</?[\w:]+>")
# A template may remove a word from a content, such as /no_think. The text on both sides may then join to a control token.
TAKEN_OUT = re.compile(r"""\breplace\(\s*('[^']+'|"[^"]+")\s*,\s*(?:''|"")\s*\)""")
THINKING_TAGS = re.compile(r"[<\[]/?(?:\w+:)?(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)


class ControlTokens:
    """The control tokens of a tokenizer and its chat template, and an encoder that knows them by their secret names only.

    texts: the control tokens as they are written. own: those that an assistant's answer may spell. encoder: adds no BOS or EOS,
    and neither pads nor truncates.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Letters and digits, which no template changes or escapes, and new for each object, so that no content can contain them.
        # Both are attributes, so an object that is sent to another rank keeps its encoder and its names together.
        self.name, self.mark = f"own{secrets.token_hex(8)}", f"mark{secrets.token_hex(8)}"
        source = _written_by(tokenizer)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special and not BYTE.fullmatch(text)}
        special |= {*tokenizer.all_special_tokens}
        markup = {text for text in added if text not in special and MARKUP.fullmatch(text) and text in source}
        # A mark breaks a token of at least two characters, unless the mark itself contains the token.
        texts = {text for text in special | markup if len(text) > 1 and text not in self.name + self.mark}
        self.texts = tuple(sorted(texts, key=lambda text: (-len(text), text)))  # a pattern finds the longest
        self.own = {text for text in texts if THINKING_TAGS.fullmatch(text)}
        self.own |= {text for text in markup if OWN_TAGS.fullmatch(text)}
        self._all = _any_of(self.texts)
        self._foreign = _any_of([text for text in self.texts if text not in self.own])  # to answers
        self._taken_out = _any_of([ast.literal_eval(text) for text in TAKEN_OUT.findall(source)])
        self.encoder = renamed(tokenizer, self.texts, self.name)

    def found_in(self, text: str) -> list[str]:
        """Return the control tokens in a text that is entirely content."""
        return self._all.findall(text)

    def marked(self, messages: Sequence[dict], tools: list | None) -> tuple[list[dict], list | None, list[str]]:
        """Return (messages, tools, the control tokens in them), with a mark inside each of these tokens."""
        spelled: list[str] = []
        messages = [
            self._marked(m, self._foreign if m["role"] == "assistant" else self._all, spelled) for m in messages
        ]
        return messages, self._marked(tools, self._all, spelled), spelled

    def _marked(self, value: Any, pattern: re.Pattern, spelled: list[str]) -> Any:
        if isinstance(value, str):
            while tokens := pattern.findall(value):  # tokens may overlap
                spelled += tokens
                value = pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], value)
            rest = value
            while (shorter := self._taken_out.sub("", rest)) != rest:  # removed words may be nested
                rest = shorter
                if tokens := pattern.findall(rest):
                    spelled += tokens
                    value = self._taken_out.sub(rf"{self.mark}\g<0>", value)
                    break
        elif isinstance(value, dict):
            return {self._marked(k, pattern, spelled): self._marked(v, pattern, spelled) for k, v in value.items()}
        elif isinstance(value, list):
            return [self._marked(item, pattern, spelled) for item in value]
        return value

    def named(self, text: str) -> str:
        """Prepare a part of a rendered chat for the encoder: secret names before the template's own tokens, no marks."""
        return self._all.sub(rf"{self.name}\g<0>", text).replace(self.mark, "")


def _written_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template's source and sample output. Some templates write a token in parts, such as '<|' + message.role + '|>'."""
    texts = [str(tokenizer.chat_template)]
    for roles in ("user assistant user", "system user", "developer user", "user assistant tool"):
        with suppress(Exception):  # a template may refuse a role, or an order of roles
            chat = [{"role": role, "content": "text"} for role in roles.split()]
            texts.append(cast(str, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)))
    return "".join(texts)


def _any_of(texts: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def renamed(tokenizer: PreTrainedTokenizerBase, control: Iterable[str], name: str) -> Tokenizer:
    """Return the tokenizer's backend with `name` before each of these tokens, in the added tokens and the vocabulary.

    It adds no BOS or EOS, and neither pads nor truncates.
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
    if "merges" in model:  # some vocabularies have merges that would build `</s>` from `</` and `s>`
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in new]
    return Tokenizer.from_str(json.dumps(parts))
