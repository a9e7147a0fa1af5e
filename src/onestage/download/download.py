"""The command `onestage download`: public data sets, checked and unpacked."""

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from onestage.download.fetch import RemoteFile, fetch
from onestage.errors import DataError, require
from onestage.files import printable, write_error

DOWNLOADS = ".downloads"
# The filter is absent before Python 3.11.4; `fetch` has compared the archive's checksum in any case.
TAR_OPTIONS: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


class Part(NamedTuple):
    """A folder of a data set and the archives that hold it."""

    folder: str  # name below the root
    path_in_archive: str
    archives: tuple[RemoteFile, ...]
    growth: float = 1.15  # expected unpacked size in multiples of the archive's; images are compressed already


# The second server is the older name of the first. MD5 as in torchvision.datasets.voc (0.29).
VOC = ("https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC")
VOC2007 = (
    RemoteFile("voc2007/VOCtrainval_06-Nov-2007.tar", VOC, "c52e279531787c972589f7e41ab4ae64", 460_000_000),
    RemoteFile("voc2007/VOCtest_06-Nov-2007.tar", VOC, "b6e924de25625d8de591ea690078ad9f", 451_000_000),
)
VOC2012 = RemoteFile("voc2012/VOCtrainval_11-May-2012.tar", VOC, "6cd6e144f989b92b3379bac3b3de84fd", 2_000_000_000)
# The same bucket twice; the second server's certificate does not match its name, hence http. COCO publishes no
# checksums: these are the ones that other tools agree on.
COCO = ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")
LABELS2017 = RemoteFile(
    "annotations/annotations_trainval2017.zip", COCO, "f4bbac642086de4f52a3fdda2de5fa2c", 253_000_000
)
VAL2017 = RemoteFile("zips/val2017.zip", COCO, "442b8da7639aecaf257c1dceb8ba8c80", 816_000_000)
TRAIN2017 = RemoteFile("zips/train2017.zip", COCO, "cced6f7f71b7629ddf16f17bbcfab6b2", 19_340_000_000)

PARTS = {
    "voc": [Part("VOC2007", "VOCdevkit/VOC2007", VOC2007), Part("VOC2012", "VOCdevkit/VOC2012", (VOC2012,))],
    "coco": [
        Part("annotations", "annotations", (LABELS2017,), growth=5.0),
        Part("val2017", "val2017", (VAL2017,)),
        Part("train2017", "train2017", (TRAIN2017,)),
    ],
}


def download(
    dataset: Literal["voc", "coco"],
    *,
    root: Path | None = None,
    mirrors: list[str] | None = None,
    keep_archives: bool = False,
) -> int:
    """Download, check and unpack a public data set.

    voc: PASCAL VOC 2007 trainval and test, 2012 trainval, 2.9 GB. coco: COCO 2017 train and val, 20.4 GB. Unpacking
    takes as much again. The same command continues a download that was stopped. Terms of use of the images:
    https://thor.robots.ox.ac.uk/pascal/VOC/ and https://cocodataset.org/#termsofuse

    Args:
        dataset: the data set.
        root: destination; default: data/voc or data/coco.
        mirrors: URLs of folders that hold the archives; tried before the official servers.
        keep_archives: keep the archives in ROOT/.downloads.
    """
    root = root or Path("data") / dataset
    install(PARTS[dataset], root, mirrors=mirrors or [], keep_archives=keep_archives)
    print(f"\n{dataset.upper()} is in {root}. Next:\n\n  onestage doctor {root}")
    print(f"  onestage fit --config configs/{dataset}_ssd300.yaml --data.source.path {root}")
    return 0


def install(parts: Sequence[Part], root: Path, *, mirrors: Sequence[str] = (), keep_archives: bool = False) -> None:
    """Download and unpack the missing folders of a data set; each appears complete or not at all.

    DataError if an archive cannot be downloaded or unpacked, another process downloads into `root`, or the disk is too
    small. Complete folders and partial downloads are kept.
    """
    for mirror in mirrors:
        require(mirror.startswith(("https://", "http://")), "mirrors", mirror, "URLs that start with http(s)://")
    for part in parts:
        if (root / part.folder).exists():
            print(f"{part.folder}: exists, skipped")
    parts = [part for part in parts if not (root / part.folder).exists()]
    downloads = root / DOWNLOADS
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise write_error(downloads, reason) from None
    try:
        with FileLock(downloads / ".lock", timeout=0):  # the system releases it when the process ends
            _require_space(parts, root)
            for part in parts:
                archives = [fetch(remote, downloads, mirrors) for remote in part.archives]
                print(f"{part.folder}: unpacking")
                _unpack(part, archives, root)
                for archive in [] if keep_archives else archives:
                    archive.unlink()
            if not keep_archives:
                shutil.rmtree(downloads, ignore_errors=True)
    except Timeout:
        remedy = "Wait until it ends, or stop it."
        raise DataError(f"{printable(root)}: another process is downloading into it.\n{remedy}") from None


def _require_space(parts: Sequence[Part], root: Path) -> None:
    """Check that the disk holds what is still to be downloaded and unpacked."""
    needed = 0.0
    for part in parts:
        for remote in part.archives:
            present = max((file.stat().st_size for file in (root / DOWNLOADS).glob(f"{remote.name}*")), default=0)
            needed += max(remote.about_bytes - present, 0) + part.growth * remote.about_bytes
    free = shutil.disk_usage(root).free
    if free < needed:
        problem = f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise DataError(f"{printable(root)}: {problem}.\nFree some space, or set another folder: --root")


def _unpack(part: Part, archives: Sequence[Path], root: Path) -> None:
    """Unpack archives, whose checksums are right, into a temporary folder, then rename the part's folder."""
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root, ignore_cleanup_errors=True) as temporary:
            for archive in archives:
                shutil.unpack_archive(archive, temporary, **(TAR_OPTIONS if archive.suffix == ".tar" else {}))
            (Path(temporary) / part.path_in_archive).rename(root / part.folder)
    except (OSError, tarfile.TarError) as reason:
        raise DataError(f"{printable(root)}: cannot be unpacked there: {reason}.") from None
