"""The model card of an export: what was measured and recorded, and what was not, said as such.

This module collects the facts; model_card.md.jinja beside it is the text. The front matter is that of the hub
(https://huggingface.co/docs/hub/model-cards). Nothing is guessed: what no file says is left out, or said to be unknown.
"""

import functools
import hashlib
import json
import re
import shlex
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.exceptions import TemplateError
from markupsafe import Markup

from common.errors import UserError
from configs.config import Config, as_dict
from data.chat_template import ChatTemplate
from eval.compare_models import table as forgetting_table
from eval.intervals import intervals
from eval.regulator.report import figures
from model.download import MANIFEST, origin
from model.fingerprint import fingerprint_of_base
from training.chat_settings import chat_settings
from training.ending import RECORD
from training.provenance import ROOT, git_state, short_commit, versions

if TYPE_CHECKING:
    from training.export import Subject

TEMPLATE = "model_card.md.jinja"
DATA_CARD = "dataset.json"  # of scripts/make_reports.py and the like, beside the data files
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Licences that are recognised by the heading of their text, with the hub's name of them
# (https://huggingface.co/docs/hub/repositories-licenses).
HEADINGS = {r"\s*Apache License\s+Version 2\.0": "apache-2.0", r"\s*MIT License": "mit"}
# Metric of eval/intervals.py -> (type, name) in the front matter.
METRICS = {
    "f1": ("f1", "F1 of the violations (micro)"),
    "fact_f1": ("f1", "F1 of the facts"),
    "exact": ("exact_match", "reports with all violations right"),
    "rouge_l": ("rouge", "ROUGE-L (F)"),
    "loss": ("loss", "nats per response token"),
}


def model_card(out: Path, subject: "Subject", record: dict, base: dict, results: "Results", options: Namespace) -> str:
    """The text of README.md in `out`. record: its export.json. base, results: of `base_model` and `read_results`.

    options: the command line of scripts/export.py, whose license replaces what the base model says.
    """
    config, name = subject.config, options.name or out.absolute().name
    tests = sorted(Path(config.data.train[0]).parent.glob("test*.jsonl")) if config else []
    context = {
        "name": name,
        "options": options,
        "subject": subject,
        "record": record,
        "base": base,
        "results": results,
        "run": subject.run,
        "state": subject.state,
        # What the scripts can load: for an adapter the run's export, which is the adapter merged.
        "measured": out if subject.weights is not None else subject.run / "export",
        "test_file": tests[0] if tests else Path("TEST.jsonl"),
        "results_folder": subject.run / "eval" if subject.run else Path("results"),
        "today": datetime.now(UTC).date().isoformat(),
        "git": git_state(ROOT),
        "versions": versions(),
    }
    if config:
        context |= {
            "data": config.data,
            "data_cards": _data_cards(config),
            "settings": _without_folders(as_dict(config)),
            "starts": _starts(subject.run),
            "chat_template": hashlib.sha256(subject.tokenizer.get_chat_template().encode()).hexdigest(),
            "chat": _chat(subject),
        }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": code,
        "commit": short_commit,
        "file_name": lambda path: Path(path).name,
        "pretty": functools.partial(json.dumps, indent=1),
        "quote": lambda path: Markup(shlex.quote(str(path))),  # inside `code` alone
    }
    body = environment.get_template(TEMPLATE).render(context)
    return ModelCard(
        f"---\n{_front_matter(name, subject, record, base, results, options).to_yaml()}\n---\n\n{body}"
    ).content


