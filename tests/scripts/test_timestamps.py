"""Time stamps of a record: a real RFC 3161 service (openssl) on loopback, and a file elsewhere."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common.errors import UserError
from scripts.verify.files import Differs
from scripts.verify.timestamps import check_timestamps
from tests.forged import rewrite
from training.checkpointer import Record
from training.timestamp import FOLDER

SERVICE = """
[tsa]
default_tsa = service
[service]
serial = serial
signer_cert = tsa.pem
signer_key = tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
ess_cert_id_alg = sha256
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = critical, timeStamping
"""


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The URL of a time-stamping service, and its root certificate."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "service.cnf").write_text(SERVICE)
    (folder / "serial").write_text("01\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "root.key", "-out", "root.pem", "-subj", "/CN=root", "-days", "9")
    openssl(folder, "req", *key, "-keyout", "tsa.key", "-out", "tsa.csr", "-subj", "/CN=service")
    signed = ("-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key", "-out", "tsa.pem", "-days", "9")
    openssl(folder, "x509", "-req", *signed, "-extfile", "service.cnf", "-extensions", "leaf")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            (folder / "query").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            openssl(folder, "ts", "-reply", "-config", "service.cnf", "-queryfile", "query", "-out", "reply")
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / "reply").read_bytes())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder / "root.pem"
    server.shutdown()


def recorded(folder: Path, target: str) -> Record:
    """A record of three entries whose start names `target`."""
    folder.mkdir()
    record = Record(folder)
    record.append("start", step=0, config={"run": {"timestamp": target}})
    record.append("stop", step=2)
    record.append("export", step=2, directory="export")
    return record


def change(entries: list[dict]) -> list[dict]:
    entries[1]["step"] = 3
    return entries


def test_tokens_of_a_service_prove_entries(tmp_path, service) -> None:
    url, root = service
    record = recorded(tmp_path / "run", url)
    run, entries = record.directory, record.read()
    (line,) = check_timestamps(run, entries, root)
    assert (
        line.startswith("time stamps: 3, the newest of entry 3 (export, step 2) at 20") and "not compared" not in line
    )
    (line,) = check_timestamps(run, entries, None)
    assert "not compared" in line
    # The message imprint is the head itself, so that openssl alone can verify a token.
    (tmp_path / "line").write_bytes(record.path.read_bytes().splitlines()[1])
    token = str(run / FOLDER / "000002.tsr")
    openssl(tmp_path, "ts", "-verify", "-data", "line", "-in", token, "-CAfile", str(root))
    rewrite(run, change)
    with pytest.raises(Differs, match=r"000002.tsr is no time stamp of entry 2 \(stop, step 3\)"):
        list(check_timestamps(run, record.read(), root))
    (run / FOLDER / "000002.tsr").unlink()
    (run / FOLDER / "000003.tsr").unlink()
    os.mkfifo(run / FOLDER / "000002.tsr")  # would be read for ever
    (line,) = check_timestamps(run, record.read(), root)
    assert line.startswith("time stamps: 1, the newest of entry 1 (start") and "2 entries have none" in line
    (run / FOLDER / "000001.tsr").unlink()
    with pytest.raises(Differs, match="no entry of .* has a time stamp"):
        list(check_timestamps(run, record.read(), root))


def test_tokens_of_another_service_differ(tmp_path, service) -> None:
    url, root = service
    run = recorded(tmp_path / "run", url).directory
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(tmp_path, "req", "-x509", *key, "-keyout", "k", "-out", "other.pem", "-subj", "/CN=root", "-days", "9")
    with pytest.raises(Differs, match="000001.tsr is no time stamp"):
        list(check_timestamps(run, Record(run).read(), tmp_path / "other.pem"))
    with pytest.raises(UserError, match="No such file"):
        list(check_timestamps(run, Record(run).read(), tmp_path / "missing.pem"))


def test_heads_in_a_file_prove_entries(tmp_path) -> None:
    heads = tmp_path / "elsewhere.txt"
    other, record = recorded(tmp_path / "other", str(heads)), recorded(tmp_path / "run", str(heads))
    assert len(heads.read_text().splitlines()) == 6
    (line,) = check_timestamps(record.directory, record.read(), heads)
    assert line.startswith("time stamps: 3, the newest of entry 3 (export, step 2) at 20")
    rewrite(record.directory, change)
    with pytest.raises(Differs, match="had the head [0-9a-f]{64} at 20.*, and has no such entry now"):
        list(check_timestamps(record.directory, record.read(), heads))
    assert list(check_timestamps(other.directory, other.read(), heads))


def test_unreachable_target_is_a_warning(tmp_path, capsys) -> None:
    record = recorded(tmp_path / "run", str(tmp_path / "no" / "such" / "file"))
    assert len(record.read()) == 3
    assert capsys.readouterr().err.count("warning: entry ") == 3
    record.append("start", step=2, config=json.loads('{"run": {}}'))  # an older record has no such setting
    assert not capsys.readouterr().err
