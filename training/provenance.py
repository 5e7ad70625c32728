"""The provenance of a run: each start that trains or exports appends an entry to runs/NAME/record.jsonl.

config.json describes the newest start. If the code differs from its commit, the start writes the difference to
diffs/NUMBER.diff, together with the files that train.py loads and git does not know.
"""

import json
import os
import platform
import pwd
import re
import socket
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from common.durable_files import sha256_of_json, write_durably, write_json
from common.errors import UserError
from common.sha256 import sha256, sha256_of_all
from configs.config import Config, as_dict
from data.files import expand
from data.store import is_store
from distributed.device import processor
from distributed.process_group import device_line, gather_objects, library_versions, read_on_first
from model.dtypes import bf16_instructions
from model.weight_digests import remembered_sha256
from training.checkpointer import Checkpointer
from training.ending import BOM, EXPORT
from training.identity import Identity, fingerprint
from training.inputs import Inputs, data_paths
from training.log import Log
from training.start import TrainingRun

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
ROOT = Path(__file__).resolve().parents[1]
OF_A_TOKENIZER = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # suffixes in a model directory
# Variables that keep libraries from newer instructions; MKL_CBWR changes the bits of products in fp32.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
LONG = 2**26  # bytes that each start hashes again; digests of further files are remembered
# Passwords in URLs, values of a query that sign or authorise, and tokens by the prefixes of their services.
SECRETS = re.compile(
    r"(?<=://)(?:[^/\s@'\"]+|[^/\s@'\"]*:[^\s@'\"]+)(?=@)"
    r"|(?<=[?&;#])((?i:[\w.-]*(?:sig|signature|token|key|credential|secret|password|auth|policy)[\w.-]*)=)[^&#\s'\"\\]+"
    r"|\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[opsu]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16})\b"
)
Say = Callable[[str], None]


def record_start(run: TrainingRun, checkpointer: Checkpointer, log: Log) -> str:
    """Append the entry of this start to the record, and write config.json and the start's diff. Every rank must call this.

    Call it after `Checkpointer.find` and before `Log.open`. Return a line that names the start. Raise UserError on all ranks if
    the files cannot be written.
    """
    config, record, identity = run.config, checkpointer.record, checkpointer.identity
    directory, ranks, settings = run.directory, run.ranks, as_dict(config)
    places = gather_objects((socket.gethostname(), _hardware(ranks.device)), ranks)

    def write() -> dict:
        """Write everything on rank 0, and return the content of config.json."""
        code = git_state(ROOT, identity["the code"])
        diff = code.pop("git_diff")
        number = sum(entry.kind == "start" for entry in record.read()) + 1
        patch = f"diffs/{number:04d}.diff" if diff else None
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "start_step": record.step,
            "total_steps": run.data.total_steps,
            "config": settings,
            "command": sys.argv,
            "directory": os.getcwd(),
            "started_by": _user(),
            "approved_by": config.run.approved_by,
            "identity": fingerprint(identity),
            **code,
            "git_diff": patch,
            "world_size": ranks.world_size,
            "devices": devices(places),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            **({} if restarts is None else {"torchrun_restarts": int(restarts)}),
            "python": platform.python_version(),
            "versions": versions(),
        }
        start = json.loads(without_secrets(json.dumps(start)))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            written = {"config.json": sha256_of_json(start)}
            if patch:
                (directory / patch).parent.mkdir(exist_ok=True)
                write_durably(directory / patch, without_secrets(diff))
                written[patch] = sha256(directory / patch)
            content = start | {
                "identity": identity,
                "written": written,
                "files": files_read(config, run.data, identity, log.say),
            }
            record.start(log.kept(record.step, checkpointer.evaluations.evaluated), **content)
            write_json(directory / "config.json", start)
        except OSError as error:
            raise UserError(f"{error.filename or directory}: {error.strerror}; cannot record this start") from error
        return start

    commit = short_commit(read_on_first(write, ranks))
    return f"run {directory}, commit {commit}, torch {torch.__version__}, {device_line(ranks)}"


