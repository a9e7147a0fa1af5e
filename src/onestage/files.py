"""Read files safely, write them atomically, and read the paths and numbers that other tools write."""

import codecs
import contextlib
import csv
import errno
import math
import os
import secrets
import shutil
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from onestage.errors import AnnotationError, ConfigError, OnestageError, ResourceError

HEAD_BYTES = 256  # enough to recognise a web page or a pointer file
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4000  # what Linux, macOS and Windows have in common, less what stands before it
MAX_FILE_BYTES = 4 << 30  # ten times COCO's largest annotation file; a path that leads to an archive is a mistake
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
TEMPORARY_SUFFIX = ".tmp"  # of unfinished files and folders; their names start with a dot
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the first bytes of what Windows' PowerShell and editors write
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRONG_PATH = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def read_file(
    path: Path,
    error: type[OnestageError],
    noun: str,
    remedy: str,
    max_bytes: int = MAX_FILE_BYTES,
    *,
    may_be_empty: bool = False,
) -> bytes:
    """Read a regular file of at most `max_bytes`, and never wait for a pipe.

    Raises `error` if it is missing, unreadable, not regular, empty, too long, a web page or an LFS pointer.
    noun: what the file should be, for the message: "a COCO annotation file". remedy: last line of the message.
    """
    place = printable(path)
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            is_regular = stat.S_ISREG(status.st_mode)
            content = file.read() if is_regular and status.st_size <= max_bytes else None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        text = getattr(reason, "strerror", None) or reason
        raise error(f"{place}: cannot be read: {text}. It must be {noun}.\n{remedy}") from None
    if content is None:
        problem = f"has {status.st_size} bytes" if is_regular else "is not a regular file"
        raise error(f"{place}: {problem}; {noun} is a file of at most {max_bytes} bytes.\n{remedy}")
    head = content[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not may_be_empty and len(content) <= HEAD_BYTES and not content.strip(b"\0 \t\r\n"):
        raise error(f"{place}: is empty ({len(content)} bytes); it must be {noun}.\n{remedy}")
    if head.startswith(b"version https://git-lfs"):
        raise error(f"{place}: is a Git LFS pointer, not {noun}.\nFetch the file itself: git lfs pull")
    if head.startswith((b"<!doctype html", b"<html")):
        raise error(f"{place}: is a web page, not {noun}.\nDownload the file again, then check its size.")
    return content


def read_text(path: Path, error: type[OnestageError], noun: str, remedy: str, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Read a text file in UTF-8, or in UTF-16 with its mark; it may be empty. See `read_file`."""
    content = read_file(path, error, noun, remedy, max_bytes, may_be_empty=True)
    try:
        return content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{printable(path)}: is not UTF-8 text (byte {reason.start}).\n{remedy}") from None


def read_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and every complete row of a run's table: a killed run may have left half a line."""
    if not file.is_file():
        return [], []
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        reader = csv.DictReader(lines)
        rows = [row for row in reader if None not in row.values() and row.get("step", "").isdecimal()]
    return list(reader.fieldnames or []), rows


def find_files(source: str, names: Sequence[object], root: Path) -> list[str | None]:
    """Return the path of each file that an annotation names, or None if there is no such regular file.

    Each folder is listed once; no file is opened. source: the annotation file, for messages. names: as written,
    relative to `root`, which no name may leave, not even through a link. Raises AnnotationError if one does, if `root`
    is no folder, or if none of the files exists.
    """
    remedy = "Give the folder that the names are relative to: data.source.train_images, data.source.val_images."
    if not root.is_dir():
        raise AnnotationError(f"{printable(root)}: is not a folder; it must hold the images of {source}.\n{remedy}")
    listings: dict[str, tuple[str, dict[str, bool]]] = {}  # folder as named -> its path, and its files
    paths: list[str | None] = []
    for name in names:
        folder, _, file_name = _checked(source, name).rpartition("/")
        if folder not in listings:
            listings[folder] = f"{root / folder}{os.sep}", list_files(root / folder)
            require_inside(source, [root], root / folder)
        prefix, is_link = listings[folder]
        found = next((form for form in spellings(file_name) if form in is_link), None)
        if found is not None and is_link[found]:
            require_inside(source, [root], Path(prefix + found))
        paths.append(None if found is None else prefix + found)
    if names and not any(paths):
        first = Path(_checked(source, names[0]))
        above = [folder for folder in root.resolve().parents[:2] if first.name in list_files(folder / first.parent)]
        if above:
            remedy = f"They are in {printable(above[0])}: give it as data.source.train_images or val_images."
        problem = f"none of the {len(names)} images is in {printable(root)} (the first is {names[0]!r})"
        raise AnnotationError(f"{source}: {problem}.\n{remedy}")
    return paths


def list_files(folder: Path) -> dict[str, bool]:
    """Return the names of the regular files in a folder -> whether each is a link. Empty if there is no such folder."""
    files = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link to itself; the other files are there all the same
                if entry.is_file():
                    files[entry.name] = entry.is_symlink()
    return files


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or leave `path` as it was.

    The content reaches the disk before the rename, so that neither a kill nor a power cut leaves a partial file.
    Raises ResourceError if the folder is read-only or the disk full, ConfigError if the path cannot be a file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 # tests interrupt this system call by its name
        with contextlib.suppress(OSError):  # the new name itself; some file systems do not support this
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise write_error(path, error, temporary.stat().st_size if temporary.exists() else 0) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/onestage, or ~/.cache/onestage. It may be deleted between two runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onestage"


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` at the end, or remove it on an error.

    `folder` must be missing or empty at the end; otherwise the rename raises OSError.
    """
    temporary = folder.parent / f".{folder.name}.unfinished-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_error(path: Path, error: OSError | RuntimeError, num_written: int = 0) -> Exception:
    """Return the error of this project for a write that failed; `error` itself if that was not the reason."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container")):
        return error
    if number in OUT_OF_SPACE or number is None:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        reason = f"the disk or the quota is full after {num_written / 1e6:,.1f} MB, with {free / 1e6:,.1f} MB free"
        remedy = "Free some space"
    else:
        reason, remedy = getattr(error, "strerror", ""), "Make its folder writable for this user"
    kind = ConfigError if number in WRONG_PATH else ResourceError
    return kind(
        f"{str(path)[:300]}: cannot be written: {reason}.\nAn earlier file of that name is unchanged. {remedy}, or "
        "choose another place (of a run: --runs_dir); a training continues with --resume auto."
    )


def printable(name: str | Path) -> str:
    """Return a name without characters that break a line or colour a terminal."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def as_path(path: str | Path) -> Path:
    """Return the path of an option or a setting; `~` is the home folder, `$X` a variable; unknown ones stay."""
    return Path(os.path.expanduser(Path(os.path.expandvars(path))))  # noqa: PTH111 # that raises for an unknown user


def spellings(name: str) -> Iterator[str]:
    """Yield how a system or a tool may write a file's name: accents composed or not, signs of a URL, case of .JPG."""
    yield name
    texts = name, name.strip(), unquote(name.strip())
    accents = (
        form for text in texts for form in (text, *(unicodedata.normalize(kind, text) for kind in ("NFC", "NFD")))
    )
    for form in dict.fromkeys(form for form in accents if "/" not in form):
        stem, dot, suffix = form.rpartition(".")
        yield from (form, stem + dot + suffix.lower(), stem + dot + suffix.upper())


def only_folder(folder: Path) -> Path | None:
    """Return the folder that is all that a folder holds: archives often unpack into one, and may lie beside it."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)] if folder.is_dir() else []
    entries = [entry for entry in entries if not entry.name.lower().endswith(ARCHIVES)]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else None


def is_hidden(name: str) -> bool:
    """Tell whether a system or a tool keeps a file or folder for itself: .cache, ._a.jpg, @eaDir, __MACOSX."""
    return name.startswith((".", "@", "__MACOSX"))


def refuse_repeated_keys(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the table of a JSON or YAML file; ValueError if a key occurs twice, of which only the last would count."""
    key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise ValueError(f"the key {key!r} occurs twice in one object")
    return dict(pairs)


def foreign_parts(name: object) -> tuple[str, ...]:
    """Return the folders and the file of a path that another tool wrote, on any system, without drive, "." and "..".

    Empty for anything that no file system can hold.
    """
    text = name.strip().strip("\"'").replace("\\", "/") if isinstance(name, str) else "\0"
    parts = text.split("/") if is_path(text) else []
    return tuple(
        part for n, part in enumerate(parts) if part not in ("", ".", "..") and not (n == 0 and part[1:] == ":")
    )


def find_below(root: Path, name: object) -> Path | None:
    """Return the file or folder below `root` that a foreign path means, or None.

    Its leading folders may be those of another machine, another system or another working directory: for
    `/home/me/mine/images/a.jpg` that is `images/a.jpg` if it exists, for `../train/images` it is `train/images`.
    """
    parts = foreign_parts(name)
    forms = spellings(parts[-1]) if parts else ()
    paths = (root.joinpath(*parts[start:-1], form) for form in forms for start in range(len(parts)))
    return next((path for path in paths if os.path.exists(path)), None)  # noqa: PTH110 # raises for no name


def to_number(value: object) -> float:
    """Return a number that another tool wrote, as such or as text; NaN for anything else, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if int(value) > 0 else -math.inf


def to_flag(value: object) -> bool:
    """Return whether another tool set a flag: true or 1, as such or as text."""
    if value is None or isinstance(value, int):  # nearly always, and there may be a million
        return value == 1
    return to_number(value) == 1 or str(value).strip().lower() in ("true", "yes")


def _checked(source: str, name: object) -> str:
    """Return the name, with "/" and without "." and "//", if it can only lead to a file under the root."""
    if isinstance(name, str) and name and is_path(name):
        if "/" not in name and "\\" not in name and name not in (".", ".."):
            return name
        path = PurePosixPath(name.replace("\\", "/"))
        if path.name and not path.is_absolute() and ".." not in path.parts and path.parts[0][1:] != ":":
            return str(path)
    raise AnnotationError(
        f"{source}: file_name {name!r:.200} is not a path below the image folder; it must be relative and without "
        "'..'.\nCorrect the file_name, or data.source.train_images if the images lie elsewhere."
    )


def is_path(name: str) -> bool:
    """Tell whether a file system can hold the name; asking for one that it cannot hold may raise."""
    try:
        is_short = len(name) < MAX_PATH_BYTES and all(len(part.encode()) <= MAX_NAME_BYTES for part in name.split("/"))
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return is_short and "\0" not in name


def require_inside(source: str, roots: Sequence[Path], path: Path) -> None:
    """Refuse a link that leads out of all roots: an unpacked archive must not open files elsewhere."""
    target = path.resolve()
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        problem = f"{printable(path)} is a link to {printable(target)}, outside the data set's folder"
        raise AnnotationError(f"{source}: {problem}.\nCorrect data.path, so that it leads to the files themselves.")


def open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
