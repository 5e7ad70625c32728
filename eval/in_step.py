"""Ranks that generate at the same time: together before every forward of a sharded model, now and then if each has it whole."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from distributed.process_group import Ranks, StopSignal
from eval.over_ranks import token_bar

Turn = TypeVar("Turn")
IDLE, WORKING, STOPPING = range(3)


class InStep:
    """Before each forward of `model` all ranks agree that it takes place, also where there is nothing left to compute.

    This is what transformers' `generate(synced_gpus=True)` does for each token. Here it covers every forward, so that
    ranks may have different numbers of batches and of tokens. The agreement is on the CPU and waits for no device. A
    signal on any rank stops all of them before their next forward, with KeyboardInterrupt.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks) -> None:
        self.model, self.stop = model, StopSignal(ranks)
        self.idling = False
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # before FSDP's own, which gathers

    def finish(self) -> None:
        """Run empty forwards as long as another rank has work. A collective: every rank calls it when it has none left."""
        while self._any_is_working(IDLE):
            self.idling = True
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
            with torch.no_grad():
                self.model(input_ids=token, attention_mask=token + 1, position_ids=token, use_cache=False)
            self.idling = False

    def _before_forward(self, module: nn.Module, arguments: tuple) -> None:
        if not self.idling:  # else `finish` has agreed on it
            self._any_is_working(WORKING)

    def _any_is_working(self, state: int) -> bool:
        answer = _agree(state, self.stop)
        if answer == STOPPING:
            stop_all(self.stop.ranks)
        return answer == WORKING


class Stopped(Exception):
    """A signal has been agreed on by all ranks, in the middle of their answers."""


class Together:
    """Ranks with different numbers of forwards that agree now and then whether a signal has come. None waits for long.

    Each calls `advance` after every forward, and `finish` when it has none left. Agreements are on the CPU, and all ranks
    take part in all of them, also a rank without any forward.
    """

    FORWARDS = 8  # between two agreements

    def __init__(self, stop: StopSignal) -> None:
        self.stop, self.forwards = stop, 0

    def advance(self, tokens: int) -> None:
        """One forward more (an `eval.generate.Advance`). Raises Stopped on all ranks after a signal on any."""
        self.forwards += 1
        if self.forwards % self.FORWARDS == 0:
            self._agree(WORKING)

    def finish(self) -> None:
        """Wait for the ranks that still have forwards. Raises Stopped as `advance` does."""
        while self._agree(IDLE) == WORKING:
            pass

    def _agree(self, state: int) -> int:
        answer = _agree(state, self.stop)
        if answer == STOPPING:
            self.stop.stopped = True  # on all ranks: `agreed`, which lags behind, says the same from here on
            raise Stopped
        return answer


def _agree(state: int, stop: StopSignal) -> int:
    """The largest state of all ranks; STOPPING after a signal on any. A collective."""
    stop.ranks.watch.tick()
    answer = torch.tensor(STOPPING if stop.name else state)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=stop.ranks.flags)
    return int(answer)


def in_turns(turns: Iterable[Turn], tokens: Sequence[int], stop: StopSignal, description: str) -> Iterator[Turn]:
    """Yield each of `turns`, of which every rank has the same number, and stop all ranks together after a signal.

    tokens: those of each turn of this rank, for the progress bar of rank 0. A collective.
    """
    with token_bar(sum(tokens), description, stop.ranks) as bar:
        for turn, number in zip(turns, tokens, strict=True):
            if stop.agreed():
                stop_all(stop.ranks)
            yield turn
            bar.update(number)


def stop_all(ranks: Ranks) -> None:
    """End an evaluation after a signal that all ranks have agreed on: one line on rank 0, then KeyboardInterrupt."""
    if ranks.rank == 0:
        tqdm.write("stopped by a signal, before the result", file=sys.stderr)
    raise KeyboardInterrupt
