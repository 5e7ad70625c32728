"""The model card of an export (README.md): what was measured and recorded, and what was not, said as such.

The front matter is that of the hub (https://huggingface.co/docs/hub/model-cards), written by huggingface_hub.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from eval.intervals import intervals
from training.export.base_model import UNKNOWN, BaseModel
from training.export.card_data import data_section
from training.export.card_results import forgetting_section, results_section
from training.export.card_run import how_made_section, limits_section, settings_section
from training.export.markdown import block, escape
from training.export.results import Results
from training.export.subject import Subject

# Metric of eval/intervals.py -> (type, name) in model-index.
METRICS = {
    "f1": ("f1", "F1 of the violations (micro)"),
    "fact_f1": ("f1", "F1 of the facts"),
    "exact": ("exact_match", "reports with all violations right"),
    "rouge_l": ("rouge", "ROUGE-L (F)"),
    "loss": ("loss", "nats per response token"),
}


@dataclass(frozen=True)
class Statements:
    """What only the user knows: the options of the same names. license replaces what the base model says."""

    name: str
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    author: str | None = None


@dataclass(frozen=True)
class CardInputs:
    """Everything that the card is made of. out: the directory that it describes. record: its export.json."""

    out: Path
    subject: Subject
    record: dict
    base: BaseModel
    results: Results
    stated: Statements


def model_card(inputs: CardInputs) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{front_matter(inputs)}\n---",
        f"# {escape(inputs.stated.name)}",
        _summary(inputs),
        "## Use\n\n" + _use(inputs),
        "## Training data\n\n" + data_section(inputs.subject),
        "## Training\n\n" + settings_section(inputs.subject),
        "## Results\n\n" + results_section(inputs.results, inputs.out, inputs.subject, inputs.record),
        "## Forgetting\n\n" + forgetting_section(inputs.results, inputs.out, inputs.subject),
        "## Base model and licence\n\n" + _base_section(inputs),
        "## Limits\n\n" + limits_section(inputs.subject, inputs.record, inputs.results),
        "## How it was made\n\n" + how_made_section(inputs.subject, inputs.stated.author),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(inputs: CardInputs) -> str:
    """The YAML of the card without its fences. Keys whose value is not known are left out."""
    base, stated, kind = inputs.base, inputs.stated, inputs.record["kind"]
    relation = "adapter" if kind == "adapter" else "merge" if inputs.record["averaged"] else "finetune"
    results = _eval_results(inputs.results)
    data = ModelCardData(
        license=stated.license or base.license,
        language=list(stated.language) or None,
        base_model=base.hub_id,
        datasets=list(stated.datasets) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["lora"] if inputs.subject.adapter else None,
        model_name=stated.name if results else None,
        eval_results=results or None,
    )
    if base.hub_id:
        data["base_model_relation"] = relation
    if stated.license is None:
        for key, value in base.metadata.items():
            data[key] = value
    if metrics := sorted({result.metric_type for result in data.eval_results or ()}):
        data["metrics"] = metrics
    return data.to_yaml()


def _eval_results(results: Results) -> list[EvalResult]:
    """The figures with intervals of all evaluations, for model-index."""
    found = []
    for result in results.evaluations:
        content = result.content
        for metric, interval in intervals(content).items():
            if metric in METRICS:
                kind, name = METRICS[metric]
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type="json",
                        dataset_name=Path(content["data"]).name,
                        dataset_args={"sha256": content["data_sha256"], "examples": content["n_examples"]},
                        metric_type=kind,
                        metric_value=interval.value,
                        metric_name=f"{name}; 95% interval {interval.low:.4g} to {interval.high:.4g}",
                    )
                )
    return found


def _summary(inputs: CardInputs) -> str:
    subject, record, run = inputs.subject, inputs.record, inputs.subject.run
    how = "LoRA adapters on" if subject.adapter else "All weights were fine-tuned, starting from"
    text = f"{how} {inputs.base.origin}."
    if run is None and subject.adapter is None:
        text = f"Exported from the directory `{subject.path.name}`; how it was trained is not recorded."
    if "step" in record:
        total = run.state.get("settings", {}).get("steps in total") if run else None
        text += f" These are the {record['weights']} weights of the run, after step {record['step']}"
        text += f" of {total}." if total else "."
    if record["averaged"]:
        share = record["averaged"]["share_of_tuned"]
        text += (
            f" They were then averaged with the base model: {1 - share:g} of the base and {share:g} of the tuned weights, in "
            "fp32, tensor by tensor ([WiSE-FT](https://arxiv.org/abs/2109.01903)); rows of new tokens are the tuned ones."
        )
    if record["kind"] == "merged":
        text += " The adapters are merged into the weights."
    return text + f" The files are in {record['dtype']}."


def _use(inputs: CardInputs) -> str:
    name = inputs.stated.name
    load = f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")'
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if inputs.record["kind"] == "adapter":
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        load = f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")'
    code = f"""{imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
{load}
chat = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
    ends = "Generation stops at the tokens in `generation_config.json`, which training taught as the end of an answer."
    if inputs.record["kind"] == "adapter":
        ends = "Generation stops at the tokens in the `generation_config.json` of the base model."
    return f"{block(code, 'python')}\n\nHere `{name}` stands for the path of this directory. {ends}"


def _base_section(inputs: CardInputs) -> str:
    base, stated = inputs.base, inputs.stated
    lines = [f"- Base model: {base.origin}."]
    if base.extended:
        lines.append(f"- Its vocabulary was extended by {base.extended} tokens before training (new_tokens.json).")
    if stated.license:
        lines.append(f"- Licence: {escape(stated.license)}, stated by who exported the model.")
        if base.license not in (UNKNOWN, stated.license):
            lines.append(f"- The base model's own licence: {escape(base.license)} (from {escape(base.license_from)}).")
    elif base.license == UNKNOWN:
        lines.append(
            f"- Licence: unknown: {base.license_from}. A fine-tuned model is bound by the licence of its base."
        )
    else:
        named = base.metadata.get("license_name")
        lines.append(
            f"- Licence: {escape(base.license)}{f' ({escape(named)})' if named else ''}, as of {escape(base.license_from)}. "
            "A fine-tuned model is bound by the licence of its base."
        )
    return "\n".join(lines)
