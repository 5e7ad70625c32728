"""Run the `main` of train.py several times in one launch, each time with its own arguments and possibly a planted fault.

    torchrun --nproc_per_node=N tests/distributed/train_worker.py plan.json

plan.json is a list of {"arguments": [...], "plant": a fault of `plant` or null, "expect": exit code, "script": an edited
copy of train.py or null}. All runs share one launch, because starting processes and a process group costs more than a tiny
run. The exit code of every run on every rank is written to <plan>.<run>.rank<rank>.exit.
"""

import dataclasses
import functools
import itertools
import json
import os
import pkgutil
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch
from safetensors.torch import save_file
from torch.distributed.tensor.debug import CommDebugMode

import distributed.checkpoint
import distributed.sharding
import eval.forgetting
import model.flops
import train
import training.inputs
import training.observe
import training.start
from common.errors import exit_code_of, exit_process
from data.batches import MicroBatch
from data.dealing import Deal, Dealer, length_as_cost
from data.sources import Corpus
from distributed.sharding import whole
from model.language_model import PackedLanguageModel
from tests.code_memory import remember_code
from tests.in_memory import weighted

WEIGHTS = (0.0, 0.25, 1.0, 3.0)
RANK = int(os.environ.get("RANK", 0))
LAST = int(os.environ.get("WORLD_SIZE", 1)) - 1 == RANK
FORWARD = ("model.language_model:PackedLanguageModel", "forward")
# Plant -> the signal that the last rank, or every rank, sends itself before a call. Argument: the number of the call.
SIGNALS = {
    # One forward before that with this number: the ranks read each other's flags one micro-batch later.
    "signal_at_micro_batch": (signal.SIGTERM, LAST, *FORWARD, -1),
    "signal_at_answer": (signal.SIGTERM, LAST, "eval.generate:StopOnSignal", "__call__", 0),
    "signal_at_alpha": (signal.SIGTERM, LAST, "training.budget:Line", "go", 0),  # a point on the line of a budget
    "kill_at_micro_batch": (signal.SIGKILL, True, *FORWARD, 0),
    "kill_at_alpha": (signal.SIGKILL, True, "training.budget:Line", "go", 0),
}


def note(name: str) -> Path:
    """The file NAME of this run, beside its plan."""
    run = next(a for a in sys.argv if a.startswith("run.name=")).removeprefix("run.name=")
    return Path(sys.argv[1]).parent / f"{run}.{name}"


def before_call(number: int | None, owner: object, name: str, act: Callable[[], object], set_attribute) -> None:
    """Call `act` before the call of `owner.name` with this number; None: before each."""
    calls, original = itertools.count(), getattr(owner, name)

    def called(*arguments, **options) -> object:
        if number is None or next(calls) == number:
            act()
        return original(*arguments, **options)

    set_attribute(owner, name, called)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def change_batches(change: Callable, set_attribute) -> None:
    """`change(batch, corpus)` of every batch of the plan."""
    plan_training = training.inputs.plan_training

    def changed(corpus: Corpus, *arguments, **options) -> object:
        plan = plan_training(corpus, *arguments, **options)
        return dataclasses.replace(plan, batch=lambda step: change(plan.batch(step), corpus))

    set_attribute(training.inputs, "plan_training", changed)


