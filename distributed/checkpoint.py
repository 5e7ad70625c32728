"""Save and load checkpoints that survive a kill at any moment: written to a temporary name, fsynced, renamed.

Tensors are stored by torch.distributed.checkpoint (DCP), so that any number of ranks can read them:

    model.PARAMETER   optimizer.KEY.PARAMETER, such as optimizer.exp_avg.lm_head.weight   registered.NAME.KEY   random.RANK

Plain values (a counter of an optimizer, the position of a sampler) are stored in manifest.json.
distributed/checkpoint_directory.py describes the files.
"""

import hashlib
import itertools
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from common.torch_private import private
from distributed.checkpoint_directory import (
    PREVIOUS,
    Append,
    CheckpointReader,
    CheckpointWriter,
    check_free_space,
    checkpoint_name,
    prune,
    read_manifest,
    replace_state,
    write_manifest,
)
from distributed.process_group import (
    Ranks,
    call_on_all,
    check_agreement,
    gather_objects,
    random_state,
    read_on_first,
    set_random_state,
)
from distributed.sharding import local
from model.dtypes import dtype_name

StateDictStager = private("distributed.checkpoint._state_dict_stager.StateDictStager")
MOST_STEPS = 16  # within which an optimizer must have created its state
OF_THE_LOOP = ("params", "lr")  # keys of optimizer.param_groups that no checkpoint stores: the loop sets them
Tensors = dict[str, torch.Tensor]
_PLANS = itertools.count()


class SaveTimes(NamedTuple):
    """Seconds of one save on this rank. Training waits for `pause`. head: the record's head after the save."""

    step: int
    pause: float
    total: float
    head: str = ""


