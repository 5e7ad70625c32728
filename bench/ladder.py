"""Effect of each optimisation on a 1B model with random weights: python -m bench.ladder OUT.json --device cuda

Each rung of the ladder adds one optimisation to the rung before it: eager; `torch.compile` of each layer; logits in chunks
instead of all at once; activation checkpointing of every layer; 12 instead of 16 bytes per parameter; 6 bytes per
parameter (8-bit moments, needs torchao). Every rung runs in its own process through our own model and sharding code, with
2 documents of 4,096 tokens per step in which every token but the first is a target. No other trainer is needed. On CPU the
same code runs on a miniature model, only as a test: its speeds mean nothing.
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
from bench.report import processor_name, version
from common.dtypes import choose_dtype, dtype_name
from configs.config import Model, Optimizer, Sharding
from data.batches import MicroBatch, collate
from data.examples import Documents
from distributed.optimizer import adamw, parameter_dtype
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
DOCUMENTS = 2  # per step, each of max_position_embeddings tokens
WARMUP, STEPS = 3, 8


@dataclasses.dataclass(frozen=True)
class Rung:
    """One configuration of the ladder."""

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
    "12N": Rung("+ 12 bytes per parameter", checkpointing="full", memory="12N"),
    "6N": Rung("+ 8-bit moments", checkpointing="full", memory="6N"),
}
# Not rungs of the ladder, but runs of the same kind, against which scripts/gpu_proof.sh holds the planner.
EXTRA = {
    "uncompiled": Rung("chunked loss, without compile", compiled=False),
    "full": Rung("checkpointing, without compile", compiled=False, checkpointing="full"),
    "selective": Rung("selective checkpointing, without compile", compiled=False, checkpointing="selective"),
    "offload": Rung("activations on the host, without compile", compiled=False, checkpointing="offload"),
    "8N": Rung("8 bytes per parameter, without compile", compiled=False, checkpointing="full", memory="8N"),
}


def all_logits_at_once(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    settings: HeadSettings,
    **unused: object,
) -> torch.Tensor:
    """Baseline for `model.loss.cross_entropy_sum`: keeps fp32 logits `(targets, vocabulary)` for backward."""
    return F.cross_entropy(logits(hidden, head_weight, settings), target_ids, reduction="sum")


def initialize_randomly(model: language_model.PackedLanguageModel, device: torch.device) -> None:
    """Materialize the (sharded) meta model on `device`: matrices with standard deviation 0.02, norms with 1."""
    model.to_empty(device=device)
    model.causal_lm.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            local = local_shard(parameter)[0]
            local.normal_(0.0, 0.02) if parameter.dim() >= 2 else local.fill_(1.0)
    language_model._recompute_buffers(model, device)


def random_batch(config: LlamaConfig) -> MicroBatch:
    """DOCUMENTS documents of the full context length with random tokens; every token but the first is a target."""
    generator, length = torch.Generator().manual_seed(0), config.max_position_embeddings
    ids = [torch.randint(config.vocab_size, (length,), generator=generator).numpy() for _ in range(DOCUMENTS)]
    targets = [(torch.arange(length) > 0).numpy() for _ in range(DOCUMENTS)]
    lengths = np.full(DOCUMENTS, length)
    documents = Documents(ids, targets, lengths=lengths, targets=lengths - 1, fingerprint="", report="")
    return collate(tuple(range(DOCUMENTS)), documents)


def run_rung(rung: Rung) -> dict:
    """Train for some steps with one rung in this process, and return its measurements."""
    ranks = start_process_group()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[ranks.device.type], tie_word_embeddings=True)
    model = language_model.build_on_meta(config).to(parameter_dtype(rung.memory))
    if not rung.chunked:
        language_model.cross_entropy_sum = all_logits_at_once
    dtype = choose_dtype("auto", ranks.device)
    settings = Model(path="", activation_checkpointing=rung.checkpointing, compile=rung.compiled)
    mesh = make_mesh(ranks.device.type, 1, 1, Sharding())
    parallelize(model, decoder_layers(model), model.extra_fsdp_units(), mesh, dtype, settings, Sharding())
    initialize_randomly(model, ranks.device)
    model.train()
    parameters = language_model.parameter_names(model)
    optimizer = adamw(parameters, Optimizer(learning_rate=1e-5, memory=rung.memory), seed=0)
    batch = random_batch(config).to(ranks.device)
    targets = batch.target_ids.numel()
    work = count_work(model, config)
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            _synchronize(ranks.device)
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["noise_step"] = step
        loss = model(batch)
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(ranks.device)
    seconds = (time.perf_counter() - start) / STEPS
    measurements = {
        "name": rung.name,
        "tokens_per_second": sum(batch.document_lengths) / seconds,
        "flops_per_second": step_flops(work, batch.document_lengths, targets) / seconds,
        "memory_gib": peak_memory_gib(ranks.device),
        "loss": loss.item() / targets,
    }
    torch.distributed.destroy_process_group()
    return measurements


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def render(rungs: list[dict], peak: float) -> str:
    """The ladder as a table. A rung that failed shows the reason instead of numbers. peak: FLOP/s."""
    base = next((rung["tokens_per_second"] for rung in rungs if "loss" in rung), None)
    text = [f"{'ladder':<32}{'tokens/s':>10}{'x eager':>9}{'MFU':>7}{'GiB':>8}{'loss':>9}"]
    for rung in rungs:
        if "failed" in rung:
            text.append(f"{rung['name']:<32}  {rung['failed']}")
            continue
        text.append(
            f"{rung['name']:<32}{rung['tokens_per_second']:>10,.0f}{rung['tokens_per_second'] / base:>8.2f}x"
            f"{rung['flops_per_second'] / peak:>7.1%}{rung['memory_gib']:>8.2f}{rung['loss']:>9.4f}"
        )
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def main() -> None:
    """Run each rung in its own process and print the ladder; with --rung, run only that one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the measurements")
    parser.add_argument("--device", default="cuda", choices=tuple(SHAPES))
    parser.add_argument("--rungs", default=",".join(RUNGS), help="which rungs to run, in this order (%(default)s)")
    parser.add_argument("--rung", choices=tuple(RUNGS | EXTRA), help="run only this rung, in this process")
    arguments = parser.parse_args()
    if arguments.rung:
        arguments.out.write_text(json.dumps(run_rung((RUNGS | EXTRA)[arguments.rung])), encoding="utf-8")
        return
    device = torch.device(arguments.device)
    peak = measured_peak(device, choose_dtype("auto", device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    lines = []
    for key in arguments.rungs.split(","):
        command = [sys.executable, "-m", "bench.ladder", str(arguments.out), "--rung", key]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            lines.append({"name": RUNGS[key].name, "failed": reason})
        else:
            lines.append(json.loads(arguments.out.read_text(encoding="utf-8")))
    arguments.out.write_text(json.dumps({"peak": peak, "lines": lines}, indent=1), encoding="utf-8")
    versions = ", ".join(f"{name} {found}" for name in ("torch", "transformers", "torchao") if (found := version(name)))
    dtype = dtype_name(choose_dtype("auto", device))
    print(
        f"\n{render(lines, peak)}\n{processor_name(device.type)}; {dtype}, peak {peak / 1e12:.2f} TFLOP/s; {versions}"
    )


if __name__ == "__main__":
    main()
