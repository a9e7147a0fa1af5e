"""List the images of a folder without annotations, for `onestage predict`."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import onestage.data.annotations as rules
from onestage.data.annotations import ImageColumns, ObjectColumns, build_annotation_set
from onestage.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from onestage.data.source import Source, Split
from onestage.errors import DataError
from onestage.files import as_path, is_hidden, printable
from onestage.types import AnnotationSet, Finding


class ImageFolder(Source):
    """Images without annotations, for predicting: the only split is test.

    Args:
        path: a folder of images, or one image.
    """

    format = "images"

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Only test."""
        return ("test",)

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """List the images, with the classes of the model and no object; see `find_images`. Ids are 1..N.

        An entry that is named like an image and is no regular file (a pipe, a dangling link) is skipped; images of a
        type that is not read are counted. Raises DataError if no image is found, or a folder cannot be listed.
        """
        folder, is_folder, names = self.path, self.path.is_dir(), class_names or ()
        found = find_images(folder) if is_folder else [folder]
        paths = [str(path) for path in found if path.is_file()]
        if not paths:
            problem = f"holds no images ({' '.join(IMAGE_SUFFIXES)})" if is_folder else "is neither folder nor image"
            raise DataError(f"{printable(folder)}: {problem}.\nGive a folder of images, or one image: data.predict_dir")
        others = [path for path in found if not path.is_file()]
        findings = [rules.IMAGE_UNREADABLE.broken(printable(path), "is not a regular file") for path in others]
        findings += count_unread(folder) if is_folder else []
        no_rows = np.zeros(0, dtype=np.int64)
        return build_annotation_set(
            printable(folder),
            ImageColumns(paths, np.arange(1, len(paths) + 1), np.zeros((len(paths), 2), dtype=np.int32)),
            ObjectColumns(no_rows, np.zeros((0, 4)), no_rows),
            names,
            range(1, len(names) + 1),
            describe=str,
            findings=findings,
        )


def count_unread(folder: Path) -> list[Finding]:
    """Return findings with the numbers of images below a folder whose type is not read, and of linked folders."""
    unread, links = find_images(folder, UNREAD_SUFFIXES), find_linked_folders(folder)
    types = " ".join(sorted({path.suffix.lower() for path in unread}))
    problems = {
        rules.NOT_READ: (unread, f"images are of a type that is not read ({types})"),
        rules.NOT_SEARCHED: (links, "folders are links, which are not searched"),
    }
    return [
        rule.broken(printable(folder), f"{len(paths)} {problem}, such as {printable(paths[0])}", len(paths))
        for rule, (paths, problem) in problems.items()
        if paths
    ]


def find_linked_folders(folder: Path) -> list[Path]:
    """Return the links to folders below a folder, in order: `find_images` goes into none of them."""
    below = (Path(parent, name) for parent, folders, _ in os.walk(folder) for name in folders if not is_hidden(name))
    return sorted(path for path in below if path.is_symlink())


def find_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Return the entries below a folder that have one of the suffixes, sorted; DataError if it cannot be listed.

    Nothing that is hidden or below a linked folder is among them.
    """

    def stop(reason: OSError) -> None:
        place = printable(reason.filename or folder)
        raise DataError(f"{place}: cannot be listed: {reason.strerror}.\nMake it readable, or move it away.")

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(parent, name) for name in files if not is_hidden(name) and name.lower().endswith(suffixes)]
    return sorted(found)
