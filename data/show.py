"""Show an encoded example as text: the model's input, its loss-carrying tokens and the cuts. Summarise a source in a few lines.

The functions return lines. Targets are in colour, or between ⟦ and ⟧ without colour; weights other than 1 stand before the
text. No data can reach a terminal as a command: control characters, such as the escape that begins a command, and characters
that are invisible or change the direction of writing are replaced by their code: ⟨U+001B⟩.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.encoding import NOTES, Encoded, Outcome
from data.examples import parts_of
from data.store import StoreWriter

GREEN, YELLOW, RESET = "\x1b[32m", "\x1b[33m", "\x1b[0m"
MAX_TOKENS = 3000  # shown of one sequence
MAX_PIECES = 2  # shown of a long text
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")  # Unicode categories; a plain space is an exception
MARKS = "⟦⟧⟨⟩"  # these have a meaning in the output, so their occurrences in the data are replaced
SIGNS = {"\n": "⏎\n", "\t": "⇥", " ": " "}
BEFORE = 8  # maximum number of tokens before a run that are decoded with it
BAR = 50  # characters of a histogram's longest bar
BINS = 10


@dataclass(frozen=True)
class Style:
    """How targets are marked, and how much is shown.

    max_tokens: number of tokens shown per sequence; the middle of a longer sequence is left out. None: show all.
    """

    colour: bool = False
    max_tokens: int | None = MAX_TOKENS

    def legend(self) -> str:
        """Explain the marks in a line."""
        if self.colour:
            text = f"{GREEN}green{RESET}: carries loss; {YELLOW}0.5× yellow{RESET}: carries 0.5 times the loss"
        else:
            text = "⟦text⟧ carries loss; ⟦0.5× text⟧ carries 0.5 times the loss"
        return f"{text}; ⏎ newline, ⇥ tab, ⟨...⟩ code of an invisible character"

    def target(self, text: str, weight: float) -> str:
        """Mark a target's text, which may have several lines."""
        if weight != 1:
            text = f"{weight:g}× {text}"
        if not self.colour:
            return f"⟦{text}⟧"
        colour = GREEN if weight == 1 else YELLOW
        return "\n".join(f"{colour}{line}{RESET}" if line else "" for line in text.split("\n"))


def show_outcome(
    outcome: Outcome,
    tokenizer: PreTrainedTokenizerBase,
    is_text: bool,
    sequence_length: int,
    too_long: str,
    style: Style = Style(),  # noqa: B008 (immutable)
) -> list[str]:
    """Return lines about one example: its sequences with their targets, their cuts, and the example's notes."""
    if outcome.error:
        return [f"REFUSED: {one_line(outcome.error)}"]
    lines = []
    for number, encoded in enumerate(outcome.sequences, 1):
        if len(outcome.sequences) > 1:
            lines.append(f"--- sequence {number} of {len(outcome.sequences)}")
        writer = StoreWriter(None, {"dtype": "<u4"})
        writer.add(encoded.ids, encoded.spans, is_text=is_text)
        parts, counts, _ = parts_of(writer.finish({}), sequence_length, too_long)  # as for training
        lines += _cuts(encoded, counts, len(parts), sequence_length, too_long)
        if counts["empty"] or counts["empty_truncated"]:
            lines.append("LEFT OUT: no token of it carries loss")
        shown = [parts.get(i) for i in range(len(parts))] or [(encoded.ids, encoded.weights())]
        for piece, part in enumerate(shown, 1):
            if piece > MAX_PIECES and style.max_tokens is not None:
                lines.append(f"... {len(shown) - MAX_PIECES} more pieces are not shown (--full) ...")
                break
            if len(shown) > 1:
                lines.append(f"--- piece {piece} of {len(shown)}")
            lines += show_sequence(*part, tokenizer, style)
    if not outcome.sequences:
        lines.append("LEFT OUT: nothing of it carries loss")
    return lines + [f"counted in the report: {NOTES[note]}" for note in outcome.notes]