def plant(name: str | None, set_attribute) -> None:
    """Plant the faults and probes `name`, joined by " and ", in train.py. `set_attribute(object, name, value)` is undone
    after the run."""
    if name is None:
        return
    if " and " in name:
        for one in name.split(" and "):
            plant(one, set_attribute)
        return
    kind, _, argument = name.partition(":")
    forward = PackedLanguageModel.forward
    if kind in SIGNALS:
        number, is_sender, owner, method, shift = SIGNALS[kind]
        if is_sender:
            before_call(int(argument) + shift, pkgutil.resolve_name(owner), method, send(number), set_attribute)
    elif kind in ("first", "last"):
        if LAST if kind == "last" else RANK == 0:  # for which the others wait in their first collective
            exec(argument)
    elif kind == "fsdp_division_on":
        set_attribute(distributed.sharding, "sum_gradients", lambda model: None)
    elif kind == "native_bf16":
        # "yes": compute bf16 in bf16 on every processor (torch emulates it without hardware support).
        # A number: only that rank has the hardware.
        native = argument in ("yes", os.environ.get("RANK"))
        set_attribute(training.start, "has_native_bf16", lambda device: native)
    elif kind == "count_collectives":
        # Collectives with more than one element: FSDP's, but not flags and sums of a single number.
        counts = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
        counted_file = note("collectives.json")
        for function, what in {
            "all_gather_into_tensor": "all_gather",  # torch < 2.13
            "all_gather_single": "all_gather",
            "reduce_scatter_tensor": "reduce_scatter",
            "reduce_scatter_single": "reduce_scatter",
            "all_reduce": "all_reduce",
        }.items():
            original = getattr(torch.distributed, function, None)

            def counted(*arguments, original=original, what=what, **options) -> object:
                tensor = arguments[0] if arguments else options.get("output_tensor", options.get("output"))
                # Without the polls of the stop signal and the comparison of a save (`differing_copies`).
                counts[what] += tensor.numel() > 1 and tensor.dtype not in (torch.float64, torch.int64)
                if RANK == 0:
                    counted_file.write_text(json.dumps(counts))
                return original(*arguments, **options)

            if original:
                set_attribute(torch.distributed, function, counted)
    elif kind == "count_graphs":
        # Compile with the backend `argument`; after every forward note the graphs that torch.compile has made in the run.
        import distributed.compiled_layers as compiled_layers

        graphs, graphs_file = [], note(f"graphs.{RANK}.json")
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()

        def noted(self, batch: MicroBatch) -> torch.Tensor:
            hidden = forward(self, batch)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            graphs_file.write_text(json.dumps(graphs))
            return hidden

        set_attribute(PackedLanguageModel, "forward", noted)
        compile_layers = functools.partial(compiled_layers.compile_layers, backend=argument)
        set_attribute(compiled_layers, "compile_layers", compile_layers)
    elif kind == "no_device_wait":
        # "first,last": between these two forwards, an operation that makes the host wait for the GPU is an error, but for the
        # loop's own reading of loss and gradient norm, once a step.
        read = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> object:
            if sys._getframe(1).f_code is not train.train.__code__:
                return read(tensor)
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return read(tensor)
            finally:
                torch.cuda.set_sync_debug_mode(mode)

        set_attribute(torch.Tensor, "tolist", tolist)
        for number, mode in zip(map(int, argument.split(",")), ("error", "default"), strict=True):
            act = functools.partial(torch.cuda.set_sync_debug_mode, mode)
            before_call(number, PackedLanguageModel, "forward", act, set_attribute)
    elif kind == "mean_of_means":
        # Average the means of the micro-batches: loss_m / targets_m, divided by the number of micro-batches. The argument
        # is the examples of a micro-batch.
        world_size, capacity = int(os.environ.get("WORLD_SIZE", 1)), int(argument)
        chunked = train.chunked

        def mean(head, hidden, batch: MicroBatch, *options) -> torch.Tensor:
            return chunked(head, hidden, batch, *options) / max(1, batch.target_ids.numel())

        def by_micro_batches(batch: object, corpus: Corpus) -> object:
            deal = Dealer(capacity, length_as_cost, packing=False).deal(batch.items, corpus, world_size)
            return dataclasses.replace(batch, num_target_tokens=len(deal.items) * world_size)

        set_attribute(train, "chunked", mean)
        change_batches(by_micro_batches, set_attribute)
    elif kind in ("weighted", "weighted_by_count"):
        # Train on weighted documents in memory. weighted_by_count: divide by the number of targets, not by their weights.
        source = weighted(WEIGHTS)
        set_attribute(training.inputs.Reader, "training", lambda *arguments: Corpus((source,)))

        def by_count(batch: object, corpus: Corpus) -> object:
            count = sum(int((source.get(item)[1] > 0).sum()) for item in batch.items)
            return dataclasses.replace(batch, num_target_tokens=count)

        if kind == "weighted_by_count":
            change_batches(by_count, set_attribute)
    elif kind == "slow_rank":
        # The clock of this rank's forwards runs at thirty times the speed, and no clock depends on the machine.
        ticks = itertools.count(step=30 if int(argument) == RANK else 1)
        set_attribute(training.observe, "mark", lambda device: float(next(ticks)))
    elif kind == "endless_step":
        # From the step with this number on, a step has a million times as many micro-batches: it never ends. Their forwards
        # wait first, so that the other tests have the processor.
        steps, of_rank = itertools.count(), Deal.of_rank

        def slow(self, batch: MicroBatch) -> torch.Tensor:
            time.sleep(0.2)
            return forward(self, batch)

        def of_rank_endless(*some) -> list:
            if next(steps) < int(argument):
                return of_rank(*some)
            set_attribute(PackedLanguageModel, "forward", slow)
            return of_rank(*some) * 10**6

        set_attribute(Deal, "of_rank", of_rank_endless)
    elif kind == "not_finite":
        # "3,4": a NaN loss in the forwards with these numbers, on the last rank only.
        bad, count = {int(n) for n in argument.split(",")}, itertools.count()

        def broken(self, batch: MicroBatch) -> torch.Tensor:
            hidden = forward(self, batch)
            return hidden * float("nan") if next(count) in bad and LAST else hidden

        set_attribute(PackedLanguageModel, "forward", broken)
    elif kind == "leak":
        # The documents of a row are one document to the attention.

        def merged(self, batch: MicroBatch) -> torch.Tensor:
            whole_row = sum(batch.document_lengths)
            ends = torch.tensor([0, whole_row], dtype=torch.int32)
            return forward(self, dataclasses.replace(batch, document_lengths=(whole_row,), cu_seq_lens=ends))

        set_attribute(PackedLanguageModel, "forward", merged)
    elif kind == "bad_batch":
        # The documents of the step with this 0-based number have a NaN loss, whenever one of them is in a micro-batch.
        collate, plan_as_usual, bad_items = training.inputs.collate, training.inputs.plan_training, set()

        def plan_with_bad(*arguments, **options) -> object:
            plan = plan_as_usual(*arguments, **options)
            bad_items.update(plan.batch(int(argument)).items)
            return plan

        def collate_bad(items: tuple[int, ...], corpus: Corpus) -> MicroBatch:
            micro_batch = collate(items, corpus)
            if bad_items.isdisjoint(items):
                return micro_batch
            return dataclasses.replace(
                micro_batch, target_weights=torch.full(micro_batch.target_ids.shape, float("nan"))
            )

        set_attribute(training.inputs, "plan_training", plan_with_bad)
        set_attribute(training.inputs, "collate", collate_bad)
    elif kind == "gradients_of_last_rank":
        # "1,nan,100": the last rank multiplies its gradients by these factors, one for each step, so that the copies of a model
        # differ. Every rank notes the sum of squares of its part, the norm that it got, and by which norm it clipped.
        notes_file, squares, factors = note(f"gradients.{RANK}.json"), [], map(float, argument.split(","))
        gradient_norm, clip_gradients = train.gradient_norm, train.clip_gradients

        def norm_of_different(parameters) -> torch.Tensor:
            parameters = list(parameters)
            gradients = [distributed.sharding.local(parameter.grad) for parameter in parameters]
            torch._foreach_mul_(gradients, next(factors) if LAST else 1.0)
            norm = gradient_norm(parameters)
            own = sum(gradient.square().sum().item() for gradient in gradients)
            squares.append({"own": own, "norm": norm.item(), "clipped": None})
            notes_file.write_text(json.dumps(squares))
            return norm

        def clip_noted(parameters, max_norm: float, norm: float) -> None:
            squares[-1]["clipped"] = norm
            notes_file.write_text(json.dumps(squares))
            clip_gradients(parameters, max_norm, norm)

        set_attribute(train, "gradient_norm", norm_of_different)
        set_attribute(train, "clip_gradients", clip_noted)
    elif kind == "note_penalty":
        # What stood around the penalty of step 2, whole: the weights, and their gradients before (`plain`) and after (`total`).
        from model.ewc import Penalty

        add_gradient = Penalty.add_gradient

        def add_noted(self, step: int, **options) -> None:
            def note_all(kind: str, tensors: list) -> None:
                noted_tensors.update(
                    {f"{kind}.{name}": whole(tensor) for name, tensor in zip(self.parameters, tensors, strict=True)}
                )

            noted_tensors, parameters = {}, list(self.parameters.values())
            if step != 1:
                return add_gradient(self, step, **options)
            note_all("weight", parameters)
            note_all("plain", [parameter.grad.clone() for parameter in parameters])
            with CommDebugMode() as communicated:
                add_gradient(self, step, **options)
            assert communicated.get_total_counts() == 0
            note_all("total", [parameter.grad for parameter in parameters])
            if RANK == 0:
                save_file(
                    {name: tensor.contiguous() for name, tensor in noted_tensors.items()}, note("penalty.safetensors")
                )

        set_attribute(Penalty, "add_gradient", add_noted)
    elif kind == "dropout":
        # Training draws random numbers in every forward, others on every rank.
        def dropped(self, batch: MicroBatch) -> torch.Tensor:
            return torch.nn.functional.dropout(forward(self, batch), 0.5, self.training)

        set_attribute(PackedLanguageModel, "forward", dropped)
    elif kind == "figures_by_rank":
        # Rank 0 finds a validation loss that falls from evaluation to evaluation, and the others one that rises.
        evaluations, validate = itertools.count(1), train.validate

        def validate_by_rank(model, batches, data, *others) -> dict | None:
            figures = validate(model, batches, data, *others)
            if batches is data.validation_batches and figures:
                figures["validation/loss"] = 10.0 + next(evaluations) * (1 if RANK else -1)
            return figures

        set_attribute(train, "validate", validate_by_rank)
    elif kind == "certificate":
        # Another text for the certificate of a budget.
        from training import budget

        set_attribute(budget, "CERTIFICATE", Path(argument))
    elif kind == "kill":
        # SIGKILL in the second save: before the checkpoint is complete ("data"), or after its rename ("prune").
        owner = distributed.checkpoint.dcp.FileSystemWriter if argument == "data" else distributed.checkpoint
        before_call(1, owner, "finish" if argument == "data" else argument, send(signal.SIGKILL), set_attribute)
    elif kind == "signal_in_background":
        # SIGTERM while rank 0 writes its first save in the background, which goes on when all ranks have agreed to stop.
        stopped, agreed, writer = (
            threading.Event(),
            train.StopSignal.agreed,
            distributed.checkpoint.dcp.FileSystemWriter,
        )

        def noted_agreed(stop: train.StopSignal) -> bool:
            if answer := agreed(stop):
                stopped.set()
            return answer

        def signal_and_wait() -> None:
            send(signal.SIGTERM)()
            assert stopped.wait(60)

        set_attribute(train.StopSignal, "agreed", noted_agreed)
        if RANK == 0:
            before_call(0, writer, "write_data", signal_and_wait, set_attribute)
    elif kind == "count_files_and_threads":
        # After every save rank 0 notes how many files are open and how many threads there are.
        counts_file, notes = note("counts.json"), []

        def count() -> None:
            notes.append([len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")])
            counts_file.write_text(json.dumps(notes))

        before_call(None, distributed.checkpoint, "prune", count, set_attribute)
    elif kind == "note_unflushed_rows":
        # At every save rank 0 notes how many rows TensorBoard has received since its last flush.
        from training.sinks import TensorBoard

        rows_file, rows, counts_at_saves = note("unflushed.json"), [], []

        def note_rows() -> None:
            counts_at_saves.append(len(rows))
            rows_file.write_text(json.dumps(counts_at_saves))

        before_call(None, TensorBoard, "plot", lambda: rows.append(None), set_attribute)
        before_call(None, TensorBoard, "flush", rows.clear, set_attribute)
        before_call(None, distributed.checkpoint, "start_directory", note_rows, set_attribute)
    elif kind == "disk_full":
        # Rank 0, and no other rank, finds the disk full when it looks for the time with this number: once before the first
        # step, then once before each save.
        looks, usage = itertools.count(), shutil.disk_usage

        def full(path: Path) -> object:
            full_now = next(looks) == int(argument) and RANK == 0
            return usage(path)._replace(free=0) if full_now else usage(path)

        set_attribute(shutil, "disk_usage", full)
    else:
        raise ValueError(name)


def main_of(script: str | None) -> Callable[[], int]:
    """`main` of train.py, or of a copy."""
    if script is None:
        return train.main
    program = types.ModuleType("edited_train")
    program.__file__ = script
    exec(compile(Path(script).read_bytes(), script, "exec"), program.__dict__)
    return program.main


def main() -> None:
    plan_file = Path(sys.argv[1])
    # One process group for all runs: a launcher's store cannot be joined a second time.
    initialise, destroy = torch.distributed.init_process_group, torch.distributed.destroy_process_group
    torch.distributed.init_process_group = lambda *a, **o: torch.distributed.is_initialized() or initialise(*a, **o)
    torch.distributed.destroy_process_group = lambda: None
    remember_code()
    # torch looks at it in the first product on a GPU, and once: after any other run, run.deterministic would come too late.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What a killed process has written is not lost: only a machine that fails needs this wait for the disk.
    os.fsync = lambda descriptor: None
    # One thread per rank (OMP_NUM_THREADS): on matrices this small, threads only wait for each other.
    torch.set_num_threads = lambda count: None
    # Forgetting is measured on two texts and few questions: without packing all of them are 500 forwards of an evaluation.
    eval.forgetting.TEXT_BYTES = 2048
    read_questions = eval.forgetting.read_questions
    eval.forgetting.read_questions = lambda: read_questions()[:8]
    # The peak is measured with small matrices: 24 products of size 1024 per run would take most of the time, and a minute
    # where torch emulates bf16.
    measured_flops = model.flops.measured_flops
    model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
    for number, run in enumerate(json.loads(plan_file.read_text())):
        changed = []

        def set_attribute(target: object, name: str, value: object, changed: list = changed) -> None:
            changed.append((target, name, getattr(target, name)))
            setattr(target, name, value)

        sys.argv = ["train.py", *run["arguments"]]
        plant(run.get("plant"), set_attribute)
        code = exit_code_of(main_of(run.get("script")))
        for target, name, value in reversed(changed):
            setattr(target, name, value)
        plan_file.with_suffix(f".{number}.rank{RANK}.exit").write_text(str(code))
    destroy()
    exit_process(0)


if __name__ == "__main__":
    main()
