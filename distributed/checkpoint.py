"""Save and load checkpoints that survive a kill at any moment: written to a temporary name, fsynced, renamed.

Tensors are stored by torch.distributed.checkpoint (DCP), so that any number of ranks can read them:

    model.PARAMETER   optimizer.KEY.PARAMETER, such as optimizer.exp_avg.lm_head.weight   registered.NAME.KEY   random.RANK

What is no tensor (a counter of an optimizer, the position of a sampler) stands in manifest.json.
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
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from common.dtypes import dtype_name
from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from distributed.agreement import check_agreement
from distributed.checkpoint_directory import (
    PREVIOUS,
    Append,
    CheckpointReader,
    CheckpointWriter,
    checkpoint_name,
    prune,
    read_manifest,
    replace_state,
    write_manifest,
)
from distributed.disks import check_free_space
from distributed.process_group import Ranks, call_on_all, gather_objects, random_state, read_on_first, set_random_state
from distributed.sharding import unlike_copies

MOST_STEPS = 16  # in which an optimizer must have made its state
OF_THE_LOOP = ("params", "lr")  # keys of optimizer.param_groups that the loop sets before every step
Tensors = dict[str, torch.Tensor]
_PLANS = itertools.count()


class SaveTimes(NamedTuple):
    """Seconds of one save on this rank. Training waits for `pause`. head: of the record, after the save."""

    step: int
    pause: float
    total: float
    head: str = ""


class Saver:
    """Saves and loads the training state of a run. Every rank calls each of its methods.

    The state: `parameters` (this rank's shards by name), the state of any optimizer, what is registered, and the random state
    of every rank. Make it right after the optimizer: what that changes in its `param_groups` from then on (the `d` of Prodigy) is
    saved too, and settings that nobody changed are not, so that a resume with another weight decay has that one.

    A save in the background (`run.async_save`) pauses training while the tensors are copied to buffers in host memory, pinned
    on CUDA, which all saves use again. A thread then writes them, on a gloo group of its own.
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
        self.shapes: dict[str, str] = {}  # of the tensors of what is registered, as they must stay
        self.is_open = True  # for `register`
        for group in optimizer.param_groups:
            tensors = [key for key, value in group.items() if isinstance(value, torch.Tensor) and key != "lr"]
            if tensors:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {tensors[0]} in param_groups as a tensor, which a checkpoint does not "
                    "store: make it a number"
                )
        self.at_start = [dict(group) for group in optimizer.param_groups]
        names = {parameter: name for name, parameter in parameters.items()}
        # The peak rates, by which scripts/check/runs.py judges the updates; no load reads them.
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

    def register(self, name: str, thing: Any) -> None:
        """Keep in every checkpoint what else has `state_dict()` and `load_state_dict(state)`, such as an average of the weights.

        The state is a flat dictionary of tensors and of values that JSON has. A tensor that is no DTensor must be equal on all
        ranks. Raises UserError for another state, a name that is taken, and after a load or a save.
        """
        if not self.is_open:
            raise UserError(f"register({name!r}): register before the checkpoint is loaded")
        if name in self.registered or "." in name:
            raise UserError(f"register({name!r}): choose a name without a dot that nothing else has")
        state = getattr(thing, "state_dict", lambda: None)()
        if not isinstance(state, dict) or not hasattr(thing, "load_state_dict"):
            raise UserError(
                f"register({name!r}): a {type(thing).__name__} has no state_dict() and load_state_dict(state)"
            )
        self.shapes |= _shapes(_named(f"registered.{name}", state))
        self.registered[name] = thing

    def contents(self) -> tuple[Tensors, dict[str, Any]]:
        """What a checkpoint stores, by name: tensors, which are no copies apart from the random state, and plain values.

        Raises UserError for what it cannot store.
        """
        found: dict[str, Any] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})  # in brackets it would be added
            found |= _named("optimizer", {f"{key}.{name}": value for key, value in state.items()})
        registered: dict[str, Any] = {}
        for name, thing in self.registered.items():
            registered |= _named(f"registered.{name}", thing.state_dict())
        if (shapes := _shapes(registered)) != self.shapes:
            changed = [name for name in sorted({*shapes, *self.shapes}) if shapes.get(name) != self.shapes.get(name)]
            raise UserError(
                f"{changed[0]} was {self.shapes.get(changed[0])} and is {shapes.get(changed[0])} now: the tensors of what is "
                "registered must keep their names, shapes and dtypes, or no resume could read them"
            )
        found |= registered
        tensors = {name: value.detach() for name, value in found.items() if isinstance(value, torch.Tensor)}
        return tensors | random_state(self.ranks), {name: v for name, v in found.items() if name not in tensors}

    def stored_bytes(self) -> int:
        """Bytes of a checkpoint, of all ranks. An optimizer without a state yet counts like AdamW, with two moments."""
        size = stored_bytes(self.contents()[0])
        return size if self.optimizer.state else size + 2 * stored_bytes(dict(self.parameters))

    def _groups(self) -> list[dict]:
        """What the optimizer has changed in its `param_groups`, as plain JSON."""
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
        """Read a checkpoint of any number of ranks in place. Returns a line for the user. None: there is nothing to read.

        Every block of a file is compared with its checksum before it is used. Nothing is converted. Raises UserError
        if a file is damaged, and if the checkpoint does not fit the run: model, optimizer, optimizer.memory, and what is registered.
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
        tensors, others = self.contents()
        differences = []
        for what, before, now in (
            ("optimizer", of_optimizer["type"], kind),
            ("number of param_groups", len(of_optimizer["groups"]), len(self.at_start)),
        ):
            if before != now:
                differences.append(f"{what} {before}, now {now}")
        differences += _differences(stored, tensors, {*stored, *plain}, {*tensors, *others})
        _refuse(checkpoint, differences)
        # Another number of ranks, or another kind of device, has other random states.
        wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.") or name in stored}
        _read(wanted, reader, self.ranks)
        groups = zip(self.optimizer.param_groups, self.at_start, of_optimizer["groups"], strict=True)
        for group, before, changed in groups:
            for key in [key for key in group if key not in OF_THE_LOOP]:
                del group[key]  # what the step that allocates has changed
            group |= {k: v for k, v in before.items() if k not in OF_THE_LOOP}
            group |= {k: tuple(v) if isinstance(before.get(k), tuple) else v for k, v in changed.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            state |= {key: plain[full] for key in state if (full := f"optimizer.{key}.{name}") in plain}
        for name, thing in self.registered.items():
            prefix = f"registered.{name}."
            everything = (tensors | plain).items()
            thing.load_state_dict({key.removeprefix(prefix): v for key, v in everything if key.startswith(prefix)})
        set_random_state(wanted, self.ranks)
        # A kill in the last save may have left what that did not remove, and after the last step no other save follows.
        read_on_first(lambda: prune(self.directory, self.keep_last, self.append), self.ranks)
        size, seconds = reader.num_bytes / 2**20, time.perf_counter() - begin
        return [f"resumed from {checkpoint}: all {size:,.0f} MiB have their checksums, {seconds:.1f} s"]

    def _allocate_state(self, stored: set[str]) -> None:
        """Let an optimizer make the state that a checkpoint has of it, to read it in place. `stored`: all names in there.

        Most make it in their first step, some in a later one: steps of rate 0 with gradients of 0. Whatever they change is then
        read. What is still missing is refused.
        """
        wanted = {name for name in stored if name.startswith("optimizer.")}
        if all(self.optimizer.state.get(parameter) for parameter in self.parameters.values()):
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(MOST_STEPS):
            if not wanted.difference(*self.contents()):
                break
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    # --- Save ---------------------------------------------------------------------------------------------------------

    def save(self, state: dict, **entry: Any) -> None:
        """Save `state`, plain JSON, and everything else as step `state["step"]`; then remove what `prune` does not keep.

        The record's entry about it says `entry` as well.
        Returns when the checkpoint is durable; in the background, when the tensors have been copied. Waits for the previous
        save first. Raises UserError on all ranks, and leaves the existing checkpoints as they are, if either save fails.
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
        if unlike := unlike_copies(self.parameters):
            what = f"step {step} is not saved: the copies of the model differ in {len(unlike)} tensors, the first is {unlike[0]}"
            raise UserError(f"{what}; train.py must change all copies alike, such as by random numbers of one seed")
        # Rank 0 writes it for all.
        written = {"what is saved": values, "the state of the loop": state, "what is registered": _copies(tensors)}
        check_agreement(written, self.ranks)
        check_free_space(self.directory, stored_bytes(tensors), self.ranks, f"the checkpoint of step {step}")
        read_on_first(lambda: start_directory(self.directory / checkpoint_name(step)), self.ranks)
        if not self.pool:
            head = self._write(state, values, tensors, self.ranks, entry)
            seconds = time.perf_counter() - begin
            self.finished.append(SaveTimes(step, seconds, seconds, head))
            return
        # The loop, and what is registered, may change their values in place while the thread writes.
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
        """A collective on `ranks.flags`: a background thread has a group for itself. Returns the head of the record."""
        final = self.directory / checkpoint_name(state["step"])
        folder = temporary_path(final)
        writer = CheckpointWriter(folder)
        # Rank 0 plans for all ranks, which takes minutes for hundreds; later saves of this start use the plan of the first.
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self.plan  # torch compares shapes and no dtypes: another `Saver` has another plan
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
        """The saves that have finished since the last call. Raises UserError on all ranks if one has failed on any."""
        self._look()
        finished, self.finished = self.finished, []
        return finished

    def wait(self) -> None:
        """Wait until the save in the background is durable. Raises UserError on all ranks if it has failed on any."""
        while self.running:
            # All ranks look again and again: a rank whose thread waits for that of a failed rank must not wait with it.
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
        """Record an evaluation that finished after its step was saved, because a signal had cut it short before the save."""
        self.wait()
        checkpoint = self.directory / checkpoint_name(state["step"])
        read_on_first(lambda: replace_state(checkpoint, state, self.append, **entry), self.ranks)

    def close(self) -> list[SaveTimes]:
        """Wait for the save in the background, end its thread, and return the saves that `poll` has not returned."""
        self.wait()
        if self.pool:
            self.pool.shutdown()
            self.stager.close()
        return self.poll()


