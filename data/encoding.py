"""Encode examples: token ids, and the spans of tokens that carry loss.

Training, evaluation and scripts/data.py show all use this module to turn an example into the model's input.

A chat is the ids of the generation prompt followed by the ids of the answer, which is encoded by itself (data/labels.py), so that
the model is trained on the same ids that it sees and writes at inference. Answers share a sequence if the next prompt's ids begin
with it. Texts and completions are tokenised in one piece; a token with any character of a completion is a target. No text of a
content becomes a control token (data/control_tokens.py).
"""

import bisect
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import tokenizers
import transformers
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.chat_template import ChatSettings, ChatTemplate
from data.control_tokens import ControlTokens, renamed
from data.labels import THOUGHTS, Labels, Turn, check_complete, drops_content
from data.tokens import bos_ids, generation_stops, plain_template, tokenizer_fingerprint

MAX_LEAD = 200  # characters of a prompt's end that may be encoded before an answer
PIECE = 2**17  # the most characters of a text that are tokenised at once
PIECES = 64  # the most pieces in one call of the tokenizer, which bounds its memory
# A text cut between its lines, to find out how the tokenizer treats the beginning of a text.
PROBE = ("The reader's own notes, Grüße.\n", "Below 97.3% the sum (a) ends.\n", "it begins\n", "3 rows")
LISTED = 5  # examples named in a line of a report
VERSION = 5  # of this encoding; cache entries of another version are not used


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) are targets. `weight` is the factor of their loss, above 0."""

    start: int  # at least 1: no context precedes the first token
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One sequence of tokens. ids: int64 `(length,)`. spans: disjoint and in order; empty if no token carries loss."""

    ids: np.ndarray
    spans: tuple[Span, ...]

    def weights(self) -> np.ndarray:
        """Return the factor of each token's loss, `(length,)`: bool if all factors are 0 or 1, else float32."""
        whole = all(span.weight == 1.0 for span in self.spans)
        weights = np.zeros(len(self.ids), dtype=bool if whole else np.float32)
        for start, end, weight in self.spans:
            weights[start:end] = weight
        return weights


