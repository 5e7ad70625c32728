"""Find the strings of a corpus that are worth a new token, ranked by the number of tokens that they save.

Every text is split into three kinds of parts:

- Codes: strings that match a pattern of the user (an article number, a part number). A code is a candidate as a whole and never
  part of another candidate, so that it has the same tokens in every context.
- Figures: numbers, which are left unchanged, because the model's arithmetic relies on how the tokenizer splits them.
- Chunks: the text between codes, figures and the ends of sentences and lines. Candidates are whole chunks (labels) and pieces
  of chunks, which sentencepiece finds and which may span several words.
"""

import heapq
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.errors import UserError

FIGURE = r"(?<![^\W_])\d(?:[\d.,'-]*\d)?%?(?!\w)"  # not next to letters: B2, H2O and 2B are words
# Marks that end a sentence, and the quotes and brackets that close with it. A dot before a space also cuts an abbreviation
# ("e.g. "), which costs at most a token; a dot inside a number or a name ends nothing.
SENTENCE_END = r"""(?:[.!?\u2026]+["'\u2019\u201d\u00bb)\]]*(?=\s|$)|[\u3002\uff01\uff1f])"""
MAX_CHARACTERS = 64  # longest text of a token
PIECES_PER_TOKEN = 4  # sentencepiece pieces per requested token; most pieces are dropped later


