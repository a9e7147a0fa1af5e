"""The one data module: classes, splits, loaders and settings of any source."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import albumentations as A
import bad_data
import numpy as np
import pytest
import torch
from annotation_sets import hand_written
from data_modules import coco_data, shapes_data, voc_data
from jsonargparse import ArgumentParser
from yolo_files import write_image

import onestage.data
from onestage.data import COCO, VOC, DetectionDataModule, SSDZoomOut, Stretch
from onestage.data.annotations import select_images
from onestage.data.writers import WritableSplit, write_voc
from onestage.errors import AnnotationError, ConfigError, DataError
from onestage.types import IGNORE, DetectionData

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def write_coco(root: Path, split: str, num_images: int, *, boxes: list | None = None) -> None:
    """One box for each image: x 4..24, y 6..16, of alternating category."""
    images, annotations = [], []
    for number in range(num_images):
        write_image(root / split / f"{number}.jpg", number, 40, 30)
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "height": 30, "width": 40})
        annotations.append(
            {"id": number + 1, "image_id": 10 + number, "category_id": (3, 7)[number % 2], "bbox": [4, 6, 20, 10]}
            | {"area": 200, "iscrowd": 0}
        )
    annotations += [{"id": 100 + n, **box} for n, box in enumerate(boxes or [])]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six training and five validation images in COCO's folders."""
    write_coco(tmp_path, "train2017", 6)
    write_coco(tmp_path, "val2017", 5)
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four training images and one for validation, which has no cat; the second object of each is difficult."""
    names = [f"{number}.jpg" for number in range(5)]
    for number, name in enumerate(names):
        write_image(tmp_path / "JPEGImages" / name, number, 40, 30)
    fields = {"sizes": np.array([[30, 40]] * 5), "is_difficult": np.tile([False, True], 5)}
    labels, boxes = [[0, 1], [0, 1], [0, 1], [0, 1], [1, 1]], [[[4, 6, 24, 16]] * 2] * 5
    whole = hand_written(labels, boxes, class_names=["cat", "dog"], **fields)
    train, val = select_images(whole, np.arange(4)), select_images(whole, np.array([4]))
    write_voc(tmp_path, [WritableSplit("train", train, names[:4]), WritableSplit("val", val, names[4:])])
    return tmp_path


# Classes, splits and annotations


def test_classes_are_known_without_setup(coco: Path, voc: Path) -> None:
    data = coco_data(coco)
    assert isinstance(data, DetectionData)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [3, 7])
    data = voc_data(voc, train=["train"], val=["val"])
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [1, 2])
    assert data.annotations("val").labels.tolist() == [1, 1]  # dog is 1 although val has no cat


@pytest.mark.parametrize(("form", "last_id"), [("coco", 12), ("voc", 6)])
def test_shapes_know_their_classes_without_drawing(tmp_path: Path, form: str, last_id: int) -> None:
    data = shapes_data(tmp_path / "shapes", format=form)
    assert data.class_names == ["circle", "cross", "ring", "square", "star", "triangle"]
    assert data.category_ids[-1] == last_id
    assert not (tmp_path / "shapes").exists()


@pytest.mark.parametrize(("ids", "expected"), [([3, 7], [3, 7]), (None, [1, 2])])
def test_given_classes_need_no_annotations(tmp_path: Path, ids: list | None, expected: list) -> None:
    data = coco_data(tmp_path / "gone", class_names=["cat", "dog"], category_ids=ids)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], expected)


def test_given_class_order_is_the_label_order_and_keeps_the_ids_of_the_file(coco: Path) -> None:
    data = coco_data(coco, class_names=["dog", "cat"])
    assert data.category_ids == [7, 3]
    assert data.annotations("train").labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_annotations_are_parsed_once_and_test_falls_back_to_val(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    read = COCO.read

    def count(self: COCO, split: str, *args: object, **options: object) -> object:
        parsed.append(split)
        return read(self, split, *args, **options)

    monkeypatch.setattr(COCO, "read", count)
    data = coco_data(coco)
    for _ in range(2):
        _ = data.num_classes, data.class_names, data.category_ids
        for stage in ("fit", "validate", "test", "predict"):
            data.setup(stage)
    assert parsed == ["train", "val"]
    assert data.annotations("test") is data.annotations("val") is data.annotations("predict")


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_path_is_recognised_and_replaces_the_source(kind, tmp_path, request, caplog) -> None:
    path = request.getfixturevalue(kind)
    data = DetectionDataModule(VOC(tmp_path / "other"), path=path)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.source.format == kind.upper()
    assert data.class_names == ["cat", "dog"]
    sizes = {"coco": (6, 5), "voc": (4, 1)}[kind]
    assert (len(data.annotations("train")), len(data.annotations("val"))) == sizes
    assert f"{data.source.format} data set {path}" in caplog.text
    assert "2 classes" in caplog.text


# Loaders


def test_validation_batches_hold_every_image_once_in_order(coco: Path) -> None:
    data = coco_data(coco, image_size=64, batch_size=4, num_workers=0)
    batches = list(data.val_dataloader())
    assert [len(batch.images) for batch in batches] == [4, 1]
    assert torch.cat([batch.image_indices for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    # 40 x 30 -> 64 x 64: x by 1.6, y by 32/15
    expected = torch.tensor([6.4, 12.8, 38.4, 16 * 32 / 15])
    torch.testing.assert_close(batches[0].targets.boxes[0, 0], expected, atol=1e-3, rtol=1e-4)
    assert batches[0].targets.labels[:, 0].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(batches[0].placements[0], torch.tensor([1.6, 32 / 15, 0, 0]))


@pytest.mark.parametrize(("transforms", "left"), [([A.HorizontalFlip(p=1.0)], 25.6), ([], 6.4)])
def test_given_transforms_replace_the_default_and_are_resized_after(coco, transforms, left) -> None:
    data = coco_data(coco, image_size=64, batch_size=6, num_workers=0, train_transforms=transforms)
    (batch,) = data.train_dataloader()
    # x 4..24 of 40, or mirrored 16..36, by 1.6
    assert batch.targets.boxes[:, 0, 0].tolist() == pytest.approx([left] * 6, abs=1e-3)


@pytest.mark.parametrize(("train_difficult", "second"), [(True, 1), (False, IGNORE)])
def test_difficult_objects_are_targets_or_ignored(voc: Path, train_difficult: bool, second: int) -> None:
    data = voc_data(voc, train_difficult=train_difficult, image_size=32, batch_size=4, num_workers=0)
    data.train_transforms = []
    (batch,) = data.train_dataloader()
    assert batch.targets.labels[:, :2].tolist() == [[0, second]] * 4


@pytest.mark.parametrize(("cores", "expected"), [(1, 0), (2, 1), (8, 7), (128, 16)])
def test_automatic_workers_leave_a_core_to_training(coco, monkeypatch, cores, expected) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    loader = coco_data(coco).val_dataloader()
    assert loader.num_workers == expected
    assert loader.timeout == (300 if expected else 0)


# Invalid settings and data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 16}, "data.image_size must be >= 32, got 16"),
        ({"image_size": 64, "resize": Stretch(96)}, "data.image_size must be 96, the size of data.resize, got 64"),
        ({"batch_size": 0}, "data.batch_size must be >= 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be >= 0, got -1"),
        ({"prefetch_factor": 0}, "data.prefetch_factor must be >= 1, got 0"),
        ({"worker_timeout_seconds": float("nan")}, "data.worker_timeout_seconds must be > 0, got nan"),
        ({"seed": -1}, "data.seed must be >= 0, got -1"),
        ({"max_bad_fraction": 1.5}, r"data.max_bad_fraction must be in \[0, 1\], got 1.5"),
        ({"class_names": []}, r"data.class_names must be .*, got \[\]"),
        ({"category_ids": [1, 2]}, "data.category_ids must be one id for each"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        coco_data("anywhere", **settings)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_missing_source_or_data_stops_in_setup(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=r"data.source: missing\. Set data\.path"):
        DetectionDataModule().setup(stage)
    with pytest.raises(DataError, match=r"instances_\w+\.json"):
        coco_data(tmp_path, train="train2017", val="val2017").setup(stage)


def test_skipped_boxes_are_reported_once_and_briefly(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, n], "area": 1, "iscrowd": 0} for n in range(5)]
    write_coco(coco, "train2017", 6, boxes=bad)
    data = coco_data(coco, max_bad_fraction=0.9, batch_size=2, num_workers=0)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("fit")
        list(data.train_dataloader())
    (message,) = [record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()]
    assert "5 boxes or images were skipped" in message
    assert message.endswith("and 2 more")


# From YAML


def parse_yaml(text: str) -> DetectionDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data")
    config = parser.parse_string(text)
    parser.dump(config)  # what a run folder keeps
    return parser.instantiate(config).data


DATA_YAML = """
data:
  source: {class_path: onestage.data.Shapes}
  resize: {class_path: onestage.data.Letterbox, init_args: {size: 64}}
  num_workers: 0
  sampling: {class_path: onestage.data.RepeatFactorSampling, init_args: {threshold: 0.5}}
  train_transforms:
    - {class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}
    - {class_path: onestage.data.SSDZoomOut}
    - {class_path: onestage.data.SSDMinIoUCrop, init_args: {min_ious: [0.5, 0.7], scale: [0.5, 1.0]}}
    - {class_path: onestage.data.SSDPhotometricDistort, init_args: {brightness: 16, contrast: [0.8, 1.2]}}
