"""A chat -> the prompts that generation sees, and what the assistant writes after each.

A training sequence is a prompt as `apply_chat_template(..., add_generation_prompt=True)` renders it, followed by the answer up
to and with a token that ends generation. What generation sees and what training sees are equal because they are the same call.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import UserError
from data.chat_template import ChatTemplate
from data.control_tokens import ControlTokens

THOUGHTS = ("reasoning_content", "thinking")  # keys of a message
# A prompt may end in a block for the thinking, open or empty.
THINKING = re.compile(
    r"(?P<open>[<\[](?:\w+:)?(?:think|thinking|thought|reasoning)[>\]])\s*(?P<closed>[<\[]/(?:\w+:)?\w+[>\]]\s*)?$",
    re.IGNORECASE,
)
PLACE = "here the message before ends"  # stands in for a content, to find what the template writes after it
ANOTHER = "give another template in data.chat_template"
ASK, SAY = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
FUNCTION = {"name": "ratio", "description": "a ratio", "parameters": {"type": "object", "properties": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "ratio", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "1", "name": "ratio", "tool_call_id": "call00001"}


class Turn(NamedTuple):
    """A trained answer: what generation sees before it, and what the assistant writes, both with the marks of their content.

    exact: the template renders the chat that ends with the answer as prompt + answer. stops: the number of tokens in the answer
    at which generation ends; more than 1 if the template writes it in several parts. loss: the characters of the answer that
    the template marks with `{% generation %}`; None if it marks none, and all of them carry loss.
    """

    prompt: str
    answer: str
    weight: float
    exact: bool
    stops: int
    loss: list[tuple[int, int]] | None


class Labels:
    """Finds the answers of chats in what a template makes of them.

    stops: the tokens that end an answer: `given` (EOS first, generation_config.json) and those of the template itself.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, given: Sequence[str]) -> None:
        self.template, self.control = template, control
        self.stops = list(dict.fromkeys(given))
        # A tag such as <tool_call>, too, is not to be cut where two renderings part.
        self.tag = re.compile("|".join([*map(re.escape, control.texts), r"<[^<>\s]*>"]))
        self.ends = [text for text in control.texts if text not in control.own]
        # What ends an answer after which the template writes nothing: the token that begins the next turn (GLM), or EOS.
        self.after_text = self._ending(ASK, SAY, ASK, None)
        self.after_call = self._ending(ASK, CALL, RESULT, [{"type": "function", "function": FUNCTION}])

    def _ending(self, before: dict, answer: dict, following: dict, tools: list | None) -> str:
        """The token that ends an answer where the template writes none at the end of a chat; it becomes one of `stops`.

        It is what the template writes after the answer both at the end of a chat and in its middle; else what it writes at the
        end (gpt-oss); else what begins the next turn (GLM); else EOS. Of several tokens it is the one that is known to end an
        answer, or the last.
        """
        try:
            whole = self.template.render([before, answer], tools)
            longer = self.template.render([before, answer, following], tools)
        except UserError:
            return self.stops[0]
        said = self._said(whole)
        last_words = whole[max(0, said - 8) : said]  # of the answer, which end it in the longer chat too
        _, found, after = longer.rpartition(last_words)
        at_end, in_middle = self._leading(whole[said:]), self._leading(after) if found else []
        both = [token for token, other in zip(at_end, in_middle, strict=False) if token == other]
        tokens = both or at_end or in_middle[:1] or self.stops
        token = next((token for token in tokens if token in self.stops), tokens[-1])
        self.stops += [token] if token not in self.stops else []
        return token

    def _said(self, text: str) -> int:
        """Where the white space and the control tokens at the end of a text begin. A tag such as </tool_call> is said."""
        while True:
            rest = text.rstrip()
            text = next((rest.removesuffix(token) for token in self.ends if rest.endswith(token)), rest)
            if text == rest:
                return len(text)

    def _leading(self, text: str) -> list[str]:
        """The control tokens that a text begins with, without anything but white space between them."""
        found = []
        while token := next((token for token in self.ends if text.lstrip().startswith(token)), None):
            found.append(token)
            text = text.lstrip().removeprefix(token)
        return found

    def turn(self, messages: Sequence[dict], i: int, tools: list | None, weight: float) -> Turn:
        """The answer that is message `i`. Raises UserError if the template refuses it, or leaves out what the assistant says."""
        prompt = self.template.render(messages[:i], tools, prompt=True)
        given = self.template.render(messages[: i + 1], tools)
        exact, block = given.startswith(prompt), THINKING.search(prompt)
        rest = given[len(prompt) :] if exact else self._rest(messages, i, tools)
        if block and not (exact and _continues(block, rest)):
            rest, exact = _after_thinking(block, rest, messages[i]), False
        answer, stops = self._ended(rest, "tool_calls" in messages[i])
        loss = None
        if self.template.marks_generation and given.endswith(rest):
            loss = self._loss(messages[: i + 1], tools, answer, len(given) - len(rest))
        return Turn(prompt, answer, weight, exact, stops, loss)

    def _rest(self, messages: Sequence[dict], i: int, tools: list | None) -> str:
        """What a template that renders a given answer otherwise than its prompt writes of it, maybe with a thinking block.

        Both renderings are compared from the end of the message before on.
        """
        placed = [*messages[: i - 1], messages[i - 1] | {"content": PLACE}]
        _, in_prompt, prompt = self.template.render(placed, tools, prompt=True).rpartition(PLACE)
        _, in_given, given = self.template.render([*placed, messages[i]], tools).rpartition(PLACE)
        if not (in_prompt and in_given):
            raise UserError(f"the chat template rewrites message {i} once the assistant has answered it; {ANOTHER}")
        prompt = THINKING.sub("", prompt)
        same = len(os.path.commonprefix([prompt, given]))
        same = next((m.start() for m in self.tag.finditer(prompt) if m.start() < same < m.end()), same)
        rest = given[same:]
        if beyond := prompt[same:]:  # it may come later in the given answer (Hermes), or not at all (Apertus)
            rest = rest.partition(beyond)[2] or rest.lstrip()
            if any(stop in rest[: self._said(rest)] for stop in self.stops):
                raise UserError(
                    f"the chat template writes message {i + 1} otherwise than after its own prompt; {ANOTHER}"
                )
        return rest

    def _ended(self, rest: str, calls: bool) -> tuple[str, int]:
        """(what the template writes of an answer, up to and with the first stop after what is said; number of stops in it)."""
        said = self._said(rest)
        ends = [(rest.index(stop, said), -len(stop), stop) for stop in self.stops if stop in rest[said:]]
        inside = sum(rest.count(stop, 0, said) for stop in self.stops)
        if not ends:
            return rest.rstrip() + (self.after_call if calls else self.after_text), inside + 1
        start, _, stop = min(ends)
        return rest[: start + len(stop)], inside + 1

    def _loss(self, messages: Sequence[dict], tools: list | None, answer: str, start: int) -> list[tuple[int, int]]:
        """The characters of an answer, which begins at `start`, that the template marks as written by the assistant.

        What it writes before the first words of the assistant, and the stop, belong to them even outside of its marks.
        """
        said = (messages[-1].get("content") or "").strip()
        stop = next((len(stop) for stop in self.stops if answer.endswith(stop)), 0)
        parts = []
        for first, last in self.template.generation_spans(messages, tools):
            first, last = max(0, first - start), min(len(answer), last - start)
            first = 0 if not answer[:first].strip() or not said.startswith(answer[:first].strip()) else first
            last = len(answer) if last >= len(answer) - stop else last
            parts += [(first, last)] if first < last else []
        return parts


