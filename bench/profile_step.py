"""Where the time of one optimizer step goes, by torch's profiler: shares of products, attention, copies and so on.

    python -m bench.profile_step artifacts/models/SmolLM2-135M-Instruct --tokens 2000
    torchrun --nproc_per_node=2 -m bench.profile_step artifacts/models/SmolLM2-135M-Instruct --tokens 4000

It trains the model on random tokens with the parts that train.py uses, in documents of 100 to 400 tokens of which a third
are targets. First it times steps without the profiler, then it profiles as many. Every figure is the mean over all ranks.
The profiler itself makes small operations slower: the shares of `Python` and `elementwise` are a little too large.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.peak import measured_peak
from common.dtypes import DTYPES
from common.errors import run_script
from configs.config import Model, Optimizer, Sharding
from data.batches import MicroBatch, collate
from data.examples import Documents
from distributed.gradients import gradient_norm
from distributed.host_memory import keep_freed_memory
from distributed.optimizer import adamw, parameter_dtype
from distributed.process_group import Ranks, start_process_group
from distributed.sharding import before_micro_batch, decoder_layers, gathering_strategy, make_mesh, parallelize
from model.architectures import read_model_config
from model.flops import count_work, step_flops
from model.language_model import PackedLanguageModel, build_on_meta, load_weights, parameter_names
from model.loss import LossSums

# Category -> parts of the names of its operations; the first category that matches counts. What lies inside of the range
# `optimizer` counts as such, and so does the backward of attention, whatever its kernels are called.
CATEGORIES = {
    "communication": ("c10d::", "gloo:", "nccl:", "record_param_comms", "FSDP::all_gather", "post_backward_reduce"),
    "attention": ("scaled_dot_product", "flash_attention", "varlen", "_ProductAttention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "mkldnn_linear", "onednn"),
    "casts and copies": (
        *("copy", "aten::cat", "_chunk_cat", "clone", "contiguous", "aten::to", "aten::fill_", "aten::zero"),
        *("aten::empty", "aten::index", "aten::gather", "aten::scatter", "aten::stack", "embedding_dense_backward"),
    ),
    "elementwise": ("aten::", "torch_compile", "Torch-Compiled", "Compiled", "cpp_fused", "triton"),
}
ORDER = (
    *("matrix products", "attention", "casts and copies", "elementwise", "loss", "optimizer", "communication"),
    "Python and the rest",
)


@dataclass
class Run:
    """A model that is ready to train, and its micro-batches, which are the same in every step."""

    model: PackedLanguageModel
    optimizer: torch.optim.Optimizer
    micro_batches: list[MicroBatch]
    targets: int  # of all ranks
    strategy: str
    ranks: Ranks

    def step(self) -> None:
        """One optimizer step, as in train.py."""
        sums = LossSums(1, self.ranks.device)
        for number, micro_batch in enumerate(self.micro_batches, 1):
            before_micro_batch(self.model, self.strategy, number == len(self.micro_batches))
            loss = self.model(micro_batch, sums)
            (loss / self.targets).backward()
            sums.total.add_(loss.detach())
        with record_function("optimizer"):
            norm = gradient_norm(parameter_names(self.model).values())
            self.optimizer.grad_scale = norm.clamp(min=1.0)  # pyright: ignore[reportAttributeAccessIssue]
            for group in self.optimizer.param_groups:
                group["noise_step"] = 0
            self.optimizer.step()
            self.optimizer.zero_grad()


def random_documents(tokens: int, vocabulary: int) -> Documents:
    """Documents of 100 to 400 tokens, `tokens` in all; the last third of each are targets."""
    rng, lengths = np.random.default_rng(0), []
    while (rest := tokens - sum(lengths)) > 0:
        lengths.append(int(min(rest, rng.integers(100, 400))))
    ids = [rng.integers(0, vocabulary, n) for n in lengths]
    is_target = [np.arange(n) >= max(1, n - n // 3) for n in lengths]
    targets = np.array([flags.sum() for flags in is_target])
    return Documents(ids, is_target, np.array(lengths), targets, "", "")


def prepare(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Run, float]:
    """The model as train.py makes it, and the FLOPs of a step over all ranks."""
    config = read_model_config(arguments.model)
    model = build_on_meta(config).to(parameter_dtype(arguments.memory))
    layers = decoder_layers(model)
    sharding = Sharding(strategy=arguments.strategy, reduce_dtype=arguments.reduce_dtype)
    mesh = make_mesh(ranks.device.type, ranks.world_size, ranks.world_size, sharding)
    settings = Model(path=arguments.model, compile=arguments.compile)
    parallelize(model, layers, model.extra_fsdp_units(), mesh, DTYPES[arguments.dtype], settings, sharding)
    load_weights(model, arguments.model, ranks.device)
    optimizer = adamw(parameter_names(model), Optimizer(learning_rate=1e-5, memory=arguments.memory), seed=0)
    documents = random_documents(arguments.tokens, config.vocab_size)
    # Documents are dealt like cards, to ranks and micro-batches at once.
    parts = ranks.world_size * arguments.micro_batches
    own = [
        range(ranks.rank * arguments.micro_batches + i, len(documents.ids), parts)
        for i in range(arguments.micro_batches)
    ]
    micro_batches = [collate(tuple(part), documents).to(ranks.device) for part in own]
    targets = int(documents.targets.sum())
    flops = step_flops(count_work(model, config), list(documents.lengths), targets)
    return Run(model, optimizer, micro_batches, targets, gathering_strategy(sharding, mesh), ranks), flops


def shares(run: Run, steps: int) -> tuple[dict[str, float], float]:
    """(seconds per step by category, seconds per step), under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            with record_function("step"):
                run.step()
        seconds = (time.perf_counter() - start) / steps
    events = list(profiler.events() or [])
    main_thread = next(event.thread for event in events if event.name == "step")
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.thread == main_thread:  # other threads work at the same time, and the main one waits for them
            found[category(event)] += event.self_cpu_time_total / 1e6 / steps
    found["Python and the rest"] += seconds - sum(found.values())
    return found, seconds


