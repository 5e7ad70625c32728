"""What ranks say when they are about to train with different inputs. test_watch.py has real processes that do."""

import pytest

from common.errors import UserError
from distributed.process_group import disagreement, world_size_from_environment

FIX = "; give all ranks the same files, config and versions"


def test_differing_ranks_are_named_with_values() -> None:
    assert disagreement([("a", {"steps": "8"}), ("b", {"steps": "8"})]) is None
    expected = f"rank 1 on host a differs from rank 0 on host a in ewc (1 instead of nothing){FIX}"
    assert disagreement([("a", {}), ("a", {"ewc": "1"})]) == expected
    same, short, longer = {"steps": "8", "lr": "1"}, {"steps": "7", "lr": "1"}, {"steps": "9"}
    gathered = [("a", same)] * 8 + [("b", short)] * 8 + [("c", same)] * 2 + [("d", longer)]
    assert disagreement(gathered) == (  # those with the same difference in one phrase
        "ranks 8-15 on host b differ from rank 0 on host a in steps (7 instead of 8); rank 18 on host d differs from rank 0 on "
        f"host a in steps (9 instead of 8), lr (nothing instead of 1){FIX}"
    )


def test_long_values_are_cut_around_the_difference() -> None:
    start = "x" * 1000
    message = disagreement([("a", {"digest": start + "1" * 500}), ("a", {"digest": start + "2" * 500})])
    assert message is not None and len(message) < 250
    assert f"...{'x' * 24}{'2' * 24}... instead of ...{'x' * 24}{'1' * 24}..." in message
    message = disagreement([("a", {str(i): "1" for i in range(20)}), ("a", {str(i): "2" for i in range(20)})])
    assert message is not None and message.count("instead of") == 4 and ", 16 more;" in message


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0", "MASTER_ADDR": "a"},
    ],
)
def test_incomplete_launcher_environment_is_one_sentence(variables, monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the environment of the launcher is not complete: RANK is"):
        world_size_from_environment()
