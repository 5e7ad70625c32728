"""Split a chat into generation prompts and the answers that follow them.

A training sequence is a prompt as `apply_chat_template(..., add_generation_prompt=True)` renders it, followed by the answer up to
and including a token that ends generation. Training and generation see the same prompt because both make the same call.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import UserError
from data.chat_template import ChatTemplate
from data.control_tokens import ControlTokens

THOUGHTS = ("reasoning_content", "thinking")  # keys of a message
# A prompt may end in a thinking block, open or empty.
THINKING = re.compile(
    r"(?P<open>[<\[](?:\w+:)?(?:think|thinking|thought|reasoning)[>\]])\s*(?P<closed>[<\[]/(?:\w+:)?\w+[>\]]\s*)?$",
    re.IGNORECASE,
)
PLACE = "here the message before ends"  # replaces a content, to find the text that the template writes after it
TEMPLATE_HINT = "give another template in data.chat_template"
ASK, SAY = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
FUNCTION = {"name": "ratio", "description": "a ratio", "parameters": {"type": "object", "properties": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "ratio", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "1", "name": "ratio", "tool_call_id": "call00001"}


class Turn(NamedTuple):
    """A trained answer and the prompt before it, both with the marks in their content (data/control_tokens.py).

    exact: the template renders the chat that ends with the answer as prompt + answer. stops: the number of tokens in the answer
    at which generation ends; above 1 if the template writes the answer in several parts. loss: the characters of the answer
    inside the template's `{% generation %}` blocks; None if it has none, and the whole answer carries loss.
    """

    prompt: str
    answer: str
    weight: float
    exact: bool
    stops: int
    loss: list[tuple[int, int]] | None


class Labels:
    """Finds the answers of chats in a template's output.

    stops: the tokens that end an answer, first the argument `stops` (EOS, then generation_config.json), then the template's own.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, stops: Sequence[str]) -> None:
        self.template, self.control = template, control
        self.stops = list(dict.fromkeys(stops))
        # Also matches tags such as <tool_call>, so that no tag is cut where two renderings differ.
        self.tag = re.compile("|".join([*map(re.escape, control.texts), r"<[^<>\s]*>"]))
        self.ends = [text for text in control.texts if text not in control.own]
        # These end an answer after which the template writes nothing: the token that begins the next turn (GLM), or EOS.
        self.after_text = self._ending(ASK, SAY, ASK, None)
        self.after_call = self._ending(ASK, CALL, RESULT, [{"type": "function", "function": FUNCTION}])

    def _ending(self, before: dict, answer: dict, following: dict, tools: list | None) -> str:
        """Find the token that ends an answer if the template writes none at the end of a chat. Add it to `stops`.

        Take the tokens that the template writes after the answer both at the end of a chat and in its middle; else the tokens at
        the end (gpt-oss); else the first token of the next turn (GLM); else EOS. Of several tokens, take a known stop, or the last.
        """
        try:
            whole = self.template.render([before, answer], tools)
            longer = self.template.render([before, answer, following], tools)
        except UserError:
            return self.stops[0]
        end = self._content_end(whole)
        last_words = whole[max(0, end - 8) : end]  # of the answer, which end it in the longer chat too
        _, separator, after = longer.rpartition(last_words)
        at_end, in_middle = self._leading(whole[end:]), self._leading(after) if separator else []
        common = [token for token, twin in zip(at_end, in_middle, strict=False) if token == twin]
        tokens = common or at_end or in_middle[:1] or self.stops
        token = next((token for token in tokens if token in self.stops), tokens[-1])
        self.stops += [token] if token not in self.stops else []
        return token

    def _content_end(self, text: str) -> int:
        """Return where the white space and control tokens at the end of a text begin. Tags such as </tool_call> are content."""
        while True:
            rest = text.rstrip()
            text = next((rest.removesuffix(token) for token in self.ends if rest.endswith(token)), rest)
            if text == rest:
                return len(text)

    def _leading(self, text: str) -> list[str]:
        """Return the control tokens at the beginning of a text, with only white space between them."""
        tokens = []
        while token := next((token for token in self.ends if text.lstrip().startswith(token)), None):
            tokens.append(token)
            text = text.lstrip().removeprefix(token)
        return tokens

    def turn(self, messages: Sequence[dict], i: int, tools: list | None, weight: float) -> Turn:
        """Return the answer in message `i`. Raise UserError if the template refuses it, or leaves out a part of it."""
        prompt = self.template.render(messages[:i], tools, prompt=True)
        rendered = self.template.render(messages[: i + 1], tools)
        exact, block = rendered.startswith(prompt), THINKING.search(prompt)
        rest = rendered[len(prompt) :] if exact else self._rest(messages, i, tools)
        if block and not (exact and _continues(block, rest)):
            rest, exact = _after_thinking(block, rest, messages[i]), False
        answer, stops = self._ended(rest, "tool_calls" in messages[i])
        loss = None
        if self.template.marks_generation and rendered.endswith(rest):
            loss = self._loss(messages[: i + 1], tools, answer, len(rendered) - len(rest))
        return Turn(prompt, answer, weight, exact, stops, loss)

    def _rest(self, messages: Sequence[dict], i: int, tools: list | None) -> str:
        """Return the text of an answer that the template renders differently inside a chat than after the answer's own prompt.

        Both renderings are compared from the end of the previous message on. The text may begin with a thinking block.
        """
        placed = [*messages[: i - 1], messages[i - 1] | {"content": PLACE}]
        _, in_prompt, prompt = self.template.render(placed, tools, prompt=True).rpartition(PLACE)
        _, in_chat, chat = self.template.render([*placed, messages[i]], tools).rpartition(PLACE)
        if not (in_prompt and in_chat):
            raise UserError(
                f"the chat template rewrites message {i} once the assistant has answered it; {TEMPLATE_HINT}"
            )
        prompt = THINKING.sub("", prompt)
        same = len(os.path.commonprefix([prompt, chat]))
        same = next((m.start() for m in self.tag.finditer(prompt) if m.start() < same < m.end()), same)
        rest = chat[same:]
        # The end of the prompt may come later in the chat (Hermes), or not at all (Apertus).
        if beyond := prompt[same:]:
            rest = rest.partition(beyond)[2] or rest.lstrip()
            if any(stop in rest[: self._content_end(rest)] for stop in self.stops):
                raise UserError(
                    f"the chat template writes message {i + 1} otherwise than after its own prompt; {TEMPLATE_HINT}"
                )
        return rest

    def _ended(self, rest: str, calls: bool) -> tuple[str, int]:
        """Return (the answer up to and including the first stop after its content; the number of stops in it)."""
        end = self._content_end(rest)
        ends = [(rest.index(stop, end), -len(stop), stop) for stop in self.stops if stop in rest[end:]]
        inside = sum(rest.count(stop, 0, end) for stop in self.stops)
        if not ends:
            return rest.rstrip() + (self.after_call if calls else self.after_text), inside + 1
        start, _, stop = min(ends)
        return rest[: start + len(stop)], inside + 1

    def _loss(self, messages: Sequence[dict], tools: list | None, answer: str, start: int) -> list[tuple[int, int]]:
        """Return the character ranges of an answer, which begins at `start`, inside the template's generation blocks.

        The text before the assistant's first words and the stop belong to the ranges even if they are outside of the blocks.
        """
        content = (messages[-1].get("content") or "").strip()
        stop = next((len(stop) for stop in self.stops if answer.endswith(stop)), 0)
        parts = []
        for first, last in self.template.generation_spans(messages, tools):
            first, last = max(0, first - start), min(len(answer), last - start)
            first = 0 if not answer[:first].strip() or not content.startswith(answer[:first].strip()) else first
            last = len(answer) if last >= len(answer) - stop else last
            parts += [(first, last)] if first < last else []
        return parts


