"""The plan's figures that docs/long_context.md, docs/models.md and docs/LOG.md state."""

import pytest

from scripts.plan.machines import cluster_of
from scripts.plan.planner import Plan
from scripts.plan.subject import assumed_subject

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "sequence", "overrides", "gib"),
    [
        ("8B", 131072, ["sharding.context=8", "model.mlp_tiles=16"], 27.0),
        ("30B-A3B", 4096, [], 65.8),
    ],
)
def test_memory_agrees_with_the_pages(name, sequence, overrides, gib) -> None:
    subject = assumed_subject(name, overrides, cluster_of(8, 1, "H100"), sequence=sequence, global_examples=16)
    assert Plan(subject, subject.config).memory.total / 2**30 == pytest.approx(gib, abs=0.05)
