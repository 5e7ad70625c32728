"""Text that comes from files, written so that Markdown shows it as it is."""

import re
from collections.abc import Sequence


def escape(value: object) -> str:
    """A value inside a sentence or a cell of a table, on one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; all cells are escaped. The first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(text: str, language: str = "text") -> str:
    """A code block, with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
