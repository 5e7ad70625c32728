"""What is downloaded from the hub, and what its refusals mean. The exceptions are those of the client's own code."""

import json
import shutil
import sys
import types

import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status
from safetensors.torch import load_file, save_file

from common.errors import UserError
from model import hub
from model.hub import HubUnreachable, explain, fetch_or_verify, files_to_fetch
from tests.tiny import write_tiny_model

SMALL = ["LICENSE", "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
INDEX = "model.safetensors.index.json"
CLIENT = sys.modules[hub_errors.Response.__module__.split(".")[0]]  # httpx, or what the installed version uses instead


@pytest.mark.parametrize(
    ("others", "weights"),
    [
        (
            [
                "consolidated.safetensors",
                "consolidated.safetensors.index.json",
                "tokenizer.model.v3",
                "tekken.json",
                INDEX,
            ],
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "tokenizer.model.v3",
                "tekken.json",
                INDEX,
            ],
        ),
        (["original/consolidated.00.pth", "original/tokenizer.model"], ["model.safetensors"]),
        (
            ["pytorch_model.bin", "model-q4_k.gguf", "onnx/model.onnx", "model.fp16.safetensors", "tf_model.h5"],
            ["model.safetensors"],
        ),
        (["model.safetensors", INDEX], ["weights-a.safetensors", INDEX]),  # loaders prefer the index
    ],
    ids=["mistral", "llama", "copies", "index"],
)
def test_each_weight_is_fetched_once(others, weights):
    assert files_to_fetch({*SMALL, *others, *weights}, "me/model") == sorted([*SMALL, *weights])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["consolidated.safetensors"], "me/m has only consolidated.safetensors on the hub, not safetensors in"),
        (["README.md"], "me/m has no weights on the hub"),
    ],
)
def test_a_repository_without_weights_is_refused(names, message):
    with pytest.raises(UserError, match=message):
        files_to_fetch(names, "me/m")


