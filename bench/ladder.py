"""What each measure brings, on a 1B shape with random weights: python -m bench.ladder OUT.json --device cuda

Each rung keeps those above it: plain eager; `torch.compile` of each layer; logits in chunks instead of all at once;
activation checkpointing of every layer; 12 bytes a parameter instead of 16; 6 (8-bit moments, needs torchao). Every rung
runs in its own process, 2 documents of 4,096 tokens a step, every token a target, through our own model and sharding
code. It needs no peer. On CPU the same code runs on a miniature shape; those figures mean nothing.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from bench.peak import measured_peak
from common.dtypes import has_native_bf16
from configs.config import Model, Optimizer, Sharding
from data.batches import MicroBatch, collate
from data.examples import Documents
from distributed.optimizer import make_optimizer, parameter_dtype
from distributed.process_group import start_process_group
from distributed.sharding import decoder_layers, local_shard, make_mesh, parallelize
from model import language_model
from model.flops import count_work, step_flops
from model.loss import HeadSettings, logits
from training.run_log import peak_memory_gib

SHAPES = {  # Llama 3.2 1B, and a miniature
    "cuda": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 4096,
    },
    "cpu": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    },
}
DOCUMENTS = 2  # in a step, each of max_position_embeddings tokens
WARMUP, STEPS = 3, 8


@dataclasses.dataclass(frozen=True)
class Rung:
    """One line of the ladder."""

    name: str
    compiled: bool = True
    chunked: bool = True
    checkpointing: str = "none"
    memory: str = "16N"


RUNGS = {
    "eager": Rung("eager, all logits at once", compiled=False, chunked=False),
    "compile": Rung("+ compile", chunked=False),
    "chunked": Rung("+ chunked loss"),
    "checkpointing": Rung("+ activation checkpointing", checkpointing="full"),
    "12N": Rung("+ 12 bytes a parameter", checkpointing="full", memory="12N"),
    "6N": Rung("+ 8-bit moments", checkpointing="full", memory="6N"),
}


def all_logits_at_once(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    settings: HeadSettings,
    **others: object,
) -> torch.Tensor:
    """What model.loss.cross_entropy_sum is measured against: `(targets, vocabulary)` fp32 logits, kept for backward."""
    return F.cross_entropy(logits(hidden, head_weight, settings), target_ids, reduction="sum")


def random_weights(model: language_model.PackedLanguageModel, device: torch.device) -> None:
    """Memory on `device` for the (sharded) meta model: matrices of standard deviation 0.02, norms of 1."""
    model.to_empty(device=device)
    model.causal_lm.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            local = local_shard(parameter)[0]
            local.normal_(0.0, 0.02) if parameter.dim() >= 2 else local.fill_(1.0)
    language_model._recompute_buffers(model, device)


def random_batch(config: LlamaConfig) -> MicroBatch:
    """DOCUMENTS whole-length documents of random tokens, each token but the first a target."""
    generator, length = torch.Generator().manual_seed(0), config.max_position_embeddings
    ids = [torch.randint(config.vocab_size, (length,), generator=generator).numpy() for _ in range(DOCUMENTS)]
    targets = [(torch.arange(length) > 0).numpy() for _ in range(DOCUMENTS)]
    lengths = np.full(DOCUMENTS, length)
    documents = Documents(ids, targets, lengths=lengths, targets=lengths - 1, fingerprint="", report="")
    return collate(tuple(range(DOCUMENTS)), documents)


def climb(rung: Rung) -> dict:
    """Run one rung in this process; its line as numbers."""
    ranks = start_process_group()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[ranks.device.type], tie_word_embeddings=True)
    model = language_model.build_on_meta(config).to(parameter_dtype(rung.memory))
    if not rung.chunked:
        language_model.cross_entropy_sum = all_logits_at_once
    dtype = torch.bfloat16 if has_native_bf16(ranks.device) else torch.float32
    settings = Model(path="", activation_checkpointing=rung.checkpointing, compile=rung.compiled)
    mesh = make_mesh(ranks.device.type, 1, 1, Sharding())
    parallelize(model, decoder_layers(model), model.extra_fsdp_units(), mesh, dtype, settings, Sharding())
    random_weights(model, ranks.device)
    model.train()
    parameters = language_model.parameter_names(model)
    optimizer = make_optimizer(parameters, Optimizer(learning_rate=1e-5, memory=rung.memory), seed=0)
    batch = random_batch(config).to(ranks.device)
    targets = batch.target_ids.numel()
    work = count_work(model, config)
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            _wait(ranks.device)
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["noise_step"] = step
        loss = model(batch)
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(ranks.device)
    seconds = (time.perf_counter() - start) / STEPS
    line = {
        "name": rung.name,
        "tokens_per_second": sum(batch.document_lengths) / seconds,
        "flops_per_second": step_flops(work, batch.document_lengths, targets) / seconds,
        "memory_gib": peak_memory_gib(ranks.device),
        "loss": loss.item() / targets,
    }
    torch.distributed.destroy_process_group()
    return line


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def render(lines: list[dict], peak: float) -> str:
    """The ladder as text; a line without numbers says why."""
    base = next((line["tokens_per_second"] for line in lines if "loss" in line), None)
    text = [f"{'ladder':<32}{'tokens/s':>10}{'x eager':>9}{'MFU':>7}{'GiB':>8}{'loss':>9}"]
    for line in lines:
        if "failed" in line:
            text.append(f"{line['name']:<32}  {line['failed']}")
            continue
        text.append(
            f"{line['name']:<32}{line['tokens_per_second']:>10,.0f}{line['tokens_per_second'] / base:>8.2f}x"
            f"{line['flops_per_second'] / peak:>7.1%}{line['memory_gib']:>8.2f}{line['loss']:>9.4f}"
        )
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def main() -> None:
    """All rungs, each in a process of its own; or, with --rung, one of them here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the lines")
    parser.add_argument("--device", default="cuda", choices=tuple(SHAPES))
    parser.add_argument("--rungs", default=",".join(RUNGS), help="some of them, in order")
    parser.add_argument("--rung", choices=tuple(RUNGS), help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.rung:
        arguments.out.write_text(json.dumps(climb(RUNGS[arguments.rung])), encoding="utf-8")
        return
    device = torch.device(arguments.device)
    peak = measured_peak(device, torch.bfloat16 if has_native_bf16(device) else torch.float32)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    lines = []
    for key in arguments.rungs.split(","):
        command = [sys.executable, "-m", "bench.ladder", str(arguments.out), "--rung", key]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            reason = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
            lines.append({"name": RUNGS[key].name, "failed": reason})
        else:
            lines.append(json.loads(arguments.out.read_text(encoding="utf-8")))
    arguments.out.write_text(json.dumps({"peak": peak, "lines": lines}, indent=1), encoding="utf-8")
    print(f"\n{render(lines, peak)}")


if __name__ == "__main__":
    main()
