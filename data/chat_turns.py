"""A chat -> the texts to train on, and the characters in them that the assistant is to write.

For the answer of turn i, generation sees the prompt P = render(messages before i, with the generation prompt), and a chat
that ends with the answer is rendered as F = render(messages up to i). The answer is what F has after P, up to the token
that ends the turn.

Many templates only append: every P is a prefix of the rendering of the whole chat, and one text serves all answers. Others
rewrite earlier turns (Qwen3 drops their thinking, Mistral moves the system message to the last question). Then the chat is
split: one text per trained answer, P and the answer, which is what the model sees when it generates. Where F does not
begin with P, because the template renders an answer differently once it is given (DeepSeek-R1 opens a thinking block in
the prompt), the text is P followed by the answer as F writes it.

What follows the last trained answer is left out: it has no target, and it would change how templates render that answer.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import UserError
from data.chat_answers import OPEN_THINKING, THOUGHTS, EndMarkers, answer_after, end_of_answer, parting, thinking_of
from data.chat_template import ChatTemplate, marks_generation

FEW_TURNS = 4  # up to so many trained answers, each is rendered by itself; in longer chats only some are
MANY_KINDS = 4  # of turns in a chat; with more of them each turn is rendered by itself
MARK = "qX{}Xq"  # stands in for the content of a message to find where the template puts it


class CharSpan(NamedTuple):
    """Characters `start` to `end` (exclusive) are an answer, with this factor of the loss."""

    start: int
    end: int
    weight: float


class RenderedText(NamedTuple):
    """A text and the answers in it, in order. The prompt of each answer is the text before it.

    needs_eos: the template writes no token that ends the last answer, so EOS is to follow it.
    """

    text: str
    answers: tuple[CharSpan, ...]
    needs_eos: bool


@dataclass(frozen=True)
class _Turn:
    """One trained answer, rendered by itself: its prompt, the text of the answer with its end, and its weight.

    as_given: prompt and answer are a prefix of what the template makes of the chat up to this answer.
    """

    prompt: str
    answer: str
    weight: float
    needs_eos: bool
    as_given: bool


def as_rendered(template: ChatTemplate, messages: Sequence[dict], with_tools: bool) -> list[dict]:
    """Messages as they are given to the template: without weights, and `developer` as `system` if it does not know the role."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if template.knows("developer", with_tools):
        return plain
    return [m | {"role": "system"} if m["role"] == "developer" else m for m in plain]


