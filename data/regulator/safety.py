"""Opening files that strangers sent: report packages (zip or unpacked) and XML, with nothing expanded or fetched.

A package is read member by member in memory and never unpacked, so no name in it can reach the file system. Members are
capped in count, size and compression ratio against zip bombs.
"""

import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError

MAX_MEMBERS = 2_000
MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 1024 * 2**20
MAX_RATIO = 200  # real CSV and XML reports shrink 5 to 40 times
RATIO_FREE_BYTES = 2**20  # a small member cannot hurt, however well it shrinks


@dataclass(frozen=True)
class Package:
    """The files of a zip or of a folder: `names` are relative, with `/`."""

    path: Path
    names: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """The bytes of one member; UserError if the archive is damaged."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.path}: member {name} cannot be read ({error}); ask for the package again"
            ) from error


def open_package(path: Path) -> Package:
    """List a zip or a folder after checking its names and sizes.

    Raises UserError for a damaged or encrypted archive, a path that leaves the package, a name that occurs twice, and
    for more members, bytes or compression than a report has.
    """
    return Package(path, tuple(_folder_names(path) if path.is_dir() else _zip_names(path)))


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable zip archive ({error})") from error
    if len(members) > MAX_MEMBERS:
        raise UserError(f"{path}: {len(members)} members, more than {MAX_MEMBERS}; refused as a possible zip bomb")
    names, total = [], 0
    for member in members:
        name = member.filename
        if _leaves(member.orig_filename) or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path}: member {member.orig_filename!r} points outside the package; refused")
        if member.is_dir():
            continue
        if member.flag_bits & 1:
            raise UserError(f"{path}: member {name} is encrypted; send the package without a password")
        if name in names:
            raise UserError(f"{path}: member {name} occurs twice; refused, since readers disagree about which counts")
        total += member.file_size
        _check_size(path, name, member.file_size, member.compress_size)
        names.append(name)
    if total > MAX_TOTAL_BYTES:
        raise UserError(f"{path}: {total} bytes when expanded, over {MAX_TOTAL_BYTES}; refused as a possible zip bomb")
    return names


def _folder_names(path: Path) -> list[str]:
    root = path.resolve()
    names = []
    for file in sorted(path.rglob("*")):
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{path}: {file.name} is a link that points outside the package; refused")
        if file.is_file():
            _check_size(path, file.name, file.stat().st_size, file.stat().st_size)
            names.append(file.relative_to(path).as_posix())
        if len(names) > MAX_MEMBERS:
            raise UserError(f"{path}: more than {MAX_MEMBERS} files; a report package has fewer")
    return names


def _leaves(name: str) -> bool:
    """Whether a member name is absolute, climbs with `..`, or hides one of these behind backslashes, a drive or a control."""
    if "\\" in name or not name.isprintable() or ":" in name.split("/")[0]:
        return True
    parts = PurePosixPath(name)
    return parts.is_absolute() or ".." in parts.parts


def _check_size(path: Path, name: str, size: int, packed: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: {name} has {size} bytes, over {MAX_MEMBER_BYTES}; refused")
    if size > RATIO_FREE_BYTES and size > MAX_RATIO * max(packed, 1):
        raise UserError(f"{path}: {name} expands {size // max(packed, 1)} times; refused as a possible zip bomb")


def strict_xml(where: str, content: bytes):  # noqa: ANN201 (an lxml tree)
    """Parse XML strictly; returns the lxml tree. Nothing is fetched, expanded or repaired.

    Raises UserError, beginning with `where`, for what is empty, not well-formed or wrongly encoded, for any entity that
    is declared (internal, external or parameter) and for any that is used beyond the five of XML.
    """
    try:
        from lxml import etree
    except ImportError as error:
        raise UserError(f"{where}: reading it needs lxml; pip install lxml") from error
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False)
    try:
        tree = etree.fromstring(content, parser).getroottree()
    except (etree.XMLSyntaxError, ValueError) as error:
        reason = getattr(error, "msg", None) or error
        raise UserError(f"{where}: not well-formed XML ({reason}); ask for the file again") from error
    dtd = tree.docinfo.internalDTD
    if dtd is not None and next(dtd.iterentities(), None) is not None:
        raise UserError(f"{where}: the file declares entities, which can hide other files or grow without end; refused")
    if next(tree.iter(etree.Entity), None) is not None:
        raise UserError(f"{where}: the file uses an entity that it does not define; refused")
    return tree
