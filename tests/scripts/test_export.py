"""scripts/export.py on a run with an extended vocabulary and on model directories."""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distributed.checkpoint_directory import checksums, write_manifest
from distributed.process_group import process_group
from tests.distributed.test_vocabulary import NEW, extend
from tests.processes import ROOT, run_python
from tests.tiny import write_chat_file, write_tiny_model
from training.export import final_weights, read_subject, record_of, verify, write_export
from training.model_card import base_model

SCRIPT = ROOT / "scripts" / "export.py"


def export(*arguments: object, code: int = 0, cwd: Path = ROOT) -> str:
    done = run_python(SCRIPT, *arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """runs/trial: 4 steps, the checkpoints 2 and 4, its export; `model`, of which `base` is the extension."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny_model(folder / "model")
    extend(folder / "model", folder / "base", NEW)
    record = {"base": str(folder / "model"), "first_id": 384}  # of scripts/extend_vocabulary.py
    (folder / "base" / "new_tokens.json").write_text(json.dumps(record))
    write_chat_file(folder / "train.jsonl", 8)
    write_chat_file(folder / "validation.jsonl", 4, seed=1)
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "base")!r}, compute_dtype="fp32"),
    data=Data(({str(folder / "train.jsonl")!r},), ({str(folder / "validation.jsonl")!r},), sequence_length=256, cache=None),
    batch=Batch(global_examples=4),
    optimizer=Optimizer(1e-3, epochs=2, warmup_steps=0, weight_decay=0.0),
    run=Run("trial", directory={str(folder / "runs")!r}, save_every=2, eval_every=2),
)
""")
    done = run_python(ROOT / "train.py", folder / "config.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_the_last_checkpoint_is_the_runs_own_export(folder) -> None:
    run, out = folder / "runs" / "trial", folder / "out" / "last"
    card = folder / "dataset.json"  # of scripts/make_reports.py
    card.write_text(json.dumps({"arguments": {"profile": "laptop"}}))
    said = export(run, "--out", out)
    card.unlink()  # which makes it no other export
    assert f"the last weights of {run} (step 4) -> {out}: " in said
    before, after = weights(run / "export"), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    same = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    for name in same:
        assert json_or_text(run / "export" / name) == json_or_text(out / name), name
    record = json.loads((out / "export.json").read_text())
    mine = json.loads((run / "export" / "export.json").read_text())
    assert [record[key] for key in ("weights", "step", "checkpoint", "dtype")] == [
        "last",
        4,
        mine["checkpoint"],
        "float32",
    ]
    assert record["profile"] == "laptop"
    assert f"{out} already holds the last weights" in export(run, "--out", out)
    said = export(run, "--step", 2, "--out", out, code=2)
    assert f"error: {out} is an export of other weights; remove it, or name another directory with --out" in said
    (out / "model.safetensors").write_bytes(b"cut")
    assert "is a damaged export of these weights" in export(run, "--out", out, code=2)


def test_the_best_step_is_exported(folder) -> None:
    run = folder / "runs" / "trial"
    best = json.loads((run / "checkpoints" / "step-000004" / "manifest.json").read_text())["state"]["best_step"]
    assert f"the best weights of {run} (step {best})" in export(run, "--best", "--out", folder / "out" / "best")


def json_or_text(path: Path) -> object:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else text


def test_a_step_is_averaged_with_its_base_in_another_dtype(folder) -> None:
    run = folder / "runs" / "trial"
    said = export(run, "--step", 2, "--average-with-base", 0.25, "--dtype", "bf16")
    out = run / "export-step-000002-bfloat16-average-0.25"
    assert "the chosen weights" in said and not (run / f"{out.name}.tmp").exists()
    exact = folder / "out" / "step2"
    export(run, "--step", 2, "--out", exact)
    base, tuned, averaged = weights(folder / "base"), weights(exact), weights(out)
    assert not torch.equal(tuned["model.norm.weight"], weights(run / "export")["model.norm.weight"])
    for name, tensor in averaged.items():
        expected = 0.75 * base[name].float() + 0.25 * tuned[name].float()
        if "embed_tokens" in name:
            expected[384:] = tuned[name][384:].float()
        assert torch.equal(tensor, expected.bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size == 384 + len(NEW)


def test_a_model_directory_is_averaged_with_a_base_of_fewer_tokens(folder) -> None:
    tuned, out = folder / "runs" / "trial" / "export", folder / "out" / "directory"
    said = export(tuned, "--base", folder / "model", "--average-with-base", 0.5, "--out", out, "--verify")
    assert f"verified: transformers computes from {out} the logits of the averaged weights in float32" in said
    assert "the same most probable token at 100.0%" in said
    name = "model.embed_tokens.weight"
    old, new, mixed = (weights(path)[name].float() for path in (folder / "model", tuned, out))
    assert torch.allclose(mixed[:384], 0.5 * old + 0.5 * new[:384], atol=1e-7)
    assert torch.equal(mixed[384:], new[384:])


@pytest.fixture(scope="module")
def verified(folder) -> Iterator[tuple[Path, Callable[[], tuple[bool, list[str]]]]]:
    """An export of step 2 in bf16, and its verification."""
    out = folder / "out" / "verified"
    options = Namespace(step=2, best=False, base=None, merge_lora=False, average_with_base=None, dtype="bf16")
    with process_group(device=torch.device("cpu")) as ranks:
        subject = read_subject(folder / "runs" / "trial", options, ranks)
        weights, record = final_weights(subject, options), record_of(subject, options)
        write_export(out, subject, weights, record, base_model(None), "")
        yield out, lambda: verify(out, subject, weights, record)


def test_what_rounding_costs_is_said(verified) -> None:
    good, lines = verified[1]()
    assert good
    differs, explained = map(
        float, re.findall(r"by at most ([\d.e-]+), where rounding explains ([\d.e-]+)$", lines[0])[0]
    )
    pattern = r"by at most ([\d.e-]+), computing in bfloat16 as well by ([\d.e-]+); then KL ([\d.e-]+)"
    of_weights, as_served, kl = map(float, re.findall(pattern, lines[1])[0])
    assert differs < explained < of_weights / 10 and of_weights < as_served < 0.1 and 0 < kl < 1e-3, lines


def scale(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01


def swap(tensors: dict) -> None:
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def transpose(tensors: dict) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


def lose(tensors: dict) -> None:
    del tensors["model.norm.weight"]


def one_row(tensors: dict) -> None:
    """The embedding of one token, which no text may contain, is that of the base."""
    tensors["model.embed_tokens.weight"][301] = 0.5


@pytest.mark.parametrize("fault", [scale, swap, transpose, lose, one_row])
def test_an_export_of_other_weights_is_found(verified, fault) -> None:
    out, verification = verified
    file = out / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, {"format": "pt"})
    good, (line,) = verification()
    file.write_bytes(whole)
    expected = "finds 1 tensors missing" if fault is lose else "is NOT the weights that were trained"
    assert not good and expected in line, line


SETTINGS = {
    "tied head": {"tie_word_embeddings": False},
    "epsilon": {"rms_norm_eps": 0.1},
    "frequencies": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_export_with_another_architecture_is_found(verified, setting) -> None:
    out, verification = verified
    whole = (out / "config.json").read_bytes()
    (out / "config.json").write_text(json.dumps(json.loads(whole) | SETTINGS[setting]))
    good, (line,) = verification()
    (out / "config.json").write_bytes(whole)
    assert not good and ("lm_head" if setting == "tied head" else "is NOT the weights that were trained") in line, line


def write_lora_run(folder: Path) -> Path:
    """A copy of the run whose one checkpoint holds an adapter of q_proj, as a LoRA run saves it."""
    run = folder / "runs" / "lora"
    checkpoint = run / "checkpoints" / "step-000004"
    record = json.loads((folder / "runs" / "trial" / "config.json").read_text())
    record["config"]["lora"] = {"rank": 2, "alpha": None, "dropout": 0.0, "targets": "q_proj"}
    record["config"]["model"]["path"] = str(folder / "model")
    tensors = {}
    for layer in range(2):
        name = f"model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.default.weight"] = torch.full((2, 64), 0.01)
        tensors[f"{name}.lora_B.default.weight"] = torch.full((64, 2), 0.5)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    write_manifest(checkpoint, {"step": 4}, checksums(sorted(checkpoint.iterdir())))
    (run / "config.json").write_text(json.dumps(record))
    return run


def test_an_adapter_is_exported_for_peft_or_merged(folder) -> None:
    run, adapter, merged = write_lora_run(folder), folder / "out" / "adapter", folder / "out" / "merged"
    said = export(run, "--out", adapter, "--verify")
    assert "an adapter" in said and f"verified: transformers computes from {adapter} the logits of the trained" in said
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "is NOT the weights that were trained" in export(run, "--out", adapter, "--verify", code=1)
    file.write_bytes(whole)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (2, 4.0, ["q_proj"])
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card and "`generation_config.json` of the base model" in card
    assert f"evaluate.py '{run}/export'" in card or f"evaluate.py {run}/export" in card  # the scripts load no adapter
    assert ", 0.5 x tuned + 0.5 x base -> " in export(run, "--merge-lora", "--average-with-base", 0.5, "--out", merged)
    name = "model.layers.1.self_attn.q_proj.weight"
    base, after = weights(folder / "model"), weights(merged)
    change = 2.0 * 2 * 0.01 * 0.5  # alpha / r = 2; each element of B @ A is the sum of two products
    assert torch.allclose(after[name], base[name] + 0.5 * change, atol=1e-6)
    assert torch.equal(after["model.norm.weight"], base["model.norm.weight"])
    assert "needs --merge-lora" in export(run, "--average-with-base", 0.5, code=2)
    assert "not an adapter; leave out --merge-lora" in export(folder / "runs" / "trial", "--merge-lora", code=2)


def test_mistakes_end_in_one_sentence(folder, tmp_path) -> None:
    run = folder / "runs" / "trial"
    assert "has no checkpoint of step 3; those that it has: 2, 4" in export(run, "--step", 3, code=2)
    assert "neither the directory of a run nor that of a model" in export(tmp_path, code=2)
    for name in ("eval", "checkpoints/step-000009", "../trial/tensorboard/x"):
        assert "lies where the run keeps its own " in export(run, "--out", run / name, code=2)
        assert not (run / name).exists()
    assert "is not the directory of a run, so it has no steps" in export(run / "export", "--step", 2, code=2)
    plain = [folder / "model", "--out", tmp_path / "out", "--average-with-base", 0.5]
    assert "the base model of" in export(*plain, code=2)
    write_tiny_model(tmp_path / "wide", hidden=32)
    assert "in the tuned model: they cannot be averaged" in export(*plain, "--base", tmp_path / "wide", code=2)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
