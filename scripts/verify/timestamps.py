"""Compare the entries of a record with their time stamps (training/timestamp.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from scripts.verify.files import NOT_COMPARED, Differs
from training.checkpointer import FILE, Entry
from training.timestamp import FOLDER, INSTALL


def check_timestamps(run: Path, entries: Sequence[Entry], trusted: Path | None) -> Iterator[str]:
    """Yield a line about the stamped entries. Raise Differs if a stamp is of another entry, or if there is none.

    trusted: a file with the certificates (PEM) of the service, or the file to which heads were appended; None: only count.
    """
    tokens = sorted(path for path in (run / FOLDER).glob("*.tsr") if path.is_file())  # a pipe has no end
    if trusted is None:
        if tokens:
            yield f"time stamps: {len(tokens)}, {NOT_COMPARED} without --timestamps"
        return
    try:
        content = trusted.read_bytes()
    except OSError as error:
        raise UserError(f"--timestamps {trusted}: {error.strerror}") from error
    is_service = b"BEGIN CERTIFICATE" in content
    stamped = _tokens(tokens, entries, content) if is_service else _heads(run, entries, content, trusted)
    if not stamped:
        raise Differs(f"no entry of {run / FILE} has a time stamp {'in ' + FOLDER if is_service else f'in {trusted}'}")
    number, time = max(stamped.items())
    missing = len(entries) - len(stamped)
    rest = f"; {missing} entries have none, so their time is {NOT_COMPARED}" if missing else ""
    yield f"time stamps: {len(stamped)}, the newest of {entries[number - 1]} at {time}{rest}"


def _heads(run: Path, entries: Sequence[Entry], content: bytes, trusted: Path) -> dict[int, str]:
    """Return entry -> time from the file of run.timestamp, which may have the heads of several runs."""
    numbers, stamped = {entry.digest: entry.number for entry in entries}, dict[int, str]()
    for line in content.decode(errors="replace").splitlines():
        time, head, *words = [*line.split(" ", 4), "", ""]
        if words[2:3] != [f"of {run.resolve()}"]:
            continue
        if head not in numbers:
            raise Differs(f"{trusted}: {run / FILE} had the head {head} at {time}, and has no such entry now")
        stamped[numbers[head]] = time
    return stamped


def _tokens(tokens: Sequence[Path], entries: Sequence[Entry], content: bytes) -> dict[int, str]:
    """Return entry -> time from the tokens of a service, whose certificates (PEM) are in `content`."""
    try:
        from cryptography import x509
        from rfc3161_client import VerificationError, VerifierBuilder, decode_timestamp_response
    except ImportError as error:
        raise UserError(f"--timestamps needs a library for RFC 3161 ({error}): {INSTALL}") from error
    builder, stamped = VerifierBuilder(), dict[int, str]()
    try:
        for certificate in x509.load_pem_x509_certificates(content):
            is_root = certificate.subject == certificate.issuer
            add = builder.add_root_certificate if is_root else builder.add_intermediate_certificate
            builder = add(certificate)
        verifier = builder.build()
    except ValueError as error:
        raise UserError(f"--timestamps: no usable certificate ({error})") from error
    for token in tokens:
        entry = next((entry for entry in entries if token.stem == f"{entry.number:06d}"), None)
        try:
            response = decode_timestamp_response(token.read_bytes())
            if not (entry and verifier.verify(response, bytes.fromhex(entry.digest))):
                raise ValueError("the record has no such entry")
        except (ValueError, VerificationError) as error:
            raise Differs(f"{token} is no time stamp of {entry or FILE}: {error}") from error
        stamped[entry.number] = response.tst_info.gen_time.isoformat(timespec="seconds")
    return stamped
