"""A release: bom.json, what an export is made of, and model.sig, the signature of all of its files. scripts/export.py asks for both.

bom.json is CycloneDX 1.7: the base, the sources of the data, what computed, what was measured, the FLOPs of training. It has
names and digests of the data, and no text. model.sig is OpenSSF Model Signing 1.0 with a key, which works offline. It binds
the weights to what export.json, bom.json and README.md say of the run, its evaluation and its forgetting. git's own files
(.git, .github, .gitattributes, .gitignore) are not signed, as is usual: a hub adds them, and no model is loaded from them.
"""

import base64
import importlib
import json
from argparse import Namespace
from collections.abc import Iterator
from fnmatch import fnmatch
from getpass import getpass
from pathlib import Path
from typing import Any

from common.durable_files import write_durably
from common.errors import UserError
from data.remote import fetched_into
from model.fingerprint import fingerprint_of_sums
from model.flops import count_work, step_flops
from model.language_model import build_on_meta
from training.checkpoint_export import Export
from training.checkpointer import Record
from training.ending import BOM, EXPORT, SIGNATURE, read_json
from training.model_card import Results, base_model
from training.provenance import PACKAGES, short_commit

OURS = "full-fine-tuning:"  # begins the names of our properties
INSTALL = "pip install 'model-signing>=1.1,<2' pyopenssl 'cyclonedx-python-lib[json-validation]>=11.12,<12'"
KEY = "it must be the PEM file of a {} key on the curve P-256, P-384 or P-521"
# Commission guidelines on general-purpose AI models of 18 July 2025 (adopted as C(2025) 7719), section 3.2: who modifies such a
# model with more than a third of the compute that trained it counts as the provider of the modified one. 1e23 FLOPs, from
# which on a model is presumed to be one, stand for a base whose compute is not known. By annex A only work for updates counts.
THIRD, UNKNOWN_BASE = 1 / 3, 1e23


# ---- bom.json ------------------------------------------------------------------------------------------------------------


