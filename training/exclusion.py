"""Where a run goes on that data.exclude changes: before the first step that has seen what is left out now."""

from pathlib import Path

from data.find import Exclusion
from distributed.checkpoint_directory import complete_checkpoints, read_manifest, set_aside_after, step_of
from training.identity import EXCLUDED
from training.record import Record


def newest_without(exclusion: Exclusion, newest: Path | None) -> tuple[Path | None, int | None]:
    """(the newest checkpoint that has seen nothing of what is excluded, the step that did, counted from 1). For rank 0 alone.

    None: the base model; no step. A checkpoint of another exclusion is passed over: it may lack what is trained on now.
    """
    if newest is None or _excluded(newest) == exclusion.fingerprint:
        return newest, None
    seen = exclusion.first_step(step_of(newest))
    last = step_of(newest) if seen is None else seen
    possible = [path for path in complete_checkpoints(newest.parent) if step_of(path) <= last and not _excluded(path)]
    return (possible[-1] if possible else None), None if seen is None else seen + 1


def leave_out(
    exclusion: Exclusion, good: Path | None, newest: Path | None, seen: int | None, record: Record
) -> list[str]:
    """Record the exclusion and set the checkpoints after `good` aside; returns lines for the user. For rank 0 alone."""
    step = step_of(good) if good else 0
    recorded = [entry.content["fingerprint"] for entry in record.read() if entry.kind == "exclusion"]
    if good != newest or exclusion.fingerprint not in recorded:
        content = {"fingerprint": exclusion.fingerprint, "examples": exclusion.digests, "seen_in_step": seen}
        record.append("exclusion", step=step, **content)
    if good == newest:
        return []
    why = f"step {seen} has seen an example of data.exclude" if seen else "data.exclude has changed"
    aside = ", ".join(set_aside_after(record.directory / "checkpoints", step, record.append, why))
    start = f"the checkpoint of step {step}" if good else "the base model"
    return [f"warning: {why}: the run continues from {start}; {aside} are not used any more"]


def _excluded(checkpoint: Path) -> str | None:
    return read_manifest(checkpoint)["state"]["identity"]["the data"].get(EXCLUDED)
