"""Filters for replay documents that a model wrote itself: low-quality text, duplicates, overlap with evaluation.

All comparisons use shingles: runs of consecutive characters of a text, after its case and white space have been
normalized. Character shingles need neither spaces between words nor a tokenizer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from common.errors import UserError
from common.random_bits import hash64_tensor
from data.formats import example_text

SHINGLE = 24  # characters
EVALUATION_SHINGLE = 50  # characters; a text that shares a run of this length with evaluation texts is dropped
MAX_REPETITION = 0.3  # fraction of a document's shingles that repeat earlier ones; a larger fraction indicates a loop
MAX_SIMILARITY = 0.5  # Jaccard similarity between the shingles of a document and an earlier one
SKETCH_RATE = 4  # documents are compared by sketches: a hash selects one shingle in this many


class EvaluationTexts:
    """The texts of the evaluations, prepared for `overlaps`: hashes of their shingles, and short texts as a whole.

    Two different shingles have the same 64-bit hash with probability 2^-64, so practically nothing is dropped by mistake.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        normalized = [normalize(text) for text in texts]
        self.short_texts = [text for text in normalized if 0 < len(text) < EVALUATION_SHINGLE]
        hashes = [np.zeros(0, np.int64), *(shingle_hashes(text, EVALUATION_SHINGLE) for text in normalized)]
        # int64 (shingles,), ascending; a set would take ten times the memory
        self.shingles = np.unique(np.concatenate(hashes))

    def overlaps(self, normalized: str) -> bool:
        """Return whether a normalized text shares a run of EVALUATION_SHINGLE characters, or contains a short text."""
        hashes = shingle_hashes(normalized, EVALUATION_SHINGLE)
        places = np.searchsorted(self.shingles[:-1], hashes)
        if len(self.shingles) and (self.shingles[places] == hashes).any():
            return True
        return any(
            text in normalized and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", normalized)
            for text in self.short_texts
        )


def filter_sampled(
    sampled: Sequence[dict], min_characters: int, evaluation: EvaluationTexts
) -> tuple[list[dict], dict[str, int], int]:
    """Filter documents sampled from a model (eval/sample_replay.py).

    A document has `text` or `messages`, and `finished`: False if it reached the length limit. An unfinished text is cut after
    its last complete sentence. Unfinished chats and documents below `min_characters` are dropped.

    Return (the documents that passed, in order, without `finished`; the number of dropped documents by reason; the number of
    texts that were cut). Raise UserError if no document is left.
    """
    candidates, num_unfinished, num_truncated = [], 0, 0
    for sample in sampled:
        document = {key: value for key, value in sample.items() if key != "finished"}
        if not sample["finished"]:
            if "messages" in document:
                num_unfinished += 1
                continue
            document["text"] = until_last_sentence(document["text"])
            num_truncated += 1
        candidates.append(document)
    kept, dropped = filter_texts([example_text(document) for document in candidates], min_characters, evaluation)
    dropped = {"unfinished": num_unfinished} | dropped
    if not kept:
        raise UserError(f"none of {len(sampled)} documents passed the filters; dropped: {dropped}")
    return [candidates[i] for i in kept], dropped, num_truncated


def filter_texts(
    texts: Sequence[str], min_characters: int, evaluation: EvaluationTexts
) -> tuple[list[int], dict[str, int]]:
    """Return (indices of the texts to keep, number of dropped texts by reason). Of similar texts the first is kept."""
    kept: list[int] = []
    dropped: dict[str, int] = dict.fromkeys(("too short", "repetitive", "duplicate", "evaluated"), 0)
    texts_by_hash: dict[int, list[int]] = {}  # shingle hash -> indices of the kept texts that contain it
    sketch_sizes: dict[int, int] = {}
    for index, text in enumerate(texts):
        normalized = normalize(text)
        hashes = sketch(normalized)
        if len(normalized) < min_characters:
            reason = "too short"
        elif repetition(normalized) > MAX_REPETITION:
            reason = "repetitive"
        elif _largest_similarity(hashes, texts_by_hash, sketch_sizes) > MAX_SIMILARITY:
            reason = "duplicate"
        elif evaluation.overlaps(normalized):
            reason = "evaluated"
        else:
            kept.append(index)
            sketch_sizes[index] = len(hashes)
            for value in hashes:
                texts_by_hash.setdefault(value, []).append(index)
            continue
        dropped[reason] += 1
    return kept, dropped


def normalize(text: str) -> str:
    """Return the text in lower case, with a single space for each run of white space."""
    return " ".join(text.split()).casefold()


def shingle_hashes(normalized: str, size: int = SHINGLE) -> np.ndarray:
    """Return 64-bit hashes of all runs of `size` characters, int64, in order. A shorter text has none.

    A hash of 2n characters combines the hashes of its halves; the last step joins two runs that may overlap.
    """
    characters = normalized.encode("utf-32-le", "surrogatepass")
    hashes = torch.from_numpy(np.frombuffer(characters, dtype="<u4").astype(np.int64))
    length = 1
    while length < size and len(hashes):
        shift = min(length, size - length)
        hashes = hash64_tensor(0, hashes[:-shift], hashes[shift:])
        length += shift
    return hashes.numpy()


def repetition(normalized: str) -> float:
    """Return the fraction of shingles that occurred earlier in the text: near 0 for most prose, near 1 for a loop."""
    hashes = shingle_hashes(normalized)
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def sketch(normalized: str) -> set[int]:
    """Return the hashes of about one in SKETCH_RATE shingles. The same shingles are selected in every text."""
    hashes = shingle_hashes(normalized)
    return set(hashes[hashes % SKETCH_RATE == 0].tolist())


def until_last_sentence(text: str) -> str:
    """Return the text up to the end of its last complete sentence or line; empty if there is none.

    In training, EOS follows the text. After an incomplete sentence the model would learn to stop there.
    """
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’)\]]*(?=\s|$)|(?<=[。！？])|\n", text)]
    return text[: ends[-1]].rstrip() if ends else ""


def _largest_similarity(hashes: set[int], texts_by_hash: dict[int, list[int]], sketch_sizes: dict[int, int]) -> float:
    """Return the largest Jaccard similarity to a kept text."""
    common = Counter(index for value in hashes for index in texts_by_hash.get(value, ()))
    return max((n / (len(hashes) + sketch_sizes[index] - n) for index, n in common.items()), default=0.0)