def write_bom(out: Path, export: Export, results: Results, options: Namespace) -> str:
    """Write bom.json into the export `out`; returns what the user is told of the compute of training.

    options: the command line of scripts/export.py. Raises UserError without the library, and if the schema refuses the result.
    """
    names = ("model", "model.bom", "model.component", "contrib.license.factories", "output.json")
    types, boms, components, licences, output = (_need(f"cyclonedx.{name}") for name in names)

    def part(
        kind: str, name: str, ref: str, facts: Any = (), files: Any = (), licence: str = "unknown", **more: Any
    ) -> Any:
        """A component. facts: name -> value. files: (name, SHA-256) of what it is made of."""
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
        """(name, SHA-256) of each file of a source, as the newest start has read it: a file, folder or glob, or fetched."""
        places = [one for path in paths for one in (path, fetched_into(path, data.cache or "", most))]
        roots = [str(Path(newest["directory"], place).resolve()) for place in places]
        read = newest["files"]["the data"]
        found = [file for file in read if any(fnmatch(file, root) or file.startswith(f"{root}/") for root in roots)]
        return [(Path(file).name, read[file]) for file in found]

    weights, trained = state["identity"]["the weights"], state["identity"]["the data"]
    facts: dict[str, Any] = {"fingerprint": fingerprint_of_sums(weights), "licence": base["license_from"]}
    more = {"licence": base["license"], "description": base["origin"]}
    parts = [part("machine-learning-model", base["hub_id"] or export.base.name, "base", facts, weights.items(), **more)]
    mixed = trained["data.mix"] or []  # of what was trained; a later start may have changed data.mix
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
        purl = _need("packageurl").PackageURL("pypi", name=name, version=version) if name in PACKAGES else None
        parts.append(part("library", name, f"code:{name}", version=version, purl=purl))
    written = read_json(out / EXPORT, "remove the directory and export again")
    facts = {key: value for key, value in written.items() if isinstance(value, str | int | float)}
    facts |= {"share-of-tuned-weights": written["averaged"]["share_of_tuned"]} if written["averaged"] else {}
    compute = _compute(export, options.base_flops)
    bom = boms.Bom(components=parts)
    bom.metadata.component = part(
        "machine-learning-model",
        options.name or out.absolute().name,
        "model",
        facts | compute,
        written["files"].items(),
        options.license or base["license"],
        version=f"step {export.contents['step']}",
        pedigree=components.Pedigree(ancestors=[components.Component(type=parts[0].type, name=parts[0].name)]),
    )
    bom.register_dependency(bom.metadata.component, parts)
    content = json.loads(output.JsonV1Dot7(bom).output_as_string())
    content["metadata"]["component"]["modelCard"] = {  # which the library's model lacks
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
    least, most, share, of, means = compute.values()
    return f"{out / BOM}: training took {least} to {most} FLOPs, at most {share} of {of} (--base-flops): {means}"


def check_bom(text: str) -> None:
    """Raise UserError if a text is not CycloneDX 1.7, or has properties that its schema does not know."""
    _need("jsonschema")
    schema, validation = _need("cyclonedx.schema"), _need("cyclonedx.validation.json")
    if problem := validation.JsonStrictValidator(schema.SchemaVersion.V1_7).validate_str(text):
        where = "/".join(map(str, problem.data.absolute_path))
        raise UserError(f"{BOM} is not CycloneDX 1.7 and is not written: {where}: {problem.data.message[:200]}")


def _compute(export: Export, base_flops: float | None) -> dict[str, str]:
    """The FLOPs of all steps up to the checkpoint, between two bounds, and the share of the base's that they are at most.

    The checkpoint counts tokens and target tokens, and not how long documents were: at least, attention costs nothing; at most,
    all of them are as long as data.sequence_length. Of LoRA the upper bound takes the base as trained, which is more as long
    as the rank is below a sixth of the model's width.
    """
    counted, longest = export.state["loop"], export.config.data.sequence_length
    work, targets = count_work(build_on_meta(export.model_config), export.model_config), sum(counted["targets"])
    documents, rest = divmod(counted["tokens"], longest)
    least = work.per_token * counted["tokens"] + work.per_target * targets
    most = step_flops(work, [longest] * documents + [rest], targets)
    share = most / (base_flops or UNKNOWN_BASE)
    more = "more than a third: who modifies a general-purpose AI model so counts as the provider of the modified one"
    less = "not more than a third: by that alone, who modified the base is not the provider of such a model"
    return {
        "flops-at-least": f"{least * (2 / 3 if export.config.lora.rank else 1):.4g}",
        "flops-at-most": f"{most:.4g}",
        "share-at-most": f"{share:.3g}",
        "share-of": f"the base's {base_flops:.4g}" if base_flops else f"{UNKNOWN_BASE:.0e}: the base's are not known",
        "share-means": more if share > THIRD else less,
    }


def _metrics(export: Export, results: Results) -> Iterator[dict]:
    """The loss of validation, the scores of answers and forgetting, each with its 95% interval if it has one."""

    def metric(kind: str, value: str, of: str, low: float | None = None, high: float | None = None) -> dict:
        bounds = (
            {} if low is None else {"confidenceInterval": {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}}
        )
        return {"type": kind, "value": value, "slice": of} | bounds

    state = export.state
    if state["evaluated"].get("validation") == state["step"] and not export.contents["averaged"]:
        yield metric("validation loss (nats/token)", f"{state['loss']:.6g}", "data.validation")
    for result in results.evaluations:
        for figure in result["figures"]:
            interval, of = result["intervals"].get(figure.metric), f"{Path(result['data']).name}: {figure.n}"
            bounds = (interval.low, interval.high) if interval else ()
            yield metric(figure.name.strip(), figure.value, of, *bounds)
    if found := results.forgetting:
        kinds = {f"right answers ({kind})": each["change"] for kind, each in found["questions"].items()}
        kinds |= {"perplexity per byte": found["perplexity_per_byte"]["change"]}
        kinds |= {name: found[name] for name in ("kl", "agreement") if name in found}
        for kind, each in kinds.items():
            of = "general text, against the base" if kind in found else "general text, change from the base"
            yield metric(f"forgetting: {kind}", f"{each['value']:.6g}", of, each["low"], each["high"])


# ---- model.sig -----------------------------------------------------------------------------------------------------------


def sign_release(directory: Path, key: Path) -> None:
    """Write model.sig, a signature of all files of `directory` by the private key in a PEM file.

    The terminal asks for the password of an encrypted key. Raises UserError for what cannot be signed, and without the library.
    """
    signing = _need("model_signing.signing").Config()
    try:
        try:
            signing.use_elliptic_key_signer(private_key=key)
        except TypeError:  # it is encrypted; the library wants bytes
            signing.use_elliptic_key_signer(private_key=key, password=getpass(f"password of {key}: ").encode())
        signing.set_hashing_config(_hashing()).sign(directory, directory / SIGNATURE)
    except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"{directory} cannot be signed with {key}: {error}; {KEY.format('private')}") from error


def verify_release(directory: Path, key: Path) -> list[str]:
    """What is wrong with a directory that `sign_release` has signed, one sentence each; [] if nothing is.

    key: the PEM file of the public key; nothing else is needed. Raises UserError if it is none, and without the library.
    """
    verifying, signature = _need("model_signing.verifying").Config(), directory / SIGNATURE
    try:
        verifying.use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{key} cannot be used: {error}; {KEY.format('public')}") from error
    if not signature.is_file():
        return [f"{directory} is not signed: it has no {SIGNATURE}"]
    try:
        verifying.verify(directory, signature)
    except Exception as error:  # damage to the file raises one of six kinds
        if "Signature mismatch" in str(error) and (changed := _changed(directory)):
            return changed  # the signature is good, so what it says of the files is true
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        return [f"{signature} does not verify with {key}: {why}"]
    return []


def _changed(directory: Path) -> list[str]:
    """Which files are not those that were signed."""
    payload = json.loads((directory / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    signed = {file["name"]: file["digest"] for file in json.loads(base64.b64decode(payload))["predicate"]["resources"]}
    found = {file.identifier: file.digest.digest_hex for file in _hashing().hash(directory).resource_descriptors()}
    what = {name: "is missing" if name in signed else "was added" for name in signed.keys() ^ found.keys()}
    what |= {name: "has changed" for name in signed.keys() & found.keys() if signed[name] != found[name]}
    return [f"{directory / name} {what[name]} since the directory was signed" for name in sorted(what)]


def _hashing() -> Any:
    return _need("model_signing.hashing").Config().set_ignored_paths(paths=[SIGNATURE])


def _need(module: str) -> Any:
    """A module of the libraries for releases. Raises UserError without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:  # also of pyOpenSSL, which model-signing 1.1.1 imports and does not ask for
        raise UserError(f"a release needs {module} ({error}): {INSTALL}") from error
