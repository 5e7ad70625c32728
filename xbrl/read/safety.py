"""Safe access to untrusted files: report packages (a zip file or a directory) and XML.

Packages are never unpacked: members are read into memory one by one, so no member name is ever used as a path on disk.
Zip bombs are rejected by limits on the number of members, their size and their compression ratio. XML is parsed without
expanding entities and without fetching anything.
"""

import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue] (a compiled module without a stub)

from common.errors import UserError

MAX_MEMBERS = 2_000
MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 1024 * 2**20
MAX_RATIO = 200  # uncompressed / compressed size; real CSV and XML reports have 5 to 40
# macOS and Windows add these to folders and archives. They are never part of a report.
CLUTTER_FOLDERS = ("__MACOSX",)
CLUTTER_FILES = (".ds_store", "thumbs.db", "desktop.ini")
RATIO_FREE_BYTES = 2**20  # members up to this size may have any compression ratio

INSTANCE = "{http://www.w3.org/2001/XMLSchema-instance}"
SCHEMA_LOCATIONS = (f"{INSTANCE}schemaLocation", f"{INSTANCE}noNamespaceSchemaLocation")


@dataclass(frozen=True)
class Package:
    """The files of a zip file or a directory. `names` are relative paths with `/`."""

    path: Path
    names: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """Return the bytes of one member. Raise `UserError` if the archive is damaged."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.path}: member {name} cannot be read ({error}); ask the sender for the package again"
            ) from error


def open_package(path: Path) -> Package:
    """List the files of a zip file or a directory, after checking their names and sizes.

    Files that an operating system has added (`is_clutter`) are checked like all others and then left out.

    Raise `UserError` if the archive is damaged or encrypted, if a member's path leaves the package, if a name occurs twice,
    or if the number of members, their size or their compression ratio exceeds the limits.
    """
    names = _folder_names(path) if path.is_dir() else _zip_names(path)
    return Package(path, tuple(name for name in names if not is_clutter(name)))


def is_clutter(name: str) -> bool:
    """Return whether macOS (`__MACOSX/`, `.DS_Store`, `._name`) or Windows (`Thumbs.db`, `desktop.ini`) added a file."""
    *folders, file = name.split("/")
    return file.startswith("._") or file.lower() in CLUTTER_FILES or any(part in CLUTTER_FOLDERS for part in folders)


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable zip archive ({error}); ask the sender for the file again") from error
    if len(members) > MAX_MEMBERS:
        raise UserError(f"{path}: {len(members)} members, more than {MAX_MEMBERS}; refused as a possible zip bomb")
    names, total = [], 0
    for member in members:
        name = member.filename
        if _is_unsafe(member.orig_filename) or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path}: member {member.orig_filename!r} is a link or points outside the package; refused")
        if member.is_dir():
            continue
        if member.flag_bits & 1:
            raise UserError(f"{path}: member {name} is encrypted; ask for the package without a password")
        if name in names:
            raise UserError(f"{path}: member {name} occurs twice, so its content is ambiguous; refused")
        total += member.file_size
        _check_size(path, name, member.file_size, member.compress_size)
        names.append(name)
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{path}: {total} bytes when expanded, over {MAX_TOTAL_BYTES}, the limit for a package; "
            f"refused as a possible zip bomb"
        )
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
            raise UserError(
                f"{path}: more than {MAX_MEMBERS} files, so this is not a report package; name a smaller directory"
            )
    return names


def _is_unsafe(name: str) -> bool:
    """Return whether a member name is absolute or contains `..`.

    Backslashes, drive letters and control characters are unsafe too, because they can disguise such a name.
    """
    if "\\" in name or not name.isprintable() or ":" in name.split("/")[0]:
        return True
    parts = PurePosixPath(name)
    return parts.is_absolute() or ".." in parts.parts


def _check_size(path: Path, name: str, size: int, packed: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: {name} has {size} bytes, over {MAX_MEMBER_BYTES}, the limit for one file; refused")
    if size > RATIO_FREE_BYTES and size > MAX_RATIO * max(packed, 1):
        raise UserError(
            f"{path}: {name} has a compression ratio of {size // max(packed, 1)}, over the limit of {MAX_RATIO}; "
            f"refused as a possible zip bomb"
        )


def strict_xml(where: str, content: bytes):  # noqa: ANN201 (an lxml tree)
    """Parse XML and return the lxml tree. Entities are not expanded, errors are not repaired, nothing is fetched.

    Raise `UserError`, whose message starts with `where`, if the content is empty, not well-formed or wrongly encoded,
    if it declares an entity (internal, external or parameter), or if it uses an entity other than the five predefined
    by XML.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False)
    try:
        tree = etree.fromstring(content, parser).getroottree()
    except (etree.XMLSyntaxError, ValueError) as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split())  # lxml 5 writes some messages on two lines
        raise UserError(f"{where}: not well-formed XML ({reason}); ask the sender for the file again") from error
    dtd = tree.docinfo.internalDTD
    if dtd is not None and next(dtd.iterentities(), None) is not None:
        raise UserError(
            f"{where}: the file declares entities, which can include other files or expand without limit; refused"
        )
    if next(tree.iter(etree.Entity), None) is not None:
        raise UserError(f"{where}: the file uses an entity that it does not define; refused")
    return tree


def without_schema_locations(tree, content: bytes) -> bytes:  # noqa: ANN001 (an lxml tree)
    """Return the bytes of a document without the `xsi:schemaLocation` attributes of its `tree`.

    The attributes are only hints where a schema may be. A reader that follows them opens any local file that the sender
    names, and fails if it is missing.
    """
    elements = [element for element in tree.iter("*") if any(name in element.attrib for name in SCHEMA_LOCATIONS)]
    if not elements:
        return content
    for element in elements:
        for name in SCHEMA_LOCATIONS:
            element.attrib.pop(name, None)
    return etree.tostring(tree, encoding="utf-8", xml_declaration=True)
