"""The part of a model card about the training data: files, counts, fingerprint, target tokens and chat template."""

import hashlib
import json
from pathlib import Path

from jinja2.exceptions import TemplateError

from data.chat_template import ChatTemplate
from training.chat_settings import chat_settings
from training.export.markdown import block, escape, table
from training.export.run import Run
from training.export.subject import Subject

DATA_CARD = "dataset.json"  # of scripts/make_reports.py and the like, beside the files


def data_section(subject: Subject) -> str:
    """What is recorded about the data. Without a run nothing is, and the text says so."""
    run = subject.run
    if run is None:
        return "Not recorded: the weights were exported from a model directory, not from a run."
    return "\n\n".join([_sources(run), *_data_cards(run), _chat(subject)])


def profile_of(run: Run) -> str | None:
    """The profile of the task that a run was trained on, from the data card of scripts/make_reports.py; None without one."""
    for path in run.config.data.train:
        try:
            card = json.loads(Path(path).with_name(DATA_CARD).read_text(encoding="utf-8"))
            return str(card["arguments"]["profile"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _sources(run: Run) -> str:
    data, state = run.config.data, run.state
    names = ["data.train", *(source.name for source in data.mix)]
    shares = [max(0.0, 1 - sum(source.share for source in data.mix)), *(source.share for source in data.mix)]
    files = [data.train, *(source.paths for source in data.mix)]
    targets = state.get("targets") or ["not recorded"] * len(names)
    rows = [
        (name, ", ".join(Path(path).name for path in paths), f"{share:.1%}", _count(count))
        for name, paths, share, count in zip(names, files, shares, targets, strict=False)
    ]
    lines = [table(("source", "files", "share of target tokens asked for", "target tokens trained on"), rows), ""]
    tokens = state.get("tokens")
    lines.append(f"- Tokens trained on, repeats included: {_count(tokens or 'not recorded')}.")
    fingerprint = state.get("meaning", {}).get("data.train")
    lines.append(f"- Fingerprint of the tokenised main source: {_code(fingerprint)}.")
    validation = ", ".join(Path(path).name for path in data.validation)
    if data.validation_share:
        validation = f"{data.validation_share:.1%} of the training files, held out by a hash of each example"
    lines.append(f"- Validation: {escape(validation) if validation else 'none'}.")
    return "\n".join(lines)


def _count(value: object) -> str:
    """A number of tokens; sums of weights may have a fraction."""
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _code(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else "not recorded"


def _data_cards(run: Run) -> list[str]:
    """The data cards beside the training files, as they are now."""
    data = run.config.data
    folders = dict.fromkeys(Path(path).parent for path in (*data.train, *(p for s in data.mix for p in s.paths)))
    found = [part for folder in folders if (part := _data_card(folder))]
    return found or [f"The training files have no data card (`{DATA_CARD}`) beside them."]


def _data_card(folder: Path) -> str:
    try:
        card = json.loads((folder / DATA_CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(card, dict):
        return ""
    lines = [f"The data card of `{folder.name}` (`{DATA_CARD}`), as it was at the export:", ""]
    for key, title in (("how_made", "How it was made"), ("sources", "Sources"), ("limits", "Limits")):
        value = card.get(key)
        if value:
            lines.append(f"- {title}: {escape(' '.join(value) if isinstance(value, list) else value)}")
    splits = card.get("splits")
    if isinstance(splits, dict) and all(isinstance(counts, dict) for counts in splits.values()):
        keys = [key for key in ("examples", "banks", "clean") if any(key in counts for counts in splits.values())]
        rows = [(split, *(counts.get(key, "") for key in keys)) for split, counts in splits.items()]
        lines += ["", table(("split", *keys), rows)]
    return "\n".join(lines)


def _chat(subject: Subject) -> str:
    assert subject.run is not None
    data, tokenizer = subject.run.config.data, subject.tokenizer
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return "The tokenizer has no single chat template."
    digest = hashlib.sha256(template.encode()).hexdigest()
    where = Path(data.chat_template).name if data.chat_template else "the base model's own"
    lines = [f"Chat template: {escape(where)}, sha256 `{digest}`. It is in the tokenizer of this directory."]
    settings = {"date": data.chat_date, **data.chat_template_options}
    stated = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    if stated:
        lines.append(f"It was rendered with {escape(stated)}.")
    lines.append(f"Loss was taken on {'all answers' if data.train_on == 'all' else 'the last answer'} of a chat.")
    chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = ChatTemplate(tokenizer, chat_settings(data)).render(chat)
    except (TemplateError, ValueError, TypeError):
        return " ".join(lines)
    return " ".join(lines) + f" A chat of one question and one answer:\n\n{block(text)}"
