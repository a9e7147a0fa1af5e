"""Parts of one set: shares of every class, copies together, and the same parts everywhere."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from annotation_sets import annotation_set
from data_modules import yolo_data
from layout_files import write_yolo

from onestage.data import DetectionDataModule
from onestage.data.splits import assign_parts, split_by_fold, split_by_fraction
from onestage.errors import ConfigError
from onestage.types import AnnotationSet


def class_counts(annotations: AnnotationSet) -> list[int]:
    """Images that show each class."""
    pairs = {
        (row, label)
        for row in range(len(annotations))
        for label in annotations.labels[annotations.objects(row)].tolist()
    }
    return np.bincount([label for _, label in pairs], minlength=len(annotations.class_names)).tolist()


def names_of(annotations: AnnotationSet) -> set[str]:
    return {Path(path).name for path in annotations.image_paths}


def test_split_takes_its_share_of_every_class_and_of_the_empty_images_and_keeps_order_and_objects() -> None:
    labels = [*[[0]] * 40, *[[1]] * 20, *[[2, 0]] * 10, *[[]] * 10]
    whole = annotation_set(labels)
    train, val = split_by_fraction(whole, 0.2)
    assert (len(train), len(val)) == (64, 16)
    assert class_counts(val) == [10, 4, 2]
    assert int((np.diff(val.box_offsets) == 0).sum()) == 2
    assert names_of(train) | names_of(val) == names_of(whole)
    assert train.source.startswith("hand-made, training part (data.val_fraction 0.2)")
    for part in (train, val):
        rows = [int(Path(path).stem) for path in part.image_paths]
        assert rows == sorted(rows)
        assert part.image_ids.tolist() == [row + 1 for row in rows]
        for place, row in enumerate(rows):
            assert part.boxes[part.objects(place)].tolist() == whole.boxes[whole.objects(row)].tolist()
            assert part.labels[part.objects(place)].tolist() == labels[row]


def test_folds_are_disjoint_cover_the_set_and_hold_each_class_equally() -> None:
    whole = annotation_set([*[[0]] * 25, *[[1]] * 10, *[[2, 1]] * 5, *[[]] * 5])
    folds = [split_by_fold(whole, 5, fold) for fold in range(5)]
    assert sum(len(val) for _, val in folds) == 45
    assert set().union(*(names_of(val) for _, val in folds)) == names_of(whole)
    for train, val in folds:
        assert len(val) == 9
        assert class_counts(val) == [5, 3, 1]
        assert not names_of(train) & names_of(val)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten images of the same length, of which four are copies of the first under other names."""
    paths = [tmp_path / "a" / f"{number}.png" for number in range(10)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        path.write_bytes(bytes([0 if number < 5 else number]) * 100)
    return paths


def parts_by_name(paths: Sequence[Path], num_parts: int = 2) -> dict[str, int]:
    parts = assign_parts(annotation_set([[0]] * len(paths), paths=paths), [1 / num_parts] * num_parts)
    return {path.name: int(part) for path, part in zip(paths, parts, strict=True)}


def test_only_files_that_agree_in_every_byte_are_copies(tmp_path) -> None:
    contents = [b"x" * 20_000 + b"a", b"x" * 20_000 + b"b", b"x" * 20_001, b"y" * 20_001]  # one length; three one head
    paths = [tmp_path / f"{name}.png" for name in "abcdefgh"]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % 4])
    parts = parts_by_name(paths, num_parts=4)
    assert sorted(parts.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(parts[f"{a}.png"] == parts[f"{b}.png"] for a, b in ("ae", "bf", "cg", "dh"))


def test_copies_stay_in_one_part_whatever_the_order_and_the_folder(files, tmp_path) -> None:
    parts = parts_by_name(files)
    assert len({parts[f"{number}.png"] for number in range(5)}) == 1
    assert sorted(parts.values()) == [0] * 5 + [1] * 5  # and the others even out what they weigh
    assert parts_by_name(files[::-1]) == parts
    shutil.copytree(files[0].parent, tmp_path / "moved" / "elsewhere")
    assert parts_by_name([tmp_path / "moved" / "elsewhere" / path.name for path in files]) == parts


def test_copies_that_roboflow_augments_stay_in_one_part(tmp_path) -> None:
    parts = parts_by_name([tmp_path / f"{n}_jpg.rf.{n * 7 + copy}.jpg" for n in range(20) for copy in range(3)])
    assert len({(name.partition("_")[0], part) for name, part in parts.items()}) == 20


def test_split_of_numbered_frames_takes_no_run_of_neighbours(tmp_path) -> None:
    parts = parts_by_name([tmp_path / f"{number:06d}.jpg" for number in range(100)])
    changes = sum(parts[f"{n:06d}.jpg"] != parts[f"{n + 1:06d}.jpg"] for n in range(99))
    assert 30 < changes < 70  # two runs would change once, a strict alternation 99 times


@pytest.mark.parametrize(("number", "fraction"), [(1, 0.5), (3, 0.1)])
def test_split_that_leaves_a_part_empty_is_refused(number, fraction) -> None:
    with pytest.raises(ConfigError, match=r"(?s)data.val_fraction .* leaves \d images to train and \d to validate"):
        split_by_fraction(annotation_set([[0]] * number), fraction)
    with pytest.raises(ConfigError, match=r"(?s)data.fold 3 of 4 .* leaves 3 images to train and 0 to validate"):
        split_by_fold(annotation_set([[0]] * 3), 4, 3)


def one_split(root: Path, **settings: object) -> DetectionDataModule:
    """Ten images, one cat or one dog on each, without a validation split."""
    write_yolo(root, {str(n): f"{n % 2} 0.5 0.5 0.25 0.5\n" for n in range(10)})
    return yolo_data(root, image_size=32, batch_size=2, num_workers=0, **settings)


def test_one_split_is_divided_by_the_data_module(tmp_path) -> None:
    data = one_split(tmp_path, val_fraction=0.4)
    data.setup("fit")
    train, val = data.annotations("train"), data.annotations("val")
    assert (len(train), len(val), len(data.annotations("test"))) == (6, 4, 4)
    assert (class_counts(train), class_counts(val)) == ([3, 3], [2, 2])
    assert not names_of(train) & names_of(val)
    assert len(list(data.train_dataloader())) == 3
    assert sum(len(batch.images) for batch in data.val_dataloader()) == 4


def test_without_a_validation_split_a_fifth_is_held_out_with_a_notice(tmp_path, caplog) -> None:
    data = one_split(tmp_path)
    settings = tmp_path / "data.yaml"
    lines = [line for line in settings.read_text().splitlines() if not line.startswith("val:")]
    settings.write_text("\n".join(lines))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert (len(data.annotations("train")), len(data.annotations("val"))) == (8, 2)
    assert "has no validation split; 0.2 of the training images are held out (data.val_fraction)" in caplog.text
