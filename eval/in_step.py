"""Ranks that generate at the same time: together before every forward of a sharded model, now and then if each has it whole."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from distributed.process_group import Ranks, StopSignal
from eval.over_ranks import token_bar

Turn = TypeVar("Turn")
IDLE, WORKING, STOPPING = range(3)


class Stopped(Exception):
    """A signal has been agreed on by all ranks, in the middle of their answers."""


class Together:
    """Ranks with different numbers of forwards that agree, once in `every` forwards, whether a signal has come.

    Each calls `advance` for every forward, and `finish` when it has none left. Agreements are on the CPU and wait for no device,
    and all ranks take part in all of them, also a rank without any forward.
    """

    def __init__(self, stop: StopSignal, every: int = 8) -> None:
        self.stop, self.every, self.forwards = stop, every, 0

    def advance(self, tokens: int = 0) -> None:
        """One forward more (an `eval.generate.Advance`). Raises Stopped on all ranks after a signal on any."""
        self.forwards += 1
        if self.forwards % self.every == 0:
            self._agree(WORKING)

    def finish(self, idle: Callable[[], object] = lambda: None) -> None:
        """Wait for the ranks that still have forwards, with a call of `idle` for each agreement. Raises Stopped as `advance` does."""
        while self._agree(IDLE) == WORKING:
            idle()

    def _agree(self, state: int) -> int:
        """The largest state of all ranks. A collective."""
        self.stop.ranks.watch.tick()
        answer = torch.tensor(STOPPING if self.stop.name else state)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.stop.ranks.flags)
        if answer == STOPPING:
            self.stop.stopped = True  # on all ranks: `agreed`, which lags behind, says the same from here on
            raise Stopped
        return int(answer)


def keep_in_step(model: PreTrainedModel, ranks: Ranks) -> Callable[[], None]:
    """Have all ranks agree before each forward of a sharded `model`, also where there is nothing left to compute.

    This is what transformers' `generate(synced_gpus=True)` does for each token. Here it covers every forward, so that ranks may
    have different numbers of batches and of tokens. Returns what every rank calls when it has no work left: empty forwards as
    long as another rank has work. A signal on any rank stops all of them before their next forward, with KeyboardInterrupt.
    """
    together, idling = Together(StopSignal(ranks), every=1), False

    def before_forward(*_: object) -> None:
        if not idling:  # else `finish` has agreed on it
            try:
                together.advance()
            except Stopped:
                stop_all(ranks)

    def idle() -> None:
        nonlocal idling
        idling, token = True, torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            model(input_ids=token, attention_mask=token + 1, position_ids=token, use_cache=False)
        idling = False

    def finish() -> None:
        try:
            together.finish(idle)
        except Stopped:
            stop_all(ranks)

    model.register_forward_pre_hook(before_forward, prepend=True)  # before FSDP's own, which gathers
    return finish


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


def stop_all(ranks: Ranks) -> NoReturn:
    """End an evaluation after a signal that all ranks have agreed on: one line on rank 0, then KeyboardInterrupt."""
    if ranks.rank == 0:
        tqdm.write("stopped by a signal, before the result", file=sys.stderr)
    raise KeyboardInterrupt
