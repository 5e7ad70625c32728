"""One thread for PyTorch, a process group of one, the list of slow tests, and the order in which processes share the files."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

gc.disable()  # until all tests are collected: what is imported is never garbage
# A thread that waits for the others of a product must not spin: the other test process needs the core. Read at the import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
import torch.distributed as dist

from distributed.process_group import Ranks
from tests.code_memory import VARIABLE

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other
# How long an example takes is what else the machine does.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

# Folders, files and tests that start processes or take more than about two seconds; `-m "not slow"` leaves them out. Files
# may also use the mark themselves, as those in distributed/ do.
SLOW = (
    "xbrl/corpus/test_archive.py::test_an_archive_becomes_examples",
    "xbrl/corpus/test_archive.py::test_findings_change_labels_and_contradicting_letters_are_listed",
    "xbrl/corpus/test_archive.py::test_mistake_in_findings_ends_in_one_sentence",
    "xbrl/corpus/test_archive.py::test_pairs_file_matches_letters_that_name_no_report",
    "xbrl/corpus/test_disagreements.py::test_generated_letters_agree_only_with_their_reports",
    "xbrl/read/test_xbrl_command.py",
    "data/test_store.py::test_memory_of_reading_does_not_grow_with_store",
    "eval/test_forgetting.py",
    "eval/test_generate.py::test_batch_answers_equal_single_answers",
    "eval/test_intervals.py::test_identical_results_have_no_uncertainty",
    "eval/test_sample_replay.py",
    "eval/test_positions.py::test_positions_are_measured_with_scaled_rope",
    "model/ewc/test_fisher.py",
    "model/test_compile.py",
    "training/test_budget.py",
    "model/vocabulary/test_tokenizer.py::test_every_text_decodes_as_before",
    "scripts/plan/test_command.py",
    "scripts/test_compare.py",
    "scripts/test_data.py",
    "scripts/test_evaluate.py",
    "scripts/test_export.py",
    "scripts/test_extend_vocabulary.py",
    "scripts/test_help.py",
    "scripts/test_replay.py",
    "scripts/test_train_arguments.py",
)

# The files that take more than about ten seconds, the longest first.
LONGEST = (
    "distributed/test_two_hosts.py",
    "distributed/test_compile.py",
    "model/test_memory.py",
    "test_recipes.py",
    "scripts/check/test_check.py",
    "scripts/test_chaos.py",
    "distributed/test_survival.py",
    "rehearsal/test_pretended_gpu.py",
    "distributed/test_types.py",
    "distributed/test_watch.py",
    "scripts/plan/test_command.py",
    "model/test_compile.py",
    "distributed/test_context.py",
    "distributed/test_experts.py",
    "gpu/test_proof.py",
    "distributed/test_train.py",
    "distributed/test_durable_runs.py",
    "distributed/test_answers.py",
    "scripts/test_export.py",
    "training/test_budget.py",
    "model/ewc/test_fisher.py",
    "scripts/test_replay.py",
    "test_reference_loop.py",
    "scripts/sweep/test_sweep_command.py",
    "eval/test_generate.py",
    "data/test_labels.py",
    "eval/test_forgetting.py",
    "xbrl/corpus/test_corpus.py",
    "distributed/test_record.py",
    "scripts/test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for slow in SLOW:
        path, _, name = slow.partition("::")
        if not (root / path).exists() or (name and f"def {name}(" not in (root / path).read_text(encoding="utf-8")):
            raise pytest.UsageError(f"tests/conftest.py: SLOW names {slow}, which does not exist")
    for item in items:
        name = f"{item.path.relative_to(root).as_posix()}::{getattr(item, 'originalname', item.name)}"
        if any(name == slow or name.startswith((f"{slow}::", f"{slow}/")) for slow in SLOW):
            item.add_marker(pytest.mark.slow)
    # Each process takes the next file when it is done with one (scripts/test.sh): the long files come first, and the last
    # ones are short, so that all end together.
    first = {root / name: number for number, name in enumerate(LONGEST)}
    if missing := [path for path in first if not path.exists()]:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST names {missing[0]}, which does not exist")
    slow_tests = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (first.get(item.path, len(first)), -slow_tests[item.path], item.path))
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def code_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the workers of this process remember of the code (code_memory.py)."""
    os.environ[VARIABLE] = str(tmp_path_factory.getbasetemp() / "code.json")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()