def escape(value: object) -> Markup:
    """A value as Markdown shows it: on one line, with nothing that is markup. Markup from the template stays as it is."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|#])", r"\\\1", text))


def code(text: str) -> Markup:
    """An indented block, in which nothing is markup."""
    return Markup(textwrap.indent(text.rstrip(), "    ", lambda line: True))


def _front_matter(
    name: str, subject: "Subject", record: dict, base: dict, results: "Results", options: Namespace
) -> ModelCardData:
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type="json",
            dataset_name=Path(result["data"]).name,
            dataset_args={"sha256": result["data_sha256"], "examples": result["n_examples"]},
            metric_type=METRICS[metric][0],
            metric_value=interval.value,
            metric_name=f"{METRICS[metric][1]}; 95% interval {interval.low:.4g} to {interval.high:.4g}",
        )
        for result in results.evaluations
        for metric, interval in result["intervals"].items()
        if metric in METRICS
    ]
    is_adapter = record["kind"] == "adapter"
    more = {} if options.license else dict(base["license_more"])
    if base["hub_id"]:
        more["base_model_relation"] = "adapter" if is_adapter else "merge" if record["averaged"] else "finetune"
    if found:
        more["metrics"] = sorted({result.metric_type for result in found})
    return ModelCardData(
        license=options.license or base["license"],
        language=options.language or None,
        base_model=base["hub_id"],
        datasets=options.dataset or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lora"] if subject.adapter else None,
        model_name=name if found else None,
        eval_results=found or None,
        **more,
    )


# ---- the base model -----------------------------------------------------------------------------------------------------


def base_model(directory: Path | None) -> dict:
    """What the directory of a base model says of itself; None: the base model is unknown.

    hub_id: its id on the hub, or None. origin: the same in words. license: the hub's name of its licence, `other` or
    `unknown`. license_from: what says so, in words. license_more: `license_name` and `license_link`. files: the texts of
    the licence. extended: number of tokens that scripts/extend_vocabulary.py added.
    """
    base = {"hub_id": None, "license": "unknown", "license_more": {}, "files": [], "extended": 0}
    if directory is None or not directory.is_dir():
        where = "unknown: check" if directory is None else f"{directory.name}, a directory that is gone: check"
        return base | {"origin": where, "license_from": "the base model is not there"}
    extension = _read_json(directory / "new_tokens.json")
    source = Path(extension["base"]) if Path(str(extension.get("base"))).is_dir() else directory
    try:
        card = (metadata_load(source / "README.md") if (source / "README.md").is_file() else None) or {}
    except Exception:  # what the YAML parser raises for a damaged card
        card = {}
    base["extended"] = len(extension.get("tokens", ()))
    base["files"] = sorted(file for pattern in LICENCE_FILES for file in source.glob(pattern) if file.is_file())
    base["origin"] = origin(source)
    if base["origin"]:
        base["hub_id"] = _read_json(source / MANIFEST)["model"]
    elif card.get("base_model"):
        base["origin"] = f"{source.name}, itself made from {card['base_model']} according to its card"
    else:
        base["origin"] = f"{source.name}, a local directory that does not say where it is from: check"
    named, texts = card.get("license"), [file for file in base["files"] if file.name.startswith(("LICENSE", "LICENCE"))]
    text = texts[0].read_text(encoding="utf-8", errors="replace") if texts else ""
    known = next((name for heading, name in HEADINGS.items() if re.match(heading, text)), None)
    if isinstance(named, str) and named not in ("", "unknown"):
        base |= {"license": named, "license_from": "the card of the base model"}
        base["license_more"] = {key: str(card[key]) for key in ("license_name", "license_link") if card.get(key)}
    elif known:
        base |= {"license": known, "license_from": f"{texts[0].name} of the base model"}
    elif texts:
        base |= {"license": "other", "license_from": f"{texts[0].name} of the base model: read it"}
        base["license_more"] = {"license_name": "see-file", "license_link": texts[0].name}
    else:
        base["license_from"] = "neither a card nor a LICENSE file is in the base model's directory: check"
    return base


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- results ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The JSON of evaluations and of forgetting (None: not measured), and why other files were left out, in sentences.

    Each has also `converted`, the dtype that was measured if another one is exported, and an evaluation `figures` and
    `intervals`.
    """

    evaluations: tuple[dict, ...] = ()
    forgetting: dict | None = None
    left_out: tuple[str, ...] = ()


