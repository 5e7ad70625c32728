"""Host memory stays flat over micro-batches of many lengths, and each of 2 ranks loads only its half of a model."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from distributed import host_memory
from model.dtypes import has_native_bf16
from model.language_model import build_on_meta, parameter_names
from tests.processes import CAN_FORK, ROOT, run_python, run_ranks

WORKER = """
import resource, sys
sys.path[0] = {root!r}
import torch
from distributed.process_group import start_process_group
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_weights
from tests.sharded import shard_model

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024

ranks = start_process_group()
model = build_on_meta(read_model_config({path!r}))
shard_model(model, ranks)
before = resident()
load_weights(model, {path!r}, ranks.device)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open({path!r} + f"/grown.{{ranks.rank}}", "w").write(f"{{resident() - before}} {{peak - before}}")
"""


@pytest.mark.slow
def test_two_ranks_share_the_memory(tmp_path) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=8001,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    shapes = {name: p.shape for name, p in parameter_names(build_on_meta(config)).items()}
    size = sum(shape.numel() for shape in shapes.values()) * 4
    assert size > 3e8
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT), path=str(tmp_path)))
    process = run_ranks(2, worker, OMP_NUM_THREADS="1")
    (tmp_path / "model.safetensors").unlink()  # pytest keeps the folders of the last runs
    assert process.returncode == 0, process.stderr[-3000:]
    for rank in range(2):
        grown, peak = (int(n) for n in (tmp_path / f"grown.{rank}").read_text().split())
        assert 0.49 * size < grown < 0.55 * size, (rank, grown / size)
        assert peak < 0.65 * size, (rank, peak / size)


GROWTH = """
import sys
sys.path[0] = {root!r}
import torch
from distributed.host_memory import keep_freed_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

if sys.argv[1] == "limited":
    keep_freed_memory()
weight = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
for tokens in range(33, 1033):
    (torch.ones(tokens, 64, dtype=torch.bfloat16) @ weight).sum().backward()
    if tokens in (232, 1032):
        print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="Linux on a machine without a GPU")
def test_memory_stays_flat_over_a_thousand_lengths(tmp_path, monkeypatch) -> None:
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # another test may have set them
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "growth.py"
    script.write_text(GROWTH.format(root=str(ROOT)))

    def megabytes(which: str) -> list[float]:
        return [float(mb) for mb in run_python(script, which, OMP_NUM_THREADS="1").stdout.split()]

    before, after = megabytes("limited")
    assert after < 1.1 * before
    if torch.backends.mkldnn.is_available() and has_native_bf16(torch.device("cpu")):  # without the limit memory grows
        free_before, free_after = megabytes("free")
        assert free_after - free_before > 100 and after - before < (free_after - free_before) / 5


def test_pages_of_files_are_free_in_a_container(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    before = host_memory.free_bytes(torch.device("cpu"), 2)
    assert 0 < before < 2**50
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 700000\nactive_file 300000\n")
    assert host_memory.free_bytes(torch.device("cpu"), 2) == (2_000_000 - 1_500_000 + 1_000_000) // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free_bytes(torch.device("cpu"), 2) > 1_500_000
