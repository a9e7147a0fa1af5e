"""Finds files under a folder and reads one whole, with the mistakes that its first bytes betray."""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from onestage.errors import AnnotationError, ConfigError, DataError

HEAD_BYTES = 256  # enough to recognise a web page or a pointer file
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4000  # what Linux, macOS and Windows have in common, less what stands before it
MAX_FILE_BYTES = 4 << 30  # ten times COCO's largest annotation file; a path that leads to an archive is a mistake


def read_file(path: Path, error: type[DataError], noun: str, remedy: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file, and never wait for a pipe.

    Args:
        path: the file.
        error: what to raise.
        noun: what the file should be, for the message: "a COCO annotation file".
        remedy: what to do when it is missing or is something else.
        max_bytes: a longer file is refused before it is read.

    Raises:
        DataError: as `error`: the file is missing, unreadable, not a regular file, empty, too long, a web page or a
            Git LFS pointer.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            content = file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes else None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        text = reason.strerror if isinstance(reason, OSError) else str(reason)
        raise error(f"{printable(path)}: cannot be read: {text}. It must be {noun}.\n{remedy}") from None
    if content is None:
        problem = f"has {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise error(f"{printable(path)}: {problem}; {noun} is a file of at most {max_bytes} bytes.\n{remedy}")
    _check_head(content, path, error, noun, remedy)
    return content


def find_files(source: str, names: Sequence[object], root: Path) -> list[str | None]:
    """Find the files that an annotation names. Each folder is listed once; no file is opened.

    Args:
        source: the annotation file, for messages.
        names: what it gives as file names, relative to `root`, with "/" between folders.
        root: the folder that no name may leave, not even through a link.

    Returns:
        For each name its path, or None where there is no such regular file.

    Raises:
        AnnotationError: `root` is not a folder, a name leaves it, or none of the files exists.
    """
    remedy = "Give the folder that the names are relative to: data.root, data.train_images, or --images of doctor."
    if not root.is_dir():
        raise AnnotationError(f"{printable(root)}: is not a folder; it must hold the images of {source}.\n{remedy}")
    listings: dict[str, dict[str, bool]] = {}
    folders: dict[str, str] = {}
    paths: list[str | None] = []
    for name in names:
        folder, _, file_name = _checked(source, name).rpartition("/")
        if folder not in listings:
            listings[folder] = list_files(root / folder)
            _require_inside(source, root, root / folder)
            folders[folder] = str(root / folder)
        path = f"{folders[folder]}{os.sep}{file_name}" if file_name in listings[folder] else None
        if path and listings[folder][file_name]:
            _require_inside(source, root, Path(path))
        paths.append(path)
    if names and not any(paths):
        problem = f"none of the {len(names)} images is in {printable(root)} (the first is {names[0]!r})"
        first = _checked(source, names[0])
        parents = root.resolve().parents[:2]
        above = [folder for folder in parents if Path(first).name in list_files((folder / first).parent)]
        if above:
            remedy = f"They are in {printable(above[0])}: give that as data.train_images or data.val_images."
        raise AnnotationError(f"{source}: {problem}.\n{remedy}")
    return paths


def list_files(folder: Path) -> dict[str, bool]:
    """Return the names of the regular files in a folder -> whether each is a link. Empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return {}


def write_new_file(path: Path, content: bytes) -> None:
    """Write a file that is not there yet: whole, or not at all.

    Raises:
        ConfigError: there is such a file, or it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.link(temporary, path)  # unlike a rename it never replaces what is there
    except FileExistsError:
        raise ConfigError(f"{printable(path)}: is there already; nothing is overwritten.\nGive a new name.") from None
    except OSError as reason:
        problem = f"cannot be written: {reason.strerror or reason}"
        raise ConfigError(f"{printable(path)}: {problem}.\nChoose a folder that this user may write to.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def printable(name: str | Path) -> str:
    """Return a name without the characters that would break a line or colour a terminal."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def _checked(source: str, name: object) -> str:
    """Return the name, without "." and "//", if it can only lead to a file under the root."""
    if isinstance(name, str) and name and "\\" not in name and is_path(name):
        if "/" not in name and name not in (".", ".."):
            return name
        path = PurePosixPath(name)
        if path.name and not path.is_absolute() and ".." not in path.parts:
            return str(path)
    raise AnnotationError(
        f"{source}: file_name {name!r:.200} is not a path below the image folder; it must be relative, with '/' "
        "between folders and without '..'.\nCorrect the file_name, and data.root if the images lie elsewhere."
    )


def is_path(name: str) -> bool:
    """Tell whether a file system can hold the name: asking for one that it cannot raises, and not always the same."""
    return (
        is_encodable(name)
        and "\0" not in name
        and len(name) < MAX_PATH_BYTES
        and all(len(part.encode()) <= MAX_NAME_BYTES for part in name.split("/"))
    )


def is_encodable(name: str) -> bool:
    """Tell whether a report can hold the name; half a surrogate pair it cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_inside(source: str, root: Path, path: Path) -> None:
    """Refuse a link that leads out of the root: an unpacked archive must not open files elsewhere."""
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        problem = f"{printable(path)} is a link to {printable(target)}, outside the image folder"
        raise AnnotationError(f"{source}: {problem}.\nCorrect data.root, so that it leads to the files themselves.")


def open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_head(content: bytes, path: Path, error: type[DataError], noun: str, remedy: str) -> None:
    """Raise for an empty file, a web page, and a pointer that Git LFS left in a file's place."""
    head = content[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content.strip(b"\0 \t\r\n") if len(content) <= HEAD_BYTES else not content:
        raise error(f"{printable(path)}: is empty ({len(content)} bytes); it must be {noun}.\n{remedy}")
    if head.startswith(b"version https://git-lfs"):
        problem = f"is a Git LFS pointer, not {noun}"
        raise error(f"{printable(path)}: {problem}.\nFetch the file itself: git lfs pull")
    if head.startswith((b"<!doctype html", b"<html")):
        raise error(f"{printable(path)}: is a web page, not {noun}.\nDownload the file again, then check its size.")