def _closing(block: re.Match[str]) -> str:
    return f"{block['open'][0]}/{block['open'][1:]}"


def _continues(block: re.Match[str], rest: str) -> bool:
    """Return whether an answer continues the thinking block at the end of its prompt, if that is open, without a second block.

    Qwen3.8 closes the block empty, and then writes the block that stands in a content.
    """
    opening, closing = map(re.escape, (block["open"], _closing(block)))
    return bool(block["closed"]) or (_closing(block) in rest and not re.match(rf"\s*{closing}\s*{opening}", rest))


def _after_thinking(block: re.Match[str], rest: str, message: dict) -> str:
    """Return the answer after a prompt that ends in a thinking block: without a block if it is closed, else with its rest.

    rest: the answer as the template writes it, perhaps with blocks. The thinking comes from the template's text or from the
    message: from a key beside the content or, between tags, from the beginning of the content.
    """
    opening, closing = block["open"], _closing(block)
    block_at_start = re.compile(rf"\s*(?:{re.escape(opening)}(.*?))?{re.escape(closing)}\s*", re.DOTALL)
    written = ""
    while block_match := block_at_start.match(rest):
        written, rest = written or (block_match[1] or "").strip(), rest[block_match.end() :]
    if block["closed"]:
        return rest
    beside = next((message[key] for key in THOUGHTS if message.get(key)), "")
    inside, tag, _ = (message.get("content") or "").partition(closing)
    thought = written or beside or (inside.replace(opening, "") if tag else "")
    line = "\n" if block[0].endswith("\n") else ""
    return f"{thought.strip()}{line}{closing}{line * 2}{rest}"


def check_complete(turn: Turn, message: dict, number: int) -> bool:
    """Return whether an answer has all content of its message; False if only its thinking is missing or changed.

    Raise UserError if more is missing, because the model would learn to leave that out.
    """
    content = (message.get("content") or "").strip()
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    if any(turn.answer.count(name) < names.count(name) for name in names):
        raise UserError(f"the chat template leaves out a tool call of message {number}; {TEMPLATE_HINT}")
    if content in turn.answer:
        return all((message.get(key) or "").strip() in turn.answer for key in THOUGHTS)
    if (re.split(r"[<\[]/(?:\w+:)?\w+[>\]]", content)[-1].strip() or content) in turn.answer:
        return False
    raise UserError(
        f"the chat template leaves out or changes what the assistant says in message {number}; {TEMPLATE_HINT}"
    )


def drops_content(text: str, messages: Sequence[dict]) -> bool:
    """Return whether a rendered text lacks the content of a message other than an answer."""
    position = 0  # messages mostly come in order, which makes the search linear
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str):
            continue
        content = content.strip()
        at = text.find(content, position)
        # Some templates trim every line.
        if at < 0 and content not in text and not all(line.strip() in text for line in content.split("\n")):
            return True
        position = max(position, at)
    return False
