"""Read examples from data files of any type and form (docs/data.md) into one canonical form for the rest of the code.

A canonical example has either `messages` (data/messages.py), or `text`, or `prompt` and `completion` as texts, or
`input_ids` with a `mask` of the ids that carry loss. It may have `tools` and a `weight` other than 1. Keys that belong to no
form, such as `id`, are kept.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from configs.load import EXAMPLE_FIELDS, MESSAGE_FIELDS, OPTIONAL, REQUIRED
from configs.user_code import explain, load_function
from data.encoding import LISTED
from data.files import DEFAULT, KTO_LABEL, ROW_OPTIONS, TRL_MASKS, Reading, check_files, data_suffix
from data.messages import (
    MESSAGE_LIST,
    canonical_messages,
    canonical_tools,
    canonical_weight,
    check_unicode,
    parse_json_text,
    renamed,
    short_list,
    text_message,
)
from data.preferences import preference_advice
from data.rows import COLUMNS, column_names, read_rows

DESCRIBED_ROWS = 100  # rows at the beginning of a file whose keys are described

# Keys of the form `tokens`. In other forms they have another meaning or none.
OF_TOKENS = ("labels", "mask", "attention_mask")


@dataclass
class _Keys:
    """The keys and forms of the first DESCRIBED_ROWS rows of a file. The dictionaries serve as ordered sets."""

    rows: int = 0
    paragraphs: int = 0  # in a .txt file
    forms: dict[str, None] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)

    def add(self, form: str, row: dict, reading: Reading) -> None:
        """Add the keys of a row, by the file's names. An unused key of a message is named like `messages.id`."""
        names = {key: reading.name_of(key) for key in (*REQUIRED[form], *OPTIONAL[form])}
        used = [theirs for theirs in names.values() if row.get(theirs) is not None]
        known_keys = {*names.values(), reading.split_by}
        ignored = [key for key, value in row.items() if value is not None and key not in known_keys]
        known = {reading.message_names.get(key, key) for key in MESSAGE_FIELDS}
        for key in used:
            for message in row[key] if isinstance(row[key], list) and key != names.get("tools") else []:
                if isinstance(message, dict):
                    unknown = (name for name, value in message.items() if value is not None and name not in known)
                    ignored += [f"{key}.{name}" for name in unknown]
        for collected, keys in ((self.forms, [form]), (self.used, used), (self.ignored, ignored)):
            collected.update(dict.fromkeys(keys))

    def describe(self, path: Path, reading: Reading) -> str:
        """Describe the forms and keys of a file: "text (text); ignored: id"."""
        if not self.forms:
            return f"no well-formed example in the first {DESCRIBED_ROWS} rows"
        ignored = self.ignored
        if data_suffix(path) in COLUMNS and reading.columns is not None:
            ignored = dict.fromkeys(name for name in column_names(path) if name not in reading.columns) | ignored
        words = f"{' and '.join(self.forms)} ({short_list(self.used)})"
        if "completion" in self.forms:
            words += "; prompt and completion are joined as they stand, without a chat template: for a chat model write messages"
        words += f"; ignored: {short_list(ignored)}" if ignored else ""
        return words + (f"; made by data.row={reading.row}" if reading.row else "")


