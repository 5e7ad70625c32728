"""A sharded model gives the results of a whole one on 3 ranks, and each rank holds its part of the parameters."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eval.generate import greedy_answers
from tests.processes import run_ranks
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow
WORLDS = (1, 3)
MODELS = ("tied", "untied")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_tiny_model(folder / "tied")
    write_tiny_model(folder / "untied", "qwen2", tied=False, vocab_size=391)
    write_tiny_model(folder / "padded", "qwen3", vocab_size=391)
    config = json.loads((folder / "padded" / "config.json").read_text()) | {"make_vocab_size_divisible_by": 64}
    (folder / "padded" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "padded", folder / "padded-tuned")
    noise = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "padded" / "model.safetensors")
    noisy = {name: t + 0.02 * torch.randn(t.shape, generator=noise) for name, t in tensors.items()}
    save_file(noisy, folder / "padded-tuned" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "tied", folder / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in MODELS:  # the third token after one prompt ends answers, so that they have different lengths
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        answer = greedy_answers(model, [[0, 1, 2]], set(), 3, 1)[0]
        (folder / f"{name}.stops").write_text(str(answer[-1]))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict]]:
    """World size -> the results of each rank."""
    found = {}
    for world in WORLDS:
        done = run_ranks(world, Path(__file__).with_name("sharded_worker.py"), folder)
        assert done.returncode == 0, done.stderr[-6000:]
        found[world] = [json.loads((folder / f"{world}.{rank}.json").read_text()) for rank in range(world)]
    return found


def same(one: object, other: object) -> bool:
    """Equal, with numbers to 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5)
    return one == other


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_losses_are_those_of_one_rank_that_holds_the_whole_model(results, name):
    reference = results[1][0][f"{name} whole"]
    assert len({len(answer) for answer in reference["answers"]}) > 1
    for rank in results[3]:
        for kind in ("whole", "sharded"):
            found = rank[f"{name} {kind}"]
            assert found["answers"] == reference["answers"], kind
            assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5), kind


def test_ranks_without_an_example_take_part(results):
    reference = results[1][0]["few whole"]
    for rank in results[3]:
        assert rank["few sharded"]["answers"] == rank["few whole"]["answers"] == reference["answers"]
    first = results[1][0]["tied whole"]
    for rank in results[3]:
        assert rank["one sharded"]["answers"] == first["answers"][:1]
        assert rank["one sharded"]["losses"] == pytest.approx(first["losses"][:1], rel=1e-5)


def test_bf16_is_the_same_sharded_and_whole(results):
    for rank in results[3]:
        whole, sharded = rank["tied bf16 whole"], rank["tied bf16 sharded"]
        assert sharded["answers"] == whole["answers"]
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        total = sum(other["tied bf16 sharded"]["bytes"][0] for other in results[3])
        assert total == whole["bytes"][1] == rank["tied whole"]["bytes"][1] // 2


def test_forgetting_is_the_same_sharded_and_whole_with_a_padded_vocabulary(results):
    reference = results[1][0]["forgetting whole"]
    assert reference["kl"]["value"] > 0.01
    for rank in results[3]:
        for kind in ("whole", "sharded"):
            assert same(rank[f"forgetting {kind}"], reference), kind
    one = [rank["forgetting one sharded"] for rank in results[3]]
    assert one == [one[0]] * 3 and one[0]["texts"] == 1


def units(path: Path, tied: bool) -> tuple[int, int]:
    """Bytes of the root unit and of the largest other unit in fp32, from the file of the weights."""
    sizes: dict[str, int] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        parts = name.split(".")
        unit = ".".join(parts[:3]) if "layers" in parts else name
        if tied and "embed_tokens" in name or name == "model.norm.weight":
            unit = "root"
        sizes[unit] = sizes.get(unit, 0) + tensor.nbytes
    return sizes.pop("root"), max(sizes.values())


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_holds_its_part_and_gathers_one_unit_at_a_time(folder, results, name):
    tensors = load_file(folder / name / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    root, largest = units(folder / name, tied=name != "untied")
    found = [rank[f"{name} sharded"] for rank in results[3]]
    # Each parameter is split by rows; every rank but the last ones has ceil(rows / ranks) of them.
    at_most = sum(-(-len(tensor) // 3) * tensor[0].nbytes for tensor in tensors.values())
    assert sum(one["bytes"][0] for one in found) == total
    for one in found:
        assert one["bytes after"][1] == root  # the root stays gathered, and nothing else
        assert one["bytes"][0] <= at_most < 1.02 * total / 3 and one["bytes"][1] == 0
        assert one["most gathered"] == root + largest < 0.8 * total
    assert all(rank[f"{name} whole"]["bytes"] == [0, total] for rank in results[3])


def test_bf16_needs_it_on_every_rank(results):
    assert {rank["agreed dtype"] for rank in results[3]} == {"torch.float32"}


def test_a_rank_that_cannot_load_stops_all_ranks_with_its_sentence(folder, results):
    for rank in results[3]:
        sharded, whole = rank["missing"]
        assert sharded.startswith(f"{folder / 'broken'} has neither model.safetensors nor")
        assert whole.startswith(f"{folder / 'broken'} cannot be loaded")


def test_a_signal_on_one_rank_stops_all_ranks_before_the_same_forward(results):
    assert [rank["stopped"] for rank in results[3]] == [["stopped after 3 forwards", "stopped"]] * 3
