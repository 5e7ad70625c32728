"""Time and memory traffic of the optimizers, per parameter: python -m bench.optimizer [--threads N | --cpu-time]

Takes steps on the shapes of SmolLM2-135M (one process, weights as in a run on one rank) with all values of
optimizer.memory in turn. 16N is torch's own fused AdamW in fp32, with which the others are compared.

    bytes     what one pass must move per parameter: weights and moments read and written, gradients read
    GB/s      these bytes divided by the time; a copy of 1 GB (read and written) is printed for comparison
    x 16N     time divided by that of 16N
    norm      the gradient norm, another pass over the gradients, which precedes every step

A time is the smallest of several steps, and of all rounds. On a machine that is busy use --cpu-time.
"""

import argparse
import math
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from distributed.gradients import bytes_per_parameter, gradient_norm
from distributed.host_memory import keep_freed_memory
from distributed.optimizer import adamw, parameter_dtype

FORMS = ("16N", "14N", "12N", "8N", "6N")
SHAPES = {(49152, 576): 1, (1536, 576): 90, (576, 576): 60, (192, 576): 60, (576,): 61}  # SmolLM2-135M; shape: how many
STEPS = 3

Clock = Callable[[], float]  # seconds


def best_seconds(call: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds of the fastest of STEPS calls."""
    best = math.inf
    for _ in range(STEPS):
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def make_parameters(memory: str, shape: tuple[int, ...], count: int, device: torch.device) -> dict[str, nn.Parameter]:
    """`count` parameters of one shape with gradients, of the sizes that weights and gradients usually have."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(shape, generator=generator, device=device)
    parameters = {}
    for index in range(count):
        parameter = nn.Parameter((values * 0.02).to(parameter_dtype(memory)))
        if memory == "14N":
            parameter.grad_dtype = torch.float32
        parameter.grad = (values * 1e-3).to(torch.float32 if memory in ("16N", "14N") else torch.bfloat16)
        parameters[str(index)] = parameter
    return parameters


def measure(
    memory: str, shape: tuple[int, ...], count: int, device: torch.device, clock: Clock = time.perf_counter
) -> tuple[float, float, float]:
    """Seconds of a step over `count` parameters, seconds of their gradient norm, and the bytes that one pass moves."""
    parameters = make_parameters(memory, shape, count, device)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    settings = SimpleNamespace(memory=memory, learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = adamw(parameters, settings, seed=0)
    for name, parameter in parameters.items():  # 14N has allocated gradients of its own
        parameter.grad = gradients[name]
    for group in optimizer.param_groups:
        group["noise_step"] = 1
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
    optimizer.step()  # the first one faults the pages of the moments
    step = best_seconds(optimizer.step, device, clock)
    norm = best_seconds(lambda: gradient_norm(parameters.values()), device, clock)
    per_parameter = bytes_per_parameter(parameters, optimizer)
    moved = 2 * per_parameter["weights"] + per_parameter["gradients"] + 2 * per_parameter["moments"]
    return step, norm, moved * count * math.prod(shape)


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GB."""
    source, target = (torch.ones(2**28, device=device) for _ in range(2))
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def measure_all(
    rounds: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[tuple[str, tuple[int, ...]], tuple[float, float, float]]:
    """(form, shape): the smallest times of all rounds, and the bytes. The forms take turns within a shape."""
    best = {}
    for _ in range(rounds):
        for shape, count in SHAPES.items():
            for memory in FORMS:
                step, norm, moved = measure(memory, shape, count, device, clock)
                before = best.get((memory, shape), (math.inf, math.inf, moved))
                best[memory, shape] = min(step, before[0]), min(norm, before[1]), moved
    return best


def table(best: dict[tuple[str, tuple[int, ...]], tuple[float, float, float]]) -> list[str]:
    """A line per form: over the whole model, and nanoseconds per parameter of each shape."""
    sizes = {shape: count * math.prod(shape) for shape, count in SHAPES.items()}
    total = sum(sizes.values())
    names = "".join(f"{'x'.join(map(str, shape)):>10}" for shape in SHAPES)
    lines = [f"{'':6}{'bytes':>6}{'ns':>7}{'GB/s':>7}{'x 16N':>7}{'norm':>7}  |{names}"]
    reference = sum(best[FORMS[0], shape][0] for shape in SHAPES)
    for memory in FORMS:
        step, norm, moved = (sum(best[memory, shape][i] for shape in SHAPES) for i in range(3))
        by_shape = "".join(f"{best[memory, shape][0] / size * 1e9:>10.2f}" for shape, size in sizes.items())
        lines.append(
            f"{memory:6}{moved / total:>6.1f}{step / total * 1e9:>7.2f}{moved / step / 1e9:>7.1f}"
            f"{step / reference:>7.2f}{norm / total * 1e9:>7.2f}  |{by_shape}"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread in place of the clock's")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training
    threads = 1 if arguments.cpu_time else arguments.threads
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what, clock = ("CPU time", time.thread_time) if arguments.cpu_time else ("time", time.perf_counter)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"threads: {threads}"
    speed = copy_speed(device)
    print(f"{where}, torch {torch.__version__}, a copy moves {speed / 1e9:.0f} GB/s; ns of {what} per parameter")
    print("\n".join(table(measure_all(arguments.rounds, device, clock))))


if __name__ == "__main__":
    main()
