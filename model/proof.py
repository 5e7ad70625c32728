"""The proof of a model type before it is trained: a small model of the same kind against transformers, document by document.

tests/model/test_equivalence.py proves the types of `architectures.PROVED` in advance. For any other type the run proves it at its
start: it builds a random model with the real head and state sizes, few layers (each kind of layer is there), a small width and few
experts, and writes it with transformers' `save_pretrained`. The loss of packed documents and every gradient must equal
transformers' own, computed for each document alone with eager attention; changing a document must not change another; and the
files that an export would write must equal transformers'. If only packing fails, the run computes one document at a time.
"""

import copy
import hashlib
import json
import math
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.durable_files import write_json
from common.errors import UserError
from data.batches import MicroBatch
from model.architectures import is_proved, switch_off_randomness
from model.language_model import (
    PackedLanguageModel,
    build_on_meta,
    load_weights,
    parameter_names,
    tensors_in_files,
)
from model.loss import chunked, negative_log_likelihood
from model.weight_files import stored_tensors

DIRECTORY = Path("artifacts/proofs")  # results by key; a run reads its own again
LENGTHS = (37, 5, 64, 21)  # of the documents, in tokens
WINDOW = 8  # tokens; sliding windows and chunks of the small model, shorter than its documents
MOST_PARAMETERS = 2**30  # of the small model, 4 GiB in fp32
# Relative errors in fp32. Rounding gives up to 1e-6 and 1e-4 (deep recurrences 6e-4); a leak or a wrong mask 1e-3 to 1.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
HEAD_FACTOR = 8  # for logits of several nats
INSIDE_EXPERTS = 1e-4  # the rounding of a product over an expert's tokens depends on their number


@dataclass(frozen=True)
class Proof:
    """The result: whether documents may be packed, the property that failed if not, and the errors that were measured."""

    packed: bool
    failed: str = ""
    size: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0

    def lines(self, kind: str) -> list[str]:
        """Return what a run says at its start about its model type, `kind`. [] if tests have proved the type in advance."""
        if not self.size:
            return []
        line = (
            f"proved {kind} with {self.size}: loss within {max(self.loss_error, 1e-8):.0e}, gradients within {max(self.gradient_error, 1e-8):.0e} of "
            "transformers, documents isolated, files equal"
        )
        if self.packed:
            return [line]
        return [f"{line}; not packed, because {self.failed}: each document has its own forward, which is slower"]


def prove(config: PretrainedConfig, device: torch.device, directory: Path = DIRECTORY) -> Proof:
    """Return the proof of the model of `config`, from `directory` if it was found before with the same code and device.

    Takes seconds, and no collective: one rank calls it. Raises UserError with the property that failed if the type cannot be
    trained even one document at a time.
    """
    if is_proved(config):
        return Proof(packed=True)
    small = shrink(config)
    switch_off_randomness(small)
    path = directory / f"{_key(small, device)}.json"
    if path.is_file():
        return Proof(**json.loads(path.read_text(encoding="utf-8")))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        proof = _prove(small, device)
    with suppress(OSError):  # on a directory that only root may write, each start proves the type again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(proof))
    return proof


