"""A tiny run with everything that a resume must restore: a mixture, EWC, validation, a save after every second step."""

import json
import random
from pathlib import Path

from tests.tiny import write_tiny_model

CONFIG = """\
from configs.config import EWC, Batch, Config, Data, Model, Optimizer, Run, Source

config = Config(
    model=Model(path="{0}/model", compute_dtype="fp32"),
    data=Data(
        train=("{0}/train.jsonl",),
        validation=("{0}/validation.jsonl",),
        mix=(Source("general", ("{0}/general.jsonl",), 0.2, ("{0}/general-validation.jsonl",)),),
        sequence_length=128,
        cache="{0}/tokens",
    ),
    batch=Batch(global_examples=4, micro_batch=1),  # 120 examples are 30 steps
    optimizer=Optimizer(learning_rate=1e-3, epochs={1}, max_steps={2}, warmup_steps=3),
    ewc=EWC(strength=1.0, data=("{0}/general.jsonl",), documents=16, batch=4),
    run=Run(name="run", directory="{0}/runs", save_every=2, eval_every=5, keep_last=2),
)
"""
WORDS = [
    "river",
    "capital",
    "ratio",
    "limit",
    "report",
    "loan",
    "reserve",
    "margin",
    "rate",
    "exceeds",
    "covers",
    "holds",
]


def write_workload(directory: Path, steps: int) -> Path:
    """Write a model, its data and a config of `steps` steps to `directory`. Return the config. Runs are in `directory`/runs."""
    write_tiny_model(directory / "model")
    for name, examples in {"train": 120, "validation": 6, "general": 40, "general-validation": 4}.items():
        rng = random.Random(name)
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(examples):
                question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(3, 16))) for _ in range(2))
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": chat}) + "\n")
    config = directory / "config.py"
    config.write_text(CONFIG.format(directory, -(-steps // 30), steps), encoding="utf-8")
    return config
