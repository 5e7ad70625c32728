"""A budget for forgetting: which weights a run exports under it, and what its certificate says, on 1 and 2 ranks."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.tokens import load_tokenizer
from eval.forgetting import TASK_TOKENS, task_prompts
from eval.general_text import CERTIFICATE, SELECTION, held_out_texts, training_texts
from eval.questions import read_questions
from model.weights import tensors_of_checkpoint
from tests.distributed.launch import ENVIRONMENT, WORKER, launch, rows, run_of, weights, write_plan
from tests.distributed.test_vocabulary import NEW, extend
from tests.in_memory import chats, texts
from tests.processes import ROOT, run_python
from tests.tiny import write_chat_file, write_tiny_model
from training.budget import TOLERANCE, Line, is_within, largest_alpha

pytestmark = pytest.mark.slow
MAX_KL = "forgetting.max_kl=0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, the same with new tokens, data and the config of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("budget")
    write_tiny_model(folder / "model", layers=1, hidden=32)
    extend(folder / "model", folder / "extended", NEW)
    (folder / "extended" / "new_tokens.json").write_text(json.dumps({"base": str(folder / "model"), "first_id": 384}))
    write_chat_file(folder / "train.jsonl", 16)
    write_chat_file(folder / "validation.jsonl", 6, seed=1)
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "model")!r}, compute_dtype="fp32"),
    data=Data(({str(folder / "train.jsonl")!r},), ({str(folder / "validation.jsonl")!r},), sequence_length=256, cache=None),
    batch=Batch(global_examples=4, micro_batch=8),
    optimizer=Optimizer(2e-2, epochs=1, warmup_steps=0),
    run=Run("base", directory={str(folder / "runs")!r}, eval_general=True, eval_every=2, save_every=2, keep_last=1, log_to=()),
)
""")
    return folder


@pytest.fixture(scope="module")
def said(folder) -> dict[str, str]:
    """The output of each launch."""
    found = {}
    two = [
        run_of(folder, "plain", "run.export=best"),
        run_of(folder, "large", "forgetting.max_kl=1e9"),
        run_of(folder, "straight", MAX_KL),
        run_of(folder, "signalled", MAX_KL, plant="signal_at_alpha:4"),
    ]
    found["two"] = launch(folder, "two", 2, two)
    assert not (folder / "runs" / "signalled" / "export").exists()
    again = [
        run_of(folder, "signalled", MAX_KL),
        run_of(folder, "signalled", MAX_KL),
        run_of(folder, "extended", MAX_KL, f"model.path={folder / 'extended'}"),
        run_of(folder, "lora", MAX_KL, "lora.rank=4"),
    ]
    found["again"] = launch(folder, "again", 2, again)
    done = run_python(WORKER, write_plan(folder, "killed", [run_of(folder, "killed", MAX_KL, plant="kill_at_alpha:4")]), **ENVIRONMENT)
    assert done.returncode and not (folder / "runs" / "killed" / "export").exists(), done.stderr
    zero = ("forgetting.max_kl=0", "forgetting.strict=True")
    one = [
        run_of(folder, "killed", MAX_KL),
        run_of(folder, "killed", "forgetting.max_kl=0"),
        run_of(folder, "killed", "forgetting.max_kl=0.1", "forgetting.strict=True"),
    ]
    found["one"] = launch(folder, "one", 0, one)
    return found


def test_x(folder, said):
    for n, t in said.items():
        print("=====", n)
        print(t)
    assert 0
