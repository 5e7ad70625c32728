"""The settings of a run as frozen dataclasses. Every key of a config is described here.

A config file is Python code that ends with `config = Config(...)`. configs/load.py reads it and checks every value before
a process group starts. The type of a key lists its possible values: `Literal` names the choices.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_type_hints

# The form of the examples in a file (docs/data.md).
Format = Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text", "tokens"]


@dataclass(frozen=True)
class Model:
    # A Hugging Face model directory; scripts/fetch_base_model.py downloads one to artifacts/models/NAME. A run needs it
    path: str = ""
    part: Literal["text"] | None = None  # train the text part of a model that also reads images (docs/models.md)
    layer_class: str | None = None  # class name of the decoder layers, to shard by; None: as declared by the model
    compute_dtype: Literal["bf16", "fp32"] = "bf16"  # of matrix products and activations
    # Which activations backward recomputes (distributed/activation_checkpointing.py)
    activation_checkpointing: Literal["none", "full", "selective", "offload"] = "none"
    checkpoint_every: int = 1  # checkpoint every k-th decoder layer only
    # For long documents: split the tokens into this many tiles, compute the MLP of a layer tile by tile, and again in backward
    mlp_tiles: int = 1
    compile: bool = False  # torch.compile each decoder layer; worthwhile on CUDA
    # Factor of the routers' auxiliary loss, which spreads the tokens over the experts. None: router_aux_loss_coef of
    # config.json if output_router_logits is true there, else 0
    router_aux: float | None = None
    # To extend the model's context window (docs/long_context.md)
    rope_type: str | None = None  # linear | yarn | llama3 | longrope | default (model/rope.py); None: as in config.json
    rope_factor: float | None = None  # the window is multiplied by this
    rope_original_length: int | None = None  # window in tokens before any scaling; None: as in config.json


@dataclass(frozen=True)
class Source:
    name: str  # its curves are train/loss/NAME, train/share/NAME and validation/loss/NAME
    paths: tuple[str, ...]  # like Data.train
    share: float  # fraction of the target tokens; 0.05 is 5%. The log says over how many steps it holds
    validation: tuple[str, ...] = ()  # like Data.validation
    format: Format = "auto"  # like Data.format
    fields: dict[str, str] = field(default_factory=dict)  # like Data.fields
    max_samples: int | None = None  # like Data.max_samples
    row: str | None = None  # like Data.row
    # Train its targets by KL to the base model's predictions instead of by token_losses (docs/forgetting.md)
    anchor: bool = False


@dataclass(frozen=True)
class Data:
    # The main source: files, folders or globs of any form in docs/data.md, URLs such as s3://BUCKET/FILE, or a dataset of the
    # hub, ORG/NAME:SPLIT. Or one directory: a token store (scripts/data.py build). A run needs it
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float = 0.0  # or: hold out this fraction of data.train, chosen by a hash of each example
    # A key of the rows that belongs to no form, such as the author: rows with the same value are all trained on or all held
    # out. data.validation_share is then a fraction of the values
    split_by: str | None = None
    format: Format = "auto"
    # Our name of a key -> its name in the files: fields={"messages": "dialogue"}, or on the command line
    # data.fields=messages=dialogue,role=speaker. configs/load.py lists our names
    fields: dict[str, str] = field(default_factory=dict)
    # Stop at a malformed example, or skip, count and list it
    on_bad: Literal["error", "skip"] = "error"
    # MODULE:FUNCTION, which gets a row of data.train or data.validation as a dictionary and returns an example as a dictionary,
    # or None to leave the row out
    row: str | None = None
    # Read only this many rows of data.train, from its beginning. Of remote data, no more rows are fetched
    max_samples: int | None = None
    # Sources to mix in; the main source gets the remaining share. On the command line:
    # data.mix=NAME:SHARE:FILE,FILE[:VALIDATION FILES];NAME:... or data.mix=FILE,FILE=SHARE;ORG/NAME:SPLIT=SHARE, in which
    # SHARE:anchor sets Source.anchor
    mix: tuple[Source, ...] = ()
    # Maximum number of tokens in an example; the unit of batch.micro_batch. "auto": from data.train (training/auto.py)
    sequence_length: int | Literal["auto"] = 2048
    # Drop, truncate or refuse chats and completions above this length; they are counted. Longer texts are cut into examples
    too_long: Literal["drop", "truncate", "error"] = "drop"
    packing: bool = True  # False: a micro-batch has batch.micro_batch examples, whatever their length
    # Chats (docs/data.md). A file with the Jinja template to use instead of the tokenizer's own
    chat_template: str | None = None
    # Variables of the template: enable_thinking=false
    chat_template_options: dict[str, object] = field(default_factory=dict)
    # The date that templates such as Llama 3.2's write into every chat, YYYY-MM-DD; None: the date of the run's first start
    chat_date: str | None = None
    train_on: Literal["all", "last"] = "all"  # which answers of a chat carry loss
    # How to treat the spelling of a control token, such as <|im_end|>, in a message or text: text: encode it as plain text |
    # error: refuse the example | allow: make it a control token, for texts that were rendered before (docs/data.md)
    control_tokens: Literal["text", "error", "allow"] = "text"
    cache: str | None = "artifacts/tokens"  # directory of tokenised files, one per node; None: tokenise at every start
    # Above this size of the cache, the least recently used entries are removed; None: never
    cache_gib: float | None = 64.0

    @property
    def length(self) -> int:
        """`sequence_length` as a number. `auto` must have been replaced, which a run does before it divides its examples."""
        assert isinstance(self.sequence_length, int)
        return self.sequence_length


@dataclass(frozen=True)
class Batch:
    # Set exactly one of these two. Examples of the main source per optimizer step, over all ranks: the batch size of
    # papers. Examples of mixed-in sources come on top
    global_examples: int | None = None
    # Or: the maximum number of target tokens per optimizer step, over all sources and ranks
    global_tokens: int | None = None
    # Size of one forward pass on one rank, or on a group of sharding.context ranks, in units of data.sequence_length tokens
    # (with data.packing=False: in examples). Gradient accumulation follows from it. "auto": the largest size that is expected
    # to fit into memory, but no larger than a step needs (training/micro_batch.py)
    micro_batch: int | Literal["auto"] = 1

    @property
    def rows(self) -> int:
        """`micro_batch` as a number. `auto` must have been replaced: a run does so before it reads any data."""
        assert isinstance(self.micro_batch, int)
        return self.micro_batch


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float | Literal["auto"] = "auto"  # peak; "auto": by the size of the model (training/auto.py)
    epochs: int = 3
    max_steps: int | None = None  # stop after this many steps; the schedule is computed for this number
    # Fraction of all steps; at least 4 steps, or half of a shorter run, which then stays below the peak. 0: no warm-up
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None  # number of steps, obeyed as it is; overrides warmup_ratio
    min_lr_ratio: float = 0.1  # the cosine decay ends at this fraction of the peak
    weight_decay: float = 0.1  # on matrices only, not on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    # Skip a step whose gradient norm is more than this many standard deviations above the mean of the last 128; None: off
    skip_spikes: float | None = None
    memory: Literal["16N", "14N", "12N", "8N", "6N"] = "16N"  # bytes for N parameters (distributed/optimizer.py)
    # pre-training: training on texts, at half of the learning rate that is suggested for fine-tuning
    stage: Literal["fine-tuning", "pre-training"] = "fine-tuning"

    @property
    def peak(self) -> float:
        """`learning_rate` as a number. `auto` must have been replaced, which a run does before it reads any data."""
        assert not isinstance(self.learning_rate, str)
        return self.learning_rate


@dataclass(frozen=True)
class EWC:
    # Elastic weight consolidation (docs/forgetting.md). lambda: how many nats per new-domain token one nat per old-domain
    # token is worth. 0: off
    strength: float = 0.0
    data: tuple[str, ...] = ()  # old-domain files, like Data.train, from which the Fisher diagonal is estimated
    fisher: str | None = None  # or: runs/NAME/ewc of another run, whose Fisher diagonal and reference are reused
    documents: int = 1024  # number of documents sampled from the data
    # Documents per squared gradient, over all ranks. The relative error is about sqrt(2 x batch / documents)
    batch: int = 4
    # model: labels sampled from the model | l2: no data, every element is 1 (model/ewc.py)
    estimator: Literal["model", "l2"] = "model"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the stored Fisher diagonal and reference
    device: Literal["device", "cpu"] = "device"  # store both with the parameters, or in host memory
    seed: int = 0


@dataclass(frozen=True)
class Forgetting:
    # How much one nat of KL to the base model counts at a target of an anchored source, in nats of an ordinary target
    anchor_weight: float = 1.0
    # A budget (docs/forgetting.md): export the model with the best task score (run.best_by) on the line between base and tuned
    # weights whose KL to the base, in nats per token, is at most this with 95% confidence; None: no budget
    max_kl: float | None = None
    # A budget is missed below this share of what the unaveraged weights gained on the base in run.best_by
    min_gain: float = 0.0
    # A file of prompts (chats): the budget holds on the base's answers to them, too. general_text=False: on them alone
    keep: str | None = None
    # A budget on the score of eval.metric for these prompts, instead of KL: its mean is at most this below the base's
    max_drop: float | None = None
    general_text: bool = True
    strict: bool = False  # exit with code 3 if the budget is missed; False: only report the miss

    @property
    def has_budget(self) -> bool:
        return self.max_kl is not None or self.max_drop is not None


@dataclass(frozen=True)
class LoRA:
    # Train low-rank adapters beside frozen matrices (docs/results.md). Columns of A and B; 0: full fine-tuning
    rank: int = 0
    # Adapters are multiplied by alpha / rank. None: 2 x rank, so the factor is 2 for any rank (arXiv:2405.09673)
    alpha: float | None = None
    dropout: float = 0.0  # of the adapters' inputs
    targets: str = "all-linear"  # all-linear (every matrix but the head), or names of matrices: q_proj,v_proj

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or its default for this rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Sharding:
    # full: ZeRO-3 | grad_op: like ZeRO-2, parameters stay gathered until the last micro-batch
    # | hybrid: shard within a node, replicate across nodes | none: replicate everything (DDP)
    strategy: Literal["full", "grad_op", "hybrid", "none"] = "full"
    shard_size: int | None = None  # hybrid: number of ranks that share one copy of the model; None: the ranks of a node
    cpu_offload: bool = False  # keep parameters, gradients and moments in host memory and run AdamW there
    # This many ranks share the tokens of a micro-batch, for long documents (docs/long_context.md); 1: no sharing
    context: int = 1
    # The dtype in which gradients are summed over ranks. bf16 halves the traffic and rounds (docs/performance.md)
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Run:
    name: str  # everything is written to runs/NAME/
    directory: str = "runs"
    seed: int = 0
    log_every: int = 1  # steps
    eval_every: int = 0  # steps; 0: only before the first step and after the last
    # At each evaluation, generate answers to this many examples of data.validation and score them (docs/runs.md)
    eval_generate: int = 0
    eval_general: bool = False  # also measure forgetting against the base model (docs/forgetting.md)
    save_every: int = 0  # steps; 0: not by steps. Every run also saves at the end and on a signal
    # Also save this many minutes after the last save, by rank 0's clock: the most work that a lost rank costs. 0: not by time
    save_minutes: float = 30.0
    # Number of checkpoints to keep, besides the best (run.best_by) and the last that is known to be good
    keep_last: int = 2
    async_save: bool = False  # write checkpoints in the background; needs host memory for a copy (docs/runs.md)
    # auto: continue from the last checkpoint if every setting and input that decides the weights is unchanged | changed:
    # continue in any case, and list the changes | previous: continue from the newest undamaged checkpoint | never: refuse to
    # touch an existing run
    resume: Literal["auto", "changed", "previous", "never"] = "auto"
    timeout_minutes: float = 30.0  # end the run if a rank does not answer for this long (docs/runs.md)
    # auto: check masks, ends of answers and labels before the first step of new data or a new model, and stop a run whose loss
    # doubles in its warm-up | off: neither | only: check and end, as `train.py CONFIG --quick-check` does (docs/check.md)
    check: Literal["auto", "off", "only"] = "auto"
    deterministic: bool = False  # resume bit-identically on CUDA too; slower
    export: Literal["last", "best"] = "last"  # which checkpoint is exported as a Hugging Face directory
    # Copy the tensors that transformers does not load (multi-token prediction) from the base to the export
    export_mtp: bool = True
    # The evaluation curve that decides which checkpoint is best: validation/loss | f1 | forgetting/kl ...
    # Write NAME:max or NAME:min for a curve whose better direction is not known
    best_by: str = "validation/loss"
    stop_after_no_gain: int = 0  # end the run after this many evaluations in a row without a new best; 0: never
    # Where to show curves, besides metrics.jsonl: tensorboard | wandb | mlflow, the last two if they are installed
    log_to: tuple[str, ...] = ("tensorboard",)
    # Stop after this step as on a signal: the run is saved, and the next start continues it
    stop_at: int | None = None
    approved_by: str | None = None  # who approved this run; written to its record (docs/check.md)
    timestamp: str | None = (
        None  # URL of an RFC 3161 service, or a file: each head of the record is sent there (docs/check.md)
    )
    verbose: bool = False  # print all lines of a start; runs/NAME/start.txt always has them
    # STEP:COUNT: write torch.profiler's trace of COUNT steps from STEP on to runs/NAME/profile
    profile: str | None = None


@dataclass(frozen=True)
class Eval:
    # MODULE:FUNCTION, which scores the answers of run.eval_generate instead of our own scores: it gets (answers, examples)
    # and returns a number or a dictionary of numbers (docs/runs.md)
    metric: str | None = None
    # Maximum length of an answer in tokens; None: 25% more than the longest answer in data.train
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    run: Run
    sharding: Sharding = field(default_factory=Sharding)
    ewc: EWC = field(default_factory=EWC)
    forgetting: Forgetting = field(default_factory=Forgetting)
    lora: LoRA = field(default_factory=LoRA)
    eval: Eval = field(default_factory=Eval)


def as_dict(config: Config) -> dict:
    """Return the config as nested dictionaries of JSON types: section -> key -> value."""
    return dataclasses.asdict(config)


SECTIONS = get_type_hints(Config)
KEYS = {f"{name}.{key}": hint for name, section in SECTIONS.items() for key, hint in get_type_hints(section).items()}


# ---- What a resume may change (training/identity.py) ---------------------------------------------------------------------


def _keys(**sections: str) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for section, keys in sections.items() for key in keys.split())


# The content of these files and the effect of these settings on the data decide the weights. A resume compares the resulting
# data, so the values themselves may change.
READ = _keys(
    model="path",
    data="train validation_share split_by format fields on_bad row max_samples mix too_long chat_template "
    "chat_template_options train_on control_tokens",
    ewc="data",
)
# These keys do not change what a step computes: names, evaluation, saving, logging, the number of steps, ranks and memory.
FREE = _keys(
    model="layer_class activation_checkpointing checkpoint_every mlp_tiles compile",
    data="validation cache cache_gib",
    batch="micro_batch",
    optimizer="epochs max_steps stage",
    sharding="strategy shard_size cpu_offload context",
    ewc="device",
    forgetting="max_kl min_gain keep max_drop general_text strict",
    run="name directory log_every log_to timeout_minutes deterministic eval_every eval_generate eval_general best_by "
    "save_every save_minutes keep_last async_save resume export export_mtp stop_after_no_gain stop_at approved_by timestamp verbose profile check",
    eval="metric max_new_tokens",
)
# Every other key decides the weights: a resume with another value is refused, unless run.resume=changed.
DECIDES = tuple(name for name in KEYS if name not in READ + FREE)
