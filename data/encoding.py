"""Examples -> token ids and the spans of tokens that carry loss.

This is the one place where training, evaluation and scripts/data.py show turn an example into what the model gets.

The text of an example is tokenised in one piece, with the character offsets of its tokens, and never in parts: its ids are
those that inference makes of the same text. A token with any character of an answer is a target. Where an answer begins
inside a token, that token belongs to the answer, and the example is counted ("boundary" in NOTES): generation has another
token there, because its text ends before the answer.
"""

import bisect
import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.chat_answers import EndMarkers
from data.chat_template import ChatSettings, ChatTemplate
from data.chat_turns import CharSpan, Chat, RenderedText, as_rendered
from data.tokens import bos_ids, eos_id, make_encoder, tokenizer_fingerprint

VERSION = 2  # of this encoding; a cache of another version is not used
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
MAX_BOUNDARIES = 4096  # remembered
BEFORE, AFTER = 24, 4  # characters around the beginning of an answer that are tokenised with and without the answer


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) are targets. `weight` is the factor of their loss, above 0."""

    start: int  # at least 1: the first token has no context to be predicted from
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One sequence of tokens. ids: int64 `(length,)`. spans: disjoint and in order; empty if nothing carries loss."""

    ids: np.ndarray
    spans: tuple[Span, ...]

    def weights(self) -> np.ndarray:
        """The factor of each token's loss, `(length,)`: bool if all factors are 0 or 1, else float32."""
        whole = all(span.weight == 1.0 for span in self.spans)
        weights = np.zeros(len(self.ids), dtype=bool if whole else np.float32)
        for start, end, weight in self.spans:
            weights[start:end] = weight
        return weights

    def part(self, start: int, end: int) -> "Encoded":
        """The tokens from `start` to `end` (exclusive). The first of them is not a target: it has no context."""
        if start == 0 and end >= len(self.ids):
            return self
        spans = (Span(max(s.start - start, 1), min(s.end, end) - start, s.weight) for s in self.spans)
        return Encoded(self.ids[start:end], tuple(span for span in spans if span.start < span.end))


def kept_parts(length: int, is_text: bool, sequence_length: int, too_long: str) -> list[tuple[int, int]]:
    """(start, end) of the parts of a sequence of tokens that are trained: the whole of it, unless it is too long.

    A long text is cut into pieces. Each begins with the last token of the one before: the first token of a piece cannot be a
    target, so without this overlap every cut would lose one. `too_long` (data.too_long) applies to chats and completions; with
    `error` and `drop` nothing is kept.
    """
    if length <= sequence_length:
        return [(0, length)]
    if is_text:
        starts = range(0, length - 1, max(1, sequence_length - 1))
        return [(start, min(length, start + sequence_length)) for start in starts]
    return [(0, sequence_length)] if too_long == "truncate" else []