def category(event: FunctionEvent) -> str:
    """The category of an operation: that of a range around it, or that of its own name."""
    around, names = event, []
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    for name, inside in (("optimizer", "optimizer"), ("CrossEntropySum", "loss"), ("ProductAttention", "attention")):
        if any(name in outer for outer in names):
            return inside
    if any("attention" in outer for outer in names):
        return "attention"
    return next(
        (kind for kind, parts in CATEGORIES.items() if any(part in event.name for part in parts)), "Python and the rest"
    )


def main() -> None:
    """Print the speed, then one line per category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face model directory")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a step, over all ranks (%(default)s)")
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="micro-batches of a step on each rank (%(default)s)"
    )
    parser.add_argument("--strategy", default="full", choices=("full", "grad_op", "hybrid", "none"))
    parser.add_argument("--reduce-dtype", default="fp32", choices=tuple(DTYPES), help="of gradients (%(default)s)")
    parser.add_argument("--memory", default="16N", choices=("16N", "14N", "12N", "8N", "6N"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the products (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="model.compile=True")
    parser.add_argument("--steps", type=int, default=4, help="steps to time, and to profile (%(default)s)")
    arguments = parser.parse_args()
    keep_freed_memory()
    ranks = start_process_group()
    torch.manual_seed(ranks.rank)
    run, flops = prepare(arguments, ranks)
    run.step()
    times = []
    for _ in range(arguments.steps):
        dist.barrier()
        start = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - start)
    found, seconds = shares(run, arguments.steps)
    peak = measured_peak(ranks.device, DTYPES[arguments.dtype])
    figures = torch.tensor([sorted(times)[len(times) // 2], seconds, peak, *(found[kind] for kind in ORDER)])
    dist.all_reduce(figures)
    if ranks.rank == 0:
        report(arguments, ranks, figures, flops)
    dist.destroy_process_group()


def report(arguments: argparse.Namespace, ranks: Ranks, figures: torch.Tensor, flops: float) -> None:
    """Print `figures`: sums over ranks of seconds, seconds under the profiler, the peak, and seconds by category."""
    peak, (seconds, profiled, _, *kinds) = figures[2].item(), (figures / ranks.world_size).tolist()
    print(
        f"{ranks.world_size} x {torch.get_num_threads()} threads, {arguments.strategy}, {arguments.memory}, "
        f"{arguments.dtype}, {arguments.tokens:,} tokens in {arguments.micro_batches} micro-batches per rank\n"
        f"{seconds:.3f} s per step, {arguments.tokens / seconds:,.0f} tokens/s, MFU {flops / seconds / peak:.1%} of "
        f"{peak / 1e12:.2f} TFLOP/s; {profiled:.3f} s under the profiler, of which"
    )
    for kind, value in zip(ORDER, kinds, strict=True):
        print(f"  {kind:20} {value:7.3f} s  {value / profiled:6.1%}")


if __name__ == "__main__":
    run_script(main)