"""


def test_one_line_of_yaml_is_enough_and_resize_sampling_and_transforms_are_built_from_more(coco: Path) -> None:
    assert parse_yaml(f"data: {{path: {coco}}}").num_classes == 2
    data = parse_yaml(DATA_YAML)
    assert (data.image_size, data.sampling.threshold) == (64, 0.5)
    flip, zoom_out, crop, distort = data.train_transforms
    assert flip.p == 0.5
    assert isinstance(zoom_out, SSDZoomOut)
    assert (crop.min_ious, crop.scale) == ((0.5, 0.7), (0.5, 1.0))
    assert distort.contrast == (0.8, 1.2)


def test_every_public_name_exists_and_importing_the_package_is_light() -> None:
    for name in onestage.data.__all__:
        assert getattr(onestage.data, name).__name__ == name
    assert set(onestage.data.__all__) <= set(dir(onestage.data))
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = onestage.data.NoSuchThing
    code = (
        "import sys, os, onestage.data; assert not {'lightning', 'albumentations', 'torch'} & set(sys.modules); "
        "assert os.environ['NO_ALBUMENTATIONS_UPDATE']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_validation_file_with_fewer_categories_passes_with_a_notice(tmp_path: Path, caplog) -> None:
    for name in ("train", "val"):
        content = bad_data.coco_content()
        if name == "val":
            content["categories"] = content["categories"][1:]  # only dog (7)
            content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 7]
        bad_data.write_coco(tmp_path, content, name)
    data = coco_data(tmp_path, train="train.json", val="val.json", train_images="train", val_images="val")
    val = data.annotations("val")
    assert (val.class_names, val.category_ids) == (("cat", "dog"), (3, 7))
    assert set(val.labels.tolist()) == {1}
    assert "the file does not name cat" in caplog.text
    swapped = coco_data(tmp_path, train="val.json", val="train.json", train_images="val", val_images="train")
    with pytest.raises(AnnotationError, match=r"only here: cat(.|\n)*data\.class_names"):
        swapped.annotations("val")
    names = {"class_names": ["dog", "cat"], "train_images": "val", "val_images": "train"}  # the remedy
    named = coco_data(tmp_path, train="val.json", val="train.json", **names)
    assert named.annotations("val").category_ids == (7, 3)
    assert named.annotations("train").category_ids == (7, 9)  # an unused one
