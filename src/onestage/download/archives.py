"""Unpacks tar and zip archives of foreign origin: files below one folder, within limits, and nothing else."""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from onestage.errors import DataError
from onestage.files import is_encodable, printable

COPY_BYTES = 1 << 20
REMEDY = "Delete the archive and download it again; if that does not help, it is not what it should be."


class Limits(NamedTuple):
    """What an archive may become."""

    num_members: int = 1_000_000
    num_bytes: int = 64 << 30


class Member(NamedTuple):
    """One entry of an archive."""

    name: str
    kind: Literal["file", "folder", "other"]
    num_bytes: int
    open: Callable[[], IO[bytes] | None]


def extract(archive: Path, folder: Path, limits: Limits | None = None) -> None:
    """Unpack a tar file (not compressed) or a zip file below `folder`.

    All names are checked before the first byte is written. Files get the rights of new files.

    Args:
        archive: the file.
        folder: where to; must exist. A file that is there already must be the same.
        limits: on members and bytes.

    Raises:
        DataError: the archive is damaged; or a member leads out of the folder, is a link or device, stands there twice,
            or there are too many or too large ones.
    """
    with _members(archive) as members:
        entries = _checked(archive, members, limits or Limits())
        for member, path in entries:
            target = folder / path
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(archive, member, target)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Open an archive of either kind."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zip_file:
                yield _zip_members(zip_file)
        else:
            with tarfile.open(archive, "r:") as tar_file:
                yield _tar_members(tar_file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as reason:
        raise DataError(f"{printable(archive)}: is damaged, or no archive ({reason}).\n{REMEDY}") from None


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        kind: Literal["file", "folder", "other"] = "folder" if info.is_dir() else "file"
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:  # a link; encrypted
            kind = "other"
        yield Member(info.orig_filename, kind, info.file_size, lambda info=info: archive.open(info))  # type: ignore[misc]


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        kind: Literal["file", "folder", "other"] = "file" if info.isreg() else "folder" if info.isdir() else "other"
        yield Member(info.name, kind, info.size, lambda info=info: archive.extractfile(info))  # type: ignore[misc]


def _checked(archive: Path, members: Iterator[Member], limits: Limits) -> list[tuple[Member, PurePosixPath]]:
    """Return the members and where they go, or raise for what should not be in an archive of data."""
    entries: list[tuple[Member, PurePosixPath]] = []
    kind_of_path: dict[str, str] = {}
    num_bytes = 0
    for member in members:
        path = PurePosixPath(member.name)
        num_bytes += member.num_bytes
        problem = _problem(member, path)
        key = str(path).casefold()
        if len(entries) >= limits.num_members:
            problem = f"is one of more than {limits.num_members} members"
        elif num_bytes > limits.num_bytes:
            problem = f"makes it unpack to more than {limits.num_bytes / 1e9:.1f} GB"
        elif key in kind_of_path and "folder" not in (member.kind, kind_of_path[key]):
            problem = "is there twice, or in two spellings that are one file on some disks"
        elif any(kind_of_path.get(str(parent).casefold()) == "file" for parent in path.parents):
            problem = "lies in what is a file"
        if problem:
            raise DataError(f"{printable(archive)}: {member.name!r:.200} {problem}: refused.\n{REMEDY}")
        kind_of_path[key] = member.kind
        entries.append((member, path))
    return entries


def _problem(member: Member, path: PurePosixPath) -> str | None:
    if member.kind == "other":
        return "is a link, a device or encrypted"
    is_drive = len(member.name) > 1 and member.name[1] == ":"
    is_strange = {"\\", "\0"}.intersection(member.name) or not is_encodable(member.name)
    if path.is_absolute() or ".." in path.parts or is_drive or is_strange:
        return "leads out of the folder"
    return None


def _write(archive: Path, member: Member, target: Path) -> None:
    """Write one file, and not a byte more than the archive said."""
    source = member.open()
    if source is None:
        raise DataError(f"{printable(archive)}: {member.name!r:.200} has no content.\n{REMEDY}")
    with source:
        if target.exists():  # of another archive that shares a file
            is_same = target.stat().st_size == member.num_bytes and target.read_bytes() == source.read()
            if not is_same:
                raise DataError(f"{printable(archive)}: {member.name!r:.200} is there with other content.\n{REMEDY}")
            return
        with target.open("xb") as file:
            shutil.copyfileobj(source, file, COPY_BYTES)
            num_bytes = file.tell()
    if num_bytes != member.num_bytes:
        raise DataError(f"{printable(archive)}: {member.name!r:.200} has another length than it says.\n{REMEDY}")
