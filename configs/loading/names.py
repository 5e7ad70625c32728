"""Names that users write: our names of the keys of data files, and the errors for names that nobody knows."""

import difflib
from collections.abc import Mapping, Sequence

from common.errors import UserError

# Our names of the keys of examples and messages (data/formats.py): what data.fields can rename.
EXAMPLE_FIELDS = (
    *("messages", "conversations", "instruction", "input", "output", "history", "system"),
    *("prompt", "completion", "text", "tools", "weight"),
)
MESSAGE_FIELDS = (
    *("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"),
    *("reasoning_content", "thinking", "weight", "train", "training"),
)


def check_fields(fields: Mapping[str, str], name: str) -> None:
    """Check that the keys of a mapping from our names to those in the files are ours. Raises UserError."""
    known = list(dict.fromkeys((*EXAMPLE_FIELDS, *MESSAGE_FIELDS)))
    for ours, theirs in fields.items():
        if ours not in known:
            hint = f"; write KEY=NAME IN THE FILES: {theirs}={ours}" if theirs in known else nearest(ours, known)
            raise UserError(f"{name}: unknown key {ours!r}{hint}")
        if not theirs:
            raise UserError(f"{name}: {ours} has no name; write KEY=NAME IN THE FILES")


def nearest(name: str, names: Sequence[str], otherwise: str = "") -> str:
    """The end of an error message for an unknown name: the most similar of `names`.

    If none is similar, the message ends with `otherwise`, or with all `names` if that is empty.
    """
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; {otherwise or 'known names: ' + ', '.join(names)}"
