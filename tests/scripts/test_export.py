"""scripts/export.py on a run with an extended vocabulary and on a LoRA run."""

import importlib.util
import json
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from distributed.checkpoint_directory import CheckpointWriter, read_manifest, write_manifest
from distributed.process_group import process_group
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base
from model.weight_files import hash_weights
from model.weights import Weights, tensors_of_checkpoint
from scripts.export.bom import check_bom
from scripts.export.signature import verify_release
from scripts.verify.files import Differs, compare_tensors
from tests.distributed.launch import workplace
from tests.distributed.test_vocabulary import NEW, extend
from tests.forged import BESIDE_WEIGHTS
from tests.processes import ROOT, run_python
from training.checkpoint_export import Export, read_export, verify, write_export
from training.checkpointer import Record
from training.ending import sums_of
from training.identity import of_model_config

SCRIPT = ROOT / "scripts" / "export.py"


def export(*arguments: object, code: int = 0, cwd: Path = ROOT) -> str:
    done = run_python(SCRIPT, *arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """runs/trial: 4 steps, the checkpoints 2 and 4, its export; `model`, of which `base` is the extension."""
    folder = tmp_path_factory.mktemp("export")
    workplace(folder, 8, 4, optimizer="epochs=2, weight_decay=0.0", run="save_every=2, eval_every=2")
    extend(folder / "model", folder / "base", NEW)
    record = {"base": str(folder / "model"), "first_id": 384}  # of scripts/extend_vocabulary.py
    (folder / "base" / "new_tokens.json").write_text(json.dumps(record))
    done = run_python(ROOT / "train.py", folder / "config.py", f"model.path={folder / 'base'}", "run.name=trial")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_the_last_checkpoint_is_the_runs_own_export(folder) -> None:
    run, out = folder / "runs" / "trial", folder / "out" / "last"
    output = export(run, "--out", out)
    assert f"the last weights of {run} (step 4) -> {out}: " in output
    before, after = weights(run / "export"), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    same = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    for name in same:
        assert json_or_text(run / "export" / name) == json_or_text(out / name), name
    record = json.loads((out / "export.json").read_text())
    mine = json.loads((run / "export" / "export.json").read_text())
    contents = [record[key] for key in ("weights", "step", "checkpoint", "dtype")]
    assert contents == ["last", 4, mine["checkpoint"], "float32"]
    assert record["identity"] == mine["identity"] and record["files"] == sums_of(out)
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert f"error: {out} exists; remove it or choose another --out" in export(run, "--step", 2, "--out", out, code=2)
    # No test reaches the hub.
    output = export(run, "--out", pushed := folder / "out" / "pushed", "--push", "me/m", code=2)
    assert f"so {pushed} is not pushed: OfflineModeIsEnabled" in output and "HF_HUB_OFFLINE" in output


def test_gguf_is_written_beside_the_export(folder) -> None:
    run, out, converter = folder / "runs" / "trial", folder / "out" / "served", ROOT / "tests/scripts/gguf_converter.py"
    missing = export(run, "--out", out, "--gguf", folder / "none.py", code=2)
    assert f"error: {folder / 'none.py'} is not there; --gguf needs the convert_hf_to_gguf.py" in missing
    output = export(run, "--out", out, "--gguf", converter)
    served = out.with_name("served-gguf")
    assert f"1 tensors in float32 -> {served / 'served.gguf'}" in output
    modelfile = (served / "Modelfile").read_text()
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert modelfile.count("PARAMETER stop ") == len(stops) and sums_of(out).keys() == sums_of(run / "export").keys()


def test_release_is_signed_by_the_script(folder) -> None:
    pytest.importorskip("model_signing")
    from tests.scripts.test_release import new_keys  # needs the libraries

    run, out = folder / "runs" / "trial", folder / "out" / "signed"
    private, public = new_keys(folder, "release")
    output = export(run, "--out", out, "--sign", private)
    assert f"signed: {out / 'model.sig'}" in output and " FLOPs\n" in output
    assert verify_release(out, public) == []
    check_bom((out / "bom.json").read_text())


def test_export_of_other_weights_is_not_signed(folder, monkeypatch) -> None:
    out = folder / "out" / "unsigned"
    spec = importlib.util.spec_from_file_location("export_script", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "verify", lambda out, export: (False, "NOT the weights"))
    words = [SCRIPT, folder / "runs" / "trial", "--out", out, "--verify", "--sign", "no.key", "--push", "me/m"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert script.main() == 1 and not (out / "model.sig").exists()


def json_or_text(path: Path) -> object:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else text


@pytest.fixture(scope="module")
def read(folder) -> Iterator[Callable[..., Export]]:
    """`read_export` of a run with options of the command line."""
    options = {"step": None, "best": False, "dtype": "auto"}
    options |= {"merge_lora": False, "average_with_base": None}
    with process_group(device=torch.device("cpu")) as ranks:
        yield lambda run=folder / "runs" / "trial", **changes: read_export(run, Namespace(**(options | changes)), ranks)


def test_step_is_averaged_with_its_base(folder, read) -> None:
    run, out = folder / "runs" / "trial", folder / "out" / "averaged"
    output = export(run, "--step", 2, "--average-with-base", 0.25, "--dtype", "bf16", "--out", out, "--verify")
    assert "the chosen weights" in output and ", 0.25 x tuned + 0.75 x base -> " in output
    assert f"verified: transformers computes from {out} the logits of the averaged weights in bfloat16" in output
    base, tuned, averaged = weights(folder / "base"), read(step=2).weights, weights(out)
    assert not torch.equal(tuned.read("model.norm.weight"), weights(run / "export")["model.norm.weight"])
    for name, tensor in averaged.items():
        expected = (0.25 * tuned.read(name).float()).add_(base[name].float(), alpha=0.75)
        if "embed_tokens" in name:
            expected[384:] = tuned.read(name)[384:].float()
        assert torch.equal(tensor, expected.bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size == 384 + len(NEW)


@pytest.fixture(scope="module")
def verified(folder, read) -> tuple[Path, Callable[[], tuple[bool, str]]]:
    """An export of step 2 in bf16, and a function that verifies it."""
    out, exported = folder / "out" / "verified", read(step=2, dtype="bf16")
    write_export(out, exported, "")
    return out, lambda: verify(out, exported)


def test_logits_differ_by_less_than_rounding(verified) -> None:
    good, sentence = verified[1]()
    pattern = r"by at most ([\d.e-]+), where rounding explains ([\d.e-]+)$"
    differs, explained = map(float, re.findall(pattern, sentence)[0])
    assert good and differs < explained, sentence


def lose(tensors: dict) -> None:
    del tensors["model.norm.weight"]


def smallest(tensors: dict) -> None:
    """A change that no logit shows."""
    elements = tensors["model.layers.0.mlp.down_proj.weight"].view(-1)
    elements[elements.abs().argmin()] *= 1.01


@pytest.mark.parametrize("fault", [lose, smallest])
def test_export_of_other_weights_is_found(verified, fault) -> None:
    out, verification = verified
    file = out / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, {"format": "pt"})
    good, line = verification()
    file.write_bytes(whole)
    assert not good and "is NOT the weights that were trained" in line, line


@pytest.mark.parametrize("change", BESIDE_WEIGHTS)
def test_export_is_what_base_and_settings_give(change, verified, tmp_path) -> None:
    out, verification = verified
    file, do = BESIDE_WEIGHTS[change]
    whole = shutil.copytree(out, tmp_path / "whole")
    do(out)
    good, line = verification()
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    assert not good and f"runs/trial give: {file}; remove it and export again" in line, line


def write_lora_run(folder: Path, name: str = "lora") -> Path:
    """A copy of the run whose one checkpoint holds an adapter of q_proj, as a LoRA run saves it."""
    run = folder / "runs" / name
    checkpoint = run / "checkpoints" / "step-000004"
    record = json.loads((folder / "runs" / "trial" / "config.json").read_text())
    record["config"]["lora"] = {"rank": 2, "alpha": None, "dropout": 0.0, "targets": "q_proj"}
    record["config"]["model"]["path"] = str(folder / "model")
    tensors = {}
    for layer in range(2):
        module = f"model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.default.weight"] = torch.full((2, 64), 0.01)
        tensors[f"{module}.lora_B.default.weight"] = torch.full((64, 2), 0.5)
    writer = CheckpointWriter(checkpoint)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    trial = folder / "runs" / "trial" / "checkpoints" / "step-000004"
    base = {
        "the weights": hash_weights(folder / "model"),
        "config.json": of_model_config(read_model_config(str(folder / "model"))),
    }
    manifest = read_manifest(trial)
    state = manifest["state"] | {"identity": manifest["state"]["identity"] | base}
    digests = write_manifest(checkpoint, state, writer.entries(), manifest["values"])
    Record(run).append("checkpoint", step=4, **digests)
    (run / "config.json").write_text(json.dumps(record))
    return run


def test_an_adapter_is_exported_for_peft_or_merged(folder, read, monkeypatch) -> None:
    run, adapter = write_lora_run(folder), folder / "out" / "adapter"
    converter = ROOT / "tests/scripts/gguf_converter.py"
    assert "error: --gguf converts whole" in export(run, "--out", adapter, "--gguf", converter, code=2)
    assert "error: --verify is for whole weights; add --merge-lora" in export(run, "--out", adapter, "--verify", code=2)
    output = export(run, "--out", adapter)
    assert ", an adapter -> " in output
    file, checkpoint = adapter / "adapter_model.safetensors", run / "checkpoints" / "step-000004"
    entry, start = Record(run).read()[-1], json.loads((run / "config.json").read_text()) | {"directory": str(ROOT)}
    written = json.loads((adapter / "export.json").read_text())
    assert "with the adapter of their" in compare_tensors(run, adapter, written, start, entry)
    weights_of_adapter, alpha = load_file(file), adapter / "adapter_config.json"
    save_file({name: tensor + 0.1 for name, tensor in weights_of_adapter.items()}, file, {"format": "pt"})
    with pytest.raises(Differs, match=f"adapter_model.safetensors is not what {checkpoint} gives, of which entry 2"):
        compare_tensors(run, adapter, written, start, entry)
    save_file(weights_of_adapter, file, {"format": "pt"})
    whole = alpha.read_text()
    for change in ('"lora_alpha": 4.0', '"lora_alpha": 9.0'), (str(folder / "model"), str(folder / "base")):
        alpha.write_text(whole.replace(*change))
        with pytest.raises(Differs, match=f"adapter_config.json is not what {checkpoint} gives, of which entry 2"):
            compare_tensors(run, adapter, written, start, entry)
    alpha.write_text(whole)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (2, 4.0, ["q_proj"])
    card = (adapter / "README.md").read_text()
    assert json.loads((adapter / "base.json").read_text())["files"] == hash_weights(folder / "model")
    assert f"base_model_fingerprint: {fingerprint_of_base(folder / 'model')}" in card
    assert "library_name: peft" in card and "`generation_config.json` of the base model" in card
    record = json.loads((run / "config.json").read_text())
    record["config"]["model"] |= {"rope_type": "yarn", "rope_factor": 2.0}
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"was trained with another config.json or RoPE .*\(max_position_embeddings, rope_"
    ):
        read(run)
    with monkeypatch.context() as patched:  # as if it were trained so
        patched.setattr("training.checkpoint_export.of_model_config", lambda config: {})
        with pytest.raises(UserError, match="has an adapter: its RoPE, .* needs --merge-lora"):
            read(run)
        assert read(run, merge_lora=True).model_config.rope_parameters["rope_type"] == "yarn"
    record["config"]["model"] |= {"rope_type": None, "rope_factor": None}
    (run / "config.json").write_text(json.dumps(record))
    merged = read(run, merge_lora=True, average_with_base=0.5)
    assert merged.contents["kind"] == "merged" and merged.adapter is None
    name = "model.layers.1.self_attn.q_proj.weight"
    base, change = weights(folder / "model"), 2.0 * 2 * 0.01 * 0.5  # alpha / r = 2; B @ A sums two products
    assert torch.allclose(merged.weights.read(name), base[name] + 0.5 * change, atol=1e-6)
    assert torch.equal(merged.weights.read("model.norm.weight"), base["model.norm.weight"])