def _key(small: PretrainedConfig, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [
        small.to_json_string().encode(),
        torch.__version__.encode(),
        transformers.__version__.encode(),
        name.encode(),
        *code,
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _prove(small: PretrainedConfig, device: torch.device) -> Proof:
    kind = small.model_type
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs = _random_model(small)
        theirs.save_pretrained(folder)
        size = f"{small.num_hidden_layers} layers, width {small.hidden_size}"
        theirs = _reference(folder, device)
        documents = [torch.randint(3, min(small.vocab_size, 259), (n,), device=device) for n in LENGTHS]
        with torch.no_grad():
            first, second = (theirs(input_ids=documents[0][None], use_cache=False).logits for _ in range(2))
        if not torch.equal(first, second):
            raise UserError(
                f"model type {kind} cannot be trained here: two forwards of one batch differ in train mode, because its layers "
                "draw random numbers"
            )
        total = sum(
            F.cross_entropy(
                theirs(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="sum"
            )
            for ids in documents
        )
        assert isinstance(total, torch.Tensor)
        total.backward()
        why_alone = ""
        for is_packed in (True, False):
            model = build_on_meta(small)
            if not is_packed:
                model.one_document_at_a_time()
            try:
                load_weights(model, folder, device)
                model.train()
                loss, gradient = _errors(model, documents, theirs, total.item())
                _check_isolation(model, documents)
                _check_files(model, folder)
            except UserError as error:
                failed = str(error).replace(folder, kind)
            except (
                ArithmeticError,
                AttributeError,
                IndexError,
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                failed = f"its forward failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            else:
                return Proof(is_packed, why_alone, size, loss, gradient)
            if not is_packed:
                raise UserError(f"model type {kind} cannot be trained here: {failed}")
            why_alone = failed
    raise AssertionError


def _reference(folder: str, device: torch.device) -> PreTrainedModel:
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except ValueError:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return nn.Module.to(theirs, device).train()  # pyright: ignore[reportReturnType]


def _random_model(small: PretrainedConfig) -> PreTrainedModel:
    """Return a random model in which biases, norms and persistent buffers differ from their initial values, too."""
    theirs = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    persistent = theirs.state_dict()
    with torch.no_grad():
        for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name in persistent and value.is_floating_point() and value.dim() < 2 and "A_log" not in name:
                value += 0.1 * torch.randn_like(value)
        theirs.get_output_embeddings().weight *= HEAD_FACTOR  # or a cap of the logits could be overlooked
    return theirs


def _errors(
    model: PackedLanguageModel, documents: list[torch.Tensor], theirs: PreTrainedModel, expected: float
) -> tuple[float, float]:
    """Return the relative errors of loss and worst gradient. Raises UserError if one is above its tolerance."""
    batch = _micro_batch(documents)
    loss = chunked(model.head, model(batch), batch, negative_log_likelihood)
    loss.backward()
    loss_error = abs(loss.item() - expected) / abs(expected)
    if not loss_error < LOSS_TOLERANCE:
        raise UserError(f"the loss differs from transformers' by {loss_error:.1e}")
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in expected_gradients.items() if gradient is not None}
    floor, worst = 1e-4 * math.hypot(*norms.values()), 0.0
    for name, parameter in parameter_names(model).items():
        if (gradient := expected_gradients.get(name)) is None:
            continue
        if parameter.grad is None:
            raise UserError(f"{name} gets no gradient")
        error = (parameter.grad - gradient).norm().item() / max(norms[name], floor)
        if not error < GRADIENT_TOLERANCE:
            raise UserError(f"the gradient of {name} differs from transformers' by {error:.1e}")
        worst = max(worst, error)
    return loss_error, worst


def _check_isolation(model: PackedLanguageModel, documents: list[torch.Tensor]) -> None:
    """Raise UserError if a document's states change when another document of the micro-batch changes."""
    ends = [0, *accumulate(map(len, documents))]
    is_exact = not any(parameter.dim() == 3 for parameter in model.parameters())
    with torch.no_grad():
        every = replace(_micro_batch(documents), target_positions=torch.arange(ends[-1], device=documents[0].device))
        before = model(every)
        for index, ids in enumerate(documents):
            changed = [*documents[:index], (ids - 3) % 250 + 5, *documents[index + 1 :]]
            after = model(replace(every, input_ids=torch.cat(changed)[None]))
            others = torch.ones(ends[-1], dtype=torch.bool)
            others[ends[index] : ends[index + 1]] = False
            leak = (after - before)[others].abs().max().item() / before.abs().max().item()
            if not leak <= (0.0 if is_exact else INSIDE_EXPERTS):
                raise UserError(f"document {index + 1} changes the states of other documents by {leak:.1e}")


def _check_files(model: PackedLanguageModel, folder: str) -> None:
    """Raise UserError if the tensors of an export differ from the files that transformers has written."""
    form, stored, tensors = model.stored_form, stored_tensors(folder), tensors_in_files(model)
    for group in form.groups(tensors):
        for name, tensor in form({name: tensors[name].detach().cpu() for name in group}).items():
            if name not in stored:
                raise UserError(f"an export would write {name}, which transformers does not write")
            with safe_open(stored[name].file, framework="pt") as file:
                if not torch.equal(file.get_tensor(name), tensor):
                    raise UserError(f"an export would write other values of {name} than transformers")


def _micro_batch(documents: list[torch.Tensor]) -> MicroBatch:
    lengths, device = tuple(map(len, documents)), documents[0].device
    ends = [0, *accumulate(lengths)]
    targets = torch.cat([torch.arange(ends[i], ends[i + 1] - 1, device=device) for i in range(len(lengths))])
    ids = torch.cat(documents)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return MicroBatch(
        input_ids=ids[None],
        position_ids=positions[None],
        document_lengths=lengths,
        cu_seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        target_positions=targets,
        target_ids=ids[targets + 1],
    )


# --- The small model --------------------------------------------------------------------------------------------------

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a small model of the same kind: few layers of each kind, and as small a width as builds.

    Head sizes, state sizes and all switches stay. Raises UserError if no small model can be built.
    """
    reason = ""
    for change in (_narrow, _with_few_experts, _with_few_tokens):
        small = copy.deepcopy(config)
        vars(small).pop("whole", None)  # of a part (model/text_part.py), which is proved by itself
        try:
            change(small)
            _with_few_layers(small)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(small), dtype=torch.float32)
            count = sum(parameter.numel() for parameter in model.parameters())
            if count <= MOST_PARAMETERS:
                _run(small)
                return small
            reason = f"its smallest form has {count / 1e9:.1f} billion parameters"
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  another width may fit; configs of 196 types fail in as many ways
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    raise UserError(
        f"model type {config.model_type} cannot be proved: no small model of its kind can be built ({reason})"
    )


def _run(small: PretrainedConfig) -> None:
    """Raise an error if the small model has no finite logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(small), dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")


def _with_few_tokens(config: PretrainedConfig) -> None:
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if (getattr(config, name, None) or 0) > 512:
            setattr(config, name, 512)
    for name in SPECIAL:
        value = getattr(config, name, None)
        values = value if isinstance(value, list) else [value]
        if any((v or 0) >= config.vocab_size for v in values):
            setattr(config, name, 2)
    for name in ("sliding_window", "attention_window_size", "attention_chunk_size"):
        if (getattr(config, name, None) or 0) > WINDOW:
            setattr(config, name, WINDOW)
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.8 * config.hidden_size**-0.5


def _with_few_experts(config: PretrainedConfig) -> None:
    _with_few_tokens(config)
    groups = getattr(config, "n_group", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    for name in EXPERTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 8:
            setattr(config, name, max(8, 2 * groups, groups * -(-2 * chosen // groups)))
    for name, value in vars(config).items():
        if name.endswith(WIDTHS) and isinstance(value, int) and value > 128:
            setattr(config, name, 128)
        elif name.endswith(WIDTHS) and isinstance(value, list):
            setattr(config, name, [min(item, 128) for item in value])


def _narrow(config: PretrainedConfig) -> None:
    _with_few_experts(config)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError("no attention heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    few = min(kv_heads, 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    count = few * min(heads // kv_heads, 2)
    if config.hidden_size <= count * head_dim:
        return
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few
    config.num_attention_heads, config.hidden_size = count, count * head_dim
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.8 * config.hidden_size**-0.5


def _with_few_layers(config: PretrainedConfig) -> None:
    """Keep the first layers, as many as are needed to have one of each kind. Layers that share keys and values stay last."""
    total = config.num_hidden_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if not stacks:
        return
    lists = {k: v for k, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == total}
    kinds = [
        (
            *((name, type(module).__name__) for name, module in layer.named_modules()),
            *map(str, (v[i] for v in lists.values())),
        )
        for i, layer in enumerate(stacks[0])
    ]
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    own = total - shared
    count = 1 + max(kinds[:own].index(kind) for kind in set(kinds[:own]))
    chosen = [*range(count), *sorted({kinds.index(kind, own) for kind in set(kinds[own:])})]
    if len(chosen) >= total:
        return
    for name, values in lists.items():
        setattr(config, name, [values[index] for index in chosen])
    config.num_hidden_layers = len(chosen)
    if shared:
        config.num_kv_shared_layers = len(chosen) - count
