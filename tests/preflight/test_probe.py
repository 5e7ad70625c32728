"""The program that checks: its file of results, and what it says about a config that cannot be read."""

import json

import torch

from preflight.layers import cut_model
from preflight.probe import main
from tests.preflight.tiny_run import tiny_config


def probe(tmp_path, monkeypatch, *arguments: object) -> dict:
    config = tiny_config(tmp_path, {"train": ("train.jsonl",), "validation": ("validation.jsonl",)})
    file = tmp_path / "run.py"
    monkeypatch.setattr("preflight.probe.choose_device", lambda rank, ranks: torch.device("cpu"))  # sets no threads
    monkeypatch.setattr("preflight.probe.keep_freed_memory", lambda: None)
    monkeypatch.setattr("preflight.probe.without_launcher", lambda: None)
    names = ("Batch", "Config", "Data", "EWC", "Eval", "LoRA", "Model", "Optimizer", "Run", "Sharding")
    file.write_text(f"from configs.config import {', '.join(names)}\nconfig = {config!r}\n", encoding="utf-8")
    out = tmp_path / "results.json"
    train = f"data.train={tmp_path / 'train.jsonl'}"
    validation = f"data.validation={tmp_path / 'validation.jsonl'}"
    monkeypatch.setattr("sys.argv", ["probe.py", "--out", str(out), str(file), train, validation, *map(str, arguments)])
    assert main() == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_it_writes_results_and_reference(tmp_path, monkeypatch) -> None:
    found = probe(tmp_path, monkeypatch, "--world-size", "2")
    assert {result["group"] for result in found["results"]} == {"data", "model", "precision"}
    assert {result["status"] for result in found["results"]} == {"ok"}, found["results"]
    assert len(found["results"]) == 18
    reference = found["reference"]
    assert reference["complete"] and reference["documents"] == 6 and reference["grad_norm"] > 0
    cut_model(tmp_path / "model", 1, tmp_path / "cut")
    shallow = probe(tmp_path, monkeypatch, "--layers-model", tmp_path / "cut")
    assert "the first 1 of 2 decoder layers" in next(r["text"] for r in shallow["results"] if r["name"] == "layers")
    assert shallow["reference"]["loss"] != reference["loss"]
    missing = probe(tmp_path, monkeypatch, f"data.train={tmp_path / 'missing.jsonl'}")
    (line,) = missing["results"]
    assert (line["group"], line["name"], line["status"]) == ("data", "inputs", "fails") and "missing.jsonl" in line[
        "text"
    ]
    assert missing["reference"] is None
