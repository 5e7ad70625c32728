"""scripts/plan.py as a user starts it: a config whose model has no weights, the size of a model, and mistakes."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import scripts.plan.command
import scripts.plan.search
import scripts.plan.subject
from common.errors import exit_code_of
from configs.load import load_config
from model.memory import ModelShape
from scripts.plan.command import main
from scripts.plan.machines import cluster_of
from scripts.plan.planner import Plan
from scripts.plan.search import SearchResult, search
from scripts.plan.subject import assumed_subject, read_subject
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
    """Write a config, its data, a model without weights ("model"), and a wide model of two layers without tokenizer ("wide")."""
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
    """By path: plans of one model share its shape, so that each finds the activations that an earlier one has counted."""
    return {}


@pytest.fixture
def results(monkeypatch) -> list[SearchResult]:
    """Collect the results of the searches behind the printed plans."""
    results: list[SearchResult] = []
    monkeypatch.setattr(scripts.plan.command, "search", lambda subject: results.append(search(subject)) or results[-1])
    return results


@pytest.fixture
def plan(folder, shapes, monkeypatch, capsys):
    """Run the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(scripts.plan.search, "MEMORIES", ("16N", "8N"))  # a third of the settings
    monkeypatch.setattr(scripts.plan.search, "CHECKPOINTING", (("none", 1), ("full", 1), ("offload", 1)))
    shape_of = scripts.plan.subject._shape

    def shape_once(config, model_config) -> ModelShape:
        key = f"{config.model.path}, rank {config.lora.rank}"
        if key not in shapes:
            shapes[key] = shape_of(config, model_config)
        return shapes[key]

    monkeypatch.setattr(scripts.plan.subject, "_shape", shape_once)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        code = exit_code_of(main)
        return code, *capsys.readouterr()

    return run


def test_config_is_planned_from_its_data(plan, results) -> None:
    code, out, err = plan("config.py", "--gpus", "4", "--gpu", "A100-40", "batch.micro_batch=2")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    (result,) = results
    own, workload = result.own, result.own.workload
    assert workload.total_steps == 6 and [step.step for step in workload.steps] == list(range(6))
    worst = workload.worst
    line = f"{worst.tokens} tokens in {len(worst.lengths)} documents, {worst.targets} targets"
    text = " ".join(out.split())  # lines may break anywhere
    assert f"{line}: step {worst.step + 1}, rank {worst.rank} (all steps looked at)" in text
    available = own.cluster.device.memory
    assert own.memory.total == sum(vars(own.memory).values()) <= available and own.fits
    for name, size in vars(own.memory).items():
        assert (re.search(rf"^  {name} +{size / 2**30:.1f}  ", out, re.MULTILINE) is not None) == (size > 0)
    assert f"a checkpoint {own.disk['checkpoint'] / 2**30:.1f} GiB" in text
    for setting in result.plans:
        assert setting.fits == (setting.memory.total <= available) == (setting.rate > 0)


def test_deepspeed_changes_are_printed(plan, folder) -> None:
    file = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "steps_per_print": 10}
    (folder / "ds.json").write_text(json.dumps(file))
    code, out, err = plan("config.py", "--gpus", "1", "--deepspeed", "ds.json", "optimizer.epochs=1")
    assert code == 0, err
    lines = out.splitlines()[:4]
    assert lines[0] == "deepspeed: sharding.strategy: full -> grad_op (zero_optimization.stage=2)"
    assert "deepspeed: optimizer.max_grad_norm: 1.0 -> 0.5 (gradient_clipping=0.5)" in lines
    assert "deepspeed: ignored, because the result does not depend on it: steps_per_print" in out
    assert "deepspeed: applied last, from the command line: optimizer.epochs=1" in out


WIDE = ("--model", "wide", "--sequence", "512", "--gpus", "1")  # 0.7B parameters


