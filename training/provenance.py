"""What produced a run: an entry of runs/NAME/record.jsonl for every start that does something.

config.json is that of the newest start. A start whose code is not that of a commit keeps the difference as a patch of its
own, diffs/NUMBER.diff, with the files that train.py loads and git does not know.
"""

import os
import platform
import pwd
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

from common.dtypes import bf16_instructions
from common.durable_files import sha256_of_json, write_durably, write_json
from common.errors import UserError
from common.sha256 import remembered_sha256, sha256, sha256_of_all
from configs.config import Config, as_dict
from data.files import expand
from data.store import is_store
from distributed.device import processor
from distributed.process_group import device_line, gather_objects, library_versions, read_on_first
from training.checkpointer import Checkpointer
from training.ending import BOM, EXPORT
from training.identity import Identity, fingerprint
from training.inputs import Inputs, data_paths
from training.log import Log
from training.start import TrainingRun

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
ROOT = Path(__file__).resolve().parents[1]
OF_A_TOKENIZER = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # suffixes in a model directory
# What keeps libraries from newer instructions; MKL_CBWR changes the bits of products in fp32.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
LONG = 2**26  # bytes that each start reads again; the digests of other files are remembered
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
        """Write everything on rank 0; returns what config.json says."""
        code = git_state(ROOT, identity["the code"])
        diff = code.pop("git_diff")
        number = sum(entry.kind == "start" for entry in record.read()) + 1
        patch = f"diffs/{number:04d}.diff" if diff else None
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "start_step": record.step,
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
        try:
            directory.mkdir(parents=True, exist_ok=True)
            written = {"config.json": sha256_of_json(start)}
            if patch:
                (directory / patch).parent.mkdir(exist_ok=True)
                write_durably(directory / patch, diff)
                written[patch] = sha256(directory / patch)
            of_entry = start | {
                "identity": identity,
                "written": written,
                "files": files_read(config, run.data, identity, log.say),
            }
            record.start(log.kept(record.step, checkpointer.evaluations.evaluated), **of_entry)
            write_json(directory / "config.json", start)
        except OSError as error:
            raise UserError(f"{error.filename or directory}: {error.strerror}; cannot record this start") from error
        return start

    commit = short_commit(read_on_first(write, ranks))
    return f"run {directory}, commit {commit}, torch {torch.__version__}, {device_line(ranks)}"


def files_read(config: Config, inputs: Inputs, identity: Identity, say: Say) -> dict[str, dict[str, str]]:
    """The SHA-256 of the files that decide a run, by their absolute paths: `the base` with its tokenizer, `the data`."""
    base, paths = Path(config.model.path).resolve(), data_paths(inputs.local)
    others = [config.data.chat_template] if config.data.chat_template else []
    fisher = Path(config.ewc.fisher) if config.ewc.strength and config.ewc.fisher else None
    others += sorted(map(str, fisher.iterdir())) if fisher and fisher.is_dir() else []
    small = [path for path in base.iterdir() if path.suffix in OF_A_TOKENIZER and path.is_file()]
    small = [path for path in small if path.name not in (EXPORT, BOM)]  # of a base that is an export; they are renewed
    known = {str(base / name): digest for name, digest in identity["the weights"].items()}
    folders = [path for path in paths if is_store(path)]
    found = [*expand(path for path in paths if path not in folders), *map(Path, others)]
    found += [file for folder in folders for file in sorted(Path(folder).iterdir()) if file.is_file()]
    return {
        "the base": known | _sums([path for path in small if str(path) not in known], say),
        "the data": _sums([path.resolve() for path in found], say),
    }


def _sums(paths: list[Path], say: Say) -> dict[str, str]:
    """The SHA-256 of each file. Only the smallest are read at each start, LONG bytes of them together."""
    sizes = {path: path.stat().st_size for path in paths}
    paths = sorted(sizes, key=sizes.__getitem__)
    count = bisect_right(list(accumulate(sizes[path] for path in paths)), LONG)
    found = sha256_of_all(paths[:count]) | remembered_sha256(paths[count:], say)
    return {str(path): found[path] for path in sorted(found)}


def _user() -> str:
    """Of the process, by the system: LOGNAME and the like can be set to anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container that has no name for its user
        return f"user {os.getuid()}"


def git_state(root: Path, code: Iterable[str] = ()) -> dict[str, str]:
    """git_commit and git_diff of the checkout at `root`.

    The diff has all changes of files that git knows, and the whole of the files named in `code` that it does not know.
    Bytes that are not UTF-8 are written as \\xNN. Where git fails, without git and outside of a checkout too, the first of
    the two that it does not tell says why.
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
    """The commit of a record in 12 digits and whether the code is another one, or why the commit is unknown."""
    commit = record["git_commit"]
    if " " in commit:
        return f"unknown ({commit.removeprefix('unknown: ')})"
    return commit[:12] + " (dirty)" * bool(record["git_diff"])


def versions() -> dict[str, str]:
    """Versions of the packages that compute, and of CUDA and NCCL where torch has them."""
    found = {name: library_versions()[name] for name in PACKAGES}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if dist.is_nccl_available():
            found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def _hardware(device: torch.device) -> str:
    """The GPU's name, or cpu with what decides how it rounds: `cpu (x86_64, AVX512, amx_bf16, avx512_bf16)`.

    A virtual machine may call processors with and without bf16 instructions by one name, such as `Intel(R) Xeon(R) Processor`.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    kinds = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *bf16_instructions(), *limits]
    return f"cpu ({', '.join(kinds)})"


def devices(places: list[tuple[str, str]]) -> list[dict]:
    """(host, device) of each rank -> one entry per host and device, with its ranks."""
    ranks_at: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_at.setdefault(place, []).append(rank)
    return [{"host": host, "device": device, "ranks": ranks} for (host, device), ranks in ranks_at.items()]


def _git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str:
    """What git prints. Raises OSError if it cannot be started or fails."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    answer = subprocess.run(["git", "-C", root, *arguments], capture_output=True, env=environment)
    if answer.returncode not in ok:
        said = answer.stderr.decode("utf-8", errors="backslashreplace").splitlines()
        raise OSError(answer.returncode, said[0] if said else f"exit code {answer.returncode}")
    return answer.stdout.decode("utf-8", errors="backslashreplace")
