"""Check an export: it loads in transformers and generates, and other loaders know its tensors."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from data.chat_settings import read_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import load_tokenizer
from model.adapter import adapter_of_directory, merge
from model.language_model import build_on_meta
from model.serving_names import gguf_line, vllm_line
from model.weight_files import stored_tensors
from model.weights import weights_of_directory

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
NEW_TOKENS = 8


def verify_model(out: Path, converter: Path | None = None) -> tuple[bool, list[str]]:
    """(whether all checks passed, one line for each). `converter`: llama.cpp's convert_hf_to_gguf.py, to be run.

    Loads the model as a whole. Raises UserError if it cannot be read at all.
    """
    config = AutoConfig.from_pretrained(out)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(out).items()}
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    model, info = loaded
    checks = [_transformers_line(out, model, info), vllm_line(config, shapes), gguf_line(config, shapes)]
    if converter is not None:
        checks.append(_converted_line(out, model, converter))
    return all(good for good, _ in checks), [line for _, line in checks]


def verify_adapter(out: Path, base: Path) -> tuple[bool, list[str]]:
    """The same for an adapter: its files are whole, and its matrices fit those of the base."""
    adapter = adapter_of_directory(out)
    merge(
        weights_of_directory(base, build_on_meta(AutoConfig.from_pretrained(base))), adapter
    )  # refuses what does not fit
    load_tokenizer(str(out))
    return True, [f"adapter: {len(adapter.modules)} pairs of matrices fit the base model by names and shapes"]


def _transformers_line(out: Path, model: Any, info: dict) -> tuple[bool, str]:
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        return False, f"transformers: {len(wrong)} tensors are missing, unexpected or of another shape: {wrong[0]}"
    tokenizer = load_tokenizer(str(out))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        return False, f"transformers: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"
    stated = model.generation_config.eos_token_id if model.generation_config else None
    stops: set[int] = set(stated if isinstance(stated, list) else [] if stated is None else [stated])
    taught = set(ExampleEncoder(tokenizer, read_chat_settings(out)).stop_ids)
    if not taught <= stops:
        return False, f"transformers: generation does not stop at {sorted(taught - stops)}, which end an answer"
    ids = _prompt(out)
    with torch.no_grad():
        finite = bool(torch.isfinite(model(ids).logits).all())
        answer = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    if not finite:
        return False, "transformers: the logits of a short chat are not finite"
    return True, (
        f"transformers: loads as {type(model).__name__} in {str(model.dtype).removeprefix('torch.')}, {len(tokenizer)} tokens; "
        f"generation stops at {sorted(stops)}; {answer.shape[1] - ids.shape[1]} tokens of a chat generated"
    )


def _prompt(out: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(out)
    return tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def _converted_line(out: Path, model: Any, converter: Path) -> tuple[bool, str]:
    """Run the converter, load its file with transformers, and compare the logits of a short chat in fp32."""
    if not converter.is_file():
        raise UserError(f"--converter {converter}: no such file; name convert_hf_to_gguf.py of llama.cpp")
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as folder:
        file = Path(folder, "model.gguf")
        command = [sys.executable, str(converter), str(out), "--outtype", kind, "--outfile", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not file.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return False, f"llama.cpp: its converter failed: {last}"
        size = file.stat().st_size / 2**20
        try:
            again: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            return True, f"llama.cpp: converted to {size:,.0f} MiB; transformers cannot read it back here ({error})"
        ids = _prompt(out)
        with torch.no_grad():
            difference = (again(ids).logits - model.float()(ids).logits).abs().max().item()
    good = difference < 1e-3
    return (
        good,
        f"llama.cpp: converted to {size:,.0f} MiB ({kind}), read back: logits differ by at most {difference:.2g}",
    )