class Saver:
    """Saves and loads the training state of a run. Every rank must call each of its methods.

    The state consists of `parameters` (this rank's shards by name), the state of any optimizer, all registered objects, and the
    random state of every rank. Create the saver right after the optimizer: values that the optimizer changes in its
    `param_groups` from then on (the `d` of Prodigy) are saved too. Unchanged settings are not saved, so that a resume uses the
    weight decay of its own config.

    A save in the background (`run.async_save`) pauses training while the tensors are copied to buffers in host memory, pinned
    on CUDA, which later saves reuse. A thread then writes them, on a gloo group of its own.
    """

    def __init__(
        self,
        directory: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        keep_last: int = 1,
        in_background: bool = False,
        timeout_minutes: float = 30.0,
        append: Append = lambda kind, **content: "",
    ) -> None:
        self.append, self.plan = append, f"plan {next(_PLANS)}"
        self.directory, self.parameters, self.optimizer, self.ranks = directory, parameters, optimizer, ranks
        self.keep_last = keep_last
        self.registered: dict[str, Any] = {}
        self.shapes: dict[str, str] = {}  # of the registered tensors, which must not change
        self.is_open = True  # `register` may still be called
        for group in optimizer.param_groups:
            tensors = [key for key, value in group.items() if isinstance(value, torch.Tensor) and key != "lr"]
            if tensors:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {tensors[0]} in param_groups as a tensor, which a checkpoint does not "
                    "store: make it a number"
                )
        self.at_start = [dict(group) for group in optimizer.param_groups]
        names = {parameter: name for name, parameter in parameters.items()}
        # The peak rates, with which the check of a run compares the updates. No load reads them.
        self.peaks = {names[p]: float(group["lr"]) for group in self.at_start for p in group["params"] if p in names}
        self.finished: list[SaveTimes] = []  # not yet logged
        self.running: Future[SaveTimes] | None = None
        self.pool: ThreadPoolExecutor | None = None
        if in_background:
            group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
            assert isinstance(group, dist.ProcessGroup)
            self.background = replace(ranks, flags=group)
            on_cuda = ranks.device.type == "cuda"
            # A thread begins on GPU 0, where DCP's stream would take memory in every rank.
            self.pool = ThreadPoolExecutor(1, "save", lambda: on_cuda and torch.cuda.set_device(ranks.device))
            # Not DefaultStager: in torch 2.11 and 2.12 it closes this one after the first save, and fails in the second.
            self.stager = StateDictStager(pin_memory=on_cuda)

    # --- What a checkpoint holds --------------------------------------------------------------------------------------

    def register(self, name: str, stateful: Any) -> None:
        """Store an object with `state_dict()` and `load_state_dict(state)` in every checkpoint, such as an average of the
        weights.

        The state is a flat dictionary of tensors and of JSON values. A tensor that is not a DTensor must be equal on all ranks.
        Raise UserError for any other state, for a name that is taken, and after a load or a save.
        """
        if not self.is_open:
            raise UserError(f"register({name!r}): register before the checkpoint is loaded")
        if name in self.registered or "." in name:
            raise UserError(f"register({name!r}): choose a name without a dot that nothing else has")
        state = getattr(stateful, "state_dict", lambda: None)()
        if not isinstance(state, dict) or not hasattr(stateful, "load_state_dict"):
            raise UserError(
                f"register({name!r}): a {type(stateful).__name__} has no state_dict() and load_state_dict(state)"
            )
        self.shapes |= _shapes(_named(f"registered.{name}", state))
        self.registered[name] = stateful

    def contents(self) -> tuple[Tensors, dict[str, Any]]:
        """Return all that a checkpoint stores, by name: tensors, which share memory except for the random state, and plain
        values.

        Raise UserError for values that it cannot store.
        """
        values: dict[str, Any] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})  # indexing would add an entry to this defaultdict
            values |= _named("optimizer", {f"{key}.{name}": value for key, value in state.items()})
        registered: dict[str, Any] = {}
        for name, stateful in self.registered.items():
            registered |= _named(f"registered.{name}", stateful.state_dict())
        if (shapes := _shapes(registered)) != self.shapes:
            changed = [name for name in sorted({*shapes, *self.shapes}) if shapes.get(name) != self.shapes.get(name)]
            raise UserError(
                f"{changed[0]} was {self.shapes.get(changed[0])} and is {shapes.get(changed[0])} now: registered "
                "tensors must keep their names, shapes and dtypes, or no resume could read them"
            )
        values |= registered
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return tensors | random_state(self.ranks), {name: v for name, v in values.items() if name not in tensors}

    def stored_bytes(self) -> int:
        """Return the bytes of a whole checkpoint. An optimizer without a state yet counts like AdamW, with two moments."""
        size = stored_bytes(self.contents()[0])
        return size if self.optimizer.state else size + 2 * stored_bytes(dict(self.parameters))

    def _groups(self) -> list[dict]:
        """Return the values that the optimizer has changed in each of its `param_groups`, as plain JSON."""
        groups = []
        for group, before in zip(self.optimizer.param_groups, self.at_start, strict=True):
            changed = {k: v for k, v in group.items() if k not in OF_THE_LOOP and (k not in before or before[k] != v)}
            groups.append({k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()})
            for key, value in groups[-1].items():
                if not is_plain(value):
                    raise UserError(
                        f"{type(self.optimizer).__name__} has changed {key} in param_groups to a value of type "
                        f"{type(value).__name__}, which a checkpoint does not store: make it a number"
                    )
        return groups

    # --- Load ---------------------------------------------------------------------------------------------------------

    def load(self, checkpoint: Path | None) -> list[str]:
        """Read a checkpoint of any number of ranks in place. Return a message for the user; [] if `checkpoint` is None.

        Every block of a file is compared with its checksum before it is used. No tensor is converted. Raise UserError if a file
        is damaged, and if the checkpoint does not fit the run: its model, optimizer, optimizer.memory or registered objects.
        (14N and 12N store the same tensors; the run's identity tells them apart.)
        """
        self.is_open = False
        if checkpoint is None:
            return []
        begin = time.perf_counter()
        reader, of_optimizer, plain = _open(checkpoint, self.ranks, PREVIOUS)
        stored, kind = reader.metadata.state_dict_metadata, type(self.optimizer).__name__
        if of_optimizer["type"] == kind:
            self._allocate_state({*stored, *plain})
        tensors, values = self.contents()
        differences = []
        for part, before, now in (
            ("optimizer", of_optimizer["type"], kind),
            ("number of param_groups", len(of_optimizer["groups"]), len(self.at_start)),
        ):
            if before != now:
                differences.append(f"{part} {before}, now {now}")
        differences += _differences(stored, tensors, {*stored, *plain}, {*tensors, *values})
        _refuse(checkpoint, differences)
        # A run on another number of ranks or another kind of device has stored other random states.
        to_read = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.") or name in stored}
        _read(to_read, reader, self.ranks)
        groups = zip(self.optimizer.param_groups, self.at_start, of_optimizer["groups"], strict=True)
        for group, before, changed in groups:
            for key in [key for key in group if key not in OF_THE_LOOP]:
                del group[key]  # `_allocate_state` may have changed it
            group |= {k: v for k, v in before.items() if k not in OF_THE_LOOP}
            group |= {k: tuple(v) if isinstance(before.get(k), tuple) else v for k, v in changed.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            state |= {key: plain[full] for key in state if (full := f"optimizer.{key}.{name}") in plain}
        for name, stateful in self.registered.items():
            prefix = f"registered.{name}."
            everything = (tensors | plain).items()
            stateful.load_state_dict({key.removeprefix(prefix): v for key, v in everything if key.startswith(prefix)})
        set_random_state(to_read, self.ranks)
        # A kill in the last save may have left checkpoints to remove, and after the last step no other save follows.
        read_on_first(lambda: prune(self.directory, self.keep_last, self.append), self.ranks)
        size, seconds = reader.num_bytes / 2**20, time.perf_counter() - begin
        return [f"resumed from {checkpoint}: all {size:,.0f} MiB have their checksums, {seconds:.1f} s"]

    def _allocate_state(self, stored: set[str]) -> None:
        """Let the optimizer create the state tensors that a checkpoint holds, so that `load` can read them in place.

        stored: all names in the checkpoint. Most optimizers create their state in the first step, some in a later one, so this
        takes steps of rate 0 with gradients of 0. All that they change is then read from the checkpoint. `load` refuses a
        checkpoint whose state is still missing.
        """
        needed = {name for name in stored if name.startswith("optimizer.")}
        if all(self.optimizer.state.get(parameter) for parameter in self.parameters.values()):
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(MOST_STEPS):
            if not needed.difference(*self.contents()):
                break
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    # --- Save ---------------------------------------------------------------------------------------------------------

    def save(self, state: dict, **entry: Any) -> None:
        """Save `state`, plain JSON, with all tensors as step `state["step"]`; then remove the checkpoints that `prune` names.

        The record's entry about the checkpoint also holds `entry`. Wait for the previous save first. Return when the checkpoint
        is durable; in the background, when the tensors have been copied. Raise UserError on all ranks, and leave the existing
        checkpoints as they are, if either save fails.
        """
        begin = time.perf_counter()
        self.is_open = False
        self.wait()
        (tensors, plain), step = self.contents(), state["step"]
        of_optimizer = {name: value for name, value in plain.items() if name.startswith("optimizer.")}
        optimizer = {"type": type(self.optimizer).__name__, "groups": self._groups(), "peaks": self.peaks}
        values = {
            "optimizer": optimizer | {"state": of_optimizer},
            "registered": {name: value for name, value in plain.items() if name not in of_optimizer},
        }
        if unlike := differing_copies(self.parameters):
            problem = f"step {step} is not saved: the copies of the model differ in {len(unlike)} tensors, the first is {unlike[0]}"
            raise UserError(f"{problem}; train.py must change all copies alike, such as by random numbers of one seed")
        # Rank 0 writes these for all ranks.
        of_rank_0 = {
            "what is saved": values,
            "the state of the loop": state,
            "what is registered": _registered_checksums(tensors),
        }
        check_agreement(of_rank_0, self.ranks)
        check_free_space(self.directory, stored_bytes(tensors), self.ranks, f"the checkpoint of step {step}")
        read_on_first(lambda: start_directory(self.directory / checkpoint_name(step)), self.ranks)
        if not self.pool:
            head = self._write(state, values, tensors, self.ranks, entry)
            seconds = time.perf_counter() - begin
            self.finished.append(SaveTimes(step, seconds, seconds, head))
            return
        # The loop and registered objects may change their values in place while the thread writes.
        state, values = json.loads(json.dumps([state, values]))
        copies: Any = self.stager.stage(tensors, non_blocking=self.stager.pin_memory)
        if self.stager.pin_memory:
            torch.cuda.synchronize(self.ranks.device)
        pause = time.perf_counter() - begin

        def write() -> SaveTimes:
            head = self._write(state, values, copies, self.background, entry)
            return SaveTimes(step, pause, time.perf_counter() - begin, head)

        self.running = self.pool.submit(write)

    def _write(self, state: dict, values: dict, tensors: Tensors, ranks: Ranks, entry: dict) -> str:
        """Write the checkpoint and return the head of the record. A collective on `ranks.flags`: a thread has its own group."""
        final = self.directory / checkpoint_name(state["step"])
        folder = temporary_path(final)
        writer = CheckpointWriter(folder)
        # Rank 0 plans for all ranks, which takes minutes for hundreds; later saves of this process reuse it.
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self.plan  # torch compares shapes and not dtypes, so each `Saver` has its own plan
        try:
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=ranks.flags)
        except dcp.CheckpointException as error:  # DCP raises it on all ranks
            reasons = [reason for reason, _ in error.failures.values()]
            if not all(isinstance(reason, OSError) for reason in reasons):
                raise
            raise UserError(
                f"{folder}: the checkpoint of step {state['step']} could not be written ({reasons[0]}); mend the disk and start "
                "again: the run continues from its last checkpoint"
            ) from error
        files = {name: sums for part in gather_objects(writer.entries(), ranks) for name, sums in part.items()}

        def complete() -> str:
            digests = write_manifest(folder, state, files, values)
            head = self.append("checkpoint", **digests, **entry)
            publish(final)
            return prune(self.directory, self.keep_last, self.append) or head

        return read_on_first(complete, ranks)

    def poll(self) -> list[SaveTimes]:
        """Return the saves that have finished since the last call.

        Raise UserError on all ranks if a save has failed on any rank.
        """
        self._look()
        finished, self.finished = self.finished, []
        return finished

    def wait(self) -> None:
        """Wait until the save in the background is durable. Raise UserError on all ranks if it has failed on any."""
        while self.running:
            # All ranks poll: a thread may wait for ever for the thread of a failed rank, and its rank must not wait with it.
            self._look()
            if self.running:
                time.sleep(0.02)

    def _look(self) -> None:
        if not self.running:
            return
        is_done = self.running.done()
        error = self.running.exception() if is_done else None
        reason = error and (
            str(error) if isinstance(error, UserError) else f"a save in the background failed: {error!r}"
        )
        status = gather_objects((is_done, reason), self.ranks)
        if all(done for done, _ in status) or any(reason for _, reason in status):
            save, self.running = self.running, None
            if error and not isinstance(error, UserError | OSError):
                raise error  # a bug keeps its traceback
            for _, reason in status:
                if reason:
                    raise UserError(reason)
            self.finished.append(save.result())

    def update_state(self, state: dict, **entry: Any) -> None:
        """Replace the saved state of a step, after an evaluation that a signal interrupted has finished after the save."""
        self.wait()
        checkpoint = self.directory / checkpoint_name(state["step"])
        read_on_first(lambda: replace_state(checkpoint, state, self.append, **entry), self.ranks)

    def close(self) -> list[SaveTimes]:
        """Wait for the save in the background, end its thread, and return the saves that `poll` has not returned yet."""
        self.wait()
        if self.pool:
            self.pool.shutdown()
            self.stager.close()
        return self.poll()