def load_parameters(checkpoint: Path, parameters: dict[str, nn.Parameter], ranks: Ranks, hint: str = PREVIOUS) -> None:
    """Read only the parameters of a checkpoint, in place, as `Saver.load` does. A collective."""
    reader, *_ = _open(checkpoint, ranks, hint)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    stored = reader.metadata.state_dict_metadata
    _refuse(checkpoint, _differences(stored, tensors, set(stored) & set(tensors), set(tensors)))
    _read(tensors, reader, ranks)


def stored_bytes(tensors: Tensors) -> int:
    """Bytes of whole tensors: a DTensor counts the elements of all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _open(checkpoint: Path, ranks: Ranks, hint: str) -> tuple[CheckpointReader, dict, dict[str, Any]]:
    """(a reader of the files; type and groups of the optimizer; plain values by name). A collective.

    Raises the same UserError on all ranks if the manifest or the metadata are damaged.
    """
    manifest = read_on_first(lambda: read_manifest(checkpoint, hint), ranks)
    reader = call_on_all(lambda: CheckpointReader(checkpoint, manifest["files"], hint), ranks)
    of_optimizer, registered = manifest["values"]["optimizer"], manifest["values"]["registered"]
    return reader, of_optimizer, of_optimizer["state"] | registered


def _read(tensors: Tensors, reader: CheckpointReader, ranks: Ranks) -> None:
    """Read tensors in place. Raises the UserError of the first rank that finds damage on all ranks."""
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.flags)
    except dcp.CheckpointException as error:  # on all ranks
        for _, (reason, _) in sorted(error.failures.items()):
            if isinstance(reason, UserError):
                raise UserError(str(reason)) from error
        raise


def _differences(stored: dict, tensors: Tensors, before: set[str], now: set[str]) -> list[str]:
    """Where a checkpoint does not fit a run, in words. `stored`: DCP's metadata. `before`, `now`: all names, of values too."""
    found = []
    for words, names in (("it has no {}", now - before), ("it has {}, and the run has not", before - now)):
        # Each rank has a random state of its own, and another number of ranks other ones.
        kinds = sorted({_kind(name) for name in names if not name.startswith("random.")})
        if kinds:
            found.append(words.format(", ".join(kinds[:4]) + f" and {len(kinds) - 4} more" * (len(kinds) > 4)))
    for name in sorted(tensors):
        metadata = stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            continue
        tensor = tensors[name]
        if tuple(metadata.size) != tuple(tensor.shape):
            return [*found, f"{name} has shape {tuple(metadata.size)}, now {tuple(tensor.shape)}"]
        if metadata.properties.dtype != tensor.dtype:  # DCP would silently convert it
            return [*found, f"{name} is {dtype_name(metadata.properties.dtype)}, now {dtype_name(tensor.dtype)}"]
    return found