@dataclass(frozen=True)
class Outcome:
    """What became of one example: its sequences, or an error.

    A chat has several sequences if its template rewrites earlier turns. notes: what is unusual about it, keys of `NOTES`.
    """

    sequences: tuple[Encoded, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None  # one sentence without the file and line


# What the report of a data file says about the examples that have a note (`note_sentence`); {n} is their number.
NOTES: dict[str, str] = {
    "split": "{n} {chats} {are} split by answer, because the chat template rewrites earlier turns",
    "rebuilt": "{n} {chats} {have} answers that the template renders differently once they are given; they follow the prompt of "
    "generation",
    "opening": "{n} {chats} {begin} with an assistant message, which answers nothing and carries no loss",
    "trailing": "{n} {chats} {go} on after the last trained answer; the rest is left out",
    "unanswered": "{n} {chats} {have} no answer of the assistant",
    "silent": "{n} {chats} {have} an empty answer, of which only the token that ends it carries loss",
    "weightless": "in {n} {examples} all that would carry loss has weight 0",
    "developer": "in {n} {chats} `developer` messages are rendered as `system`, because the template does not know the role",
    "tools": "{n} {chats} {have} `tools`, which the chat template does not render",
    "thinking": "{n} {chats} {have} answers whose thinking the chat template drops or changes",
    "left out": "{n} {chats} {have} questions or instructions that the chat template leaves out or changes",
    "boundary": "in {n} {examples} an answer begins inside a token, or its prompt has other tokens than at generation",
}


def note_sentence(note: str, count: int | None) -> str:
    """What the report says about `count` examples that have a note of `NOTES`; None: about those of any number."""
    words = {"chats": "chat", "examples": "example", "have": "has", "are": "is", "begin": "begins", "go": "goes"}
    number = "N" if count is None else f"{count:,}"
    return NOTES[note].format(n=number, **(words if count == 1 else {word: word for word in words}))


class ExampleEncoder:
    """Encodes examples with one tokenizer and one set of settings. The result depends on nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None) -> None:
        """Raises UserError for a tokenizer without a `tokenizers` backend (tokenizer.json)."""
        self.tokenizer, self.settings = tokenizer, settings or ChatSettings()
        self.template = ChatTemplate(tokenizer, self.settings)
        self.encoder = make_encoder(tokenizer)
        self.encoder.post_processor = None  # offsets then keep the space before a word
        self.bos, self.eos = bos_ids(tokenizer), eos_id(tokenizer)
        self.eos_text = str(tokenizer.eos_token)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.markers = EndMarkers(tuple({self.eos_text: 0} | dict.fromkeys(special)), (self.eos_text,))
        self.markers = self._markers_of_template()
        self.known_boundaries: dict[tuple[str, str], bool] = {}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: EOS, and the one that the chat template writes."""
        ids = [self.encoder.token_to_id(text) for text in self.markers.stops]
        return tuple(dict.fromkeys([self.eos, *(i for i in ids if i is not None)]))

    @functools.cached_property
    def of_tokenizer(self) -> str:
        """The tokenizer's fingerprint (data/tokens.py), computed once for all sources of a run."""
        return tokenizer_fingerprint(self.tokenizer)

    def fingerprint(self) -> dict[str, object]:
        """Everything besides the example and the tokenizer's vocabulary that determines an outcome, as plain JSON."""
        return {
            "version": VERSION,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "bos": self.bos,
            "eos": self.eos,
            "special": list(self.markers.special),
            "train_on": self.settings.train_on,
            **self.template.fingerprint(),
        }

    def encode(self, examples: Sequence[dict]) -> list[Outcome]:
        """One outcome per example (the canonical form of data/formats.py), in order. Tokenises the batch in one call."""
        rendered = self._render(examples)
        texts = [text for item in rendered if not isinstance(item, UserError) for text in item[0]]
        encodings = iter(self._tokenise(texts))
        outcomes = []
        for example, item in zip(examples, rendered, strict=True):
            if isinstance(item, UserError):
                outcomes.append(Outcome(error=str(item)))
                continue
            parts, notes = item
            is_chat = "messages" in example
            sequences = tuple(self._sequence(text, next(encodings), is_chat) for text in parts)
            if any(self._differs_anywhere(text) for text in parts):
                notes = [*notes, "boundary"]
            outcomes.append(Outcome(sequences, tuple(notes)))
        return outcomes

    def _tokenise(self, texts: Sequence[RenderedText]) -> list[Encoding]:
        """The encodings of texts. One that carries loss as a whole needs no offsets, which take a third of the time."""
        is_whole = [bool(text.answers) and text.answers[0][:2] == (0, len(text.text)) for text in texts]
        whole = [text.text for text, simple in zip(texts, is_whole, strict=True) if simple]
        others = [text.text for text, simple in zip(texts, is_whole, strict=True) if not simple]
        without = iter(self.encoder.encode_batch_fast(whole, add_special_tokens=False) if whole else ())
        with_offsets = iter(self.encoder.encode_batch(others, add_special_tokens=False) if others else ())
        return [next(without if simple else with_offsets) for simple in is_whole]

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The ids of a chat up to the beginning of the next answer, as `apply_chat_template` makes them at inference.

        A final assistant message is ignored. Raises UserError if the template refuses the chat.
        """
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text = self.template.render(as_rendered(self.template, messages, tools is not None), tools, prompt=True)
        return self.encoder.encode(text, add_special_tokens=False).ids

    def _render(self, examples: Sequence[dict]) -> list[tuple[list[RenderedText], list[str]] | UserError]:
        """The texts of each example with the characters that carry loss, and its notes; or why it cannot be rendered."""
        chats: dict[int, Chat | UserError] = {}
        for i, example in enumerate(examples):
            if "messages" in example:
                try:
                    chats[i] = self._chat(example)
                except UserError as error:
                    chats[i] = error
        self._render_last_turns([chat for chat in chats.values() if isinstance(chat, Chat)])
        rendered = []
        for i, example in enumerate(examples):
            try:
                texts, notes = self._text(example) if i not in chats else self._rendered(chats[i])
            except UserError as error:
                rendered.append(error)
                continue
            weight = float(example.get("weight", 1.0))
            if weight == 0:
                texts, notes = [], ["weightless"]
            elif weight != 1.0:
                texts = [
                    t._replace(answers=tuple(a._replace(weight=a.weight * weight) for a in t.answers)) for t in texts
                ]
            rendered.append((texts, notes))
        return rendered

    def _chat(self, example: dict) -> Chat:
        return Chat(self.template, self.markers, example["messages"], example.get("tools"), self.settings.train_on)

    def _render_last_turns(self, chats: list[Chat]) -> None:
        """Render the last answers of chats without tools in two calls. If the template refuses one, none is set."""
        chats = [chat for chat in chats if chat.trained and chat.tools is None]
        if len(chats) < 2:
            return
        try:
            prompts = self.template.render_many([chat.messages[:-1] for chat in chats], prompt=True)
            given = self.template.render_many([chat.messages for chat in chats])
        except UserError:
            return  # each is rendered by itself, to tell which one it is
        for chat, prompt, text in zip(chats, prompts, given, strict=True):
            with contextlib.suppress(UserError):  # it comes up again when this chat is rendered
                chat.set_last_turn(prompt, text)

    def _rendered(self, chat: Chat | UserError) -> tuple[list[RenderedText], list[str]]:
        if isinstance(chat, UserError):
            raise chat
        return chat.render()

    def _text(self, example: dict) -> tuple[list[RenderedText], list[str]]:
        prompt = example.get("prompt", "")
        text = prompt + example["completion"] if "completion" in example else example["text"]
        return [RenderedText(text, (CharSpan(len(prompt), len(text), 1.0),), True)], []

    def _sequence(self, text: RenderedText, encoding: Encoding, is_chat: bool) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        spans = []
        for a, b, weight in text.answers:
            first, last = _first_token_after(encoding, a) if a else 0, len(ids)
            if b < len(text.text):
                last = _first_token_after(encoding, b)
                characters = encoding.token_to_chars(last) if last < len(ids) else None
                if characters and characters[0] < b:
                    last += 1  # the token has characters of the answer and of what follows it
            spans.append(Span(first, max(first, last), weight))
        if not is_chat and self.bos and ids[: len(self.bos)].tolist() != self.bos:
            ids = np.concatenate([self.bos, ids])
            spans = [Span(a + len(self.bos), b + len(self.bos), w) for a, b, w in spans]
        if text.needs_eos and (len(ids) == 0 or ids[-1] != self.eos):
            ids = np.append(ids, self.eos)
            spans[-1:] = [Span(a, len(ids), w) for a, _, w in spans[-1:]]
        spans = [Span(max(1, a), b, w) for a, b, w in spans]
        return Encoded(ids, tuple(span for span in spans if span.start < span.end))

    def _differs_anywhere(self, text: RenderedText) -> bool:
        """Whether the end of a prompt has other tokens when the beginning of its answer follows it."""
        return any(
            self._differs(text.text[max(0, a - BEFORE) : a], text.text[a : a + AFTER]) for a, _, _ in text.answers
        )

    def _differs(self, before: str, after: str) -> bool:
        """Whether `before` has other tokens when `after` follows it. Prompts end alike, so most are known."""
        differs = self.known_boundaries.get((before, after))
        if differs is None:
            if len(self.known_boundaries) >= MAX_BOUNDARIES:
                self.known_boundaries.clear()
            alone, together = self.encoder.encode_batch_fast([before, before + after], add_special_tokens=False)
            differs = self.known_boundaries[before, after] = together.ids[: len(alone.ids)] != alone.ids
        return differs

    def _markers_of_template(self) -> EndMarkers:
        """The markers with what the chat template writes after an answer, if it renders a plain chat.

        An ending of several tokens is told from an end of the chat, such as a second EOS, by an earlier answer: it is what
        follows both.
        """
        special = self.markers.special
        try:
            texts, _ = self._chat({"messages": PROBE}).render()
            later = self.template.render([*PROBE, *PROBE])
        except UserError:
            return self.markers
        first = texts[0].text.rpartition(PROBE[1]["content"])[2].lstrip()
        tails = [part.lstrip() for part in later.split(PROBE[1]["content"])[1:]]
        ending = _special_tokens_at_start(os.path.commonprefix(tails) if len(tails) == 2 else "", special) or [first]
        stops = tuple(dict.fromkeys((self.eos_text, ending[-1]))) if ending[-1] in special else (self.eos_text,)
        return EndMarkers(special, stops, "".join(ending))


def _special_tokens_at_start(text: str, special: Sequence[str]) -> list[str]:
    """The special tokens that a text begins with, without anything between them."""
    found = []
    while token := max((s for s in special if text.startswith(s)), key=len, default=""):
        found.append(token)
        text = text.removeprefix(token)
    return found


def _first_token_after(encoding: Encoding, position: int) -> int:
    """The first token that has a character at or after a position. Several tokens may share one character."""
    token = encoding.char_to_token(position)
    if token is not None:
        return token
    ends = [end for _, end in encoding.offsets]  # no token has that character, or it is the end of the text
    return bisect.bisect_right(ends, position)
