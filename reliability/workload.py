"""A tiny run with everything that could go wrong in a resume: a mixture, EWC, validation, frequent saves.

The model and the texts are random; a step takes some hundredths of a second.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

NOUNS = [
    "bank",
    "capital",
    "ratio",
    "limit",
    "report",
    "deposit",
    "loan",
    "reserve",
    "margin",
    "audit",
    "ledger",
    "rate",
]
VERBS = ["exceeds", "covers", "lowers", "reports", "holds", "reviews"]


def write_workload(directory: Path, steps: int) -> Path:
    """Write a model, its data and a config of `steps` steps to `directory`; return the config file. Takes a second.

    The config mixes two sources, penalises with EWC, saves after every second step and validates after every fifth. Runs
    go to `directory`/runs.
    """
    write_model(directory / "model")
    for name, examples in {"train": 120, "validation": 6, "general": 40, "general-validation": 4}.items():
        write_examples(directory / f"{name}.jsonl", examples, name)
    files = {
        name: str(directory / f"{name}.jsonl") for name in ("train", "validation", "general", "general-validation")
    }
    config = directory / "config.py"
    config.write_text(
        f'''"""A tiny run with a mixture, EWC, validation and frequent saves. Written by reliability/workload.py."""

from configs.config import EWC, Batch, Config, Data, Model, Optimizer, Run, Source

config = Config(
    model=Model(path={str(directory / "model")!r}, compute_dtype="fp32"),
    data=Data(
        train=({files["train"]!r},),
        validation=({files["validation"]!r},),
        mix=(Source("general", ({files["general"]!r},), 0.2, ({files["general-validation"]!r},)),),
        sequence_length=256,
        cache={str(directory / "tokens")!r},
    ),
    batch=Batch(global_examples=4, micro_batch=1),
    # 120 examples / 4 = 30 steps per epoch.
    optimizer=Optimizer(learning_rate=1e-3, epochs={-(-steps // 30)}, max_steps={steps}, warmup_steps=3),
    ewc=EWC(strength=1.0, data=({files["general"]!r},), documents=16, batch=4),
    run=Run(name="run", directory={str(directory / "runs")!r}, save_every=2, eval_every=5, keep_last=2),
)
''',
        encoding="utf-8",
    )
    return config


def write_model(directory: Path, layers: int = 2, hidden: int = 64) -> None:
    """Save a random fp32 Llama model and a byte tokenizer with a chat template."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def write_examples(path: Path, count: int, seed: str, longest: int = 4) -> None:
    """Write `count` chats of one question and one answer with 1 to `longest` clauses each."""
    rng = random.Random(seed)

    def clauses() -> str:
        return ", ".join(
            f"{rng.choice(NOUNS)} {rng.randint(1, 99)} {rng.choice(VERBS)} {rng.choice(NOUNS)}"
            for _ in range(rng.randint(1, longest))
        )

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [{"role": "user", "content": clauses()}, {"role": "assistant", "content": clauses()}]
            file.write(json.dumps({"messages": messages}) + "\n")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, merged into frequent pairs up to 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(NOUNS + VERBS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