class Noticed:
    """Observations made while examples are read: malformed examples, rows left out, and the keys that are used."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.counts: Counter = Counter()  # examples by reason
        self.bad: list[str] = []  # sentences about the first malformed examples
        self.control: list[str] = []  # places of the first examples whose content spells control tokens
        self.opened: list[Path] = []  # not all files, if data.max_samples is reached earlier
        self.files: dict[Path, _Keys] = {}

    def skip(self, sentence: str) -> None:
        """Count a malformed example, or raise `sentence` as a UserError if on_bad is "error"."""
        if self.reading.on_bad == "error":
            raise UserError(sentence)
        self.counts["skipped"] += 1
        self.bad += [sentence] if len(self.bad) < LISTED else []

    def forms(self) -> list[str]:
        """Return a line for each group of files with equal descriptions: "a.jsonl and 2 more: text (text); ignored: id".

        For a single .txt file with several paragraphs, add a line that it is one document.
        """
        groups: dict[str, list[Path]] = {}
        for path, keys in self.files.items():
            groups.setdefault(keys.describe(path, self.reading), []).append(path)
        more = {form: f" and {len(files) - 1} more" if len(files) > 1 else "" for form, files in groups.items()}
        lines = [f"{files[0]}{more[form]}: {form}" for form, files in groups.items()]
        for path, keys in self.files.items() if len(self.files) == 1 else ():
            if keys.paragraphs > 1:
                lines.append(
                    f"{path}: its {keys.paragraphs:,} paragraphs are one document; to have many, write each as a line "
                    '{"text": "..."} of a .jsonl file, or a .txt file each'
                )
        return lines


def read_files(
    files: Iterable[str | Path], reading: Reading = DEFAULT, noticed: Noticed | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield (location, canonical example) for each example of the files, up to `reading.max_samples` rows in total.

    A location reads "FILE, line 3". Examples are not kept in memory, and no file is opened after the last row to read. Rows may
    have different forms, but a row of another form than the file's first row must have no keys of other forms: an Alpaca
    example without its output would otherwise become a text.

    Raise UserError for a file that is missing, damaged or empty, and for the first malformed example. With
    `reading.on_bad="skip"`, malformed examples are skipped and reported to `noticed`. A damaged file is always an error,
    because the extent of its loss is unknown.
    """
    noticed = noticed or Noticed(reading)
    function = load_function("data.row", reading.row) if reading.row else None
    rest = reading.max_samples or sys.maxsize
    for path in map(Path, files):
        check_files([path])
        noticed.opened.append(path)
        # data.fields cannot apply to a .txt file, which has no keys.
        of_file = replace(reading, fields={}) if data_suffix(path) == ".txt" else reading
        keys = noticed.files[path] = _Keys()
        first, problem, is_empty = None, None, True
        for where, row in itertools.islice(read_rows(path, of_file.columns), rest):
            rest, keys.rows = rest - 1, keys.rows + 1
            try:
                if isinstance(row, UserError):
                    raise row
                if function and isinstance(row, dict) and (row := _call_row(row, where, function, reading)) is None:
                    noticed.counts["left"] += 1
                    is_empty = False
                    continue
                form, example = canonical_example(row, where, of_file)
                first = first or form
                if form != first:
                    _check_own_keys(form, first, row, where, of_file)
            except UserError as error:
                noticed.skip(str(error))
                problem = problem or error
                continue
            if keys.rows <= DESCRIBED_ROWS:
                keys.add(form, row, of_file)
            if data_suffix(path) == ".txt":
                keys.paragraphs = example.get("text", "").strip().count("\n\n") + 1
            is_empty = False
            yield where, example
        if is_empty and problem:
            within = "" if rest else f" in its first {keys.rows:,} rows"  # data.max_samples stops there
            raise UserError(f"{path} contains no well-formed example{within}; {problem}") from problem
        if is_empty and data_suffix(path) == ".txt":  # the file is one example, and an empty example is malformed
            noticed.skip(f"{path} contains no text")
        elif is_empty:
            raise UserError(f"{path} contains no examples")
        if not rest:
            return


def read_examples(path: str | Path, reading: Reading = DEFAULT) -> list[dict]:
    """Return all examples of a file. Raise UserError with the file and line for a malformed one."""
    return [example for _, example in read_files([path], reading)]


def _call_row(row: dict, where: str, function: Callable[[dict], Any], reading: Reading) -> dict | None:
    """Return the example that data.row makes from a row, or None to leave it out. Raise UserError if data.row fails."""
    try:
        example = function(dict(row))
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: data.row={reading.row} fails: {explain(error)}") from error
    if example is not None and not isinstance(example, dict):
        raise UserError(
            f"{where}: data.row={reading.row} returns {short_list([type(example).__name__])}; it gets a row as a dictionary and "
            "must return an example as one, or None to leave the row out"
        )
    return example


def _check_own_keys(form: str, first: str, row: dict, where: str, reading: Reading) -> None:
    """Raise UserError if a row has keys of forms other than its own, in a file whose first row has the form `first`."""
    own = {*REQUIRED[form], *OPTIONAL[form], *OF_TOKENS}
    foreign = {reading.name_of(key) for key in EXAMPLE_FIELDS if key not in own}
    if present := [key for key, value in row.items() if value is not None and key in foreign]:
        raise UserError(
            f"{where} has the form {form}, but also {short_list(present)}, and the file began with {first}; name the form in "
            "data.format, or give the row the keys of one form"
        )


