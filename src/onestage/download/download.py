"""Downloads one large file: resumed where it was cut off, from the first server that has it, and checked."""

import errno
import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from onestage import __version__
from onestage.errors import ConfigError, DataError
from onestage.files import printable

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two downloads apart there
    fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 1 << 20
REPORT_SECONDS = 10.0
OVERLONG = 1.25  # times the size expected, from which on something else is being sent
WEB_PAGE = (b"<!doctype", b"<html")
UNFINISHED = ".part"


class RemoteFile(NamedTuple):
    """A file to download."""

    name: str
    urls: tuple[str, ...]  # the same file on several servers, tried in order
    md5: str
    about_bytes: int  # for the check of the free disk; the checksum decides


class Patience(NamedTuple):
    """How long to wait for a server, and how often to come back."""

    attempts: int = 5  # for each URL, as long as nothing arrives; what arrives is kept and starts them anew
    wait_seconds: float = 2.0  # after the first failure; twice as long after each other
    timeout_seconds: float = 60.0  # without a byte


class _AttemptError(Exception):
    """A download that may work the next time; or, if `is_final`, not from this URL."""

    def __init__(self, problem: str, *, is_final: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final


def download(
    remote: RemoteFile, folder: Path, *, patience: Patience | None = None, report: Callable[[str], None] = print
) -> Path:
    """Download a file, unless it is there already, and return its path.

    It is called `<name>.part` until its checksum is right, and goes on from there the next time.

    Args:
        remote: what, from where.
        folder: where to; created if needed.
        patience: with the servers.
        report: takes a line of text.

    Raises:
        DataError: no server sends the right file, another process is downloading into the folder, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    with locked(folder):
        if target.exists() and _md5(target) == remote.md5:
            return target
        part = target.with_name(target.name + UNFINISHED)
        problems = []
        for url in remote.urls:
            try:
                _from_url(remote, url, part, patience or Patience(), report)
            except _AttemptError as reason:
                problems.append(f"  {url}: {reason}")
                report(problems[-1])
                continue
            part.replace(target)
            return target
    raise DataError(
        f"{remote.name} cannot be downloaded:\n" + "\n".join(problems) + "\n"
        f"Run the command again later, which goes on where it stopped; or put {remote.name} into {printable(folder)}."
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from downloading into a folder. The lock ends with the process, however that ends.

    Raises:
        DataError: another process has it.
    """
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(
                    f"{printable(folder)}: another process is downloading into it.\nWait for it, or end it."
                ) from None
        yield


def require_space(folder: Path, num_bytes: int) -> None:
    """Check the free disk.

    Raises:
        DataError: there is less than `num_bytes`.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DataError(
            f"{printable(folder)}: about {num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.\n"
            "Make room, or give another folder: --root"
        )


def _from_url(remote: RemoteFile, url: str, part: Path, patience: Patience, report: Callable[[str], None]) -> None:
    """Complete the part from one URL, with a check at the end. A file with a wrong checksum is begun anew once."""
    failures = num_wrong = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            _append(remote, url, part, patience.timeout_seconds, report)
            if _md5(part) == remote.md5:
                return
            part.unlink()
            num_wrong += 1
            problem = "the checksum is wrong: the file is damaged, or another"
            raise _AttemptError(problem, is_final=num_wrong > 1)
        except _AttemptError as reason:
            is_longer = part.exists() and part.stat().st_size > have
            failures = 1 if is_longer else failures + 1
            if reason.is_final or failures >= patience.attempts:
                raise
            wait_seconds = patience.wait_seconds * 2 ** (failures - 1)
            report(f"{remote.name}: {reason}; again in {wait_seconds:g} s")
            time.sleep(wait_seconds)


def _append(remote: RemoteFile, url: str, part: Path, timeout_seconds: float, report: Callable[[str], None]) -> None:
    """Request what is missing and append it to the part."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"onestage/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(url, headers=headers)  # the opener knows http and https alone
        with _opener().open(request, timeout=timeout_seconds) as response:
            is_resumed = response.status == 206 and _starts_at(response.headers.get("Content-Range", ""), have)
            if response.status not in (200, 206) or (response.status == 206 and not is_resumed):
                part.unlink(missing_ok=True)
                raise _AttemptError(f"the server answers {response.status} with another part than asked for")
            with part.open("ab" if is_resumed else "wb") as file:
                _receive(remote, response, file, report)
    except urllib.error.HTTPError as reason:
        if reason.code == 416 and have:  # nothing is missing, or the part is longer than the file: the checksum tells
            return
        is_final = 400 <= reason.code < 500 and reason.code not in (408, 425, 429)
        raise _AttemptError(f"the server answers {reason.code} {reason.reason}", is_final=is_final) from None
    except (OSError, http.client.HTTPException, ValueError) as reason:
        if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
            raise DataError(f"{printable(part)}: the disk is full.\nMake room, and run the command again.") from None
        raise _AttemptError(_words(reason)) from None


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that follows redirects, and opens nothing but http and https."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _receive(
    remote: RemoteFile, response: http.client.HTTPResponse, file: BinaryIO, report: Callable[[str], None]
) -> None:
    """Write what the server sends, as long as it can be the file."""
    expected = response.length  # what the server says is to come; None where it says nothing
    received, start = 0, file.tell()
    last_report = began = time.monotonic()
    while chunk := response.read1(CHUNK_BYTES):
        if start + received == 0 and chunk.lstrip()[:9].lower().startswith(WEB_PAGE):
            raise _AttemptError("the server sends a web page, not the file", is_final=True)
        received += len(chunk)
        if start + received > OVERLONG * remote.about_bytes + CHUNK_BYTES:
            raise _AttemptError("the server sends far more than the file has", is_final=True)
        file.write(chunk)
        if time.monotonic() - last_report > REPORT_SECONDS:
            last_report = time.monotonic()
            share = min((start + received) / max(remote.about_bytes, 1), 1)
            report(f"{remote.name}: {share:.0%}, {received / (last_report - began) / 1e6:.1f} MB/s")
    if expected is not None and received < expected:
        raise _AttemptError(f"the connection was cut after {received} of {expected} bytes")


def _starts_at(content_range: str, have: int) -> bool:
    """Tell whether `bytes 100-199/200` starts at byte `have`."""
    return content_range.replace("bytes", "").strip().split("-")[0] == str(have)


def _words(reason: Exception) -> str:
    inner = getattr(reason, "reason", reason)
    return (
        "the server was silent for too long" if isinstance(inner, TimeoutError) else str(inner) or type(inner).__name__
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def with_mirrors(remote: RemoteFile, mirrors: Sequence[str]) -> RemoteFile:
    """Return the file with mirrors that are tried first; each is a URL below which the file has its own name.

    Raises:
        ConfigError: a mirror is no such URL.
    """
    for mirror in mirrors:
        if not mirror.startswith(("https://", "http://")):
            raise ConfigError(f"--mirror {mirror!r:.200} is no URL of a web server.\nGive https://... or http://...")
    return remote._replace(urls=(*(f"{mirror.rstrip('/')}/{remote.name}" for mirror in mirrors), *remote.urls))