def test_export_mistakes_are_one_sentence(folder, read) -> None:
    run = folder / "runs" / "trial"
    best = json.loads((run / "checkpoints" / "step-000004" / "manifest.json").read_text())["state"]["best_step"]
    assert (read(best=True).contents["weights"], read(best=True).contents["step"]) == ("best", best)
    mistakes = {
        "has no checkpoint of step 3; name a step with --step: 2, 4": (run, {"step": 3}),
        "trial/export is not the directory of a run": (run / "export", {}),
        "must be from 0": (run, {"average_with_base": 1.5}),
        "not an adapter; leave out --merge-lora": (run, {"merge_lora": True}),
        "needs --merge-lora": (write_lora_run(folder, "adapter"), {"average_with_base": 0.5}),
    }
    for sentence, (directory, options) in mistakes.items():
        with pytest.raises(UserError, match=sentence):
            read(directory, **options)
    planted = write_lora_run(folder, "planted")
    (planted / "record.jsonl").unlink()
    with pytest.raises(UserError, match="planted/record.jsonl has no entry about the checkpoint of step 4 as it is"):
        read(planted)


def test_unreadable_own_export_leaves_nothing(folder, tmp_path) -> None:
    run, out = Path(shutil.copytree(folder / "runs" / "trial", tmp_path / "trial")), tmp_path / "out"
    contents = run / "export" / "export.json"
    contents.write_text(json.dumps(json.loads(contents.read_text()) | {"format": 0}))
    entries = len(Record(run).read())
    assert f"error: {contents} has format 0, and this version" in export(run, "--out", out, code=2)
    assert not out.exists() and len(Record(run).read()) == entries


