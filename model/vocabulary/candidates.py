"""Which strings of a corpus are worth a token of their own: candidates, ranked by the tokens that they save.

A text is cut in three kinds of parts. What a pattern matches (a cell, a form code, an article) is one candidate and
nothing else, so that a code is the same tokens wherever it stands. Figures are left as they are: the tokenizer's way of
splitting numbers is what the model's arithmetic rests on. The chunks between give whole labels and, through
sentencepiece, pieces of several words. A number that belongs to a name ("Tier 1", "the 75% cap") is no figure.
"""

import heapq
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PATTERNS = {
    # How the EBA's templates, their cells, their codes and the articles of CRR and CRD are written.
    "regulator": (
        r"\{[rcs]\d{4}\}",  # {c0010} in a formula of the DPM (DPM-XL)
        r"t?[A-Z][ _]\d\d\.\d\d(?:\.[a-z])?",  # C 03.00, F 01.01, C_76.00.a; tC_01.00 in a formula
        r"[rcs]\d{3,4}(?:-\d{4})?",  # r0010, c0010, c010; r0040-0060 in a formula
        r"(?:CRR|CRD) Art\. \d+[a-z]*(?:\(\d+\))?(?:\([a-z]\))?",  # CRR Art. 92(1)(a)
        r"Art(?:icle|\.) \d+[a-z]*(?:\(\d+\))?(?:\([a-z]\))?",
        r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+",  # TC_MIN, OCR_CET1: rules
        r"eba_[A-Za-z]+:[\w.]*\w",  # eba_BT:x15, eba_GA:IMF.CL_AREA.7H: members
        r", default: \w+(?:, interval: \w+)?\}:?",  # the end of {tC_01.00, r0010, default: 0, interval: true}:
    ),
}
FIGURE = r"(?<![^\W_])\d(?:[\d.,'-]*\d)?%?(?!\w)"  # between no letters: CET1, T2 and 2B are words
IN_A_NAME = r"\d{1,3}%?"  # of figures, those that may belong to a name: no year, no date, hardly an amount
DIFFERENT_IN_NAMES = 16  # a word before more different numbers stands before figures
MAX_CHARACTERS = 64
PIECES_PER_TOKEN = 4  # sentencepiece's pieces are so many times the tokens asked for: most of them will be dropped


@dataclass(frozen=True)
class NewToken:
    """A string that becomes one token; with its leading space where it has one."""

    text: str
    count: int  # in the corpus, where no longer new token covers it
    saved: int  # tokens of the base tokenizer less one, times count


def find_new_tokens(
    texts: Iterable[str],
    length: Callable[[str], int],
    wanted: int,
    patterns: Iterable[str] = (),
    min_count: int = 20,
    general: Iterable[str] = (),
    usable: Callable[[str], bool] = lambda text: True,
) -> list[NewToken]:
    """At most `wanted` new tokens, those that save most first.

    length: tokens of a string in the base tokenizer, in the middle of a text. patterns: regular expressions. min_count:
    the floor; a token that is seen less often cannot be learned. general: texts of everyday language; what occurs there
    (" as the") stays as it is, since its old tokens are well trained. usable: whether the tokenizer can have a token of that
    text. Fewer than `wanted` come back where no more are worth it.
    """
    codes, chunks = split(texts, patterns)
    length = lru_cache(maxsize=None)(length)
    codes = {text: count for text, count in codes.items() if count >= min_count and usable(text)}
    found = [(text, count, count * (length(text) - 1)) for text, count in codes.items()]
    tokens = [NewToken(*one) for one in found if one[2] > 0]
    frequent = Counter({chunk: count for chunk, count in chunks.items() if count > 1})
    whole = {chunk for chunk, n in frequent.items() if n >= min_count}
    candidates = {text for chunk in whole for text in (chunk, chunk.rstrip(" |:,;")) if is_sound(text)}
    candidates |= {piece for piece in pieces(frequent, wanted * PIECES_PER_TOKEN) if is_sound(piece)}
    everyday = "\n".join(general)
    candidates = {text for text in candidates if text not in everyday and length(text) > 1 and usable(text)}
    tokens += choose(sorted(candidates), frequent, length, wanted, min_count)
    return sorted(tokens, key=lambda token: (-token.saved, token.text))[:wanted]


