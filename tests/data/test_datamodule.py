"""The one data module: classes, splits, loaders and settings of any source."""

import json
import logging
from pathlib import Path

import albumentations as A
import bad_data
import numpy as np
import pytest
import torch
from annotation_sets import hand_written
from data_modules import coco_data, shapes_data, voc_data
from layout_files import coco_folder, edit_json

from onestage.data import COCO, VOC, DetectionDataModule
from onestage.data.annotations import select_images
from onestage.data.writers import WritableSplit, write_voc
from onestage.errors import AnnotationError, ConfigError, DataError
from onestage.types import IGNORE, DetectionData


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six training and five validation images of 100 x 80 px in COCO's folders, each with a cat and a dog."""
    coco_folder(tmp_path, "train2017", num_images=6)
    coco_folder(tmp_path, "val2017", num_images=5)
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four training images and one for validation, which has no cat; the second object of each is difficult."""
    names = [f"{number}.jpg" for number in range(5)]
    for number, name in enumerate(names):
        bad_data.write_image(tmp_path / "JPEGImages" / name, number, (30, 40))
    fields = {"sizes": np.array([[30, 40]] * 5), "is_difficult": np.tile([False, True], 5)}
    labels, boxes = [[0, 1], [0, 1], [0, 1], [0, 1], [1, 1]], [[[4, 6, 24, 16]] * 2] * 5
    whole = hand_written(labels, boxes, class_names=["cat", "dog"], **fields)
    train, val = select_images(whole, np.arange(4)), select_images(whole, np.array([4]))
    write_voc(tmp_path, [WritableSplit("train", train, names[:4]), WritableSplit("val", val, names[4:])])
    return tmp_path


def test_classes_are_known_without_setup(coco, voc) -> None:
    data = coco_data(coco)
    assert isinstance(data, DetectionData)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [3, 7])
    data = voc_data(voc, train=["train"], val=["val"])
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [1, 2])
    assert data.annotations("val").labels.tolist() == [1, 1]  # dog is 1 although val has no cat


def test_given_classes_and_those_of_shapes_need_no_files(tmp_path) -> None:
    for form, last_id in (("coco", 12), ("voc", 6)):
        data = shapes_data(tmp_path / "shapes", format=form)
        assert data.class_names == ["circle", "cross", "ring", "square", "star", "triangle"]
        assert data.category_ids[-1] == last_id
    for ids, expected in (([3, 7], [3, 7]), (None, [1, 2])):
        data = coco_data(tmp_path / "gone", class_names=["cat", "dog"], category_ids=ids)
        assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], expected)
    assert [*tmp_path.iterdir()] == []


def test_annotations_are_parsed_once_and_test_falls_back_to_val(coco, monkeypatch) -> None:
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


def test_evaluation_says_that_there_is_no_test_split(coco, caplog) -> None:
    for stage, is_said in (("fit", False), ("validate", False), ("test", True)):
        caplog.clear()
        coco_data(coco).setup(stage)
        assert ("there is no test split: the validation images are read" in caplog.text) == is_said


def test_training_images_can_replace_an_unusable_validation_split(coco) -> None:
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(AnnotationError, match=r"'images' must be .*(\n.*)*\nOr hold out .*: data\.val_fraction: 0\.2$"):
        coco_data(coco).setup("fit")
    coco_data(coco, val_fraction=0.2).setup("fit")


def test_categories_go_by_id_unless_the_names_are_given(coco) -> None:
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    dog, cat = content["categories"][1], content["categories"][0]
    cat["id"], dog["id"] = 1, 2  # 3 and 7 in the training file
    for one in content["annotations"]:
        one["category_id"] = {3: 1, 7: 2}[one["category_id"]]
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"train2017.json: 3 cat, 7 dog\n.*: 1 cat, 2 dog\n.*class_names"):
        coco_data(coco).setup("fit")
    assert coco_data(coco, class_names=["cat", "dog"]).annotations("val").labels.tolist() == [0, 1] * 5


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


def test_position_of_a_checkpoint_is_for_the_loader_of_the_next_fit(coco) -> None:
    data = coco_data(coco, batch_size=2)
    for batches in (2, 1):
        data.setup("fit")  # Lightning calls it, restores the position, and asks for the loader
        data.load_state_dict(coco_data(coco, batch_size=2).train_dataloader().state_dict() | {"batches": batches})
        assert data.train_dataloader().state_dict()["batches"] == batches


def test_validation_batches_hold_every_image_once_in_order(coco) -> None:
    data = coco_data(coco, image_size=64, batch_size=4, num_workers=0)
    batches = list(data.val_dataloader())
    assert [len(batch.images) for batch in batches] == [4, 1]
    assert torch.cat([batch.image_indices for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    # The cat is at x 10..40, y 20..60. 100 x 80 -> 64 x 64: x by 0.64, y by 0.8
    expected = torch.tensor([6.4, 16, 25.6, 48])
    torch.testing.assert_close(batches[0].targets.boxes[0, 0], expected, atol=1e-3, rtol=1e-4)
    assert batches[0].targets.labels[:, :2].tolist() == [[0, 1]] * 4
    torch.testing.assert_close(batches[0].placements[0], torch.tensor([0.64, 0.8, 0, 0]))


@pytest.mark.parametrize(("transforms", "left"), [([A.HorizontalFlip(p=1.0)], 38.4), ([], 6.4)])
def test_given_transforms_replace_the_default_and_are_resized_after(coco, transforms, left) -> None:
    data = coco_data(coco, image_size=64, batch_size=6, num_workers=0, train_transforms=transforms)
    (batch,) = data.train_dataloader()
    # x 10..40 of 100, or mirrored 60..90, by 0.64
    assert batch.targets.boxes[:, 0, 0].tolist() == pytest.approx([left] * 6, abs=1e-3)


@pytest.mark.parametrize(("train_difficult", "second"), [(True, 1), (False, IGNORE)])
def test_difficult_objects_are_targets_or_ignored(voc, train_difficult, second) -> None:
    data = voc_data(voc, train_difficult=train_difficult, image_size=32, batch_size=4, num_workers=0)
    data.train_transforms = []
    (batch,) = data.train_dataloader()
    assert batch.targets.labels[:, :2].tolist() == [[0, second]] * 4


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_missing_source_or_data_stops_in_setup(tmp_path, stage) -> None:
    with pytest.raises(ConfigError, match=r"data.source: missing\. Set data\.path"):
        DetectionDataModule().setup(stage)
    with pytest.raises(DataError, match=r"instances_\w+\.json"):
        coco_data(tmp_path, train="train2017", val="val2017").setup(stage)


def test_skipped_boxes_are_reported_once_and_briefly(coco, caplog) -> None:
    for row in range(5):
        edit_json(coco / "annotations" / "instances_train2017.json", "annotations", [row], bbox=[5, 5, 0, row])
    data = coco_data(coco, max_bad_fraction=0.9, batch_size=2, num_workers=0)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("fit")
        list(data.train_dataloader())
    (message,) = [record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()]
    assert "5 boxes or images were skipped" in message
    assert message.endswith("and 2 more")


def test_validation_file_with_fewer_categories_passes_with_a_notice(tmp_path, caplog) -> None:
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
