"""The parts of a model card about the run: its settings, who made it with what, and the limits that follow from them."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from configs.config import as_dict
from training.export.markdown import block, escape, table
from training.export.results import Results
from training.export.run import Run
from training.export.subject import Subject
from training.provenance import ROOT, git_state, short_commit, versions

SHOWN = (
    "data.sequence_length",
    "data.packing",
    "batch.global_examples",
    "batch.global_tokens",
    "optimizer.learning_rate",
    "optimizer.epochs",
    "optimizer.max_steps",
    "optimizer.warmup_ratio",
    "optimizer.warmup_steps",
    "optimizer.min_lr_ratio",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.max_grad_norm",
    "optimizer.memory",
    "model.compute_dtype",
    "model.rope_type",
    "model.rope_factor",
    "ewc.strength",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.targets",
    "sharding.strategy",
    "run.seed",
)


def settings_section(subject: Subject) -> str:
    """The main settings as a table, and all of them as JSON."""
    run = subject.run
    if run is None:
        return "Not recorded: the weights were exported from a model directory, not from a run."
    settings = _settings(run)
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    rows = [(key, _value(flat[key])) for key in SHOWN if flat.get(key) is not None]
    state = run.state
    for key, title in (
        ("step", "steps taken"),
        ("updates", "steps that changed the weights"),
        ("skipped_steps", "skipped"),
    ):
        if key in state:
            rows.append((title, state[key]))
    everything = block(json.dumps(settings, indent=1), "json")
    return (
        "AdamW with a linear warm-up and a cosine decay; the loss of a step is the mean over its target tokens.\n\n"
        f"{table(('setting', 'value'), rows)}\n\n<details><summary>All settings</summary>\n\n{everything}\n\n</details>"
    )


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _settings(run: Run) -> dict:
    """All settings. Of paths only the last part, because a card is published."""
    recorded = run.record["config"]
    settings = json.loads(json.dumps({**recorded, **{k: v for k, v in as_dict(run.config).items() if k in recorded}}))
    for section in settings.values():
        for key, value in section.items():
            section[key] = _without_folders(value)
    return settings


def _without_folders(value: object) -> object:
    if isinstance(value, str) and "/" in value:
        return Path(value).name
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return value


def how_made_section(subject: Subject, author: str | None) -> str:
    """Commit, versions and devices of each start, and those of the export."""
    lines = [f"- Made by: {escape(author)}." if author else "- Made by: not stated (option --author of the export)."]
    if subject.run:
        starts = subject.run.starts()
        lines.append(f"- Starts of the run: {len(starts)}.")
        lines += [f"- {_start(start)}" for start in starts[-3:]]
    code = git_state(ROOT)
    changed = " with uncommitted changes" if code["git_diff"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.now(UTC).date().isoformat()
    lines.append(f"- Export: {today}, commit `{short_commit(code)}`{changed}; {packages}.")
    return "\n".join(lines)


def _start(start: dict) -> str:
    commit = f"commit `{short_commit(start)}`" if start.get("git_commit") else "an unrecorded commit"
    changed = " with uncommitted changes" if start.get("git_diff") else ""
    devices: Counter[str] = Counter()
    for place in start.get("devices", ()):
        devices[place["device"]] += len(place["ranks"])
    ranks = ", ".join(f"{count} x {escape(name)}" for name, count in devices.items())
    packages = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    return (
        f"Start at step {start.get('start_step')}: {start.get('time')}, {commit}{changed}, ranks: {ranks or 'not recorded'}; "
        f"Python {start.get('python')}, {packages}."
    )


def limits_section(subject: Subject, record: dict, results: Results) -> str:
    """What follows from the settings and from what was not measured."""
    lines = ["- The model can state wrong figures, dates and articles; check each of them before an answer is used."]
    window = getattr(subject.model_config, "max_position_embeddings", None)
    if subject.run:
        length = subject.run.config.data.sequence_length
        lines.append(f"- It was trained on sequences of at most {length} tokens; its context window is {window}.")
        lines.append("- It was trained on the data above; other kinds of input were not tried unless a result says so.")
    if not results.evaluations:
        lines.append("- No result on a test set is known for these weights.")
    if results.forgetting is None:
        lines.append("- How much general ability it has lost against its base was not measured.")
    for result in results.evaluations:
        content = result.content
        clusters = {answer.get("cluster") for answer in content.get("answers", ())} - {None}
        banks = f" of {len(clusters)} banks" if clusters else ""
        lines.append(f"- {escape(Path(content['data']).name)} has {content['n_examples']} evaluated examples{banks}.")
    if record["averaged"] and not results.evaluations:
        lines.append("- The averaged weights were never trained as such; the results of the run are not theirs.")
    lines.append("- Safety, bias and refusal of harmful requests were not evaluated.")
    return "\n".join(lines)
