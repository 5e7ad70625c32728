"""Stands in for experiment.launch.run_jobs: one script after the other, in processes that need not import the libraries."""

from collections.abc import Callable, Iterable

from experiment.launch import Ended, Job
from tests.processes import run_python, run_ranks


def run_forked_jobs(
    jobs: Iterable[Job | None], parallel: int = 1, on_end: Callable[[Ended], None] = lambda ended: None
) -> None:
    """Run each job to its end before the next one is asked for, and write its output to its log."""
    for job in jobs:
        assert job is not None, "no job runs, so none can be waited for"
        command = (job.script, *job.options)
        done = run_python(*command) if job.processes == 1 else run_ranks(job.processes, *command)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text(f"\n$ {job.script}\n{done.stdout}{done.stderr}", encoding="utf-8")
        on_end(Ended(job, done.returncode, stopped=False, seconds=1.0))