def answer(status, path="api/models/me/m", **headers):
    """The exception that the client raises for an answer of the hub."""
    request = CLIENT.Request("GET", f"https://huggingface.co/{path}")
    named = {"x-request-id": "r1"} | {name.replace("_", "-"): value for name, value in headers.items()}
    response = CLIENT.Response(status, headers={k: v for k, v in named.items() if v}, content=b"", request=request)
    with pytest.raises(hub_errors.HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


def behind(error):
    """As a download reports it, after it has looked for a copy on the disk."""
    local = hub_errors.LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub.")
    local.__cause__ = error
    return local


EXPIRED = {"x_error_message": "Invalid credentials in Authorization header"}
HF_TOKEN, STORED = "HF_TOKEN", "stored"
GATED = "accept its terms on https://huggingface.co/me/m if it is gated"


@pytest.mark.parametrize(
    ("error", "token", "message"),
    [
        (
            lambda: answer(401, **EXPIRED),
            HF_TOKEN,
            r"to HF_TOKEN \(HTTP status 401: Invalid credentials in .*another token",
        ),
        (
            lambda: answer(401, **EXPIRED),
            STORED,
            "to the token that `hf auth login` has stored .* or none for a public model",
        ),
        (lambda: behind(answer(401, **EXPIRED)), HF_TOKEN, "does not give me/m to HF_TOKEN"),
        (lambda: answer(401), None, "to anybody who is not logged in .*; check the name, .* log in with"),
        (
            lambda: answer(404, x_error_code="RepoNotFound"),
            HF_TOKEN,
            r"me/m to HF_TOKEN \(HTTP status 404\); check the name",
        ),
        (lambda: answer(401, x_error_code="GatedRepo"), None, f"{GATED}, and log in with"),
        (lambda: answer(403, x_error_code="GatedRepo"), STORED, f"{GATED}, and use another token"),
        (lambda: behind(answer(403, x_error_message="no")), None, r"\(HTTP status 403: no\); .* log in with"),
        (lambda: answer(429, x_request_id=""), None, r"\(HTTP status 429\); wait a few minutes"),
        (
            lambda: answer(403, x_error_message="Access to this resource is disabled."),
            None,
            "Access to this resource is dis",
        ),
        (lambda: hub_errors.HFValidationError("bad"), None, "'me/m' is not the id of a model; write ORGANISATION/NAME"),
    ],
)
def test_a_refusal_says_what_to_do(monkeypatch, error, token, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token and "hf_secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token == HF_TOKEN:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match=message) as caught:
        raise explain(error(), "me/m")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            lambda: CLIENT.ConnectError("[Errno -2] Name or service not known"),
            "ConnectError: .* Name or service not known",
        ),
        (lambda: CLIENT.ProxyError("403 Forbidden"), "ProxyError: 403 Forbidden"),
        (lambda: CLIENT.ReadTimeout("timed out"), "ReadTimeout: timed out"),
        (lambda: behind(CLIENT.ConnectError("refused")), "ConnectError: refused"),
        (lambda: hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        (lambda: answer(503), "answers with HTTP status 503"),
        (lambda: answer(403, x_request_id=""), "a proxy on the way, answers with HTTP status 403"),
        (lambda: ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_an_unreachable_hub_is_told_from_a_refusal(monkeypatch, error, reason):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    with pytest.raises(HubUnreachable, match=reason):
        raise explain(error(), "me/m")


@pytest.mark.parametrize("error", [KeyError("sha"), OSError(28, "No space left on device")])
def test_a_bug_or_a_full_disk_stays_what_it_is(error):
    assert explain(error, "me/m") is error


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """Fake a hub with one tiny model in two files, a second copy of its weights, and one more in a folder."""
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
    left = tmp_path / "models" / "tiny.tmp" / "consolidated.safetensors"  # of an earlier attempt
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert "is ready" in fetch_or_verify("me/tiny", tmp_path / "models")
    names = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    names += [INDEX, "tokenizer.json", "tokenizer_config.json"]
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


def test_a_download_that_breaks_off_says_why_and_that_it_continues(remote, tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise behind(CLIENT.ReadTimeout("timed out"))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", broken)
        with pytest.raises(
            UserError, match=r"of me/tiny broke off \(ReadTimeout: timed out\); run this again to continue"
        ):
            fetch_or_verify("me/tiny", tmp_path)
        # Without the hub the client is content with any directory that exists.
        patch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **keywords: None)
        with pytest.raises(UserError, match="chat_template.jinja of me/tiny is missing .*; run this again"):
            fetch_or_verify("me/tiny", tmp_path)


def test_the_listing_of_the_client_is_explained(monkeypatch):
    def refuse(*arguments, **keywords):
        raise answer(401, **EXPIRED)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    with pytest.raises(UserError, match="Invalid credentials"):
        hub.hub_info("me/m")


def test_a_refusal_leaves_nothing_behind(monkeypatch, tmp_path):
    def refuse(model_id):
        raise UserError("no such model")

    monkeypatch.setattr(hub, "hub_info", refuse)
    with pytest.raises(UserError, match="no such model"):
        fetch_or_verify("me/m", tmp_path)
    assert not list(tmp_path.iterdir())


class PretendedApi:
    """What the hub is asked for; `error` is its answer, if it refuses."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def create_repo(self, repository, **options):
        self.asked.append((repository, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(oid="0123456789abcdef")


def test_a_directory_is_pushed_to_a_private_repository_and_never_without_a_card(tmp_path, monkeypatch):
    api = PretendedApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    folder = tmp_path / "release"
    folder.mkdir()
    for card in (None, "# a title\n", "---\ntags: [a]\n---\n"):
        if card:
            (folder / "README.md").write_text(card)
        with pytest.raises(UserError, match="has no model card with a licence .*, and is not pushed without one"):
            hub.push(folder, "me/m", False)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match="--push m must be ORGANISATION/NAME"):
        hub.push(folder, "m", False)
    assert api.asked == []
    said = hub.push(folder, "me/m", False)
    assert said == f"pushed: {folder} -> https://huggingface.co/me/m, commit 0123456789ab"
    assert api.asked[0] == ("me/m", {"private": True, "exist_ok": True})
    assert api.asked[1] == {"repo_id": "me/m", "folder_path": folder, "commit_message": "Upload release"}
    hub.push(folder, "me/m", True)
    assert api.asked[2] == ("me/m", {"private": False, "exist_ok": True})


def test_a_push_that_the_hub_does_not_take_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    for error, message in (
        (hub_errors.OfflineModeIsEnabled("no"), "hub cannot be reached, so .* is not pushed: HF_HUB_OFFLINE or"),
        (CLIENT.ConnectError("refused"), "is not pushed: ConnectError: refused"),
        (answer(401), "the Hugging Face hub does not give me/m to anybody who is not logged in"),
    ):
        api = PretendedApi(error)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda api=api: api)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match=message):
            hub.push(tmp_path, "me/m", False)
        assert len(api.asked) == 1