@dataclass(frozen=True)
class Outcome:
    """The result of encoding one example: its sequences, or an error.

    A chat has several sequences if its template rewrites earlier turns. notes: the example's peculiarities, keys of `NOTES`.
    """

    sequences: tuple[Encoded, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None  # one sentence without the file and line


# Note -> its line in the report of a data file, which counts the examples with this note.
NOTES: dict[str, str] = {
    "plain": "chats written as User: and Assistant:, because the tokenizer has no chat template (data.chat_template sets one)",
    "split": "chats split by answer, because the chat template rewrites earlier turns",
    "rebuilt": "chats with answers that the template renders differently in a finished chat; here they follow the generation "
    "prompt",
    "parts": "chats in which the template writes an answer in several parts, and generation ends after the first of them",
    "opening": "chats that begin with an assistant message, which answers nothing and carries no loss",
    "trailing": "chats that go on after the last trained answer; the rest is left out",
    "unanswered": "chats without an answer of the assistant",
    "silent": "chats with an empty answer, of which only the token that ends it carries loss",
    "weightless": "examples whose targets all have weight 0",
    "developer": "chats whose `developer` messages are rendered as `system`, because the template does not know the role",
    "tools": "chats with `tools`, which the chat template does not render",
    "thinking": "chats with answers whose thinking the chat template drops or changes",
    "left out": "chats with questions or instructions that the chat template leaves out or changes",
    "boundary": "examples whose completion begins inside a token",
    "control": "examples whose content spells a control token; it stays text, unless data.control_tokens=allow",
}


def control_line(count: int, places: Sequence[str], noun: str = "example") -> str:
    """Return the report's line about `count` examples that spell control tokens. The first `LISTED` places are named."""
    named = [*places[:LISTED], *(["..."] if count > LISTED else [])]
    what = f"{count:,} {noun} has" if count == 1 else f"{count:,} {noun}s have"
    rule = "content that spells one; it stays text, unless data.control_tokens=allow"
    return f"control tokens: {what} {rule}: {'; '.join(named)}"


class ExampleEncoder:
    """Encodes examples with one tokenizer and one set of settings. The result depends on nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None) -> None:
        """Raise UserError for a tokenizer without a `tokenizers` backend (tokenizer.json)."""
        self.tokenizer, self.settings = tokenizer, settings or ChatSettings()
        self.template = ChatTemplate(tokenizer, self.settings)
        self.bos, self.eos = bos_ids(tokenizer), cast(int, tokenizer.eos_token_id)
        self.control = ControlTokens(tokenizer)
        self.is_plain = tokenizer.chat_template == plain_template(tokenizer)
        self.encoder = self.control.encoder  # for texts and completions, which are content
        if self.settings.control_tokens == "allow":
            self.encoder = renamed(tokenizer, (), "")
        stops = [str(tokenizer.eos_token), *tokenizer.convert_ids_to_tokens(generation_stops(tokenizer))]
        self.labels = Labels(self.template, self.control, [stop for stop in stops if stop])
        # A tokenizer that puts a space before every text would put a second one before an answer. The answer is then encoded after
        # the last words of the prompt or after this character, which is in no piece of any vocabulary: no token reaches over it.
        alone, joint = (self._ids([text])[0] for text in ("\ue000", "\ue000a"))
        self.before = "" if joint[len(alone) :] == self._ids(["a"])[0] else "\ue000"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: EOS, those of the chat template, and those of generation_config.json."""
        return tuple(dict.fromkeys([self.eos, *map(self._id, self.labels.stops)]))

    def _id(self, token: str) -> int:
        return cast(int, self.tokenizer.convert_tokens_to_ids(token))

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """The tokenizer's fingerprint (data/tokens.py), computed once for all sources of a run."""
        return tokenizer_fingerprint(self.tokenizer)

    def fingerprint(self) -> dict[str, object]:
        """Return everything besides the example and the tokenizer's vocabulary that determines an outcome, as plain JSON."""
        return {
            "version": VERSION,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "bos": self.bos,
            "stops": list(self.stop_ids),
            "control": list(self.control.texts),
            "control_tokens": self.settings.control_tokens,
            "train_on": self.settings.train_on,
            **self.template.fingerprint(),
        }

    def control_tokens_in(self, example: dict) -> list[str]:
        """Return the control tokens that the content of an example spells, in the order of the content."""
        if "messages" in example:
            return self.control.marked(example["messages"], example.get("tools"))[2]
        texts = (example.get(key, "") for key in ("text", "prompt", "completion"))
        return [token for text in texts for token in self.control.found_in(text)]

    def control_report(self, examples: Iterable[tuple[str, dict]]) -> str:
        """Return the report's line about the (place, example) pairs whose content spells control tokens; "" without any."""
        places = [where for where, example in examples if self.control_tokens_in(example)]
        return control_line(len(places), places) if places else ""

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """Return the ids of a chat up to the beginning of the next answer, as `apply_chat_template` makes them at inference.

        They differ only if a content spells a control token, which stays text here. A final assistant message is ignored.
        Raise UserError if the template refuses the chat.
        """
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        messages, tools, _ = self._content(messages, tools)
        return self._ids([self.control.named(self.template.render(messages, tools, prompt=True))])[0]

    def encode(self, examples: Sequence[dict]) -> list[Outcome]:
        """Return one outcome per example (in the canonical form of data/formats.py), in order."""
        return [self._outcome(example) for example in examples]

    def _outcome(self, example: dict) -> Outcome:
        try:
            if "input_ids" in example:
                sequences, notes = [self._ready_ids(example)], []
            elif "messages" in example:
                turns, notes = self._turns(example)
                sequences = self._sequences(turns)
                notes += ["split"] if len(sequences) > 1 else []
                notes += ["plain"] if self.is_plain else []
            else:
                sequences, notes = self._text(example)
        except UserError as error:
            return Outcome(error=str(error))
        if (weight := float(example.get("weight", 1.0))) == 0:
            return Outcome(notes=("weightless",))
        if weight != 1.0:
            weighted = [tuple(span._replace(weight=span.weight * weight) for span in s.spans) for s in sequences]
            sequences = [Encoded(s.ids, spans) for s, spans in zip(sequences, weighted, strict=True)]
        return Outcome(tuple(sequences), tuple(notes))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.control.encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def _content(self, messages: Sequence[dict], tools: list | None) -> tuple[list[dict], list | None, list[str]]:
        """Prepare a chat for the template: control tokens marked, no weights, only roles that the template knows.

        Return (messages, tools, the control tokens in their content).
        """
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if not self.template.knows("developer", tools is not None):
            plain = [m | {"role": "system"} if m["role"] == "developer" else m for m in plain]
        marked, marked_tools, spelled = self.control.marked(plain, tools)
        if self.settings.control_tokens == "allow":
            return plain, tools, spelled
        return marked, marked_tools, self._refused(spelled)

    def _refused(self, spelled: list[str]) -> list[str]:
        """Return the control tokens that a content spells. Raise UserError if data.control_tokens refuses them."""
        if spelled and self.settings.control_tokens == "error":
            raise UserError(
                f"it has the text of the control token {spelled[0]}; remove it, or let it be text with data.control_tokens=text"
            )
        return spelled

    def _turns(self, example: dict) -> tuple[list[Turn], list[str]]:
        """Return (the trained answers of a chat, its notes). Raise UserError if the template cannot render all of it."""
        original, tools = example["messages"], example.get("tools")
        messages, tools, spelled = self._content(original, tools)
        notes, with_tools = ["control"] if spelled else [], tools is not None
        if any(message["role"] == "developer" for message in original) and not self.template.knows(
            "developer", with_tools
        ):
            notes.append("developer")
        if tools and not self.template.knows("tools", True):
            notes.append("tools")
        if any(message.get("tool_calls") for message in original) and not self.template.knows("tool_calls", with_tools):
            raise UserError(
                "the chat template does not render `tool_calls`; name one that does in data.chat_template, or leave this chat "
                "out"
            )
        answers = [i for i, message in enumerate(original) if message["role"] == "assistant"]
        if 0 in answers:
            answers.remove(0)  # an answer without a question
            notes.append("opening")
        candidates = answers[-1:] if self.settings.train_on == "last" else answers
        trained = {i: weight for i in candidates if (weight := float(original[i].get("weight", 1.0))) > 0}
        if not trained:
            notes.append("weightless" if answers else "unanswered")
            self.template.render(messages, tools)  # raises if the template refuses the chat
            return [], notes
        if any(_is_empty(original[i]) for i in trained):
            notes.append("silent")
        if (last := max(trained)) < len(original) - 1:
            notes.append("trailing")
        turns = [self.labels.turn(messages, i, tools, weight) for i, weight in trained.items()]
        if not all(turn.exact for turn in turns):
            notes.append("rebuilt")
        if any(turn.stops > 1 for turn in turns):
            notes.append("parts")
        if drops_content(turns[-1].prompt, messages[:last]):
            notes.append("left out")
        if not all([check_complete(turn, messages[i], i + 1) for i, turn in zip(trained, turns, strict=True)]):
            notes.append("thinking")
        return turns, notes

    def _sequences(self, turns: Sequence[Turn]) -> list[Encoded]:
        """Return the sequences of a chat. An answer continues the previous sequence if its prompt's ids begin with it.

        If a prompt continues the previous turn, only the text after that turn's last control token is encoded, because no token
        reaches over it. An answer is encoded after some text, `lead`, whose ids are then removed.
        """
        sequences: list[tuple[list[int], list[Span]]] = []
        prompt: list[int] = []
        done, named = None, ""
        for turn in turns:
            before, named, answer = named, self.control.named(turn.prompt), self.control.named(turn.answer)
            start, lead = self._last_control(before) if done and turn.prompt.startswith(done) else None, ""
            if self.before:
                last = self._last_control(named)
                is_near = last and len(named) - last[0] < MAX_LEAD and not answer[:1].isspace()
                lead = named[last[0] :] if last and is_near else self.before
            new, ids = self._ids([named[start[0] :] if start else named, lead + answer])
            prompt = prompt[: len(prompt) - 1 - prompt[::-1].index(start[1])] + new if start else new
            if ids[: len(self._lead_ids(lead))] != self._lead_ids(lead):  # a token reaches over the end of the lead
                lead = self.before
                (ids,) = self._ids([lead + answer])
            ids = ids[len(self._lead_ids(lead)) :]
            if not sequences or prompt[: len(sequences[-1][0])] != sequences[-1][0]:
                sequences.append(([], []))
            spans = [(0, len(ids))] if turn.loss is None else self._marked(turn, turn.loss, lead)
            spans = [Span(max(1, len(prompt) + a), len(prompt) + b, turn.weight) for a, b in spans]
            sequences[-1] = ([*prompt, *ids], sequences[-1][1] + spans)
            done = turn.prompt + turn.answer
        return [Encoded(np.array(ids, dtype=np.int64), tuple(spans)) for ids, spans in sequences]

    def _last_control(self, named: str) -> tuple[int, int] | None:
        """Return (start of the template's last control token in a text, its id). None if there is none, or only <unk>."""
        start = named.rfind(self.control.name)
        rest = start + len(self.control.name)
        token = next((text for text in self.control.texts if named.startswith(text, rest)), "")
        return (start, self._id(token)) if start >= 0 and token != self.tokenizer.unk_token else None

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _lead_ids(self, text: str) -> list[int]:
        return self._ids([text])[0] if text else []

    def _marked(self, turn: Turn, loss: Sequence[tuple[int, int]], lead: str) -> list[tuple[int, int]]:
        """Return (first, end) of the answer's tokens that have a character in the ranges `loss` of its marked text."""
        encoding = self.control.encoder.encode(lead + self.control.named(turn.answer), add_special_tokens=False)
        offsets = encoding.offsets[len(self._lead_ids(lead)) :]
        spans: list[tuple[int, int]] = []
        for a, b in loss:
            a, b = (len(lead) + len(self.control.named(turn.answer[:end])) for end in (a, b))
            inside = [k for k, (first, end) in enumerate(offsets) if first < b and end > a]
            if inside and spans and spans[-1][1] >= inside[0]:
                spans[-1] = (spans[-1][0], inside[-1] + 1)
            elif inside:
                spans.append((inside[0], inside[-1] + 1))
        return spans

    def _text(self, example: dict) -> tuple[list[Encoded], list[str]]:
        """Encode a text, or a prompt with its completion, between BOS (if the tokenizer writes it) and EOS."""
        first, notes = 0, ["control"] if self._refused(self.control_tokens_in(example)) else []
        if "text" in example:  # without offsets, which would be a third of the time
            ids = self._ids_of_text(example["text"])
        else:
            encoding = self.encoder.encode(example["prompt"] + example["completion"], add_special_tokens=False)
            ids, length = np.array(encoding.ids, dtype=np.int64), len(example["prompt"])
            first = _first_token_after(encoding, length) if length else 0
            if length and first < len(ids) and encoding.offsets[first][0] < length:
                notes.append("boundary")
        bos = self.bos if ids[: len(self.bos)].tolist() != self.bos else []
        ids = np.concatenate([bos, ids, [self.eos] if not len(ids) or ids[-1] != self.eos else []]).astype(np.int64)
        return [Encoded(ids, (Span(max(1, len(bos) + first), len(ids)),))], notes

    def _ids_of_text(self, text: str) -> np.ndarray:
        """Return the ids of a text. A long one is cut into pieces at lines where the usual pre-tokenizers split anyway."""
        is_cut = len(text) > PIECE and self._piece_lead is not None
        return self._ids_of_pieces(cut(text), self._piece_lead or "") if is_cut else self._ids_of_pieces([text], "")

    def _ids_of_pieces(self, pieces: Sequence[str], lead: str) -> np.ndarray:
        """Return the ids of a text in pieces. All but the first are encoded after `lead`, whose ids are then removed.

        A tokenizer that puts a mark before every text (Llama 2, Mistral) would otherwise put one before every piece.
        """
        ids, alone = [], len(self.encoder.encode(lead, add_special_tokens=False).ids)
        for first in range(0, len(pieces), PIECES):
            texts = [lead + piece if first + i else piece for i, piece in enumerate(pieces[first : first + PIECES])]
            encodings = self.encoder.encode_batch_fast(texts, add_special_tokens=False)
            ids += [np.array(e.ids[alone if first + i else 0 :], dtype=np.int64) for i, e in enumerate(encodings)]
        return np.concatenate(ids)

    @functools.cached_property
    def _piece_lead(self) -> str | None:
        """The text to encode before a piece that continues a text; None if pieces have other ids than the whole text."""
        whole = self.encoder.encode("".join(PROBE), add_special_tokens=False).ids
        return next((lead for lead in ("\n", "") if self._ids_of_pieces(PROBE, lead).tolist() == whole), None)

    def _ready_ids(self, example: dict) -> Encoded:
        """Return the sequence of an example with `input_ids`. Raise UserError for an id that the tokenizer does not have."""
        if (highest := max(example["input_ids"])) >= len(self.tokenizer):
            raise UserError(f"it has the token id {highest}, but the tokenizer has {len(self.tokenizer)} tokens")
        mask = np.array([0, *example["mask"][1:], 0])
        edges = np.flatnonzero(np.diff(mask, prepend=0)).tolist()
        spans = tuple(Span(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True))
        return Encoded(np.array(example["input_ids"], dtype=np.int64), spans)


def cut(text: str) -> list[str]:
    """Cut a text into pieces of at most PIECE characters.

    Cut between two lines that are not blank, if possible, else between a word and a space, else at the maximum length.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = _piece_end(text, start)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _piece_end(text: str, start: int) -> int:
    limit = end = start + PIECE
    while (end := text.rfind("\n", start + 1, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    end = limit
    while (end := text.rfind(" ", start + 1, end)) > 0:
        if text[end - 1].isalnum():
            return end
    return limit


def _is_empty(answer: dict) -> bool:
    """Return whether an assistant's answer is empty: no text, no thinking and no tool call."""
    values = (answer.get(key) for key in ("content", *THOUGHTS, "tool_calls"))
    return not any(value.strip() if isinstance(value, str) else value for value in values)


def _first_token_after(encoding: Encoding, position: int) -> int:
    """Return the first token that has a character at or after a position. Several tokens may share a character."""
    token = encoding.char_to_token(position)
    if token is not None:
        return token
    ends = [end for _, end in encoding.offsets]  # no token has this character, or the text ends here
    return bisect.bisect_right(ends, position)