def show_sequence(
    tokens: np.ndarray, weights: np.ndarray, tokenizer: PreTrainedTokenizerBase, style: Style
) -> list[str]:
    """Return lines about one sequence: its size, and its text with the targets marked. tokens, weights: `(length,)`."""
    ids, targets = tokens.tolist(), np.count_nonzero(weights)
    size = f"{len(ids):,} tokens, {targets:,} of them targets"
    weighted = float(weights.sum())
    if weighted != targets:
        size += f" (sum of weights {weighted:g})"
    changes, texts = np.flatnonzero(weights[1:] != weights[:-1]) + 1, []
    shown, most = [(0, len(ids))], style.max_tokens
    # Of a long sequence, show two thirds of the limit from its beginning, and the rest from its end.
    if most is not None and len(ids) > most:
        shown = [(0, most * 2 // 3), (len(ids) - most // 3, len(ids))]
    for first, last in shown:
        text, inside = "", changes[(first < changes) & (changes < last)].tolist()
        for start, end in itertools.pairwise([first, *inside, last]):  # runs of tokens with equal weight
            run, weight = visible(run_text(tokenizer, ids, start, end)), float(weights[start])
            text += style.target(run, weight) if weight else run
        texts.append(text)
    between = f"\n... {shown[-1][0] - shown[0][1]:,} tokens are not shown (--full) ...\n"
    return [size, *between.join(texts).split("\n")]


def _cuts(encoded: Encoded, counts: Counter, pieces: int, limit: int, too_long: str) -> list[str]:
    """Describe the effect of data.sequence_length on a sequence in a line; no line if it fits."""
    length, lost = len(encoded.ids), int(np.count_nonzero(encoded.weights()[limit:]))
    actions = {
        "cut": f"it is CUT into {pieces} pieces",
        "truncate": f"TRUNCATED: the last {length - limit:,} tokens are cut off, {lost:,} of them targets",
        "drop": "it is dropped",
        "error": "training stops with an error",
    }
    start = f"TOO LONG: {length:,} tokens, data.sequence_length={limit}, data.too_long={too_long}"
    return [f"{start}: {description}" for action, description in actions.items() if counts[action]]


# ---- the text of tokens --------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Return the text with signs for newlines and tabs, and codes for characters that are invisible or unsafe.

    The sign for a newline is followed by a line break, the only control character of the result.
    """

    def shown(character: str) -> str:
        is_hidden = character in MARKS or unicodedata.category(character) in INVISIBLE
        return SIGNS.get(character) or (f"⟨U+{ord(character):04X}⟩" if is_hidden else character)

    return "".join(map(shown, text))


def one_line(text: str) -> str:
    """Return `visible(text)` without line breaks."""
    return visible(text).replace("\n", "")


def run_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """Decode the tokens `start` to `end` (exclusive) of a sequence to text for `visible`.

    They are decoded together with some tokens before them, because decoders trim the first space of a text.
    """

    def decode(low: int, high: int) -> str:
        text = tokenizer.decode(list(ids[low:high]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    for first in range(start - 1, max(-1, start - 1 - BEFORE), -1):
        before, whole = decode(first, start), decode(first, end)
        if "\ufffd" not in before and whole.startswith(before):
            return whole[len(before) :]
    return decode(start, end)


# ---- all examples of a source -----------------------------------------------------------------------------------------------


def describe_source(name: str, report: str, lengths: np.ndarray, targets: np.ndarray) -> list[str]:
    """Return lines about one source. lengths, targets: `(sequences,)`, tokens and sums of weights; report: the source's own."""
    lines = [f"{name}:", *(f"  {one_line(part)}" for part in report.split("\n"))]
    lines += ["  length in tokens:", *(f"  {line}" for line in histogram(lengths))]
    least, tenth, median, ninetieth, most = np.quantile(targets, (0, 0.1, 0.5, 0.9, 1))
    share = float(targets.sum()) / max(1, int(lengths.sum()))
    return [
        *lines,
        f"  targets per sequence: {least:,.4g} to {most:,.4g}, median {median:,.4g}, 80% have {tenth:,.4g} to {ninetieth:,.4g}; "
        f"{share:.1%} of all tokens",
    ]


def histogram(lengths: np.ndarray) -> list[str]:
    """Return bars that count the lengths in each of up to BINS ranges of equal size. At most 100 characters wide."""
    least, most = int(lengths.min()), int(lengths.max())
    edges = [*range(least, most + 1, -(-(most - least + 1) // BINS)), most + 1]
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        bar = "#" * (-(-BAR * count // int(counts.max())))  # rounded up, so that no count looks like zero
        label = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        lines.append(f"{label:>20} |{bar:<{BAR}}{count:>10,} {count / len(lengths):>6.1%}")
    return lines
