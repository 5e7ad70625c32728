"""Train a tiny random model of causal model types for three steps, and compare each document's loss with transformers' own training.

    torchrun --nproc_per_node=2 tests/model/types_worker.py FILE [TYPE ...]

Without TYPE: every causal type of the installed transformers. The worker writes the table {type: outcome} to FILE (JSON) and prints it.
An outcome is `packed`, `alone: WHY`, `refused: WHY`, `no config: WHY` (transformers builds no tiny model), or a difference or traceback.
"""

import copy
import json
import sys
import tempfile
import traceback
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import model.proof
from common.errors import UserError
from data.batches import collate
from distributed.gradients import gradient_norm
from distributed.process_group import Ranks, process_group, read_on_first
from model.architectures import check_supported, read_model_config
from model.language_model import PackedLanguageModel, build_on_meta, load_weights
from model.loss import chunked, negative_log_likelihood
from model.rope import check_document_isolation
from tests.in_memory import InMemory, texts
from tests.sharded import shard_model
from tests.tiny import any_tiny_config

MOST_PARAMETERS = 50_000_000  # of a tiny model; its sizes have other names than those of tests/tiny.py
LENGTHS, STEPS, RATE = (37, 5, 64, 21), 3, 0.02
FIRST, LATER = 1e-5, 3e-5  # tolerances of a document's loss: rounding also moves the weights of later steps


def outcome(kind: str, folder: Path, ranks: Ranks) -> str:
    """Train the type on all ranks, and return the outcome. A collective."""
    try:
        try:
            config = any_tiny_config(kind)
        except Exception as error:  # noqa: BLE001  of any of 196 types
            return f"no config: {' '.join(str(error).split())[:160]}"
        text = config.get_text_config()
        if text is not config and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return f"text part: {text.model_type}"
        check_supported(config)
        check_document_isolation(config)
        error = _build(config, folder, ranks)
        if error:
            return f"no config: {error}"
        config = read_model_config(str(folder / "model"))
        proof = read_on_first(lambda: model.proof.prove(config, ranks.device, folder / "proofs"), ranks)
    except UserError as error:
        return f"refused: {error}"
    packed = build_on_meta(config)
    if not proof.packed:
        packed.one_document_at_a_time()
    shard_model(packed, ranks)
    load_weights(packed, str(folder / "model"), ranks.device)
    losses = _losses(packed.train(), texts(LENGTHS), ranks)
    expected = read_on_first(lambda: _expected(folder / "model"), ranks)
    errors = [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]
    if not (max(errors[: len(LENGTHS)]) < FIRST and max(errors) < LATER):
        return f"differs: by {max(errors):.1e}"
    return "packed" if proof.packed else f"alone: {proof.failed}"


def _build(config: PretrainedConfig, folder: Path, ranks: Ranks) -> str:
    """Write a random model on the first rank. Return why transformers builds none, or ""."""

    def build() -> str:
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
            if count > MOST_PARAMETERS:
                return f"{count:,} parameters"
            theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            theirs.get_output_embeddings().weight.data *= 8  # or a cap of the logits could be overlooked
            theirs(input_ids=torch.arange(3, 40)[None], use_cache=False)
            theirs.save_pretrained(folder / "model")
        except Exception as error:  # noqa: BLE001  of any of 196 types
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return ""

    return read_on_first(build, ranks)


def _losses(packed: PackedLanguageModel, source: InMemory, ranks: Ranks) -> list[float]:
    """Return each document's loss at each step. Rank r has every N-th document."""
    items, step_losses = range(len(LENGTHS))[ranks.rank :: ranks.world_size], []
    optimizer = torch.optim.SGD(packed.parameters(), RATE)
    for _ in range(STEPS):
        batch, kept = collate(tuple(items), source), []

        def token_losses(logits: torch.Tensor, targets: torch.Tensor, kept: list = kept) -> torch.Tensor:
            losses = negative_log_likelihood(logits, targets)
            kept.append(losses.detach())
            return losses

        loss = chunked(packed.head, packed(batch), batch, token_losses) / (sum(LENGTHS) - len(LENGTHS))
        loss.backward()
        _step(optimizer, packed)
        optimizer.zero_grad()
        parts = torch.cat(kept).split([LENGTHS[item] - 1 for item in items])
        rows = [dict(zip(items, (part.sum().item() for part in parts), strict=True))] * ranks.world_size
        if ranks.world_size > 1:
            dist.all_gather_object(rows, rows[0])
        step_losses += [loss for _, loss in sorted({k: v for row in rows for k, v in row.items()}.items())]
    return step_losses


def _step(optimizer: torch.optim.SGD, trained: torch.nn.Module) -> None:
    """Move the weights by a distance of RATE, however large the gradient is, so that steps do not amplify rounding."""
    norm = gradient_norm([parameter for parameter in trained.parameters() if parameter.grad is not None])
    optimizer.param_groups[0]["lr"] = RATE / norm.item()
    optimizer.step()


def _expected(path: Path) -> list[float]:
    theirs = _eager(path).train()
    optimizer, step_losses = torch.optim.SGD(theirs.parameters(), RATE), []
    for _ in range(STEPS):
        total = torch.zeros(())
        for ids in texts(LENGTHS).ids:
            tokens = torch.from_numpy(ids)
            logits = theirs(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, tokens[1:], reduction="sum")
            step_losses.append(loss.item())
            total = total + loss
        (total / (sum(LENGTHS) - len(LENGTHS))).backward()
        _step(optimizer, theirs)
        optimizer.zero_grad()
    return step_losses


def _eager(path: Path) -> PreTrainedModel:
    config = read_model_config(str(path))  # without dropout
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except ValueError:  # without a choice of attention
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)


def main() -> None:
    file, *kinds = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = {}
    with process_group(7.0) as ranks:
        for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            ranks.watch.at(kind)  # or the watch would take a long table for a rank that hangs
            paths = read_on_first(lambda: tempfile.mkdtemp(), ranks)
            try:
                outcomes[kind] = outcome(kind, Path(paths), ranks)
            except UserError as error:
                outcomes[kind] = f"refused: {error}"
            except Exception:  # noqa: BLE001  the table has it, and the test fails
                outcomes[kind] = f"traceback: {traceback.format_exc(limit=-3)}"
            if ranks.rank == 0:
                print(f"{kind}\t{outcomes[kind]}", flush=True)
                Path(file).write_text(json.dumps(outcomes, indent=0))


if __name__ == "__main__":
    main()
