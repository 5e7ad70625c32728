"""The checkpoints of a run: from which one it continues, when it saves, and which of them are known to be good."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Run
from distributed.checkpoint import Saver, is_plain
from distributed.checkpoint_directory import (
    MANIFEST,
    SET_ASIDE,
    complete_checkpoints,
    find_checkpoint,
    read_manifest,
    set_aside_after,
    step_of,
)
from distributed.process_group import StopSignal, read_on_first
from training.evaluations import Evaluations
from training.identity import EXCLUDED, FIRST_STEP, Identity, check_identity
from training.log import Log
from training.record import RunRecord, plan_after


class Checkpointer:
    """Finds, loads and saves the checkpoints of one run. Every rank calls each of its methods.

    A checkpoint has what `distributed.checkpoint.Saver` saves, and in its manifest the loop's `state`, that of the
    evaluations, and what the run is: its `identity` (training/identity.py) and its other `settings`. `find` comes first, then
    `save_from`, `register` and `load`.
    """

    saver: Saver  # from `save_from` on

    def __init__(
        self,
        directory: Path,
        run: Run,
        identity: Identity,
        settings: dict,
        evaluations: Evaluations,
        stop: StopSignal,
        log: Log,
        record: RunRecord,
    ) -> None:
        self.directory, self.run, self.stop, self.log, self.record = directory, run, stop, log, record
        self.identity, self.settings, self.evaluations = identity, settings, evaluations
        self.trained_as = identity  # of the weights as they are: this start's, once it has taken a step
        self.resume_from: Path | None = None
        self.saved_step = self.saved_updates = 0  # of the newest checkpoint; 0: the base model
        self.saved_at = 0.0  # on rank 0's clock: of the last save, or of the first step of this start
        self.proven_step = 0  # the newest from whose weights a finite loss and gradient norm have been computed

    def find(self, state: dict, total_steps: int, exclusion: Any = None) -> list[str]:
        """Put what the newest checkpoint says into `state` and the evaluations. Returns lines for the user.

        With an `exclusion` (data/find.py) that is new to the run it is the newest checkpoint that has not seen what is excluded.

        Raises UserError if the checkpoint is damaged, is of another identity, is beyond `total_steps`, or is not what the
        record of the run says.
        """
        ranks, num_sources = self.stop.ranks, len(state["targets"])
        checkpoint, passed_over = find_checkpoint(self.directory, self.run.resume, ranks)
        lines = [f"warning: passed over and renamed to NAME{SET_ASIDE}: {problem}" for problem in passed_over]
        newest, seen = checkpoint, None
        if exclusion:
            checkpoint, seen = read_on_first(lambda: self._newest_without(exclusion, newest), ranks)
        saved = read_on_first(lambda: read_manifest(checkpoint)["state"] if checkpoint else None, ranks)
        changes = []
        if checkpoint and saved:
            if exclusion:  # up to this step the run would have been the same
                same = {name: self.identity["the data"][name] for name in (EXCLUDED, FIRST_STEP)}
                saved["identity"]["the data"] |= same
            self.identity, changes = check_identity(checkpoint, saved, self.identity, self.settings, self.run.resume)
        if exclusion:
            more = read_on_first(lambda: self._leave_out(exclusion, checkpoint, newest, seen), ranks)
            lines += [*exclusion.lines, *more]
        if not checkpoint or not saved:
            export, aside = self.directory.with_name("export"), f"step-*{SET_ASIDE}"
            if read_on_first(lambda: export.exists() and not list(self.directory.glob(aside)), ranks):
                raise UserError(
                    f"{export} exists, but the checkpoints of its run are gone; to train again from the base model, choose "
                    f"another run.name or remove {export.parent}"
                )
            return lines + self.record.continue_from(0, None, bytes)
        self.trained_as = saved["identity"]
        if saved["step"] > total_steps:
            raise UserError(
                f"{checkpoint} is at step {saved['step']}, beyond the {total_steps} steps of this config; raise "
                "optimizer.max_steps or optimizer.epochs, or choose another run.name"
            )
        counted = saved["loop"]
        state |= {key: counted[key] for key in state if key in counted}
        if self.is_changed:
            state["bad_steps_in_a_row"] = 0  # another learning rate starts with a clean record
            if self.trained_as["the data"]["data.mix"] != self.identity["the data"]["data.mix"]:
                state["targets"] = [0] * num_sources  # of other sources
        changes += self.evaluations.load_state_dict(saved)
        self.saved_step, self.saved_updates = saved["saved_step"], saved["saved_updates"]
        self.proven_step, self.resume_from = saved["proven_step"], checkpoint
        manifest = read_on_first(lambda: sha256(checkpoint / MANIFEST), ranks)
        lines += self.record.continue_from(
            saved["step"], manifest, lambda: self.log.kept(saved["step"], saved["evaluated"])
        )
        if passed_over:  # else the next start would find the damaged one again
            read_on_first(lambda: set_aside_after(self.directory, saved["step"], self.record.append, "damaged"), ranks)
        return lines + changes

    @property
    def is_changed(self) -> bool:
        """Whether this start continues a run of another identity (run.resume=changed)."""
        return self.trained_as != self.identity

    def save_from(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """From now on these are loaded and saved. Call it right after the optimizer is made."""
        run = self.run
        options = run.keep_last, run.async_save, run.timeout_minutes, self.record.append
        self.saver = Saver(self.directory, parameters, optimizer, self.stop.ranks, *options)

    def register(self, name: str, thing: Any) -> None:
        """Keep in every checkpoint what else has a state, such as an average of the weights: `Saver.register`."""
        self.saver.register(name, thing)

    def load(self, state: dict) -> list[str]:
        """Read the checkpoint that `find` has found, if any, in place. Returns lines for the user.

        Raises UserError if `state`, which the loop counts, cannot be saved.
        """
        if wrong := [key for key, value in state.items() if not is_plain(value)]:
            raise UserError(
                f"train.py: state[{wrong[0]!r}] is a {type(state[wrong[0]]).__name__}; use numbers, strings and lists, and "
                "checkpointer.register for tensors"
            )
        return self.saver.load(self.resume_from)

    def is_due(self, step: int) -> bool:
        """Whether a save is due by steps or by rank 0's clock, since the last one: the same on every rank."""
        every, clock = self.run.save_every, self.stop.clock
        self.saved_at = self.saved_at or clock
        by_time = 0 < 60 * self.run.save_minutes <= clock - self.saved_at
        return by_time or (every > 0 and step // every > self.saved_step // every)

    def save(self, state: dict) -> None:
        """Save the state after the last finished step, unless that is saved already."""
        if state["step"] <= self.saved_step:
            return
        self.stop.ranks.watch.at(f"the save of step {state['step']}")
        self.log.sync()  # the rows of a saved step are durable
        if state["updates"] > self.saved_updates:  # steps were taken from the previous checkpoint, so it is proven
            self.proven_step = self.saved_step
        self.saved_step, self.saved_updates = state["step"], state["updates"]
        self.saved_at, self.trained_as = self.stop.clock, self.identity
        with self.stop.saving():
            self.saver.save(self._manifest(state), **self.record.so_far())
        self.show_saves()

    def update(self, state: dict) -> None:
        """If this step is saved: let its manifest say what has been evaluated since."""
        if 0 < state["step"] == self.saved_step:
            self.log.sync()
            self.saver.update_state(self._manifest(state), **self.record.so_far())

    def show_saves(self) -> None:
        """Log the saves in the background that have finished. Raises UserError on all ranks if one has failed."""
        for times in self.saver.poll():
            self.log.save(times)

    def close(self) -> None:
        """Wait until everything is durable."""
        with self.stop.saving():
            for times in self.saver.close():
                self.log.save(times)

    def give_up(self, what: str, updates: int) -> NoReturn:
        """Let the run continue from the newest checkpoint that is known to be good, and raise UserError.

        A checkpoint is known to be good when a finite loss has been computed from its weights. Later ones are renamed.
        """
        self.saver.wait()
        good = self.saved_step if updates > self.saved_updates else self.proven_step
        renamed = read_on_first(
            lambda: set_aside_after(self.directory, good, self.record.append, what), self.stop.ranks
        )
        aside = (
            f"; {', '.join(renamed)} in {self.directory} may hold bad weights and will not be used" if renamed else ""
        )
        start = f"the checkpoint of step {good}, which is good" if good else "the base model"
        again = " with run.resume=changed" if good else ""
        raise UserError(
            f"{what}{aside}; lower optimizer.learning_rate, or check the data of these steps, and start again{again}: the "
            f"run continues from {start}"
        )

    def stopped(self, state: dict, total_steps: int) -> str:
        """Where a signal has stopped the run, in words."""
        where = f"stopped after step {state['step']}/{total_steps}"
        if self.saved_step == state["step"]:
            return where + (", saved" if state["step"] else "")
        bad = state["bad_steps_in_a_row"]
        return f"{where}, whose last {bad} steps were skipped; the last saved step is {self.saved_step}"

    def _newest_without(self, exclusion: Any, newest: Path | None) -> tuple[Path | None, int | None]:
        """(the newest checkpoint that has seen nothing of what is excluded, the step that did, counted from 1). For rank 0 alone.

        None: the base model; no step. A checkpoint of another exclusion is passed over: it may lack what is trained on now. Raises
        UserError if its steps were not those of the plan as it is now, which says when an example was seen.
        """
        if newest is None or _excluded(newest) == exclusion.fingerprint:
            return newest, None
        seen = exclusion.first_step(step_of(newest))
        last = step_of(newest) if seen is None else seen
        possible = [
            path for path in complete_checkpoints(newest.parent) if step_of(path) <= last and not _excluded(path)
        ]
        plan, good = "", possible[-1] if possible else None
        for step in range(step_of(good) if good else 0):
            plan = plan_after(plan, step + 1, self.record.sources, tuple(exclusion.whole.items(step)))
        if good and self.record.named(step_of(good), sha256(good / MANIFEST)).content["plan"] != plan:
            raise UserError(
                f"{good} was trained on other documents, or in another order, than what is set now (run.resume=changed), so that "
                "it may have seen what data.exclude names; leave them out of a new run, with another run.name"
            )
        return good, None if seen is None else seen + 1

    def _leave_out(self, exclusion: Any, good: Path | None, newest: Path | None, seen: int | None) -> list[str]:
        """Record the exclusion and set the checkpoints after `good` aside; returns lines for the user. For rank 0 alone."""
        step = step_of(good) if good else 0
        recorded = [entry.content["fingerprint"] for entry in self.record.read() if entry.kind == "exclusion"]
        if good != newest or exclusion.fingerprint not in recorded:
            content = {"fingerprint": exclusion.fingerprint, "examples": exclusion.digests, "seen_in_step": seen}
            self.record.append("exclusion", step=step, **content)
        if good == newest:
            return []
        why = f"step {seen} has seen an example of data.exclude" if seen else "data.exclude has changed"
        aside = ", ".join(set_aside_after(self.directory, step, self.record.append, why))
        start = f"the checkpoint of step {step}" if good else "the base model"
        return [f"warning: {why}: the run continues from {start}; {aside} are not used any more"]

    def _manifest(self, state: dict) -> dict:
        return {
            "identity": self.trained_as,
            "settings": self.settings,
            "step": state["step"],
            "loop": state,
            **self.evaluations.state_dict(),
            "saved_step": self.saved_step,
            "saved_updates": self.saved_updates,
            "proven_step": self.proven_step,
        }


def _excluded(checkpoint: Path) -> str | None:
    return read_manifest(checkpoint)["state"]["identity"]["the data"].get(EXCLUDED)
