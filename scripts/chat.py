"""Talk to a model in the terminal, or to the base and the tuned model side by side.

    python scripts/chat.py runs/quickstart/export
    python scripts/chat.py artifacts/models/SmolLM2-135M-Instruct runs/quickstart/export
    python scripts/chat.py MODEL --system "You answer in one sentence." < questions.txt

Each line is a question, and each model answers it in its own conversation. /new begins a new conversation, /quit ends. Answers are
greedy unless --temperature is given.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterator
from contextlib import suppress

import torch

from common.command_line import add_number, new_parser, reader_may_leave
from common.errors import UserError, run_script
from eval.chat import AGAIN, END, Speaker, talk
from eval.generate import Sampling
from model.dtypes import add_dtype_option, choose_dtype


def lines() -> Iterator[str]:
    """Yield the lines that the user types, with line editing, or the lines of a redirected file. Raise UserError if not UTF-8."""
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise UserError(f"a question is not UTF-8 text: {error.reason} at byte {error.start}") from error
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


def main() -> int:
    """Load the models, and answer until the input ends."""
    parser = new_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a Hugging Face directory with a chat template")
    parser.add_argument("--system", default="", help="the system prompt, as in training (default: none)")
    add_number(parser, "--max-new-tokens", "maximum length of an answer", 256, least=1)
    add_number(
        parser, "--temperature", "sampling temperature; 1: the model's own distribution (0: greedy)", 0.0, least=0
    )
    add_number(
        parser, "--top-p", "sample only from the most probable tokens whose probabilities add up to this", 1.0, least=0
    )
    add_number(parser, "--seed", "seed of the sampling", 0, least=0)
    add_dtype_option(parser)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(options.dtype, device)
    speakers = [Speaker(path, options.system, dtype, device) for path in options.models]
    sampling = Sampling(options.temperature, options.top_p, options.seed) if options.temperature else None
    if sys.stdin.isatty():
        print(f"{AGAIN} begins again, {END} ends")
    with reader_may_leave():
        talk(speakers, lines(), options.max_new_tokens, sampling, lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    run_script(main)