def read_results(run: Path | None, extra: Sequence[Path], record: dict, out: Path) -> Results:
    """The results in `run`/eval and in the files `extra` that are of the weights that `record` describes.

    The evaluated model must be `out`, or another export of the same checkpoint and changes, or the exported directory
    itself, and must not have been written again since. Raises UserError if a file of `extra` cannot be used.
    """
    evaluations, forgetting, left_out = [], None, []
    files = sorted((run / "eval").glob("*.json")) if run else []
    for file in [*files, *(file for file in extra if file not in files)]:
        content = _read_json(file)
        is_forgetting = {"base", "tuned", "perplexity_per_byte"} <= content.keys()
        if is_forgetting or {"model", "data_sha256", "n_examples"} <= content.keys():
            model = Path(content["tuned" if is_forgetting else "model"])
            converted, problem = _compare_weights(file, model, record, out)
        else:
            converted, problem = None, f"{file} is not the JSON of scripts/evaluate.py or scripts/measure.py forgetting"
        if problem and file in extra:
            raise UserError(problem)
        content["converted"] = converted
        if problem:
            left_out.append(problem)
        elif is_forgetting:
            forgetting = content | {"table": forgetting_table(content)}
        else:
            banks = {answer.get("cluster") for answer in content.get("answers", ())} - {None}
            found = {"figures": figures(content), "intervals": intervals(content), "banks": len(banks)}
            evaluations.append(content | found)
    return Results(tuple(evaluations), forgetting, tuple(left_out))


def _compare_weights(file: Path, model: Path, record: dict, out: Path) -> tuple[str | None, str | None]:
    """(the dtype of the evaluated model if it is another one, why the result is not of the exported weights)."""
    if not (model / "config.json").is_file():
        return None, f"{file} is of {model}, which is gone: it cannot be known whether it had these weights"
    written = model / RECORD
    if not written.is_file():
        other = record.get("averaged") or fingerprint_of_base(model) != record.get("fingerprint")
        return None, f"{file} is of other weights, {model}" if other else None
    measured = _read_json(written)
    keys = ("checkpoint", "averaged", *(() if record.get("checkpoint") else ("fingerprint",)))
    if model.resolve() != out.resolve() and any(measured.get(key) != record.get(key) for key in keys):
        return None, f"{file} is of other weights, {model}"
    if written.stat().st_mtime > file.stat().st_mtime:
        return None, f"{file} is older than the weights in {model}; evaluate them again"
    return (measured.get("dtype") if measured.get("dtype") != record["dtype"] else None), None


# ---- the run ------------------------------------------------------------------------------------------------------------


def profile_of(config: Config) -> str | None:
    """The profile of the task that a run was trained on, from the data card of scripts/make_reports.py; None without one."""
    arguments = [card.get("arguments") for _, card in _data_cards(config)]
    return next((str(each["profile"]) for each in arguments if isinstance(each, dict) and "profile" in each), None)


def _data_cards(config: Config) -> list[tuple[str, dict]]:
    """(folder, data card) of the folders of the training files, as they are now."""
    paths = [*config.data.train, *(path for source in config.data.mix for path in source.paths)]
    folders = dict.fromkeys(Path(path).parent for path in paths)
    return [(folder.name, card) for folder in folders if (card := _read_json(folder / DATA_CARD))]


def _chat(subject: "Subject") -> str | None:
    """A chat of one question and one answer as the template of the run renders it; None if it refuses such a chat."""
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        return ChatTemplate(subject.tokenizer, chat_settings(subject.config.data)).render(messages)
    except (TemplateError, ValueError, TypeError):
        return None


def _without_folders(value: object) -> object:
    """Settings as JSON. Of paths only the last part, because a card is published."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _starts(directory: Path) -> list[dict]:
    """The records of all starts, the oldest first."""
    path = directory / "starts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
