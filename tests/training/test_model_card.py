"""The model card: figures equal those of the JSON, nothing is invented, and text from files stays text."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalIterable=false

import json
import os
import re
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer
from configs.config import Run as RunSettings
from eval.intervals import intervals
from model.weights import Weights
from tests.tiny import tiny_tokenizer
from training.export import Subject
from training.model_card import Results, base_model, code, escape, model_card, profile_of, read_results

RECORD = {"weights": "best", "step": 2, "checkpoint": "abc", "kind": "model", "dtype": "bfloat16", "averaged": None}
INTERVAL = {"value": 1.5, "low": 1.25, "high": 1.75}


@dataclass(frozen=True)
class Inputs:
    out: Path
    subject: Subject
    record: dict
    base: dict
    results: Results
    options: Namespace

    def card(self) -> str:
        return model_card(self.out, self.subject, self.record, self.base, self.results, self.options)


def options(name: str = "my model", **stated) -> Namespace:
    return Namespace(**({"name": name, "license": None, "language": [], "dataset": [], "author": None} | stated))


def answer(bank: str, true: list[str], predicted: list[str]) -> dict:
    return {"id": bank, "cluster": bank, "true": true, "predicted": predicted, "rouge_l": 0.5, "answer": "..."}


def evaluation(model: Path) -> dict:
    answers = [answer(f"bank {i}", ["A"], ["A"] if i % 3 else ["B"]) for i in range(12)]
    return {
        "model": str(model),
        "data": "somewhere/test|odd.jsonl",
        "data_sha256": "f" * 64,
        "n_examples": 12,
        "n_in_file": 20,
        "dtype": "float32",
        "seconds": 1.0,
        "answers": answers,
        "loss": {"mean": 0.25, "targets": 48},
        "losses": [(1.0, 4)] * 12,
        "rouge_l": {"of": "directive", "f": 0.5, "n": 12, "baselines": {}},
    }


def forgetting(tuned: Path) -> dict:
    metric = {"base": INTERVAL, "tuned": INTERVAL, "change": {"value": 0.125, "low": 0.0625, "high": 0.1875}}
    sizes = {"bytes": 100, "texts": 3, "questions": {}}
    return {
        "base": "B",
        "tuned": str(tuned),
        "text": "<general>",
        "dtype": "bf16",
        "perplexity_per_byte": metric,
        **sizes,
    }


@pytest.fixture
def made(tmp_path) -> SimpleNamespace:
    """A run with its export, results and data card, and the inputs of a card of them."""
    run, data, base = tmp_path / "run", tmp_path / "data", tmp_path / "base"
    for folder in (run / "export", run / "eval", data, base):
        folder.mkdir(parents=True)
    config = Config(
        Model(str(base)),
        Data((str(data / "train.jsonl"),)),
        Batch(4),
        Optimizer(1e-3),
        RunSettings("trial", str(tmp_path)),
    )
    (run / "export" / "config.json").write_text("{}")
    (run / "export" / "export.json").write_text(json.dumps({"checkpoint": "abc", "dtype": "float32"}))
    os.utime(run / "export" / "export.json", (1, 1))
    (data / "dataset.json").write_text(
        json.dumps(
            {
                "how_made": "by | hand <b>",
                "limits": "Synthetic.",
                "splits": {"train": {"examples": 3200, "banks": 40}, "test": {"examples": 7}},
            }
        )
    )
    state = {
        "step": 2,
        "tokens": 12345,
        "targets": [678],
        "updates": 2,
        "meaning": {"data.train": "0123abcd"},
        "settings": {"steps in total": 4},
        "evaluated": {"validation": 2},
        "loss": 0.4321,
        "base_loss": 2.5,
    }
    start = {"time": "2025-01-01T00:00:00+00:00", "start_step": 0, "git_commit": "c0ffee" * 7, "git_diff": "+x"}
    start |= {
        "python": "3.11",
        "versions": {"torch": "2.13"},
        "devices": [{"host": "secret", "device": "cpu", "ranks": [0, 1]}],
    }
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    subject = Subject(
        run,
        SimpleNamespace(max_position_embeddings=512),
        tiny_tokenizer(),
        Weights({}, lambda name: torch.zeros(0)),
        None,
        {},
        "",
        base,
        run,
        config,
        state,
    )
    inputs = Inputs(tmp_path / "out", subject, RECORD, base_model(base), Results(), options())
    return SimpleNamespace(run=run, base=base, inputs=inputs, root=tmp_path)


def with_results(made, record: dict = RECORD) -> Inputs:
    (made.run / "eval" / "test-ffffffff.json").write_text(json.dumps(evaluation(made.run / "export")))
    (made.run / "eval" / "general.json").write_text(json.dumps(forgetting(made.run / "export")))
    results = read_results(made.run, [], record, made.inputs.out)
    return replace(made.inputs, record=record, results=results, base=base_model(made.base))


def test_figures_and_intervals_are_those_of_the_json(made) -> None:
    inputs = with_results(made)
    text = inputs.card()
    known = intervals(evaluation(made.run / "export"))
    for metric, name in (("rouge_l", r"directive ROUGE-L \(F\)"), ("loss", r"validation loss \(nats/token\)")):
        row = re.search(rf"\| {name} \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|", text)
        assert row and float(row[1]) == pytest.approx(known[metric].value, abs=5e-4), text
        assert (float(row[2]), float(row[3])) == pytest.approx((known[metric].low, known[metric].high), abs=5e-4)
    assert "12 of 20 examples" in text and r"test\|odd.jsonl" in text
    assert "Measured with the files in float32, before they were converted to bfloat16" in text
    assert "+0.1250" in text and "+0.0625 to +0.1875" in text and "&lt;general&gt;" in text
    assert "Not measured" not in text and "0.4321 nats per target token, 2.5 before training" in text
    index = ModelCard(text).data.eval_results
    values = {result.metric_type: result.metric_value for result in index if result.metric_type != "f1"}
    assert values["rouge"] == known["rouge_l"].value and values["loss"] == known["loss"].value
    f1 = next(result for result in index if "violations" in result.metric_name and result.metric_type == "f1")
    assert f1.metric_value == known["f1"].value and f"{known['f1'].low:.4g} to {known['f1'].high:.4g}" in f1.metric_name
    assert f1.dataset_args == {"sha256": "f" * 64, "examples": 12}


def test_what_is_recorded_is_said_and_paths_and_hosts_are_not(made) -> None:
    text = made.inputs.card()
    for part in ("12,345", "678", "0123abcd", "3200", "by \\| hand &lt;b&gt;", "Synthetic.", "c0ffeec0ffee", "2 x cpu"):
        assert part in text, part
    assert (
        "with uncommitted changes" in text
        and "after step 2 of 4" in text
        and "    <|im_start|>user\n    QUESTION" in text
    )
    body = re.sub(r"    python scripts/.*", "", text)  # commands have paths
    assert str(made.root) not in body and "secret" not in text


def test_what_is_missing_is_said_with_the_command_that_makes_it(made) -> None:
    text = made.inputs.card()
    assert (
        "Not measured on a test set." in text
        and f"python scripts/evaluate.py {made.root}/out --data TEST.jsonl" in text
    )
    assert (
        f"python scripts/measure.py forgetting {made.base} {made.root}/out --json {made.run}/eval/general.json" in text
    )
    assert "Licence: unknown" in text and "does not say where it is from: check" in text
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.language, data.datasets, data.eval_results) == ("unknown", *[None] * 4)
    without_run = replace(made.inputs, subject=replace(made.inputs.subject, run=None, config=None, state={}, base=None))
    assert "how it was trained is not recorded" in without_run.card()
    assert without_run.card().count("Not recorded: the weights were exported from a model directory") == 2


def test_the_licence_and_the_id_of_the_base_are_those_that_its_directory_states(made) -> None:
    fetched = {"model": "org/base", "source": "Hugging Face hub", "revision": "1", "files": {}}
    (made.base / "fetched.json").write_text(json.dumps(fetched))
    (made.base / "LICENSE").write_text("\n      Apache License\n   Version 2.0, January 2004\n")
    data = ModelCard(with_results(made).card()).data
    assert (data.license, data.base_model, data["base_model_relation"]) == ("apache-2.0", "org/base", "finetune")
    averaged = RECORD | {"averaged": {"share_of_tuned": 0.25, "base": "x"}}
    text = with_results(made, averaged).card()
    assert ModelCard(text).data["base_model_relation"] == "merge" and "0.75 of the base and 0.25 of the tuned" in text
    assert (
        "Not measured on a test set" in text and "0.4321" not in text
    )  # results of the run are not those of an average
    (made.base / "LICENSE").write_text("SOME COMMUNITY LICENSE")
    data = ModelCard(with_results(made).card()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "see-file", "LICENSE")
    (made.base / "README.md").write_text("---\nlicense: gemma\n---\n")
    stated = replace(
        with_results(made), options=options("m", license="mit", language=["de"], dataset=["org/data"], author="A & B")
    )
    text = stated.card()
    data = ModelCard(text).data
    assert (data.license, data.language, data.datasets) == ("mit", ["de"], ["org/data"])
    assert "The base model's own licence: gemma" in text and "Made by: A &amp; B." in text
    (made.base / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_model(made.base)["license"] == "other"


def test_results_of_other_weights_are_left_out_with_the_reason(made) -> None:
    other = RECORD | {"checkpoint": "xyz"}
    results = with_results(made, other).results
    assert not results.evaluations and results.forgetting is None
    assert all("is of other weights" in why for why in results.left_out) and len(results.left_out) == 2
    file = made.run / "eval" / "test-ffffffff.json"
    with pytest.raises(UserError, match="is of other weights"):
        read_results(None, [file], other, made.inputs.out)
    os.utime(file, (0, 0))
    (why,) = read_results(made.run, [], RECORD, made.inputs.out).left_out
    assert "is older than the weights" in why
    file.write_text(json.dumps(evaluation(made.root / "gone")))
    assert "which is gone" in read_results(made.run, [], RECORD, made.inputs.out).left_out[0]
    file.write_text("[]")
    assert "is not the JSON of" in read_results(made.run, [], RECORD, made.inputs.out).left_out[0]


def test_text_from_files_cannot_become_markup(made) -> None:
    assert escape("a|b\n<i> `c` *d* [e](f)") == r"a\|b &lt;i&gt; \`c\` \*d\* \[e\](f)"
    assert code("```\n\n# x\n") == "    ```\n    \n    # x"
    name = "# <script> ```\n\n| x"
    text = replace(made.inputs, options=options(name, author=name)).card()
    assert "<script>" not in re.sub(r'name = ".*"', "", text) and "\n# <" not in text
    assert r"Made by: \# &lt;script&gt; \`\`\` \| x." in text and r"# \# &lt;script&gt;" in text


def test_the_profile_of_the_task_is_that_of_the_data_card(made) -> None:
    config = made.inputs.subject.config
    card = made.root / "data" / "dataset.json"
    card.write_text(json.dumps({"arguments": {"profile": "laptop"}}))
    assert profile_of(config) == "laptop"
    card.write_text("damaged")
    assert profile_of(config) is None
