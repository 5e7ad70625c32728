"""bom.json: what an export is made of, in CycloneDX 1.7.

It lists the base model, the sources of the data, the libraries and code that computed, the results of evaluations and the FLOPs of
training. It has names and digests of the data, and none of their text.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common.durable_files import write_durably
from common.errors import UserError
from data.remote import fetched_into
from model.fingerprint import fingerprint_of_sums
from model.flops import count_work, step_flops
from model.language_model import build_on_meta
from scripts.export.signature import import_optional
from training.checkpoint_export import Export
from training.checkpointer import Record
from training.ending import BOM, EXPORT, read_json
from training.model_card import Results, base_model
from training.provenance import PACKAGES, short_commit

OURS = "full-fine-tuning:"  # the prefix of our properties


def write_bom(out: Path, export: Export, results: Results) -> str:
    """Write bom.json into the export `out`, and return a line for the user with the FLOPs of training.

    Raise UserError without the library, or if the schema refuses the result.
    """
    names = ("model", "model.bom", "model.component", "contrib.license.factories", "output.json")
    types, boms, components, licences, output = (import_optional(f"cyclonedx.{name}") for name in names)

    def part(
        kind: str, name: str, ref: str, facts: Any = (), files: Any = (), licence: str = "unknown", **more: Any
    ) -> Any:
        """Return a component with the properties `facts` (name -> value) and the files (name, SHA-256) that it consists of."""
        hashes = [[types.HashType(alg=types.HashAlgorithm.SHA_256, content=digest)] for _, digest in files]
        return components.Component(
            type=components.ComponentType(kind),
            name=name,
            bom_ref=ref,
            properties=[types.Property(name=OURS + key, value=str(value)) for key, value in dict(facts).items()],
            components=[part("file", file, f"{ref}/{i}", hashes=hashes[i]) for i, (file, _) in enumerate(files)],
            licenses=[] if licence == "unknown" else [licences.LicenseFactory().make_from_string(licence)],
            **more,
        )

    data, start, state, base = export.config.data, export.start, export.state, base_model(export.base)
    newest = next(entry.content for entry in Record(export.run).read()[::-1] if entry.kind == "start")

    def files_of(paths: tuple[str, ...], most: int | None) -> list[tuple[str, str]]:
        """Return (name, SHA-256) of each file that the newest start read from these files, folders, globs and URLs."""
        places = [place for path in paths for place in (path, fetched_into(path, data.cache or "", most))]
        roots = [str(Path(newest["directory"], place).resolve()) for place in places]
        digests = newest["files"]["the data"]
        files = [file for file in digests if any(fnmatch(file, root) or file.startswith(f"{root}/") for root in roots)]
        return [(Path(file).name, digests[file]) for file in files]

    weights, trained = state["identity"]["the weights"], state["identity"]["the data"]
    facts: dict[str, Any] = {"fingerprint": fingerprint_of_sums(weights), "licence": base["license_from"]}
    more = {"licence": base["license"], "description": base["origin"]}
    parts = [part("machine-learning-model", base["hub_id"] or export.base.name, "base", facts, weights.items(), **more)]
    mixed = trained["data.mix"] or []  # of the checkpoint; a later start may have changed data.mix
    sources = [("data.train", 1 - sum(share for _, share, *_ in mixed), trained["data.train"]), *mixed]
    paths = {"data.train": (data.train, data.max_samples)}
    paths |= {source.name: (source.paths, source.max_samples) for source in data.mix}
    for (name, share, digest, *anchor), targets in zip(sources, state["loop"]["targets"], strict=True):
        facts = {"share": f"{share:.4g}", "target-tokens": targets, "fingerprint-of-tokens": digest}
        facts |= {"trained": "by KL to the base"} if anchor else {}
        parts.append(part("data", name, f"data:{name}", facts, files_of(*paths.get(name, ((), None)))))
    if data.validation:
        parts.append(part("data", "validation", "validation", files=files_of(data.validation, None)))
    measured = [*results.evaluations, *filter(None, [results.forgetting])]
    files = [(Path(result["data"]).name, result["data_sha256"]) for result in results.evaluations]
    files += [file for result in measured for file in result["file"].items()]
    parts.append(part("data", "tests and results", "results", files=files))
    for name, version in {"python": start["python"], "train.py": short_commit(start), **start["versions"]}.items():
        purl = (
            import_optional("packageurl").PackageURL("pypi", name=name, version=version) if name in PACKAGES else None
        )
        parts.append(part("library", name, f"code:{name}", version=version, purl=purl))
    written = read_json(out / EXPORT, "remove the directory and export again")
    facts = {key: value for key, value in written.items() if isinstance(value, str | int | float)}
    facts |= {"share-of-tuned-weights": written["averaged"]["share_of_tuned"]} if written["averaged"] else {}
    least, most = training_flops(export)
    bom = boms.Bom(components=parts)
    bom.metadata.component = part(
        "machine-learning-model",
        out.absolute().name,
        "model",
        facts | {"flops-at-least": f"{least:.4g}", "flops-at-most": f"{most:.4g}"},
        written["files"].items(),
        base["license"],
        version=f"step {export.contents['step']}",
        pedigree=components.Pedigree(ancestors=[components.Component(type=parts[0].type, name=parts[0].name)]),
    )
    bom.register_dependency(bom.metadata.component, parts)
    content = json.loads(output.JsonV1Dot7(bom).output_as_string())
    content["metadata"]["component"]["modelCard"] = {  # the library has no model card
        "modelParameters": {
            "task": "text-generation",
            "modelArchitecture": export.model_config.model_type,
            "datasets": [{"ref": f"data:{name}"} for name, *_ in sources],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(export, results))},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    check_bom(text)
    write_durably(out / BOM, text)
    return f"{out / BOM}: training took {least:.4g} to {most:.4g} FLOPs"


def check_bom(text: str) -> None:
    """Raise UserError if a text is not CycloneDX 1.7, or has properties that the schema does not know."""
    import_optional("jsonschema")
    schema, validation = import_optional("cyclonedx.schema"), import_optional("cyclonedx.validation.json")
    if problem := validation.JsonStrictValidator(schema.SchemaVersion.V1_7).validate_str(text):
        where = "/".join(map(str, problem.data.absolute_path))
        raise UserError(f"{BOM} is not CycloneDX 1.7 and is not written: {where}: {problem.data.message[:200]}")


def training_flops(export: Export) -> tuple[float, float]:
    """Return a lower and an upper bound of the FLOPs of all steps up to the checkpoint.

    There are two bounds, because the checkpoint counts tokens and target tokens, but not the lengths of documents. The lower bound
    takes attention as free, the upper bound takes every document as long as data.sequence_length. With LoRA the upper bound takes
    the base as trained, which costs more as long as the rank is below a sixth of the model's width.
    """
    counted, longest = export.state["loop"], export.config.data.sequence_length
    work, targets = count_work(build_on_meta(export.model_config), export.model_config), sum(counted["targets"])
    documents, rest = divmod(counted["tokens"], longest)
    least = work.per_token * counted["tokens"] + work.per_target * targets
    return least * (2 / 3 if export.config.lora.rank else 1), step_flops(work, [longest] * documents + [rest], targets)


def _metrics(export: Export, results: Results) -> Iterator[dict]:
    """Yield the validation loss, the scores of answers and the forgetting, each with its 95% interval if it has one."""

    def metric(kind: str, value: str, of: str, low: float | None = None, high: float | None = None) -> dict:
        interval = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"} if low is not None else None
        return {"type": kind, "value": value, "slice": of} | ({"confidenceInterval": interval} if interval else {})

    state = export.state
    if state["evaluated"].get("validation") == state["step"] and not export.contents["averaged"]:
        yield metric("validation loss (nats/token)", f"{state['loss']:.6g}", "data.validation")
    for result in results.evaluations:
        for figure in result["figures"]:
            interval, of = result["intervals"].get(figure.metric), f"{Path(result['data']).name}: {figure.n}"
            bounds = (interval.low, interval.high) if interval else ()
            yield metric(figure.name.strip(), figure.value, of, *bounds)
    if forgetting := results.forgetting:
        changes = {f"right answers ({kind})": figure["change"] for kind, figure in forgetting["questions"].items()}
        changes |= {"perplexity per byte": forgetting["perplexity_per_byte"]["change"]}
        against_base = {name: forgetting[name] for name in ("kl", "agreement") if name in forgetting}
        for name, figure in (changes | against_base).items():
            of = "general text, against the base" if name in against_base else "general text, change from the base"
            yield metric(f"forgetting: {name}", f"{figure['value']:.6g}", of, figure["low"], figure["high"])
