"""A release: the signature covers every byte of an export, and bom.json is valid and complete."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Source
from data.remote import fetched_into
from eval.intervals import intervals
from eval.report import Figure
from model.fingerprint import fingerprint_of_base
from model.flops import count_work, step_flops
from model.language_model import build_on_meta
from model.weights import weights_of_directory
from scripts.export import signature
from scripts.export.bom import _metrics, check_bom, write_bom
from scripts.export.signature import sign_release, verify_release
from tests.tiny import tiny_tokenizer, write_chat_file, write_tiny_model
from tests.training.test_model_card import CONTENTS, START, STATE, evaluation, forgetting
from training.checkpoint_export import Export, write_export
from training.checkpointer import Record
from training.model_card import read_results

pytest.importorskip("cyclonedx")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
SAID = "The bank Zylophon said that it holds less than it must."


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Export]:
    """Export a tiny run with data, a mixed-in source and two results."""
    folder = tmp_path_factory.mktemp("release")
    base = write_tiny_model(folder / "base")
    elsewhere, cache = "https://a.org/replay.jsonl", str(folder / "tokens")
    (fetched := fetched_into(elsewhere, cache, 9)).mkdir(parents=True)
    train, replay = write_chat_file(folder / "train.jsonl", 4), write_chat_file(fetched / "replay.jsonl", 4, seed=1)
    model = build_on_meta(shape := AutoConfig.from_pretrained(base))
    mix = (Source("replay", (elsewhere,), 0.25, max_samples=9),)
    data = Data((str(train),), (str(folder / "gone.jsonl"),), mix=mix, sequence_length=64, cache=cache)
    config = Config(Model(str(base)), data, Batch(4), Optimizer(1e-3), Run("trial", str(folder)))
    trained = {"data.train": "0123abcd", "data.mix": [["replay", 0.25, "4567cdef", "anchor"]]}
    identity = {"the weights": {"model.safetensors": sha256(base / "model.safetensors")}, "the data": trained}
    state = STATE | {"loop": STATE["loop"] | {"tokens": 1000, "targets": [678, 90]}, "identity": identity}
    contents = CONTENTS | {"identity": "id", "dtype": "float32", "head": "f" * 64}
    weights = weights_of_directory(base, model)
    export = Export(folder / "run", START, config, state, "AdamW", shape, tiny_tokenizer(), weights, None, contents, [])
    out = folder / "out"
    (export.run / "eval").mkdir(parents=True)
    Record(export.run).append(
        "start", directory=str(folder), files={"the data": {str(path): sha256(path) for path in (train, replay)}}
    )
    train.write_text("changed since")
    write_export(out, export, "")
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    measured = evaluation(fingerprint_of_base(out))
    measured["answers"][0]["answer"] = SAID
    (export.run / "eval" / "test.json").write_text(json.dumps(measured))
    (export.run / "eval" / "general.json").write_text(json.dumps(forgetting(fingerprint_of_base(out))))
    return out, export


def bom_of(out: Path, export: Export) -> tuple[dict, str]:
    line = write_bom(out, export, read_results(out, export))
    return json.loads((out / "bom.json").read_text()), line


def facts(component: dict) -> dict[str, str]:
    return {each["name"].removeprefix("full-fine-tuning:"): each["value"] for each in component["properties"]}


def files(component: dict) -> dict[str, str]:
    return {file["name"]: file["hashes"][0]["content"] for file in component.get("components", ())}


# ---- bom.json ------------------------------------------------------------------------------------------------------------


def test_the_bom_has_base_data_and_results(exported) -> None:
    out, export = exported
    bom, _ = bom_of(out, export)
    check_bom(json.dumps(bom))
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.7")
    parts, model = {part["bom-ref"]: part for part in bom["components"]}, bom["metadata"]["component"]
    base = export.base / "model.safetensors"
    assert files(parts["base"]) == {"model.safetensors": sha256(base)}
    assert facts(parts["base"])["fingerprint"] == fingerprint_of_base(export.base)
    for ref, file, share, targets, tokens in (
        ("data:data.train", "train.jsonl", 0.75, "678", "0123abcd"),
        ("data:replay", "replay.jsonl", 0.25, "90", "4567cdef"),
    ):
        source_facts = facts(parts[ref])
        (started, *_) = Record(export.run).read()
        (digest,) = (sum_ for path, sum_ in started.content["files"]["the data"].items() if Path(path).name == file)
        assert files(parts[ref]) == {file: digest}
        assert (float(source_facts["share"]), source_facts["target-tokens"], source_facts["fingerprint-of-tokens"]) == (
            share,
            targets,
            tokens,
        )
    how = [facts(parts[f"data:{name}"]).get("trained") for name in ("data.train", "replay")]
    assert how == [None, "by KL to the base"]
    assert "components" not in parts["validation"]  # the file is not here: no hash is made up
    assert parts["code:torch"]["purl"] == "pkg:pypi/torch@2.13"
    assert parts["code:train.py"]["version"].endswith("(dirty)")
    results = {name: sha256(export.run / "eval" / name) for name in ("test.json", "general.json")}
    assert files(parts["results"]) == {"test.jsonl": "f" * 64} | results
    written = json.loads((out / "export.json").read_text())
    assert model["name"] == "out" and files(model) == written["files"]
    assert facts(model).get("head", "") == written["head"] and facts(model)["step"] == "2"
    (depends,) = [each["dependsOn"] for each in bom["dependencies"] if each["ref"] == "model"]
    assert set(depends) == set(parts)
    card, known = model["modelCard"], intervals(evaluation(""))
    assert card["modelParameters"]["datasets"] == [{"ref": "data:data.train"}, {"ref": "data:replay"}]
    metrics = {each["type"]: each for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    for kind, low, high in (
        ("validation loss (nats/token)", known["loss"].low, known["loss"].high),
        ("directive ROUGE-L (F)", known["rouge_l"].low, known["rouge_l"].high),
        ("forgetting: perplexity per byte", 0.0625, 0.1875),
    ):
        bounds = metrics[kind]["confidenceInterval"]
        assert (float(bounds["lowerBound"]), float(bounds["upperBound"])) == pytest.approx((low, high), rel=1e-5)
    # The checkpoint's loss is not given for averaged weights, nor for another step.
    averaged = replace(export, contents=export.contents | {"averaged": {"share_of_tuned": 0.5}})
    earlier = replace(export, state=export.state | {"evaluated": {"validation": 1}})
    for variant, is_known in ((export, True), (averaged, False), (earlier, False)):
        slices = [each["slice"] for each in _metrics(variant, read_results(out, variant))]
        assert ("data.validation" in slices) == is_known
    text = (out / "bom.json").read_text()
    assert "Zylophon" not in text and str(out.parent) not in text and "secret" not in text  # the host


def test_the_flops_have_bounds(exported) -> None:
    out, export = exported
    stated = facts(bom_of(out, export)[0]["metadata"]["component"])
    layers, hidden, inner, vocabulary = 2, 64, export.model_config.intermediate_size, export.model_config.vocab_size
    heads = export.model_config.num_key_value_heads / export.model_config.num_attention_heads
    matrices = layers * (hidden * hidden * (2 + 2 * heads) + 3 * hidden * inner)
    assert float(stated["flops-at-least"]) == pytest.approx(6 * (matrices * 1000 + hidden * vocabulary * 768), rel=1e-3)
    work = count_work(build_on_meta(export.model_config), export.model_config)
    real = step_flops(work, [40] * 25, 768)  # 25 documents with as many tokens in total
    assert float(stated["flops-at-least"]) < real < float(stated["flops-at-most"]) < 1.5 * real


def test_an_invalid_bom_is_not_written(exported, tmp_path, monkeypatch) -> None:
    out, export = exported
    bom, _ = bom_of(out, export)
    for path, wrong in (("metadata/component/modelCard", {"loss": 1}), ("", {"note": "x"}), ("", {"version": "1"})):
        broken = json.loads(json.dumps(bom))
        place = broken
        for key in filter(None, path.split("/")):
            place = place[key]
        place |= wrong
        with pytest.raises(UserError, match=f"bom.json is not CycloneDX 1.7 and is not written: .*{next(iter(wrong))}"):
            check_bom(json.dumps(broken))
    before = (out / "bom.json").read_bytes()
    results = read_results(out, export)
    results.evaluations[0]["figures"] = [Figure("f1", 0.5, "12")]  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="performanceMetrics/1/value"):
        write_bom(out, export, results)
    assert (out / "bom.json").read_bytes() == before
    for module in ("jsonschema", "model_signing.signing"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="a release needs jsonschema .*: pip install "):
        check_bom(json.dumps(bom))
    with pytest.raises(UserError, match="a release needs model_signing.signing .*: pip install 'model-signing"):
        sign_release(out, tmp_path / "key")


# ---- model.sig -----------------------------------------------------------------------------------------------------------


def new_keys(folder: Path, name: str, key: object = None, password: bytes | None = None) -> tuple[Path, Path]:
    """Write the PEM files of a private key, by default a new one on P-256, and of its public key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def signed(exported, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Return a copy of the signed export under another name, the private key and the public key."""
    pytest.importorskip("model_signing")
    out, export = exported
    bom_of(out, export)
    folder = tmp_path_factory.mktemp("elsewhere")
    private, public = new_keys(folder, "mine")
    sign_release(out, private)
    return Path(shutil.copytree(out, folder / "copy")), private, public


def test_a_copy_verifies_with_the_public_key(signed, tmp_path) -> None:
    copy, private, public = signed
    assert verify_release(copy, public) == []
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # a hub adds it
    assert verify_release(copy, public) == []
    _, other_public = new_keys(tmp_path, "other")
    (problem,) = verify_release(copy, other_public)
    assert problem.startswith(f"{copy / 'model.sig'} does not verify with {other_public}: Key mismatch")
    bundle = json.loads((copy / "model.sig").read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]  # without a hint, the signature itself does not match
    other_copy = Path(shutil.copytree(copy, tmp_path / "copy"))
    (other_copy / "model.sig").write_text(json.dumps(bundle))
    assert verify_release(other_copy, public) == [] and "does not verify" in verify_release(other_copy, other_public)[0]
    (other_copy / "model.sig").unlink()
    assert verify_release(other_copy, public) == [f"{other_copy} is not signed: it has no model.sig"]


def test_a_changed_byte_in_any_file_is_named(signed) -> None:
    copy, _, public = signed
    names = {path.name for path in copy.iterdir()} - {".gitattributes"}
    kinds = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == kinds | {"chat_template.jinja", "export.json", "bom.json", "README.md", "model.sig"}
    for name in names - {"model.sig"}:
        whole = (copy / name).read_bytes()
        middle = len(whole) // 2
        (copy / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert verify_release(copy, public) == [f"{copy / name} has changed since the directory was signed"]
        (copy / name).write_bytes(whole)
    whole = (copy / "model.sig").read_bytes()
    for place in range(0, len(whole), 23):
        (copy / "model.sig").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (problem,) = verify_release(copy, public)
        assert problem.startswith(f"{copy / 'model.sig'} does not verify with {public}: "), place
    (copy / "model.sig").write_bytes(whole)
    assert verify_release(copy, public) == []


def test_added_missing_and_linked_files_are_named(signed) -> None:
    copy, _, public = signed
    (copy / "more").mkdir()
    (copy / "more" / "modeling.py").write_text("")
    (copy / "config.json").rename(copy / "kept")
    problems = [
        f"{copy / name} {what} since the directory was signed" for name, what in (("config.json", "is missing"),)
    ]
    problems += [f"{copy / name} was added since the directory was signed" for name in ("kept", "more/modeling.py")]
    assert verify_release(copy, public) == problems
    (copy / "config.json").symlink_to(copy / "kept")
    assert "symlink" in verify_release(copy, public)[0]
    (copy / "config.json").unlink()
    (copy / "kept").rename(copy / "config.json")
    shutil.rmtree(copy / "more")
    assert verify_release(copy, public) == []


def test_an_encrypted_key_needs_its_password(signed, tmp_path, monkeypatch) -> None:
    copy, private, public = signed
    folder = Path(shutil.copytree(copy, tmp_path / "copy"))
    key = ec.generate_private_key(ec.SECP384R1())
    hidden, shown = new_keys(tmp_path, "hidden", key, b"open sesame")
    monkeypatch.setattr(signature, "getpass", lambda prompt: "open sesame")
    sign_release(folder, hidden)
    assert verify_release(folder, shown) == []
    monkeypatch.setattr(signature, "getpass", lambda prompt: "wrong")
    no_key = "must be the PEM file of a private key on the curve P-256, P-384 or P-521"
    rsa_key, rsa_public = new_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 1024))
    for wrong in (hidden, public, rsa_key, tmp_path / "none"):
        with pytest.raises(UserError, match=f"cannot be signed with {wrong}: .*{no_key}"):
            sign_release(folder, wrong)
    for wrong in (private, rsa_public, tmp_path / "none"):
        with pytest.raises(UserError, match=f"{wrong} cannot be used: .*PEM file of a public key"):
            verify_release(folder, wrong)
    assert verify_release(folder, shown) == []