def split(texts: Iterable[str], patterns: Iterable[str]) -> tuple[Counter, Counter]:
    """(what the patterns match -> count, the chunks between matches, figures and line ends -> count)."""
    texts = list(texts)
    matched = "|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)"
    # A code takes the space before it along; it neither begins nor ends within a word.
    code = rf"( ?(?:(?<!\w)|(?=\W))(?:{matched})(?:(?!\w)|(?<=\W)))"
    cut = re.compile(rf"{code}|({FIGURE})|[\r\n]+")
    of_names = _words_of_names(texts)
    codes, chunks = Counter(), Counter()
    for text in texts:
        done = 0
        for match in cut.finditer(text):
            code, figure = match.groups()
            if figure and re.fullmatch(IN_A_NAME, figure) and _word_before(text, match.start()) in of_names:
                continue
            chunks[text[done : match.start()]] += 1
            if code is not None:
                codes[code] += 1
            done = match.end()
        chunks[text[done:]] += 1
    del chunks[""]
    return codes, chunks


def _words_of_names(texts: list[str]) -> set[str]:
    """Words that stand before few different numbers: "Tier" before 1 and 2, and not "|" or "of"."""
    before: dict[str, set[str]] = {}
    for text in texts:
        for match in re.finditer(FIGURE, text):
            numbers = before.setdefault(_word_before(text, match.start()), set())
            if len(numbers) <= DIFFERENT_IN_NAMES:
                numbers.add(match.group())
    return {word for word, numbers in before.items() if len(numbers) <= DIFFERENT_IN_NAMES}


def _word_before(text: str, position: int) -> str:
    line = text[max(0, position - MAX_CHARACTERS) : position].rpartition("\n")[2]
    return (line.split() or [""])[-1]


def is_sound(text: str) -> bool:
    """Whether a string may be a token.

    It begins with a space or a sign, so that it never matches inside a word from its beginning. It ends without a space,
    which belongs to the next word, unless a sign is before it, as in " | " before a figure. It ends without a digit: the
    rest of a longer number would be split in another way. And it holds letters.
    """
    return (
        0 < len(text) <= MAX_CHARACTERS
        and not text[0].isalnum()
        and not text.startswith("  ")
        and not text[-1].isdigit()
        and not (text[-1].isspace() and (text[-1] != " " or text[-2:-1].isalnum() or text[-2:-1].isspace()))
        and any(character.isalpha() for character in text)
        and "\u2581" not in text  # sentencepiece's sign for a space
    )


def pieces(chunks: Counter, size: int) -> list[str]:
    """The pieces of a sentencepiece unigram model (Kudo, arXiv:1804.10959) of the chunks, which may hold several words."""
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
            vocab_size=size + len(set().union(*usable)) + 3,  # each character is a piece too, and there are three signs
            max_sentencepiece_length=MAX_CHARACTERS,
            max_sentence_length=1 << 16,
            **options,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "pieces.model")))
        return [model.id_to_piece(i).replace("\u2581", " ") for i in range(model.get_piece_size())]


def choose(
    candidates: list[str], chunks: Counter, length: Callable[[str], int], wanted: int, min_count: int
) -> list[NewToken]:
    """The greedy choice: each time the candidate that saves most beside those chosen before.

    A candidate's saving is counted again when its turn comes (lazy greedy, Minoux 1978): it only falls as others are
    chosen. Of overlapping tokens the longest match counts, as in the tokenizer.
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
    while heap and len(chosen) < wanted:
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
    # Longer ones chosen later may have left little to a token that was chosen early.
    counted = [NewToken(token, uses[token], uses[token] * (length(token) - 1)) for token in chosen]
    return [token for token in counted if token.count >= min_count and token.saved > 0]


def _chunks_of(candidates: list[str], chunks: Counter) -> dict[str, list[str]]:
    """Candidate -> the chunks that hold it; candidates that more often cut a word than not are left out."""
    by_word: dict[str, set[str]] = {}
    for chunk in chunks:
        for word in chunk.split():
            by_word.setdefault(word, set()).add(chunk)
    where = {}
    for candidate in candidates:
        # Its first word but the last may only be a part of one in the chunk, so only a word in the middle is looked up.
        words = candidate.split()[:-1] if candidate[0] == " " else candidate.split()[1:-1]
        near = min((by_word.get(word, set()) for word in words), key=len, default=chunks)
        holding = sorted(chunk for chunk in near if candidate in chunk)
        whole = sum(chunks[chunk] * (1 if _ends_a_word(candidate, chunk) else -1) for chunk in holding)
        if holding and whole > 0:
            where[candidate] = holding
    return where


def _ends_a_word(candidate: str, chunk: str) -> bool:
    end = chunk.index(candidate) + len(candidate)
    return end == len(chunk) or not (chunk[end].isalnum() and chunk[end - 1].isalnum())


def _tokens(chunk: str, present: list[str], length: Callable[[str], int]) -> tuple[int, list[str]]:
    """(tokens of the chunk, the new ones among them); leftmost first, and of those the longest."""
    if not present:
        return length(chunk), []
    longest_first = "|".join(map(re.escape, sorted(present, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", chunk)
    return len(parts) // 2 + sum(length(gap) for gap in parts[::2] if gap), parts[1::2]
