"""Unpacking of tar and zip archives within a size limit."""

import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from onestage.errors import DataError
from onestage.files import printable

# The filter is absent before Python 3.11.4; `fetch` has compared the archive's checksum in any case.
TAR_OPTIONS: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def extract(archive: Path, folder: Path, max_bytes: int) -> None:
    """Unpack an uncompressed tar file or a zip file below `folder`.

    The standard library keeps every member inside: tarfile's "data" filter raises for "..", links that leave the folder
    and devices; zipfile drops drives, leading slashes and "..", and creates no links.

    Args:
        archive: the file.
        folder: destination; must exist.
        max_bytes: limit of the members' declared sizes, checked before anything is written.

    Raises:
        DataError: the archive is damaged, too large, or a member would leave the folder.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zip_file:
                _require_size(archive, sum(info.file_size for info in zip_file.infolist()), max_bytes)
                zip_file.extractall(folder)
        else:
            with tarfile.open(archive, "r:") as tar_file:
                _require_size(archive, sum(info.size for info in tar_file), max_bytes)
                tar_file.extractall(folder, **TAR_OPTIONS)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as reason:
        raise _unusable(archive, f"is damaged, not an archive, or not safe to unpack ({reason})") from None


def _require_size(archive: Path, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise _unusable(archive, f"unpacks to {num_bytes / 1e9:.1f} GB, expected at most {max_bytes / 1e9:.1f} GB")


def _unusable(archive: Path, problem: str) -> DataError:
    remedy = "Delete it and download it again; if the error persists, the server sends another file."
    return DataError(f"{printable(archive)}: {problem}.\n{remedy}")