def files_read(config: Config, inputs: Inputs, identity: Identity, say: Say) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the files that decide a run, by absolute path: `the base` with its tokenizer, and `the data`."""
    base, paths = Path(config.model.path).resolve(), data_paths(inputs.local)
    more_paths = [config.data.chat_template] if config.data.chat_template else []
    fisher = Path(config.ewc.fisher) if config.ewc.strength and config.ewc.fisher else None
    more_paths += sorted(map(str, fisher.iterdir())) if fisher and fisher.is_dir() else []
    small = [path for path in base.iterdir() if path.suffix in OF_A_TOKENIZER and path.is_file()]
    small = [path for path in small if path.name not in (EXPORT, BOM)]  # in a base that is an export: they are renewed
    known = {str(base / name): digest for name, digest in identity["the weights"].items()}
    folders = [path for path in paths if is_store(path)]
    files = [*expand(path for path in paths if path not in folders), *map(Path, more_paths)]
    files += [file for folder in folders for file in sorted(Path(folder).iterdir()) if file.is_file()]
    return {
        "the base": known | _sums([path for path in small if str(path) not in known], say),
        "the data": _sums([path.resolve() for path in files], say),
    }


def _sums(paths: list[Path], say: Say) -> dict[str, str]:
    """Return the SHA-256 of each file. Only the smallest, LONG bytes in total, are read at each start."""
    sizes = {path: path.stat().st_size for path in paths}
    paths = sorted(sizes, key=sizes.__getitem__)
    count = bisect_right(list(accumulate(sizes[path] for path in paths)), LONG)
    digests = sha256_of_all(paths[:count]) | remembered_sha256(paths[count:], say)
    return {str(path): digests[path] for path in sorted(digests)}


def without_secrets(text: str) -> str:
    """Replace tokens, passwords and signatures of URLs by REDACTED: a record may be published, and cannot be changed later."""
    return SECRETS.sub(lambda match: f"{match[1] or ''}REDACTED", text)


def _user() -> str:
    """Return the user of this process as the system knows it: LOGNAME and similar variables can be set to anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container that has no name for its user
        return f"user {os.getuid()}"


def git_state(root: Path, code: Iterable[str] = ()) -> dict[str, str]:
    """Return git_commit and git_diff of the checkout at `root`.

    The diff contains all changes of files that git knows, and the full text of the files named in `code` that it does not know.
    Bytes that are not UTF-8 are written as \\xNN. If git fails, is missing, or `root` is no checkout, the first value that
    cannot be read holds the reason.
    """
    state = {"git_commit": "", "git_diff": ""}
    try:
        state["git_commit"] = _git(root, "rev-parse", "--verify", "HEAD").strip()
        state["git_diff"] = _git(root, "diff", "--no-color", "--no-ext-diff", "HEAD")
        inside = [name for name in code if (root / name).is_file()]
        for name in _git(root, "ls-files", "--others", "-z", "--", *inside).split("\0")[:-1] if inside else ():
            state["git_diff"] += _git(root, "diff", "--no-color", "--no-index", "/dev/null", name, ok=(0, 1))
    except OSError as error:
        state["git_diff" if state["git_commit"] else "git_commit"] += f"unknown: git: {error.strerror}"
    return state


def short_commit(record: dict) -> str:
    """Return the commit of a start in 12 digits, with "(dirty)" if the code differs, or the reason why it is unknown."""
    commit = record["git_commit"]
    if " " in commit:
        return f"unknown ({commit.removeprefix('unknown: ')})"
    return commit[:12] + " (dirty)" * bool(record["git_diff"])


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute, and of CUDA and NCCL if torch has them."""
    by_name = {name: library_versions()[name] for name in PACKAGES}
    if torch.version.cuda:
        by_name["cuda"] = torch.version.cuda
        if dist.is_nccl_available():
            by_name["nccl"] = ".".join(map(str, nccl.version()))
    return by_name


def _hardware(device: torch.device) -> str:
    """Return the GPU's name, or the properties of a CPU that decide its rounding: `cpu (x86_64, AVX512, amx_bf16)`.

    The name of a CPU does not suffice: `Intel(R) Xeon(R) Processor` in a virtual machine may or may not have bf16 instructions.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    kinds = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *bf16_instructions(), *limits]
    return f"cpu ({', '.join(kinds)})"


def devices(places: list[tuple[str, str]]) -> list[dict]:
    """Group the ranks by their (host, device), and return one entry per group."""
    ranks_at: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_at.setdefault(place, []).append(rank)
    return [{"host": host, "device": device, "ranks": ranks} for (host, device), ranks in ranks_at.items()]


def _git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str:
    """Run git and return its output. Raise OSError if it cannot be started or fails."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, env=environment)
    if done.returncode not in ok:
        lines = done.stderr.decode("utf-8", errors="backslashreplace").splitlines()
        raise OSError(done.returncode, lines[0] if lines else f"exit code {done.returncode}")
    return done.stdout.decode("utf-8", errors="backslashreplace")