def _closing(block: re.Match[str]) -> str:
    return f"{block['open'][0]}/{block['open'][1:]}"


def _continues(block: re.Match[str], rest: str) -> bool:
    """Whether an answer goes on in the thinking block at the end of its prompt, if that is open, and in no second one.

    Qwen3.8 closes the block empty, and then writes the block that stands in a content.
    """
    opening, closing = map(re.escape, (block["open"], _closing(block)))
    return bool(block["closed"]) or (_closing(block) in rest and not re.match(rf"\s*{closing}\s*{opening}", rest))


def _after_thinking(block: re.Match[str], rest: str, message: dict) -> str:
    """An answer after a prompt that ends in a thinking block: nothing of one if it is closed, else the rest of it.

    rest: the answer as the template writes it, maybe with blocks. The thinking is that of the template or of the message,
    beside its content or, between tags, at the beginning of it.
    """
    opening, closing = block["open"], _closing(block)
    block_at_start = re.compile(rf"\s*(?:{re.escape(opening)}(.*?))?{re.escape(closing)}\s*", re.DOTALL)
    written = ""
    while found := block_at_start.match(rest):
        written, rest = written or (found[1] or "").strip(), rest[found.end() :]
    if block["closed"]:
        return rest
    beside = next((message[key] for key in THOUGHTS if message.get(key)), "")
    inside, tag, _ = (message.get("content") or "").partition(closing)
    thought = written or beside or (inside.replace(opening, "") if tag else "")
    line = "\n" if block[0].endswith("\n") else ""
    return f"{thought.strip()}{line}{closing}{line * 2}{rest}"


def check_complete(turn: Turn, message: dict, number: int) -> bool:
    """Whether an answer has all that the assistant says; False if only its thinking is missing or changed.

    Raises UserError if more is missing, because the model would learn to say less than the assistant said.
    """
    content = (message.get("content") or "").strip()
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    if any(turn.answer.count(name) < names.count(name) for name in names):
        raise UserError(f"the chat template leaves out a tool call of message {number}; {ANOTHER}")
    if content in turn.answer:
        return all((message.get(key) or "").strip() in turn.answer for key in THOUGHTS)
    if (re.split(r"[<\[]/(?:\w+:)?\w+[>\]]", content)[-1].strip() or content) in turn.answer:
        return False
    raise UserError(f"the chat template leaves out or changes what the assistant says in message {number}; {ANOTHER}")


def drops_content(text: str, messages: Sequence[dict]) -> bool:
    """Whether the content of a message that is not an answer is missing from a rendered text."""
    position = 0  # messages mostly come in order, so that the search is linear
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str):
            continue
        content = content.strip()
        at = text.find(content, position)
        # A template may trim every line.
        if at < 0 and content not in text and not all(line.strip() in text for line in content.split("\n")):
            return True
        position = max(position, at)
    return False
