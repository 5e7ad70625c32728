"""Text files as pieces of bounded length, tokenised in batches: the input of a token store (data/token_build.py).

No text is in memory as a whole unless it is one example of a .jsonl or .parquet file. A long text is cut between lines,
where the usual pre-tokenizers split anyway, so that its token ids are those of the uncut text.
"""

import codecs
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.compression import Advance, data_suffix, no_progress, read_chunks
from data.files import read_file
from data.formats import kind_of
from data.token_store import backend

PIECE_CHARACTERS = 2**17  # maximum length of a piece
# Characters tokenised in one call: one piece per core. Larger batches would overlap less with reading and writing.
BATCH_CHARACTERS = PIECE_CHARACTERS * max(2, os.cpu_count() or 2)


@dataclass(frozen=True)
class Piece:
    """A text, or a part of one."""

    text: str
    ends_document: bool
    file: int  # index of the source file
    examples: int  # number of examples of that file that have been read, including this one


def read_pieces(
    files: list[Path], position: tuple[int, int] = (0, 0), advance: Advance = no_progress
) -> Iterator[Piece]:
    """Yield the texts of all files in order as pieces, starting after `position` = (file, examples of it already done).

    `advance` is called with the number of bytes read. Raises UserError for a bad file or a chat.
    """
    for number, path in enumerate(files):
        is_text_file = data_suffix(path) == ".txt"
        if number < position[0] or (is_text_file and (number, 1) <= position):
            advance(path.stat().st_size)
            continue
        if is_text_file:
            yield from (Piece(text, ends, number, 1) for text, ends in _read_text_file(path, advance))
            continue
        for count, (where, example) in enumerate(read_file(path, advance), 1):
            if "text" not in example:
                raise UserError(
                    f"{where} is {kind_of(example)}, but a token store takes only documents with `text`; put such files into "
                    "data.train directly"
                )
            if (number, count) <= position:  # these bytes are read again but not tokenised again
                continue
            yield from (Piece(text, ends, number, count) for text, ends in cut_text([example["text"]]))


def cut_text(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text, given in parts, into pieces of at most `PIECE_CHARACTERS`. Yields (piece, is_last)."""
    rest = ""
    for part in parts:
        rest, start = rest + part, 0
        while len(rest) - start > PIECE_CHARACTERS:
            end = _piece_end(rest, start)
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


def batch_pieces(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches of about `BATCH_CHARACTERS` characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    """Yield (piece, token ids) in order, without special tokens.

    A thread tokenises the current batch while the caller handles the last one and the next one is read.
    """
    encoder = make_encoder(tokenizer)
    pending: deque = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch in batch_pieces(pieces):
            pending.append((batch, pool.submit(encode_batch, encoder, batch)))
            if len(pending) > 1:
                yield from _with_ids(*pending.popleft())
        for batch, future in pending:
            yield from _with_ids(batch, future)


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's `tokenizers` backend that neither pads nor truncates."""
    copy = Tokenizer.from_str(backend(tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def encode_batch(encoder: Tokenizer, batch: list[Piece]) -> list[Encoding]:
    """Tokenise a batch on all cores. `tokenizers` uses its own threads and releases the GIL."""
    return encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)


def _with_ids(batch: list[Piece], future: Future) -> Iterator[tuple[Piece, list[int]]]:
    for piece, encoding in zip(batch, future.result(), strict=True):
        yield piece, encoding.ids


def _piece_end(text: str, start: int) -> int:
    """End of the piece that begins at `start`, at most `PIECE_CHARACTERS` later.

    The cut is made between two lines that are not blank. If there is no such place, it is made before a space, and
    otherwise at the maximum length.
    """
    limit = start + PIECE_CHARACTERS
    end = limit
    while (end := text.rfind("\n", start + 1, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    space = text.rfind(" ", start + 1, limit)
    return space if space > 0 else limit


def _read_text_file(path: Path, advance: Advance) -> Iterator[tuple[str, bool]]:
    """Yield a .txt file, which is one document, as (piece, is_last). Line ends become `\\n`."""

    def decoded() -> Iterator[str]:
        """The file's text in chunks."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        held = ""  # a \r at the end of a chunk, because the next one may begin with \n
        try:
            for chunk in read_chunks(path, advance):
                text = held + decoder.decode(chunk)
                held = "\r" if text.endswith("\r") else ""
                yield text.removesuffix("\r").replace("\r\n", "\n")
            yield held + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error

    blank = True
    for text, ends in cut_text(decoded()):
        blank = blank and not text.strip()
        if ends and blank:
            raise UserError(f"{path} contains no text")
        yield text, ends
