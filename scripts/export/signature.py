"""model.sig: the signature of all files of an export, which anyone can verify with the public key alone.

It is OpenSSF Model Signing 1.0 with a key, which works offline. It binds the weights to the statements of export.json, bom.json
and README.md about the run, its evaluation and its forgetting. git's own files (.git, .github, .gitattributes, .gitignore) are
not signed, as is usual: a hub adds them, and no model is loaded from them.
"""

import base64
import importlib
import json
from getpass import getpass
from pathlib import Path
from typing import Any

from common.errors import UserError
from training.ending import SIGNATURE

INSTALL = "pip install 'model-signing>=1.1,<2' pyopenssl 'cyclonedx-python-lib[json-validation]>=11.12,<12'"
KEY = "it must be the PEM file of a {} key on the curve P-256, P-384 or P-521"


def sign_release(directory: Path, key: Path) -> None:
    """Sign all files of `directory` with the private key in a PEM file, and write model.sig.

    Ask for the password of an encrypted key in the terminal. Raise UserError if it cannot be signed, or without the library.
    """
    signing = import_optional("model_signing.signing").Config()
    try:
        try:
            signing.use_elliptic_key_signer(private_key=key)
        except TypeError:  # the key is encrypted; the library wants its password as bytes
            signing.use_elliptic_key_signer(private_key=key, password=getpass(f"password of {key}: ").encode())
        signing.set_hashing_config(_hashing()).sign(directory, directory / SIGNATURE)
    except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"{directory} cannot be signed with {key}: {error}; {KEY.format('private')}") from error


def verify_release(directory: Path, key: Path) -> list[str]:
    """Return a sentence for each way in which a directory differs from the one that was signed; [] if it is equal.

    key: the PEM file of the public key. Raise UserError if it is not one, or without the library.
    """
    verifying, signature = import_optional("model_signing.verifying").Config(), directory / SIGNATURE
    try:
        verifying.use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{key} cannot be used: {error}; {KEY.format('public')}") from error
    if not signature.is_file():
        return [f"{directory} is not signed: it has no {SIGNATURE}"]
    try:
        verifying.verify(directory, signature)
    except Exception as error:  # a damaged file raises one of six kinds
        # On a mismatch the signature itself is good, so its list of files can be trusted.
        if "Signature mismatch" in str(error) and (changes := _changes(directory)):
            return changes
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        return [f"{signature} does not verify with {key}: {why}"]
    return []


def _changes(directory: Path) -> list[str]:
    """Return a sentence for each file that is missing, was added or has changed since the directory was signed."""
    payload = json.loads((directory / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    signed = {file["name"]: file["digest"] for file in json.loads(base64.b64decode(payload))["predicate"]["resources"]}
    present = {file.identifier: file.digest.digest_hex for file in _hashing().hash(directory).resource_descriptors()}
    change = {name: "is missing" if name in signed else "was added" for name in signed.keys() ^ present.keys()}
    change |= {name: "has changed" for name in signed.keys() & present.keys() if signed[name] != present[name]}
    return [f"{directory / name} {change[name]} since the directory was signed" for name in sorted(change)]


def _hashing() -> Any:
    return import_optional("model_signing.hashing").Config().set_ignored_paths(paths=[SIGNATURE])


def import_optional(module: str) -> Any:
    """Import a module of the optional libraries for releases. Raise UserError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:  # pyOpenSSL, too, which model-signing 1.1.1 imports but does not require
        raise UserError(f"a release needs {module} ({error}): {INSTALL}") from error