def test_another_base_is_refused(folder, read, tmp_path, monkeypatch) -> None:
    moved = Path(shutil.copytree(folder / "runs" / "trial", tmp_path / "trial"))
    start = json.loads((moved / "config.json").read_text())
    start["config"]["model"]["path"] = str(base := tmp_path / "base")
    (moved / "config.json").write_text(json.dumps(start))
    with pytest.raises(UserError, match=f"the base model of {moved}, {base}, is not there; put it there"):
        read(moved)
    shutil.copytree(folder / "base", base)
    file, settings = base / "config.json", (base / "config.json").read_text()
    file.write_text(json.dumps(json.loads(settings) | {"rms_norm_eps": 0.01}))
    with pytest.raises(UserError, match=r"another config.json or RoPE than .*base .*\(rms_norm_eps\)"):
        read(moved)
    file.write_text(settings)

    def without_norm(checkpoint: Path, prefix: str = "model.") -> Weights:
        tensors = tensors_of_checkpoint(checkpoint, prefix)
        return Weights(
            {name: shape for name, shape in tensors.shapes.items() if name != "model.norm.weight"}, tensors.read
        )

    monkeypatch.setattr("model.weights.tensors_of_checkpoint", without_norm)  # as if an edited loop had frozen it
    assert torch.equal(read(moved).weights.read("model.norm.weight"), weights(base)["model.norm.weight"])
    save_file({name: tensor + 1 for name, tensor in weights(base).items()}, base / "model.safetensors")
    for options in ({}, {"average_with_base": 0.5}):
        with pytest.raises(UserError, match=f"the weights in {base} are not those that .*trial was started from"):
            read(moved, **options)