class Chat:
    """One chat in the canonical form of data/formats.py, prepared for rendering.

    messages: up to the last trained answer. trained: the indices of the trained answers, possibly none. notes: keys of
    data.encoding.NOTES.
    """

    def __init__(
        self, template: ChatTemplate, markers: EndMarkers, messages: list[dict], tools: list | None, train_on: str
    ) -> None:
        """Raises UserError if the template cannot render what the chat has."""
        self.template, self.markers, self.tools = template, markers, tools
        self.notes: list[str] = []
        self.weights = [float(message.get("weight", 1.0)) for message in messages]
        with_tools = tools is not None
        plain = as_rendered(template, messages, with_tools)
        if [message["role"] for message in plain] != [message["role"] for message in messages]:
            self.notes.append("developer")
        if tools and not template.knows("tools", True):
            self.notes.append("tools")
        if any(message.get("tool_calls") for message in plain) and not template.knows("tool_calls", with_tools):
            raise UserError(
                "the chat template does not render `tool_calls`; name one that does in data.chat_template, or leave this chat "
                "out"
            )
        answers = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
        if 0 in answers:
            answers.remove(0)  # nothing precedes it that a model could answer
            self.notes.append("opening")
        self.trained = [i for i in answers if self.weights[i] > 0]
        if train_on == "last":
            self.trained = [i for i in answers[-1:] if i in self.trained]
        if not self.trained:
            self.notes.append("weightless" if answers else "unanswered")
        if any(_is_empty(plain[i]) for i in self.trained):
            self.notes.append("silent")
        if self.trained and self.trained[-1] < len(plain) - 1:
            self.notes.append("trailing")
            plain = plain[: self.trained[-1] + 1]
        self.messages = plain
        self.generation = marks_generation(template.text(with_tools))
        self.turns: dict[int, _Turn] = {}

    def render(self) -> tuple[list[RenderedText], list[str]]:
        """(texts to train on, notes). Without a trained answer there is no text. Raises UserError if the template refuses."""
        if not self.trained:
            self.template.render(self.messages, self.tools)  # a chat that the template refuses is an error even so
            return [], self.notes
        notes, texts = list(self.notes), self._one_text()
        if texts is None:
            texts = [self._text_of(i) for i in self.trained]
            if len(texts) > 1:
                notes.append("split")
            if not all(self._turn(i).as_given for i in self.trained):
                notes.append("rebuilt")
        if _leaves_out(texts[-1].text, self.messages):
            notes.append("left out")
        if not all(self._says_all(i, texts[-1].text) for i in self.trained):
            notes.append("thinking")
        return texts, notes

    def _says_all(self, i: int, text: str) -> bool:
        """Whether the text has the whole answer of message i. False if only its thinking is missing or changed.

        Raises UserError if more is missing, because the model would learn to say less than the assistant said.
        """
        message = self.messages[i]
        content = (message.get("content") or "").strip()
        text = self.turns[i].answer if i in self.turns else text
        names = [call["function"]["name"] for call in message.get("tool_calls") or []]
        if any(text.count(name) < names.count(name) for name in names):
            raise UserError(
                f"the chat template leaves out a tool call of message {i + 1}; give another template in data.chat_template"
            )
        if content in text:
            return all((message.get(key) or "").strip() in text for key in THOUGHTS)
        if (content.rpartition("</think>")[2].strip() or content) in text:
            return False
        raise UserError(
            f"the chat template leaves out or changes what the assistant says in message {i + 1}; give another template in "
            "data.chat_template"
        )

    def set_last_turn(self, prompt: str, given: str) -> None:
        """Set the renderings of the last answer, if they are known: its prompt, and the chat with it."""
        self._add_turn(self.trained[-1], prompt, given)

    def _add_turn(self, i: int, prompt: str, given: str) -> None:
        as_given = given.startswith(prompt)
        message = self.messages[i]
        if as_given:
            rest = given[len(prompt) :]
        elif message.get("tool_calls") or not (message.get("content") or "").strip():
            rest = self._call_after(i, prompt, given)
        else:
            rest = answer_after(prompt, given, message, self.messages[i - 1], self.markers)
        end, needs_eos = end_of_answer(rest, message, self.markers)
        self.turns[i] = _Turn(prompt, rest[:end], self.weights[i], needs_eos, as_given)

    def _call_after(self, i: int, prompt: str, given: str) -> str:
        """`answer_after` of a tool call or of an empty answer, which cannot be found by its content.

        A mark in place of the content before it tells where the prompt's last message ends. From there on, the answer is
        what differs from the prompt.
        """
        message, before, mark = self.messages[i], self.messages[i - 1], MARK.format(i)
        if (before.get("content") or "").strip():
            marked = [*self.messages[: i - 1], before | {"content": mark}]
            with contextlib.suppress(UserError):  # a template may look into a content
                _, in_prompt, end = self.template.render(marked, self.tools, prompt=True).rpartition(mark)
                _, in_given, rest = self.template.render([*marked, message], self.tools).rpartition(mark)
                if in_prompt and in_given and given.endswith(rest):
                    prompt, given = end, rest
        opened = OPEN_THINKING.search(prompt)
        rest = given[parting(prompt[: opened.start()] if opened else prompt, given, self.markers) :]
        if not opened:
            return rest
        tag, content = opened[1], message.get("content") or ""
        thought = thinking_of(message) or content.rpartition(f"</{tag}>")[0].replace(f"<{tag}>", "")
        rest = re.sub(rf"^\s*<{tag}>.*?</{tag}>\s*", "", rest, flags=re.DOTALL)
        return f"{thought.strip()}\n</{tag}>\n\n{rest}"

    def _turn(self, i: int) -> _Turn:
        """The answer of message i, with the prompt that generation sees."""
        if i not in self.turns:
            prompt = self.template.render(self.messages[:i], self.tools, prompt=True)
            self._add_turn(i, prompt, self.template.render(self.messages[: i + 1], self.tools))
        return self.turns[i]

    def _text_of(self, i: int) -> RenderedText:
        """The text of the answer of message i by itself."""
        turn = self._turn(i)
        text = turn.prompt + turn.answer
        spans = (CharSpan(len(turn.prompt), len(text), turn.weight),)
        return RenderedText(text, self._marked(text, spans, i) if turn.as_given else spans, turn.needs_eos)

    def _one_text(self) -> list[RenderedText] | None:
        """The whole chat as one text with all trained answers, or None if the template rewrites earlier turns."""
        trained, last = self.trained, self._turn(self.trained[-1])
        if not last.as_given:
            return None
        whole = last.prompt + last.answer
        inferred = {} if len(trained) <= FEW_TURNS else self._infer()
        if inferred is None:
            return None
        spans = []
        for i in trained:
            if i in inferred:
                spans.append(inferred[i])
                continue
            turn = self._turn(i)
            text = turn.prompt + turn.answer
            if not (turn.as_given and whole.startswith(text)):
                return None
            spans.append(CharSpan(len(turn.prompt), len(text), turn.weight))
        return [RenderedText(whole, self._marked(whole, tuple(spans), trained[-1]), last.needs_eos)]

    def _marked(self, text: str, spans: tuple[CharSpan, ...], last: int) -> tuple[CharSpan, ...]:
        """The part of each span that the template marks as written by the assistant, if it marks anything.

        White space after the prompt and the token that ends an answer belong to it, even if the template writes them outside
        of its mark. last: index of the last
        message in the text.
        """
        if not self.generation:
            return spans
        marks = self.template.generation_spans(self.messages[: last + 1], self.tools)
        parts = []
        for span in spans:
            for start, end in marks:
                if not text[span.start : start].strip():
                    start = span.start
                if text[end : span.end].strip() in self.markers.special:
                    end = span.end
                if max(span.start, start) < min(span.end, end):
                    parts.append(CharSpan(max(span.start, start), min(span.end, end), span.weight))
        return tuple(parts)

    def _infer(self) -> dict[int, CharSpan] | None:
        """The spans of those answers of a long chat that need no rendering of their own; None if the chat must be split.

        Rendering every prompt would take time quadratic in the number of turns. Instead the chat is rendered once more with
        a mark in place of each content, which tells where the template puts the contents and what it writes between them.
        Turns between whose neighbours the template writes the same are of one kind. The first and the last of a kind are
        rendered by themselves, and the others begin and end at the same distance from their neighbours' contents. A chat
        whose contents the template changes, or with many kinds, is rendered turn by turn.
        """
        whole = self.template.render(self.messages, self.tools)
        places = self._places(whole)
        if places is None:
            return {}
        kinds: dict[tuple, list[int]] = {}
        for i in self.trained[:-1]:
            if places.get(i - 1) and places.get(i + 1):
                kinds.setdefault(self._kind(i, whole, places), []).append(i)
        if len(kinds) > MANY_KINDS:
            return {}
        inferred = {}
        for members in kinds.values():
            distances = set()
            for i in {members[0], members[-1]}:
                turn = self._turn(i)
                text = turn.prompt + turn.answer
                if not (turn.as_given and whole.startswith(text)):
                    return None
                distances.add((len(turn.prompt) - places[i - 1][1], places[i + 1][0] - len(text)))
            if len(distances) > 1:
                continue  # each is rendered by itself
            before, after = distances.pop()
            first = members[0]
            for i in members[1:-1]:
                begin, end = places[i - 1][1], places[i + 1][0]
                same_before = whole.startswith(whole[places[first - 1][1] : places[first - 1][1] + before], begin)
                same_after = whole[end - after : end] == whole[places[first + 1][0] - after : places[first + 1][0]]
                if same_before and same_after:
                    inferred[i] = CharSpan(begin + before, end - after, self.weights[i])
        return inferred

    def _kind(self, i: int, whole: str, places: dict[int, tuple[int, int]]) -> tuple:
        """What answers of one kind have in common: roles, keys, and what the template writes around their content."""
        message = self.messages[i]
        around = (places[i - 1][1], places[i + 1][0])
        if i in places:
            written = (whole[around[0] : places[i][0]], whole[places[i][1] : around[1]])
        else:  # the answer is a tool call: only what is before and after it can be alike
            written = ("", "")
        return (self.messages[i - 1]["role"], self.messages[i + 1]["role"], tuple(sorted(message)), written)

    def _places(self, whole: str) -> dict[int, tuple[int, int]] | None:
        """Where each content stands in the rendering of the whole chat; None unless all of them stand there unchanged."""
        marks = {
            i: MARK.format(i)
            for i, message in enumerate(self.messages)
            if isinstance(message.get("content"), str) and message["content"].strip()
        }
        marked = [m | {"content": marks[i]} if i in marks else m for i, m in enumerate(self.messages)]
        try:
            skeleton = self.template.render(marked, self.tools)
        except UserError:  # a template may look into a content
            return None
        places, position, done = {}, 0, 0
        for i, mark in marks.items():
            at = skeleton.find(mark, done)
            between = skeleton[done:at]
            if at < 0 or not whole.startswith(between, position):
                return None
            position += len(between)
            content = self.messages[i]["content"]
            for form in (content, content.strip()):
                if whole.startswith(form, position):
                    break
            else:
                return None
            places[i] = (position, position + len(form))
            position, done = position + len(form), at + len(mark)
        return places if whole[position:] == skeleton[done:] else None


def _is_empty(answer: dict) -> bool:
    """Whether an answer of the assistant says nothing: no text, no thinking and no call of a tool."""
    said = (answer.get(key) for key in ("content", "reasoning_content", "thinking", "tool_calls"))
    return not any(value.strip() if isinstance(value, str) else value for value in said)


def _leaves_out(text: str, messages: Sequence[dict]) -> bool:
    """Whether the content of a message that is not an answer is missing from the rendered text."""
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
