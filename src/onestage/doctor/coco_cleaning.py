"""Writes a COCO file anew with what a training uses of it, and the list of what was changed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onestage.errors import AnnotationError, ConfigError
from onestage.files import printable, write_new_file
from onestage.types import AnnotationSet, JSONDict

CHANGES_SUFFIX = ".changes.jsonl"
BOX_DECIMALS = 3  # of a pixel; annotations have two


def require_new(file: Path) -> None:
    """Check, before anything is read, that nothing would be overwritten.

    Raises:
        ConfigError: the file, or its list of changes, is there.
    """
    for path in (file, _changes_file(file)):
        if path.exists() or path.is_symlink():
            raise ConfigError(
                f"--fix-to: {printable(path)} is there already; nothing is overwritten.\nGive a new name."
            )
    if file.suffix.lower() != ".json":
        raise ConfigError(f"--fix-to is {printable(file)}; it must end in .json.\nTry: --fix-to cleaned.json")


def write_cleaned(annotation_file: Path, annotations: AnnotationSet, new_file: Path) -> int:
    """Write the images and objects that a training uses, boxes clipped, areas right, ids numbered from 1.

    All other keys (segmentation, licences, ...) are kept as they are.

    Args:
        annotation_file: the COCO file; it is read, never written.
        annotations: what `parse_coco` made of it, perhaps without images that cannot be decoded.
        new_file: the copy; beside it the changes are written, a JSON object a line.

    Returns:
        The number of changes.

    Raises:
        ConfigError: a file exists or cannot be written.
        AnnotationError: the rest of the file cannot be written as JSON.
    """
    content = json.loads(annotation_file.read_bytes().decode("utf-8-sig"))
    images, objects = content["images"], content["annotations"]
    changes: list[JSONDict] = []
    kept_ids = set(annotations.image_ids.tolist())
    content["images"] = []
    for image in images:
        if int(image["id"]) in kept_ids:
            content["images"].append(image | {"id": int(image["id"])})
        else:
            changes.append({"image": image["id"], "file_name": image.get("file_name"), "change": "skipped"})
    content["annotations"] = list(_clean_objects(objects, annotations, changes))
    content["categories"] = [
        category | {"id": int(category["id"])}
        for category in content["categories"]
        if int(category["id"]) in set(annotations.category_ids)
    ]
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:
        problem = "a key that is not read here holds NaN or Infinity, which JSON does not have"
        raise AnnotationError(f"{printable(annotation_file)}: {problem}.\nCorrect it in the file.") from None
    write_new_file(new_file, text.encode())
    write_new_file(_changes_file(new_file), "".join(json.dumps(change) + "\n" for change in changes).encode())
    return len(changes)


def _clean_objects(objects: list[JSONDict], annotations: AnnotationSet, changes: list[JSONDict]) -> Iterator[JSONDict]:
    """Yield the objects that were kept, in the file's order.

    The parser keeps the order of an image's objects, so each image's next box says whether the next object stayed.
    """
    row_of_id = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
    next_row = annotations.box_offsets[:-1].copy()
    number = 0
    for entry in objects:
        place = {"annotation": entry.get("id"), "image": entry.get("image_id")}
        image = row_of_id.get(int(entry["image_id"]))
        row = -1 if image is None else int(next_row[image])
        is_kept = image is not None and row < annotations.box_offsets[image + 1]
        if not is_kept or not _is_box(entry.get("bbox"), annotations.boxes[row], annotations.sizes[image]):
            changes.append({**place, "bbox": str(entry.get("bbox")), "change": "skipped"})
            continue
        next_row[image] += 1
        number += 1
        x1, y1, x2, y2 = annotations.boxes[row].astype(np.float64).round(BOX_DECIMALS).tolist()
        box = [x1, y1, round(x2 - x1, BOX_DECIMALS), round(y2 - y1, BOX_DECIMALS)]
        new: JSONDict = {
            "id": number,
            "image_id": int(entry["image_id"]),
            "category_id": int(entry["category_id"]),
            "iscrowd": int(annotations.is_crowd[row]),
        }
        area = float(annotations.areas[row])
        if not np.allclose(box, np.array(entry["bbox"], dtype=np.float64), atol=10.0**-BOX_DECIMALS):
            new["bbox"] = box
            area = min(area, box[2] * box[3])  # of a box that was cut no more can be left
        if not isinstance(entry.get("area"), int | float) or not np.isclose(area, entry["area"], rtol=1e-4):
            new["area"] = round(area, BOX_DECIMALS)
        changed = {key: [entry.get(key), value] for key, value in new.items() if entry.get(key) != value}
        if changed:
            changes.append({**place, "change": "corrected", "from, to": {k: str(v) for k, v in changed.items()}})
        yield entry | new


def _is_box(bbox: object, box: npt.NDArray[np.float32], size: npt.NDArray[np.int32]) -> bool:
    """Tell whether a box as written, clipped to its image as the parser does, is `box`."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not {int, float}.issuperset(map(type, bbox)):
        return False
    x, y, width, height = map(float, bbox)
    limits = [float(side) if side > 0 else np.inf for side in (size[1], size[0], size[1], size[0])]
    clipped = np.clip(np.array([x, y, x + width, y + height]), 0.0, limits).astype(np.float32)
    return bool(np.array_equal(clipped, box))


def _changes_file(file: Path) -> Path:
    return file.with_name(file.stem + CHANGES_SUFFIX)