def canonical_example(row: Any, where: str, reading: Reading = DEFAULT) -> tuple[str, dict]:
    """Return (form, canonical example) of a row. Raise UserError whose message begins with `where`."""
    if not isinstance(row, dict):
        hint = "; the name of a file with one array must end in .json" if isinstance(row, list) else ""
        raise UserError(f"{where} is not an object with keys such as `messages` or `text`{hint}")
    keys = [key if value is not None else f"{key} (null)" for key, value in row.items()]
    row = {key: value for key, value in renamed(row, reading.example_names).items() if value is not None}
    if reading.format == "auto" and (advice := preference_advice(row, where)):
        raise UserError(advice)
    form = _form(row, keys, where, reading)
    if form not in ("text", "tokens") and str(row.get(KTO_LABEL)).lower() in ("true", "false"):  # text in a .csv file
        raise UserError(
            f"{where} has `{KTO_LABEL}`, as data of preferences (KTO) has, and training would learn the answers that it rejects, "
            "too; a function in data.row can leave those rows, and the key, out"
        )
    if form not in ("text", "tokens") and row.get(ROW_OPTIONS):
        raise UserError(
            f"{where} has `{ROW_OPTIONS}`, but all rows share the options of the template here; write them as "
            "data.chat_template_options, and leave the key out, which a function in data.row can do"
        )
    names = reading.message_names
    example = _BUILDERS[form](row, where, names)
    if (tools := row.get("tools")) and form not in ("text", "tokens") and (tools := canonical_tools(tools, where)):
        if "messages" not in example:
            raise UserError(f"{where} has `tools`, which only chats can have")
        example["tools"] = tools
    if row.get("weight", "") != "" and (weight := canonical_weight(row["weight"], where)) != 1:
        example["weight"] = weight
    used = EXAMPLE_FIELDS if form == "tokens" else [key for key in EXAMPLE_FIELDS if key not in OF_TOKENS]
    return form, example | {key: value for key, value in row.items() if key not in used}


def example_text(example: dict) -> str:
    """Return all text of a canonical example: the document, the prompt with its completion, or the messages of a chat.

    Raise UserError for token ids.
    """
    if "input_ids" in example:
        raise UserError("an example has token ids and no text; name files with text")
    if "text" in example:
        return example["text"]
    if "messages" not in example:
        return example["prompt"] + example["completion"]
    return "\n\n".join(message["content"] for message in example["messages"] if message["content"] is not None)


def _form(row: dict, keys: list, where: str, reading: Reading) -> str:
    """Return the form of a row: data.format, or the first form whose required keys are all row_keys."""
    row_keys = f"its keys are {short_list(keys)}" if keys else "it has no keys"
    for form, needed in REQUIRED.items() if reading.format == "auto" else [(reading.format, REQUIRED[reading.format])]:
        missing = [key for key in needed if key not in row]
        if not missing:
            return form
        if form == reading.format:
            raise UserError(
                f"{where} has no `{reading.name_of(missing[0])}`, which data.format={form} needs; {row_keys}"
            )
    hint = "data.fields can name them"
    if len(names := [key for key in row if str(key).isidentifier() and row[key] is not None]) > 1:
        hint = f"name them, e.g. data.fields=instruction={names[0]},output={names[1]}"
    if fields := ", ".join(f"{ours}={theirs}" for ours, theirs in reading.example_names.items()):
        hint = f"it was read with fields {fields}, which hold for the training and validation files of a source alike"
    raise UserError(f"{where} has none of the forms {', '.join(REQUIRED)} (docs/data.md): {row_keys}; {hint}")


def _chat(key: str, row: dict, where: str, names: Mapping[str, str]) -> dict:
    return {"messages": _with_system(row, canonical_messages(row[key], where, key, names), where)}