@dataclass(frozen=True)
class NewToken:
    """A string that becomes a token."""

    text: str  # may begin with a space
    count: int  # occurrences in the corpus, except inside longer new tokens
    saved: int  # (tokens with the base tokenizer - 1) * count


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise UserError if a pattern is no regular expression, matches the empty text or has a group."""
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--patterns: {pattern!r} is not a regular expression: {error}") from error
        if compiled.search(""):
            raise UserError(f"--patterns: {pattern!r} matches the empty text")
        if compiled.groups:
            raise UserError(f"--patterns: {pattern!r} has a group; write (?:...)")


def find_new_tokens(
    texts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    patterns: Iterable[str] = (),
    min_count: int = 20,
    general: Iterable[str] = (),
    usable: Callable[[str], bool] = lambda text: True,
) -> list[NewToken]:
    """Return at most `max_tokens` new tokens that shorten the corpus, sorted by the number of tokens that they save.

    `length` returns the number of tokens that the base tokenizer needs for a string in the middle of a text. `patterns` are
    regular expressions of codes. A string with fewer than `min_count` occurrences in the corpus gets no token, because it could
    not be learned. Strings that occur in `general`, texts of everyday language (" as the"), get no token, because their old
    tokens are well trained. `usable` returns whether the tokenizer can have a token with a given text.
    """
    codes, chunks = split(texts, patterns)
    length = lru_cache(maxsize=None)(length)
    codes = {text: count for text, count in codes.items() if count >= min_count and usable(text)}
    saved = {text: count * (length(text) - 1) for text, count in codes.items()}
    tokens = [NewToken(text, codes[text], number) for text, number in saved.items() if number > 0]
    whole = {chunk for chunk, n in chunks.items() if n >= min_count}
    candidates = {text for chunk in whole for text in (chunk, chunk.rstrip(" |:,;")) if is_valid(text)}
    candidates |= {piece for piece in unigram_pieces(chunks, max_tokens * PIECES_PER_TOKEN) if is_valid(piece)}
    everyday = "\n".join(general)
    candidates = {text for text in candidates if text not in everyday and length(text) > 1 and usable(text)}
    tokens += select_greedily(sorted(candidates), chunks, length, max_tokens, min_count)
    return sorted(tokens, key=lambda token: (-token.saved, token.text))[:max_tokens]


def split(texts: Iterable[str], patterns: Iterable[str]) -> tuple[Counter, Counter]:
    """Split texts at codes, figures and the ends of sentences and lines. Return (code -> count, chunk -> count)."""
    matched = "|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)"
    # A code includes the space before it, and neither begins nor ends inside a word.
    code = rf"( ?(?:(?<!\w)|(?=\W))(?:{matched})(?:(?!\w)|(?<=\W)))"
    cut = re.compile(rf"{code}|{FIGURE}|{SENTENCE_END}|[\r\n]+")
    codes, chunks = Counter(), Counter()
    for text in texts:
        done = 0
        for match in cut.finditer(text):
            chunks[text[done : match.start()]] += 1
            if match[1] is not None:
                codes[match[1]] += 1
            done = match.end()
        chunks[text[done:]] += 1
    del chunks[""]
    return codes, chunks


def is_valid(text: str) -> bool:
    """Return whether a string may become a token.

    - It begins with a space or a punctuation character, so that it cannot begin inside a word.
    - It does not end with a space, which belongs to the next word, except after punctuation (" | " before a figure).
    - It does not end with a digit, because the rest of a longer number would then be split differently.
    - It contains letters.
    """
    return (
        0 < len(text) <= MAX_CHARACTERS
        and not text[0].isalnum()
        and not text.startswith("  ")
        and not text[-1].isdigit()
        and not (text[-1].isspace() and (text[-1] != " " or text[-2:-1].isalnum() or text[-2:-1].isspace()))
        and any(character.isalpha() for character in text)
        and "\u2581" not in text  # the character with which sentencepiece writes a space
    )


def unigram_pieces(chunks: Counter, size: int) -> list[str]:
    """Return about `size` pieces of a sentencepiece unigram model of the chunks (Kudo, arXiv:1804.10959).

    Pieces may cross word boundaries.
    """
    usable = {chunk: count for chunk, count in chunks.items() if "\t" not in chunk and "\u2581" not in chunk}
    if not usable:
        return []
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chunks.tsv")
        path.write_text("".join(f"{chunk}\t{count}\n" for chunk, count in usable.items()), encoding="utf-8")
        options = {
            **dict(input_format="tsv", model_type="unigram", hard_vocab_limit=False, num_threads=1, minloglevel=2),
            **dict(split_by_whitespace=False, split_by_number=False, split_by_unicode_script=False),
            **dict(add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity"),
        }
        sentencepiece.SentencePieceTrainer.train(
            input=str(path),
            model_prefix=str(Path(folder, "pieces")),
            vocab_size=size + len(set().union(*usable)) + 3,  # every character and three control symbols are pieces too
            max_sentencepiece_length=MAX_CHARACTERS,
            max_sentence_length=1 << 16,
            **options,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "pieces.model")))
        return [model.id_to_piece(i).replace("\u2581", " ") for i in range(model.get_piece_size())]


def select_greedily(
    candidates: list[str], chunks: Counter, length: Callable[[str], int], max_tokens: int, min_count: int
) -> list[NewToken]:
    """Choose repeatedly the candidate that saves most tokens in addition to the candidates chosen before.

    The saving of a candidate only decreases as more candidates are chosen, so it is recomputed only when the candidate reaches
    the top of the queue (lazy greedy, Minoux 1978). Where tokens overlap, the longest match wins, as in the tokenizer.
    """
    where = _chunks_of(candidates, chunks)
    chosen_in: dict[str, list[str]] = {chunk: [] for chunk in chunks}

    def saving(candidate: str) -> int:
        return sum(
            chunks[chunk]
            * (_tokens(chunk, chosen_in[chunk], length)[0] - _tokens(chunk, [*chosen_in[chunk], candidate], length)[0])
            for chunk in where[candidate]
        )

    heap = [(-saving(candidate), candidate) for candidate in candidates if candidate in where]
    heapq.heapify(heap)
    chosen: list[str] = []
    while heap and len(chosen) < max_tokens:
        _, candidate = heapq.heappop(heap)
        now = saving(candidate)
        if heap and now < -heap[0][0]:
            heapq.heappush(heap, (-now, candidate))
        elif now > 0 and sum(chunks[chunk] for chunk in where[candidate]) >= min_count:
            chosen.append(candidate)
            for chunk in where[candidate]:
                chosen_in[chunk].append(candidate)
    uses: Counter = Counter()
    for chunk, present in chosen_in.items():
        for token in _tokens(chunk, present, length)[1]:
            uses[token] += chunks[chunk]
    # Count again: longer tokens that were chosen later may cover most occurrences of a shorter token.
    counted = [NewToken(token, uses[token], uses[token] * (length(token) - 1)) for token in chosen]
    return [token for token in counted if token.count >= min_count and token.saved > 0]


def _chunks_of(candidates: list[str], chunks: Counter) -> dict[str, list[str]]:
    """Return candidate -> chunks that contain it, without candidates that end inside a word in most occurrences."""
    by_word: dict[str, set[str]] = {}
    for chunk in chunks:
        for word in chunk.split():
            by_word.setdefault(word, set()).add(chunk)
    where = {}
    for candidate in candidates:
        # The candidate's last word, and its first word if no space precedes it, may be part of a longer word in the chunk, so
        # only the words between them are looked up.
        words = candidate.split()[:-1] if candidate[0] == " " else candidate.split()[1:-1]
        possible = min((by_word.get(word, set()) for word in words), key=len, default=chunks)
        containing = sorted(chunk for chunk in possible if candidate in chunk)
        balance = sum(chunks[chunk] * (1 if _ends_a_word(candidate, chunk) else -1) for chunk in containing)
        if containing and balance > 0:
            where[candidate] = containing
    return where


def _ends_a_word(candidate: str, chunk: str) -> bool:
    end = chunk.index(candidate) + len(candidate)
    return end == len(chunk) or not (chunk[end].isalnum() and chunk[end - 1].isalnum())


def _tokens(chunk: str, present: list[str], length: Callable[[str], int]) -> tuple[int, list[str]]:
    """Return (number of tokens of the chunk, new tokens in it), matched from the left and the longest token first."""
    if not present:
        return length(chunk), []
    longest_first = "|".join(map(re.escape, sorted(present, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", chunk)
    return len(parts) // 2 + sum(length(gap) for gap in parts[::2] if gap), parts[1::2]
