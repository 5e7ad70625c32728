"""Time stamps of the record's heads outside of the run (run.timestamp): its owner cannot rewrite the record unseen.

A URL is a time-stamping service (RFC 3161), whose signed tokens go to runs/NAME/timestamps/ENTRY.tsr. A path is a file to which
each head is appended, on a disk that the run's owner cannot change.
"""

import os
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError

FOLDER = "timestamps"
SECONDS = 10  # that an entry waits for a service
INSTALL = "pip install 'rfc3161-client>=1.0,<2'"


def stamp(target: str, directory: Path, number: int, line: bytes, head: str) -> None:
    """Send the head of an entry to `target`, a URL or a path. If that fails, print a warning: the run goes on.

    number: of the entry. line: its bytes, whose SHA-256 is the head and the message imprint of a token. Raise UserError if the
    library for RFC 3161 is missing.
    """
    try:
        if "://" not in target:
            with Path(target).open("a", encoding="utf-8") as file:
                time = datetime.now(UTC).isoformat(timespec="seconds")
                file.write(f"{time} {head} entry {number} of {directory.resolve()}\n")
                file.flush()
                os.fsync(file.fileno())
            return
        from rfc3161_client import HashAlgorithm, TimestampRequestBuilder, decode_timestamp_response

        request = TimestampRequestBuilder(line, HashAlgorithm.SHA256).build()
        query = urllib.request.Request(target, request.as_bytes(), {"Content-Type": "application/timestamp-query"})
        with urllib.request.urlopen(query, timeout=SECONDS) as reply:
            content = reply.read(2**20)
        decode_timestamp_response(content)
        (directory / FOLDER).mkdir(exist_ok=True)
        (directory / FOLDER / f"{number:06d}.tsr").write_bytes(content)
    except ImportError as error:
        raise UserError(f"run.timestamp={target} needs a library for RFC 3161 ({error}): {INSTALL}") from error
    except (OSError, ValueError) as error:
        print(
            f"warning: entry {number} of the record has no time stamp: {target}: {error}", file=sys.stderr, flush=True
        )
