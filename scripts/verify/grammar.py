"""The grammar of a record: which entry may follow which, and what a later start must leave as an earlier one fixed it."""

from collections.abc import Sequence

from training.checkpointer import Entry, not_given_up
from training.identity import differences

KINDS = {"start", "prepared", "checkpoint", "evaluation", "pruning", "stop", "certificate", "export"}
AFTER_STOP = {"start", "pruning", "certificate", "export"}  # a start that sets damaged checkpoints aside says so first


def first_problem(entries: Sequence[Entry]) -> str:
    """Return a sentence about the first entry that no run writes after the entries before it; an empty text without one."""
    counted, start, stop = list[Entry](), entries[0], None
    for entry in entries:
        problem = ""
        if entry.kind == "start":
            problem, start = _problem_of_start(counted, stop, entry), entry
        elif entry.kind in ("checkpoint", "evaluation", "stop"):
            total = start.content["total_steps"]
            if not start.step <= entry.step <= total:
                problem = f"is of a step outside of those that {start} trains, which end at {total}"
        if entry.kind not in KINDS:
            problem = "is of a kind that no run writes"
        elif stop and entry.kind not in AFTER_STOP:
            problem = f"follows {stop}, after which only exports and a start may come"
        saved = [each for each in counted if each.kind == entry.kind == "checkpoint" and each.step == entry.step]
        if saved and saved[-1].content["tensors"] != entry.content["tensors"]:
            problem = f"has other tensors than {saved[-1]}, and no start has trained this step again"
        if problem:
            return f"{entry} {problem}"
        counted = not_given_up([*counted, entry]) if entry.kind == "start" else [*counted, entry]
        stop = entry if entry.kind == "stop" else None if entry.kind == "start" else stop
    return ""


def _problem_of_start(counted: list[Entry], stop: Entry | None, start: Entry) -> str:
    """Return what is wrong with a start after the entries that counted before it. stop: of the start before."""
    saved = [entry for entry in counted if entry.kind == "checkpoint"]
    sources = [entry for entry in saved if entry.step == start.step]
    if start.step and not sources:
        return "continues from a step of which no entry has a checkpoint"
    is_set_aside = any(entry.content.get("set_aside") for entry in counted)
    if stop and stop.content["why"] == "finished" and start.step < stop.step and not is_set_aside:
        return f"trains steps again that {stop} had finished"
    # Without a checkpoint nothing is fixed; a kill may have come before the newest one got its name.
    whole = sources or [entry for entry in saved if stop or entry.step != saved[-1].step]
    before = counted[: counted.index(whole[-1])] if whole else []
    trained = [entry for entry in before if entry.kind == "start" and entry.step < whole[-1].step]
    if not trained or start.content["config"]["run"].get("resume") == "changed":
        return ""
    fixed, now = trained[-1].content, start.content
    changes = differences(fixed["identity"], now["identity"])
    for part, digests in now["files"].items():
        known = fixed["files"].get(part, {})
        changes += [f"other bytes in {name}" for name in digests if known.get(name, digests[name]) != digests[name]]
    if not changes:
        return ""
    return f"changes what {trained[-1]} fixed ({'; '.join(changes)}), and run.resume=changed does not stand in it"
