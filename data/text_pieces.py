"""Text files as pieces of bounded length, tokenised in batches: the input of a token store (data/token_build.py).

No text is in memory as a whole unless it is one example of a .jsonl or .parquet file. A long text is cut between lines,
where the usual pre-tokenizers split anyway, so that its token ids are those of the uncut text.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from common.cores import available_cores
from common.errors import UserError
from data.compression import Advance, data_suffix, no_progress, read_chunks
from data.control_tokens import ControlTokens
from data.files import read_file
from data.formats import kind_of
from data.token_store import backend

PIECE_CHARACTERS = 2**17  # maximum length of a piece
# Characters tokenised in one call: one piece per core. Larger batches would overlap less with reading and writing.
BATCH_CHARACTERS = PIECE_CHARACTERS * max(2, available_cores())
# Cut between lines by `PieceEncoder`, to see what the tokenizer does at the beginning of a text.
PROBE = ("The bank's own funds, Grüße.\n", "Below 97.3% the LCR (a) ends.\n", "it reports\n", "3 rows")


@dataclass(frozen=True)
class Piece:
    """A text, or a part of one."""

    text: str
    ends_document: bool
    begins_document: bool
    file: int  # index of the source file
    examples: int  # number of examples of that file that have been read, including this one


def read_pieces(
    files: list[Path], position: tuple[int, int] = (0, 0), advance: Advance = no_progress
) -> Iterator[Piece]:
    """Yield the texts of all files in order as pieces, starting after `position` = (file, examples of it already done).

    `advance` is called with the number of bytes read. Raises UserError for a bad file or a chat.
    """
    begins = True
    for number, count, text, ends in _read_texts(files, position, advance):
        yield Piece(text, ends, begins, number, count)
        begins = ends


def _read_texts(files: list[Path], position: tuple[int, int], advance: Advance) -> Iterator[tuple[int, int, str, bool]]:
    """(index of the file, number of its examples so far, piece of text, whether it ends the text)."""
    for number, path in enumerate(files):
        is_text_file = data_suffix(path) == ".txt"
        if number < position[0] or (is_text_file and (number, 1) <= position):
            advance(path.stat().st_size)
            continue
        if is_text_file:
            yield from ((number, 1, text, ends) for text, ends in _read_text_file(path, advance))
            continue
        for count, (where, example) in enumerate(read_file(path, advance), 1):
            if "text" not in example:
                raise UserError(
                    f"{where} is {kind_of(example)}, but a token store takes only documents with `text`; put such files into "
                    "data.train directly"
                )
            if (number, count) <= position:  # these bytes are read again but not tokenised again
                continue
            yield from ((number, count, text, ends) for text, ends in cut_text([example["text"]]))


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
    encoder = PieceEncoder(ControlTokens(tokenizer).encoder)
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


class PieceEncoder:
    """Token ids of pieces, without special tokens, such that those of a text's pieces are those of the text.

    A tokenizer with a mark before every text (Llama 2, Mistral) would put one before every piece. A piece that continues
    a text is therefore encoded after a line end, whose ids are then taken away.
    """

    def __init__(self, encoder: Tokenizer) -> None:
        """`encoder` neither pads nor truncates (`make_encoder`)."""
        self._encoder = encoder
        self._before, self._num_before = "", 0  # text before a piece that continues another one, and its tokens
        self.can_cut = self._is_exact()
        if not self.can_cut:
            self._before, self._num_before = "\n", len(self._encode(["\n"])[0])
            self.can_cut = self._is_exact()
            if not self.can_cut:
                self._before, self._num_before = "", 0

    def __call__(self, texts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """The ids of each piece. `begins`: whether it is the first of its text. Runs on the threads of `tokenizers`."""
        encoded = self._encode(
            [text if first else self._before + text for text, first in zip(texts, begins, strict=True)]
        )
        return [ids if first else ids[self._num_before :] for ids, first in zip(encoded, begins, strict=True)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def _is_exact(self) -> bool:
        whole = self._encode(["".join(PROBE)])[0]
        return whole == [token for ids in self(PROBE, [True, False, False, False]) for token in ids]


def encode_batch(encoder: PieceEncoder, batch: list[Piece]) -> list[list[int]]:
    """Tokenise a batch on all cores. `tokenizers` uses its own threads and releases the GIL."""
    return encoder([piece.text for piece in batch], [piece.begins_document for piece in batch])


def _with_ids(batch: list[Piece], future: Future) -> Iterator[tuple[Piece, list[int]]]:
    yield from zip(batch, future.result(), strict=True)


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