def _kind(name: str) -> str:
    """`optimizer.exp_avg` and `registered.ema` for all that are a part of it, and the full name of a parameter."""
    return name if name.startswith("model.") else ".".join(name.split(".")[:2])


def _refuse(checkpoint: Path, differences: list[str]) -> None:
    """Raise UserError if there are differences."""
    if differences:
        raise UserError(
            f"{checkpoint} does not fit this run: {'; '.join(differences)}; resume with the model, vocabulary, optimizer, "
            "optimizer.memory and register() of the checkpoint, or start a new run with another run.name"
        )


def _shapes(values: dict[str, Any]) -> dict[str, str]:
    """Name -> shape and dtype of its tensor."""
    return {k: f"{tuple(v.shape)} {dtype_name(v.dtype)}" for k, v in values.items() if isinstance(v, torch.Tensor)}


def _copies(tensors: Tensors) -> dict[str, str]:
    """Registered tensors that every rank holds whole -> a checksum, by which the ranks compare them."""
    whole = {k: v for k, v in tensors.items() if k.startswith("registered.") and not isinstance(v, DTensor)}
    return {
        k: hashlib.sha256(v.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in whole.items()
    }


def _named(prefix: str, state: dict) -> dict[str, Any]:
    """The values of a state by their names in a checkpoint. Raises UserError for what it cannot store."""
    for key, value in state.items():
        if not isinstance(key, str) or not (isinstance(value, torch.Tensor) or is_plain(value)):
            raise UserError(
                f"{prefix}: {key!r} is of type {type(value).__name__}; a checkpoint stores a flat dictionary of tensors, numbers, "
                "strings and lists of these"
            )
    return {f"{prefix}.{key}": value for key, value in state.items()}


def is_plain(value: object) -> bool:
    """Whether JSON gives a value back as it was."""
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except (TypeError, ValueError):
        return False
