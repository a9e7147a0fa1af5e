"""Downloads and unpacks a public data set: folder by folder, each there whole or not at all."""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from onestage.download.archives import Limits, extract
from onestage.download.download import Patience, RemoteFile, download, require_space, with_mirrors
from onestage.errors import DataError, OnestageError
from onestage.files import printable

UNPACKED_SHARE = 1.15  # of an archive's size, unpacked: images are compressed already
ANNOTATION_SHARE = 5.0  # JSON is not
MAX_GROWTH = 20.0  # times its own size that an archive may unpack to
DOWNLOADS = ".downloads"


class Part(NamedTuple):
    """One folder of a data set."""

    folder: str  # what it is called below the root
    archives: tuple[RemoteFile, ...]
    path_in_archive: str  # where it lies in them
    unpacked_share: float = UNPACKED_SHARE


def install(
    parts: Sequence[Part],
    root: Path,
    *,
    mirrors: Sequence[str] = (),
    keep_archives: bool = False,
    patience: Patience | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Download and unpack the parts that are not there yet.

    Args:
        parts: of the data set.
        root: its folder; created if needed.
        mirrors: URLs of folders that hold the archives; tried before the official ones.
        keep_archives: whether the archives stay in `<root>/.downloads`.
        patience: with the servers.
        report: takes a line of text.

    Raises:
        DataError: something cannot be downloaded or unpacked, or the disk is too small. What is complete stays.
    """
    root.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not (root / part.folder).exists()]
    for part in parts:
        if part not in missing:
            report(f"{part.folder}: is there already")
    require_space(root, sum(_bytes_to_come(part, root / DOWNLOADS) for part in missing))
    for part in missing:
        archives = []
        for remote in part.archives:
            report(f"{remote.name}: about {remote.about_bytes / 1e9:.1f} GB")
            archives.append(download(with_mirrors(remote, mirrors), root / DOWNLOADS, patience=patience, report=report))
        report(f"{part.folder}: unpacking")
        _unpack(part, archives, root)
        if not keep_archives:
            for archive in archives:
                archive.unlink()
    if not keep_archives:
        shutil.rmtree(root / DOWNLOADS, ignore_errors=True)


def run_installation(
    description: str, parts: Sequence[Part], default_root: str, next_steps: Callable[[Path], str]
) -> int:
    """Parse the command line of a download script, install, and print what to do next. Return the exit code.

    Args:
        description: of the script, for its help.
        parts: of the data set.
        default_root: where it goes without `--root`.
        next_steps: root -> the text to print at the end.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root), help=f"where to; {default_root} by default")
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="folder of the archives; repeatable"
    )
    parser.add_argument("--keep-archives", action="store_true", help="leave them in ROOT/.downloads")
    arguments = parser.parse_args()
    try:
        install(parts, arguments.root, mirrors=arguments.mirror, keep_archives=arguments.keep_archives)
    except OnestageError as error:
        print(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the next run goes on from here")
        return 130
    print(next_steps(arguments.root))
    return 0


def _bytes_to_come(part: Part, downloads: Path) -> int:
    """Return what a part still takes on the disk at most: its archives and what is in them."""
    needed = 0.0
    for remote in part.archives:
        files = (downloads / remote.name, downloads / f"{remote.name}.part")
        have = max((file.stat().st_size for file in files if file.exists()), default=0)
        needed += max(remote.about_bytes - have, 0) + part.unpacked_share * remote.about_bytes
    return round(needed)


def _unpack(part: Part, archives: Sequence[Path], root: Path) -> None:
    """Unpack beside the place where the folder goes, then give it its name."""
    staging = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=root))
    try:
        for archive in archives:
            extract(archive, staging, Limits(num_bytes=round(MAX_GROWTH * archive.stat().st_size) + (1 << 20)))
        folder = staging / part.path_in_archive
        if not folder.is_dir():
            names = ", ".join(archive.name for archive in archives)
            raise DataError(f"{names}: holds no {part.path_in_archive}.\nIt is not what it should be: delete it.")
        folder.rename(root / part.folder)
    except OSError as reason:
        raise DataError(f"{printable(root)}: cannot be unpacked there: {reason.strerror}.\nCorrect it.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