def _alpaca(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """Convert an Alpaca row. The input follows the instruction after an empty line. `history`: (instruction, output) pairs."""
    messages = []
    history = parse_json_text(row.get("history") or [], where, "history")
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{where}: `history` must be a list of pairs of an instruction and its output")
        messages += [text_message(role, text, where, "history") for role, text in zip(TURN, turn, strict=True)]
    parts = [text_message("user", row.get(key, ""), where, key)["content"] for key in ("instruction", "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise UserError(f"{where}: `instruction` is empty")
    messages += [{"role": "user", "content": question}, text_message("assistant", row["output"], where, "output")]
    return {"messages": _with_system(row, messages, where)}


def _completion(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """Keep texts. Turn messages, in a .csv file as JSON, into one chat in which only the completion carries loss."""
    prompt, completion = row["prompt"], row["completion"]
    if all(isinstance(part, str) and MESSAGE_LIST.match(part) for part in (prompt, completion)):
        prompt, completion = (parse_json_text(row[key], where, key) for key in REQUIRED["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UserError(f"{where}: `completion` must be a non-empty string")
        return {key: check_unicode(row[key], where) for key in REQUIRED["completion"]}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise UserError(f"{where}: `prompt` and `completion` must both be strings or both be lists of messages")
    earlier = canonical_messages(prompt, where, "prompt", names)
    earlier = [message | {"weight": 0.0} if message["role"] == "assistant" else message for message in earlier]
    return {"messages": earlier + canonical_messages(completion, where, "completion", names)}


def _document(row: dict, where: str, names: Mapping[str, str]) -> dict:
    if not isinstance(row["text"], str) or not row["text"]:
        raise UserError(f"{where}: `text` must be a non-empty string")
    return {"text": check_unicode(row["text"], where)}


def _tokens(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """Return the ids without those that `attention_mask` calls padding. `labels` are the ids, or -100 for no loss."""
    lists: dict[str, Any] = {
        key: parse_json_text(row[key], where, key) for key in ("input_ids", *OF_TOKENS) if key in row
    }
    if len(lists.keys() - {"attention_mask"}) == 1 and (theirs := [key for key in TRL_MASKS if key in row]):
        raise UserError(f"{where} has `{theirs[0]}`, which is a `mask` here; write data.fields=mask={theirs[0]}")
    ids = lists["input_ids"]
    for key, values in lists.items():
        if not isinstance(values, list) or not all(type(value) is int or value in (True, False) for value in values):
            raise UserError(f"{where}: `{key}` must be a list of integers")
        if len(values) != len(ids):
            raise UserError(f"{where}: `{key}` has {len(values)} items, but `input_ids` has {len(ids)}")
        if key in ("mask", "attention_mask") and not set(values) <= {0, 1}:
            raise UserError(f"{where}: `{key}` must have only 0 and 1")
    if not ids or min(ids) < 0:
        raise UserError(f"{where}: `input_ids` must be at least one id, and none below 0")
    if "labels" in lists and "mask" in lists:
        raise UserError(f"{where} has `labels` and `mask`; remove one of them")
    labels, mask = lists.get("labels"), lists.get("mask") or [1] * len(ids)
    if labels is not None:
        wrong = next((i for i, (a, b) in enumerate(zip(labels, ids, strict=True)) if a not in (b, -100)), None)
        if wrong is not None:
            raise UserError(
                f"{where}: `labels` must have -100 or the id at the same place, not shifted; item {wrong + 1} is "
                f"{labels[wrong]} beside the id {ids[wrong]}"
            )
        mask = [int(label != -100) for label in labels]
    kept = lists.get("attention_mask") or [1] * len(ids)
    pairs = [(int(i), int(m)) for i, m, is_kept in zip(ids, mask, kept, strict=True) if is_kept]
    if not pairs:
        raise UserError(f"{where}: `attention_mask` is 0 everywhere")
    return {"input_ids": [i for i, _ in pairs], "mask": [m for _, m in pairs]}


def _with_system(row: dict, messages: list[dict], where: str) -> list[dict]:
    """Return the messages, preceded by the example's own `system` text if it has one."""
    if not row.get("system"):
        return messages
    system = text_message("system", row["system"], where, "system")
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0]["content"] != system["content"]:
        raise UserError(f"{where} has `system` and another system message; remove one of them")
    return messages


TURN = ("user", "assistant")
_BUILDERS = {
    "messages": lambda *args: _chat("messages", *args),
    "sharegpt": lambda *args: _chat("conversations", *args),
    "alpaca": _alpaca,
    "completion": _completion,
    "text": _document,
    "tokens": _tokens,
}