def test_pasted_lines_give_a_setting_that_fits(plan, results) -> None:
    def tight(*more: str) -> tuple[str, SearchResult]:
        code, out, err = plan(*WIDE, "--gpu-memory", "15", *more)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 100
        return out, results[-1]

    # 12 x 512 tokens without checkpointing do not fit beside 16 bytes for each parameter.
    own = ("batch.micro_batch=12", "model.activation_checkpointing=none")
    out, result = tight(*own)
    assert "does not fit" in out and "Your settings do not fit. The cheapest that do:" in out
    assert not result.own.fits
    proposed = result.cheapest
    assert isinstance(proposed, Plan) and " ".join(proposed.overrides) in " ".join(out.split())
    assert "optimizer.memory" not in str(proposed.overrides)
    again, pasted = tight(*own, *proposed.overrides, "--all")
    assert "Your settings fit" in again and pasted.own.memory == proposed.memory
    # --all lists every setting.
    row = r"^  \S.*? {2,}\d+N +\S+ +\d+ +\d+ +[\d.,]+ +[\d.,]+ .*  (yes|no)$"
    rows = re.findall(row, again, re.MULTILINE)
    assert len(rows) == len(pasted.plans) >= 2 * 3 and " + offload" not in again
    assert rows.count("yes") == sum(setting.fits for setting in pasted.plans)


def test_lora_and_smaller_model_replace_full_training(plan, results) -> None:
    code, out, err = plan(*WIDE, "--gpu-memory", "4")
    (result,) = results
    assert code == 0, err
    assert result.cheapest and result.cheapest.config.sharding.cpu_offload and " + offload" in out
    commands = " ".join(out.split())
    assert "python train.py CONFIG lora.rank=64 optimizer.learning_rate=auto" in commands
    assert "python scripts/fetch_base_model.py HuggingFaceTB/SmolLM2-135M" in out
    assert "python train.py CONFIG model.path=artifacts/models/SmolLM2-135M" in commands
    assert result.lora and result.lora.fits and not result.lora.config.sharding.cpu_offload


def test_nothing_fits(plan, results) -> None:
    code, out, _ = plan(*WIDE, "--gpu-memory", "1")
    (result,) = results
    assert code == 0 and "No setting fits" in out and result.cheapest is None
    assert "LoRA (lora.rank=64) needs " in out and "GiB per GPU and does not fit either" in out
    assert (f"It would fit on {result.devices} GPUs of this kind." in out) == (result.devices is not None)
    assert ("Not even 64 times as many" in out) == (result.devices is None)


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        ([], "name a config, e.g. configs/quickstart.py, or a model"),
        (["--model", "8B", "--sequence", "131073"], "data.sequence_length=131073 exceeds the 131072 positions of 8B"),
        (["--model", "model", "model.rope_factor=2"], "rope_factor and rope_original_length need a rope_type"),
        (["--model", "8B", "configs/lora.py"], "with --model, write settings such as lora.rank=64"),
        (["config.py", "--gpus", "0"], "--gpus must be 1 or more, not 0"),
        (["--model", "8B", "--sequence", "32k"], "--sequence must be a whole number in digits, not 32k"),
        (["--model", "8B", "--gpu-memory", "24GB"], "--gpu-memory must be a number in digits, not 24GB"),
        (["config.py", "--gpus", "8", "--nodes", "3"], "8 GPUs cannot be spread evenly over 3 nodes"),
        (["config.py", "--gpu", "H10"], "did you mean H100"),
        (["config.py", "--gpu-memory", "nan"], "--gpu-memory must be 1 or more, not nan"),
        (["config.py", "--network", "HDR"], "--network must be a number in digits, not HDR"),
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
def test_mistake_is_one_sentence(plan, monkeypatch, arguments, sentence) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = plan(*arguments)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_sizes_in_lower_case_and_models_without_data(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    cluster = cluster_of(2, 1, "A100-80")
    lower, upper = (assumed_subject(name, [], cluster).shape.num_parameters for name in ("7b", "7B"))
    assert lower == upper
    subject = assumed_subject("model", [], cluster, sequence=256, length=100)
    assert subject.workload_of(1, 1).worst.lengths == (100, 100)


def test_disk_includes_the_predictions_of_the_base(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config("config.py", ["data.mix=base:0.5:anchor:train.jsonl"])
    assert read_subject(config, cluster_of(1, 1, "A100-80")).anchor > 20 * 386  # bytes of a target


@pytest.mark.slow
def test_dry_run_plans_for_this_machine(folder) -> None:
    done = run_python(WORKER, folder / "config.py", "--dry-run", "optimizer.epochs=3", cwd=folder)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "plan 9 steps of" in text and "1 x CPU on 1 node" in text
    assert "a process holds" in text and ": fits" in text and "Your settings fit" in text
    assert not (folder / "runs").exists()


def test_run_is_compared_on_its_own_machine(plan, folder) -> None:
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
