"""Export in several files, and on a full disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from distributed.export import export_model
from tests.tiny import write_tiny_model


def test_large_export_has_files_and_an_index(tmp_path, ranks) -> None:
    path = write_tiny_model(tmp_path / "model", tied=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    out = tmp_path / "export"
    out.mkdir()
    (out / "stale").write_text("from an earlier export")

    def write_rest(folder: Path) -> None:
        model.config.save_pretrained(folder)

    before = ranks.watch.progress
    export_model(out, dict(model.named_parameters()), torch.float32, ranks, write_rest, max_file_bytes=150_000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert ranks.watch.progress == before + len(files)  # run.timeout_minutes is for each of them
    assert not (out / "stale").exists() and not (tmp_path / "export.tmp").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert sorted(set(index["weight_map"].values())) == files
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert all(4 * sum(t.numel() for t in load_file(out / f).values()) <= 150_000 for f in files)


def test_full_disk_keeps_the_older_export(tmp_path, ranks, monkeypatch) -> None:
    parameters = {"weight": torch.nn.Parameter(torch.ones(2**18))}  # 1 MiB
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    with pytest.raises(UserError, match="the export needs 1 MiB, but the disk has 0 MiB free; free 1 MiB"):
        export_model(tmp_path / "export", parameters, torch.float32, ranks, lambda folder: None)
    assert (tmp_path / "export" / "old").exists()
