"""scripts/plan.py as a user starts it: with a config whose model has no weights, with a size, and with mistakes."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import scripts.plan.planner
from common.errors import exit_code_of
from configs.load import load_config
from model.memory import ModelShape
from scripts.plan.command import main
from scripts.plan.machines import cluster_of
from scripts.plan.planner import assumed_subject, read_subject
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model

WORKER = Path(__file__).parents[1] / "dry_run_worker.py"
CONFIG = """
from configs.config import *
config = Config(
    Model("model", activation_checkpointing="full"),
    Data(("train.jsonl",), sequence_length=256, cache=None),
    Batch(global_examples=8),
    Optimizer(1e-4, epochs=2),
    Run("r"),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, its data, a model directory without weights, and one with large matrices, few layers and no tokenizer."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.py").write_text(CONFIG)
    write_chat_file(folder / "train.jsonl", 20)
    write_tiny_model(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2, "num_attention_heads": 32}
    LlamaConfig(**sizes, max_position_embeddings=4096, vocab_size=32000).save_pretrained(folder / "wide")
    return folder


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelShape]:
    """By path: all plans of a model are of one shape, so each finds the activations that an earlier one has counted."""
    return {}


@pytest.fixture
def plan(folder, shapes, monkeypatch, capsys):
    """Run the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(scripts.plan.planner, "MEMORIES", ("16N", "8N"))  # a third of the settings
    monkeypatch.setattr(scripts.plan.planner, "CHECKPOINTING", (("none", 1), ("full", 1), ("offload", 1)))
    shape_of = scripts.plan.planner._shape

    def shape_once(config, model_config) -> ModelShape:
        if config.model.path not in shapes:
            shapes[config.model.path] = shape_of(config, model_config)
        return shapes[config.model.path]

    monkeypatch.setattr(scripts.plan.planner, "_shape", shape_once)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        code = exit_code_of(main)
        return code, *capsys.readouterr()

    return run


def test_a_config_is_planned_from_its_own_data(plan, folder) -> None:
    arguments = ("config.py", "--gpus", "4", "--gpu", "A100-40", "--json", "plan.json")
    code, out, err = plan(*arguments, "batch.micro_batch=2")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    written = json.loads((folder / "plan.json").read_text())
    workload = written["workload"]
    assert workload["total_steps"] == 6 and [step["step"] for step in workload["steps"]] == list(range(6))
    worst = workload["worst"]
    line = f"{sum(worst['lengths'])} tokens in {len(worst['lengths'])} documents, {worst['targets']} targets"
    said = " ".join(out.split())  # lines may break anywhere
    assert f"{line}: step {worst['step'] + 1}, rank {worst['rank']} (all steps looked at)" in said
    own = written["own"]
    terms = dict(own["memory"])
    assert terms.pop("total") == sum(terms.values()) <= written["cluster"]["device"]["memory"] and own["fits"]
    for name, size in terms.items():
        assert (re.search(rf"^  {name} +{size / 2**30:.1f}  ", out, re.MULTILINE) is not None) == (size > 0)
    assert f"a checkpoint {written['disk']['checkpoint'] / 2**30:.1f} GiB" in said
    for setting in written["settings"]:
        assert setting["fits"] == (setting["fits_device"] and setting["fits_host"]) == (setting["speed"] is not None)
        assert setting["fits_device"] == (setting["memory"]["total"] <= written["cluster"]["device"]["memory"])


WIDE = ("--model", "wide", "--sequence", "512", "--gpus", "1", "--json", "wide.json")  # 0.7B parameters


def test_pasted_lines_give_a_setting_that_fits(plan, folder) -> None:
    def tight(*more: str) -> tuple[str, dict]:
        code, out, err = plan(*WIDE, "--gpu-memory", "15", *more)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 100
        return out, json.loads((folder / "wide.json").read_text())

    # 12 x 512 tokens without checkpointing do not fit beside 16 bytes for each parameter.
    own = ("--micro-batch", "12", "model.activation_checkpointing=none")
    out, written = tight(*own)
    assert "does not fit" in out and "Your settings do not fit. The cheapest that do:" in out
    assert not written["own"]["fits"]
    proposed = written["proposals"]["cheapest"]
    assert " ".join(proposed["overrides"]) in " ".join(out.split())
    assert "optimizer.memory" not in str(proposed["overrides"])
    again, found = tight(*own, *proposed["overrides"], "--all")
    assert "Your settings fit" in again and found["own"]["memory"] == proposed["memory"]
    # --all lists every setting.
    row = r"^  \S.*? {2,}\d+N +\S+ +\d+ +\d+ +[\d.,]+ +[\d.,]+ .*  (yes|no|no \(host\))$"
    rows = re.findall(row, again, re.MULTILINE)
    assert len(rows) == len(found["settings"]) >= 2 * 2 * 3
    assert rows.count("yes") == sum(setting["fits"] for setting in found["settings"])


def test_nothing_fits(plan, folder) -> None:
    code, out, _ = plan(*WIDE, "--gpu-memory", "4", "--host-memory", "2")
    written = json.loads((folder / "wide.json").read_text())
    assert code == 0 and "No setting fits" in out and written["proposals"]["cheapest"] is None
    devices = written["nearest"]["devices"]
    assert (f"It would fit on {devices} GPUs of this kind." in out) == (devices is not None)
    assert ("Not even 64 times as many" in out) == (devices is None)


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        ([], "name a config, e.g. configs/xbrl.py, or a model"),
        (["--model", "8B", "--sequence", "131073"], "data.sequence_length=131073 exceeds the 131072 positions of 8B"),
        (["--model", "model", "model.rope_factor=2"], "rope_factor and rope_original_length need a rope_type"),
        (["config.py", "--json", "missing/x.json"], "--json missing/x.json: its directory does not exist"),
        (["config.py", "--gpus", "0"], "--gpus 0 must be above 0"),
        (["--model", "8B", "--sequence", "32k"], "--sequence must be a whole number in digits, not 32k"),
        (["--model", "8B", "--gpu-memory", "24GB"], "--gpu-memory must be a number in digits, not 24GB"),
        (["config.py", "--gpus", "8", "--nodes", "3"], "8 GPUs cannot be spread evenly over 3 nodes"),
        (["config.py", "--gpu", "H10"], "did you mean H100"),
        (["config.py", "--host-memory", "nan"], "--host-memory nan must be above 0"),
        (["config.py", "--gpus", "8", "--network", "8x4000"], "no network named 8x4000 is known (did you mean 8x400?)"),
        (["config.py", "--sequence", "512"], "--sequence goes with --model"),
        (["--model", "8B", "--here"], "--here go with a config, not with --model"),
        (["--model", "8B", "--against", "runs/a"], "--against and --here go with a config"),
        (["--model", "8B", "--deepspeed", "ds.json"], "--deepspeed, --against and --here go with a config"),
        (["nothing.py"], "config file nothing.py does not exist"),
        (["config.py", "optimizer.memry=12N"], "did you mean optimizer.memory?"),
        (["config.py", "model.path=elsewhere"], "or plan without it: scripts/plan.py --model"),
        (["config.py", "sharding.strategy=hybrid", "sharding.shard_size=3"], "8 ranks cannot be divided into groups"),
        (["--model", "9B"], "9B is neither a model directory, nor an id on the hub (ORG/NAME), nor one of"),
        (["--model", "7B", "--length", "9999"], "--length 9999 is longer than --sequence 4096"),
        (["--model", "7B", "batch.global_examples=none", "batch.global_tokens=9"], "set --global-examples"),
        (["--model", "organisation/model"], "its config.json cannot be fetched, because the Hugging Face hub"),
    ],
)
def test_a_mistake_is_one_sentence(plan, monkeypatch, arguments, sentence) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = plan(*arguments)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_names_of_sizes_in_lower_case_and_directories_without_data(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    cluster = cluster_of(2, 1, "A100-80")
    lower, upper = (assumed_subject(name, [], cluster).shape.num_parameters for name in ("7b", "7B"))
    assert lower == upper
    subject = assumed_subject("model", [], cluster, sequence=256, length=100)
    assert subject.workload_of(1, 1).worst.lengths == (100, 100)


def test_the_disk_of_a_run_that_anchors_has_what_the_base_predicts(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config("config.py", ["data.mix=base:0.5:anchor:train.jsonl"])
    assert read_subject(config, cluster_of(1, 1, "A100-80")).anchor > 20 * 386  # bytes of a target


@pytest.mark.slow
def test_a_dry_run_of_train_is_the_plan_of_this_machine_and_leaves_no_run(folder) -> None:
    arguments = (folder / "config.py", "--dry-run", "--json", folder / "here.json", "optimizer.epochs=3")
    done = run_python(WORKER, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "here.json").read_text())
    assert written["workload"]["total_steps"] == 9 and written["cluster"]["device"]["kind"] == "cpu"
    assert written["own"]["fits"] and "1 x CPU" in done.stdout and "a process holds" in done.stdout
    assert not (folder / "runs").exists()


def test_a_run_is_compared_on_the_machine_that_its_record_names(plan, folder) -> None:
    run = folder / "done"
    run.mkdir(exist_ok=True)
    record = {"world_size": 2, "devices": [{"host": "a", "device": "NVIDIA L4", "ranks": [0, 1]}]}
    (run / "config.json").write_text(json.dumps(record))
    rows = [
        {"step": step, "train/tokens": 100 * step, "train/tokens_per_second": 50.0, "train/memory_gib": 0.5}
        for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = plan("config.py", "--against", str(run))
    assert code == 0, err
    assert re.fullmatch(
        r"planned against measured \(2 steps\): peak memory 0.0 and 0.5 GiB \(-\d+%\); [\d,]+ to [\d,]+ and 50 tokens/s, "
        r"outside of the range\n",
        out,
    )
    (run / "metrics.jsonl").unlink()
    code, _, err = plan("config.py", "--against", str(run))
    assert code == 2 and "metrics.jsonl has 0 rows of steps" in err and err.count("\n") == 1