def load_parameters(checkpoint: Path, parameters: dict[str, nn.Parameter], ranks: Ranks, hint: str = PREVIOUS) -> None:
    """Read only the parameters of a checkpoint, in place, as `Saver.load` does. Every rank must call this."""
    reader, *_ = _open(checkpoint, ranks, hint)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    stored = reader.metadata.state_dict_metadata
    _refuse(checkpoint, _differences(stored, tensors, set(stored) & set(tensors), set(tensors)))
    _read(tensors, reader, ranks)


def stored_bytes(tensors: Tensors) -> int:
    """Return the bytes of whole tensors. A DTensor counts the elements of all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _open(checkpoint: Path, ranks: Ranks, hint: str) -> tuple[CheckpointReader, dict, dict[str, Any]]:
    """Return a reader of the files, type and groups of the optimizer, and the plain values by name. Every rank must call this.

    Raise the same UserError on all ranks if the manifest or the metadata are damaged.
    """
    manifest = read_on_first(lambda: read_manifest(checkpoint, hint), ranks)
    reader = call_on_all(lambda: CheckpointReader(checkpoint, manifest["files"], hint), ranks)
    of_optimizer, registered = manifest["values"]["optimizer"], manifest["values"]["registered"]
    return reader, of_optimizer, of_optimizer["state"] | registered


def _read(tensors: Tensors, reader: CheckpointReader, ranks: Ranks) -> None:
    """Read tensors in place. Raise the UserError of the first rank that meets damage on all ranks."""
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.flags)
    except dcp.CheckpointException as error:  # on all ranks
        for _, (reason, _) in sorted(error.failures.items()):
            if isinstance(reason, UserError):
                raise UserError(str(reason)) from error
        raise


def _differences(stored: dict, tensors: Tensors, before: set[str], now: set[str]) -> list[str]:
    """Return a sentence for each difference between a checkpoint and a run.

    stored: DCP's metadata of the checkpoint. before, now: the names of all tensors and plain values in the checkpoint, in the
    run.
    """
    differences = []
    for words, names in (("it has no {}", now - before), ("it has {}, and the run has not", before - now)):
        # Each rank has its own random state, so another number of ranks has other names.
        kinds = sorted({_kind(name) for name in names if not name.startswith("random.")})
        if kinds:
            differences.append(words.format(", ".join(kinds[:4]) + f" and {len(kinds) - 4} more" * (len(kinds) > 4)))
    for name in sorted(tensors):
        metadata = stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            continue
        tensor = tensors[name]
        if tuple(metadata.size) != tuple(tensor.shape):
            return [*differences, f"{name} has shape {tuple(metadata.size)}, now {tuple(tensor.shape)}"]
        if metadata.properties.dtype != tensor.dtype:  # DCP would silently convert it
            return [*differences, f"{name} is {dtype_name(metadata.properties.dtype)}, now {dtype_name(tensor.dtype)}"]
    return differences


def _kind(name: str) -> str:
    """Shorten a name to its kind, such as `optimizer.exp_avg` or `registered.ema`. A parameter keeps its full name."""
    return name if name.startswith("model.") else ".".join(name.split(".")[:2])


def _refuse(checkpoint: Path, differences: list[str]) -> None:
    """Raise UserError unless `differences` is empty."""
    if differences:
        raise UserError(
            f"{checkpoint} does not fit this run: {'; '.join(differences)}; resume with the model, vocabulary, optimizer, "
            "optimizer.memory and register() of the checkpoint, or start a new run with another run.name"
        )


def _shapes(values: dict[str, Any]) -> dict[str, str]:
    """Return the shape and dtype of each tensor in `values`, as text by name."""
    return {k: f"{tuple(v.shape)} {dtype_name(v.dtype)}" for k, v in values.items() if isinstance(v, torch.Tensor)}


def differing_copies(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the parameters that differ between copies of the model (sharding `hybrid` and `none`).

    The copies compare the sum of each parameter's bits. Every rank must call this.
    """
    first = next(iter(parameters.values()))
    if not isinstance(first, DTensor) or first.device_mesh.ndim == 1:
        return []
    bits = torch.stack([local(parameter).flatten().view(torch.int16).sum() for parameter in parameters.values()])
    ends = torch.stack([bits, -bits])
    dist.all_reduce(ends, dist.ReduceOp.MAX, first.device_mesh.get_group(0))
    spread = ends.sum(0)  # the largest sum minus the smallest
    dist.all_reduce(spread, dist.ReduceOp.MAX)  # the ranks of other shards have compared theirs alone
    return [name for name, difference in zip(parameters, spread.tolist(), strict=True) if difference]


def _registered_checksums(tensors: Tensors) -> dict[str, str]:
    """Return a checksum of each registered tensor that every rank holds whole, by which the ranks compare them."""
    whole = {k: v for k, v in tensors.items() if k.startswith("registered.") and not isinstance(v, DTensor)}
    return {
        k: hashlib.sha256(v.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in whole.items()
    }


def _named(prefix: str, state: dict) -> dict[str, Any]:
    """Return the values of a state by their names in a checkpoint. Raise UserError for values that it cannot store."""
    for key, value in state.items():
        if not isinstance(key, str) or not (isinstance(value, torch.Tensor) or is_plain(value)):
            raise UserError(
                f"{prefix}: {key!r} is of type {type(value).__name__}; a checkpoint stores a flat dictionary of tensors, numbers, "
                "strings and lists of these"
            )
    return {f"{prefix}.{key}": value for key, value in state.items()}


def is_plain(value: object) -> bool:
    """Return whether a value survives JSON unchanged."""
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except (TypeError, ValueError):
        return False
