"""Resumable, checked download of one file."""

import errno
import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from onestage import __version__
from onestage.errors import DataError
from onestage.files import printable

CHUNK_BYTES = 1 << 20
ATTEMPTS = 5  # per URL without progress; any received byte resets the count
WAIT_SECONDS = 2.0  # after the first failure; doubles with each further one
TIMEOUT_SECONDS = 60.0  # without a byte
REPORT_SECONDS = 10.0
RETRIED_CODES = (408, 425, 429)  # of 4xx: timeout, too early, too many requests


class RemoteFile(NamedTuple):
    """A file to download."""

    path: str  # below each server
    servers: tuple[str, ...]  # URLs that hold the same file, tried in order
    md5: str
    about_bytes: int  # for disk space and progress; the checksum decides

    @property
    def name(self) -> str:
        """Name of the complete file."""
        return self.path.rpartition("/")[2]


class _AttemptError(Exception):
    """A failed attempt; if `is_final`, this URL is not tried again."""

    def __init__(self, problem: str, *, is_final: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final


def fetch(remote: RemoteFile, folder: Path, mirrors: Sequence[str] = ()) -> Path:
    """Download a file into an existing folder unless it is complete there already; return its path.

    The file is called `<name>.part` until its checksum is right, and the next call continues it. Mirrors, URLs of
    folders that hold the file, are tried first. DataError if no server sends the right file, or the disk is full.
    """
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    if target.exists() and _md5(target) == remote.md5:
        return target
    print(f"{remote.name}: about {remote.about_bytes / 1e9:.1f} GB")
    urls = [f"{mirror.rstrip('/')}/{remote.name}" for mirror in mirrors]
    problems = ""
    for url in urls + [f"{server}/{remote.path}" for server in remote.servers]:
        try:
            _fetch_from(remote, url, part)
            return part.replace(target)
        except _AttemptError as reason:
            print(f"  {url}: {reason}")
            problems += f"  {url}: {reason}\n"
    remedy = f"Run the command again later to continue the download, or put {remote.name} into {printable(folder)}."
    raise DataError(f"{remote.name} cannot be downloaded:\n{problems}{remedy}")


def _fetch_from(remote: RemoteFile, url: str, part: Path) -> None:
    """Complete and check the part from one URL; restart once if the checksum is wrong."""
    failures = num_wrong = 0
    while True:
        size_before = _size(part)
        try:
            _append(remote, url, part)
            if _md5(part) == remote.md5:
                return
            part.unlink()
            num_wrong += 1
            raise _AttemptError("the checksum is wrong: the file is damaged or another one", is_final=num_wrong > 1)
        except _AttemptError as reason:
            failures = 1 if _size(part) > size_before else failures + 1
            if reason.is_final or failures >= ATTEMPTS:
                raise
            wait_seconds = WAIT_SECONDS * 2 ** (failures - 1)
            print(f"{remote.name}: {reason}; next attempt in {wait_seconds:g} s")
            time.sleep(wait_seconds)


def _append(remote: RemoteFile, url: str, part: Path) -> None:
    """Request the missing bytes and append them to the part."""
    size = _size(part)
    headers = {"User-Agent": f"onestage/{__version__}"} | ({"Range": f"bytes={size}-"} if size else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            is_resumed = response.status == 206
            with part.open("ab" if is_resumed else "wb") as file:
                _receive(remote, response, file)
    except urllib.error.HTTPError as reason:
        if reason.code == 416 and size:  # the part is complete or too long; the checksum tells
            return
        is_final = 400 <= reason.code < 500 and reason.code not in RETRIED_CODES
        raise _AttemptError(f"the server answers {reason.code} {reason.reason}", is_final=is_final) from None
    except (OSError, http.client.HTTPException, ValueError) as reason:
        if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
            problem = "the disk is full.\nFree some space, then run the command again"
            raise DataError(f"{printable(part)}: {problem}.") from None
        cause = getattr(reason, "reason", reason)
        is_silent = isinstance(cause, TimeoutError)
        raise _AttemptError(f"no byte within {TIMEOUT_SECONDS:g} s" if is_silent else repr(cause)) from None


def _receive(remote: RemoteFile, response: http.client.HTTPResponse, file: BinaryIO) -> None:
    """Write the answer to the file, and report the progress."""
    expected = response.length  # None if the server gives no length
    start, received = file.tell(), 0
    began = last_report = time.monotonic()
    while chunk := response.read1(CHUNK_BYTES):
        received += len(chunk)
        file.write(chunk)
        if time.monotonic() - last_report > REPORT_SECONDS:
            last_report = time.monotonic()
            fraction = min((start + received) / max(remote.about_bytes, 1), 1)
            print(f"{remote.name}: {fraction:.0%}, {received / (last_report - began) / 1e6:.1f} MB/s")
    if not received or (expected is not None and received < expected):
        raise _AttemptError(f"the connection was cut after {received} of {expected} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
