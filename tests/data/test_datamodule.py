import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from data_modules import coco_data, shapes_data, voc_data, yolo_data
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

import onestage.data
from onestage.data import DetectionDataModule, SSDZoomOut
from onestage.errors import AnnotationError, ConfigError, DataError
from onestage.types import IGNORE, DetectionData

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
BCCD = Path(__file__).resolve().parents[2] / "../shared/data/bccd"
COCO128 = Path(__file__).resolve().parents[2] / "../shared/data/coco128"


def write_image(path: Path, seed: int, height: int = 30, width: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_coco(
    root: Path, split: str, num_images: int, *, boxes: list | None = None, categories: list | None = None
) -> None:
    """One box for each image: x 4..24, y 6..16, of alternating category."""
    images, annotations = [], []
    for number in range(num_images):
        write_image(root / split / f"{number}.jpg", number)
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "height": 30, "width": 40})
        annotations.append(
            {"id": number + 1, "image_id": 10 + number, "category_id": (3, 7)[number % 2], "bbox": [4, 6, 20, 10]}
            | {"area": 200, "iscrowd": 0}
        )
    annotations += [{"id": 100 + n, **box} for n, box in enumerate(boxes or [])]
    content = {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}
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
    for number in range(5):
        write_image(tmp_path / "JPEGImages" / f"{number}.jpg", number)
        names = ("dog", "dog") if number == 4 else ("cat", "dog")
        objects = "".join(
            f"<object><name>{name}</name><difficult>{row}</difficult><bndbox><xmin>5</xmin><ymin>7</ymin>"
            "<xmax>24</xmax><ymax>16</ymax></bndbox></object>"
            for row, name in enumerate(names)
        )
        xml = f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>"
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{number}.xml").write_text(xml)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n3\n")
    (lists / "val.txt").write_text("4\n")
    return tmp_path


# -- what training asks of a data module -------------------------------------------------------------------------------


def test_coco_knows_its_classes_without_setup(coco: Path) -> None:
    data = coco_data(coco)
    assert isinstance(data, DetectionData)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [3, 7])


def test_voc_knows_its_classes_without_setup(voc: Path) -> None:
    data = voc_data(voc, train=["train"], val=["val"])
    assert isinstance(data, DetectionData)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [1, 2])
    assert data.annotations("val").labels.tolist() == [1, 1]  # dog is 1 although val has no cat


def test_shapes_know_their_classes_without_drawing(tmp_path: Path) -> None:
    for form, last_id in (("coco", 12), ("voc", 6)):
        data = shapes_data(tmp_path / "shapes", format=form)
        assert data.num_classes == 6
        assert data.class_names == ["circle", "cross", "ring", "square", "star", "triangle"]
        assert data.category_ids[-1] == last_id
    assert not (tmp_path / "shapes").exists()


def test_given_classes_need_no_annotations(tmp_path: Path) -> None:
    for data in (
        coco_data(tmp_path / "gone", class_names=["cat", "dog"], category_ids=[3, 7]),
        voc_data(tmp_path / "gone", class_names=["cat", "dog"], category_ids=[3, 7]),
    ):
        assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [3, 7])
    for data in (
        coco_data(tmp_path / "gone", class_names=["cat", "dog"]),
        voc_data(tmp_path / "gone", class_names=["cat", "dog"]),
    ):
        assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [1, 2])


def test_given_class_order_is_the_label_order_and_keeps_the_files_ids(coco: Path) -> None:
    data = coco_data(coco, class_names=["dog", "cat"])
    assert data.category_ids == [7, 3]
    assert data.annotations("train").labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_annotations_are_parsed_once(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = coco_data.parse
    monkeypatch.setattr(
        coco_data, "parse", lambda self, split, names: parsed.append(split) or parse(self, split, names)
    )
    data = coco_data(coco)
    for _ in range(2):
        _ = data.num_classes, data.class_names, data.category_ids
        for stage in ("fit", "validate", "test", "predict"):
            data.setup(stage)
    assert parsed == ["train", "val"]
    assert data.annotations("test") is data.annotations("val") is data.annotations("predict")


def test_read_image_gives_original_pixels(coco: Path) -> None:
    image = coco_data(coco).read_image("val", 2)
    assert image.shape == (30, 40, 3)
    expected = cv2.imread(str(coco / "val2017" / "2.jpg"))[..., ::-1]
    assert np.abs(image.astype(int) - expected).max() <= 1


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_training_batches_have_the_documented_form(coco: Path) -> None:
    loader = coco_data(coco, image_size=64, batch_size=4, num_workers=0).train_dataloader()
    (batch,) = loader  # two of six images wait for another epoch
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 64, 64), torch.uint8)
    assert batch.targets.boxes.shape == (4, 16, 4)
    assert batch.original_sizes.tolist() == [[30, 40]] * 4
    assert len(set(batch.image_indices.tolist())) == 4


def test_validation_batches_are_every_image_once_in_order(coco: Path) -> None:
    data = coco_data(coco, image_size=64, batch_size=4, num_workers=0)
    batches = list(data.val_dataloader())
    assert [len(batch.images) for batch in batches] == [4, 1]
    assert torch.cat([batch.image_indices for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    # 40 x 30 -> 64 x 64: x by 1.6, y by 32/15
    expected = torch.tensor([6.4, 12.8, 38.4, 16 * 32 / 15])
    torch.testing.assert_close(batches[0].targets.boxes[0, 0], expected, atol=1e-3, rtol=0)
    assert batches[0].targets.labels[:, 0].tolist() == [0, 1, 0, 1]


def test_two_epochs_differ_and_one_repeats(coco: Path) -> None:
    def epoch(number: int, **settings: int) -> bytes:
        loader = coco_data(coco, image_size=32, batch_size=6, num_workers=0, **settings).train_dataloader()
        loader.sampler.set_epoch(number)
        (batch,) = loader
        return batch.images.contiguous().numpy().tobytes()

    assert epoch(0) == epoch(0)
    assert len({epoch(0), epoch(1), epoch(2), epoch(0, seed=1)}) == 4


def test_given_transforms_replace_the_default_and_are_resized_after(coco: Path) -> None:
    data = coco_data(coco, image_size=64, batch_size=6, num_workers=0, train_transforms=[A.HorizontalFlip(p=1.0)])
    (batch,) = data.train_dataloader()
    # x 4..24 of 40, mirrored: 16..36, by 1.6
    assert batch.targets.boxes[:, 0, 0].tolist() == pytest.approx([25.6] * 6, abs=1e-3)
    data = coco_data(coco, image_size=64, batch_size=6, num_workers=0, train_transforms=[])
    (batch,) = data.train_dataloader()
    assert batch.targets.boxes[:, 0, 0].tolist() == pytest.approx([6.4] * 6, abs=1e-3)


def test_voc_difficult_objects_are_trained_on_or_left_out(voc: Path) -> None:
    for train_difficult, second in ((True, 1), (False, IGNORE)):
        data = voc_data(
            voc,
            train=["train"],
            val=["val"],
            train_difficult=train_difficult,
            image_size=32,
            batch_size=4,
            num_workers=0,
            train_transforms=[],
        )
        (batch,) = data.train_dataloader()
        assert batch.targets.labels[:, :2].tolist() == [[0, second]] * 4


def test_voc_test_split_falls_back_to_validation(voc: Path) -> None:
    data = voc_data(voc, train=["train"], val=["val"])
    assert data.annotations("test") is data.annotations("val")
    data = voc_data(voc, train=["train"], val=["val"], test=["train", "val"])
    assert len(data.annotations("test")) == 5


def test_coco_paths_can_be_given(coco: Path, tmp_path: Path) -> None:
    (coco / "elsewhere").mkdir()
    (coco / "annotations" / "instances_val2017.json").rename(coco / "elsewhere" / "labels.json")
    (coco / "val2017").rename(coco / "elsewhere" / "pictures")
    data = coco_data(
        coco,
        test="elsewhere/labels.json",
        test_images=coco / "elsewhere" / "pictures",
        val="annotations/instances_train2017.json",
        val_images="train2017",
    )
    assert (len(data.annotations("val")), len(data.annotations("test"))) == (6, 5)


def test_predict_reads_a_folder_or_one_image(coco: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "photos" / "a.jpg", 0, 20, 50)
    write_image(tmp_path / "photos" / "b.jpg", 1, 50, 20)
    known = {"class_names": ["cat", "dog"], "category_ids": [3, 7], "image_size": 32, "num_workers": 0}
    data = coco_data(tmp_path / "gone", predict_dir=tmp_path / "photos", **known)
    (batch,) = data.predict_dataloader()
    assert batch.original_sizes.tolist() == [[20, 50], [50, 20]]
    assert (batch.targets.labels == -1).all()
    assert data.annotations("predict").category_ids == (3, 7)
    assert data.read_image("predict", 0).shape == (20, 50, 3)
    data = coco_data(tmp_path / "gone", predict_dir=tmp_path / "photos" / "b.jpg", **known)
    assert len(data.annotations("predict")) == 1
    assert len(coco_data(coco, num_workers=0).predict_dataloader()) == 1  # the validation split


def test_shapes_are_drawn_once_and_read_in_both_formats(tmp_path: Path) -> None:
    sets = []
    for form in ("coco", "voc"):
        data = shapes_data(tmp_path / "shapes", num_train=3, num_val=1, format=form, image_size=64, num_workers=0)
        data.prepare_data()
        drawn = (tmp_path / "shapes" / "shapes.json").stat().st_mtime_ns
        sets.append(data.annotations("train"))
        assert data.annotations("train").category_ids == tuple(data.category_ids)
        assert len(list(data.val_dataloader())) == 1
    assert (tmp_path / "shapes" / "shapes.json").stat().st_mtime_ns == drawn
    assert np.array_equal(sets[0].boxes, sets[1].boxes)
    assert np.array_equal(sets[0].labels, sets[1].labels)


def test_automatic_workers_leave_a_core_to_training(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 0), (2, 1), (8, 7), (128, 16)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert coco_data(coco).val_dataloader().num_workers == expected


def test_position_goes_through_the_data_module(coco: Path) -> None:
    def build() -> coco_data:
        return coco_data(coco, image_size=32, batch_size=2, num_workers=0)

    data = build()
    loader = data.train_dataloader()
    expected = [batch.image_indices.tolist() for batch in loader]
    next(iter(loader))
    state = data.state_dict()
    assert state["batches"] == 1
    resumed = build()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [batch.image_indices.tolist() for batch in resumed.train_dataloader()] == expected[1:]
    other = coco_data(coco, image_size=32, batch_size=3, num_workers=0)
    other.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data.batch_size was 2; now it is 3"):
        other.train_dataloader()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 16}, "data.image_size is 16; it must be at least 32"),
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1; it must be at least 0"),
        ({"prefetch_factor": 0}, "data.prefetch_factor is 0"),
        ({"worker_timeout_seconds": 0.0}, "data.worker_timeout_seconds is 0"),
        ({"worker_timeout_seconds": float("nan")}, "data.worker_timeout_seconds is nan"),
        ({"seed": -1}, "data.seed is -1"),
        ({"max_bad_fraction": 1.5}, r"data.max_bad_fraction is 1.5; it must be in 0\.\.1"),
        ({"max_bad_fraction": float("nan")}, "data.max_bad_fraction is nan"),
        ({"class_names": []}, "data.class_names is"),
        ({"class_names": ["cat", "cat"]}, "none twice"),
        ({"category_ids": [1, 2]}, "data.category_ids"),
        ({"class_names": ["cat", "dog"], "category_ids": [1, 1]}, "data.category_ids"),
        ({"class_names": ["cat", "dog"], "category_ids": [1]}, "data.category_ids"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        coco_data("anywhere", **settings)


def test_voc_without_any_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.val_splits is empty"):
        voc_data("anywhere", val=[])


def test_batch_larger_than_the_training_split_is_refused(coco: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)only 6 images.*at most 6"):
        coco_data(coco, batch_size=7, num_workers=0).train_dataloader()


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_missing_data_stops_in_setup(tmp_path: Path, stage: str) -> None:
    with pytest.raises(DataError, match=r"instances_train2017.json"):
        coco_data(tmp_path).setup(stage)


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 3, "name": "cat"}, {"id": 7, "name": "wolf"}],
        [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 9, "name": "cow"}],
        [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
    ],
    ids=["another name", "one more", "ids swapped"],
)
def test_splits_of_different_categories_are_refused(coco: Path, categories: list) -> None:
    write_coco(coco, "val2017", 2, categories=categories)
    with pytest.raises(AnnotationError) as caught:
        coco_data(coco).setup("fit")
    for name in {"cat", "dog", *(category["name"] for category in categories)}:
        assert name in str(caught.value)


def test_skipped_boxes_are_reported_once_and_briefly(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, n], "area": 1, "iscrowd": 0} for n in range(5)]
    write_coco(coco, "train2017", 6, boxes=bad)
    data = coco_data(coco, max_bad_fraction=0.9, batch_size=2, num_workers=0)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("fit")
        list(data.train_dataloader())
    (message,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert "5 boxes or images were left out" in message
    assert message.count("\n") == 4  # three of them, and "and 2 more"
    assert message.endswith("and 2 more")


# -- from YAML ---------------------------------------------------------------------------------------------------------


def parse_yaml(text: str) -> LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    config = parser.parse_string(text)
    parser.dump(config)  # what a run folder keeps
    return parser.instantiate_classes(config).data


def test_two_lines_of_yaml_are_enough(coco: Path) -> None:
    data = parse_yaml(f"data:\n  class_path: onestage.data.COCO\n  init_args: {{root: {coco}}}\n")
    assert isinstance(data, coco_data)
    assert data.num_classes == 2


TRANSFORMS_YAML = """
data:
  class_path: onestage.data.Shapes
  init_args:
    image_size: 64
    num_workers: 0
    train_transforms:
      - {class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}
      - {class_path: onestage.data.SSDZoomOut}
      - {class_path: onestage.data.SSDMinIoUCrop, init_args: {min_ious: [0.5, 0.7], scale: [0.5, 1.0]}}
      - {class_path: onestage.data.SSDPhotometricDistort, init_args: {brightness: 16, contrast: [0.8, 1.2]}}
"""


def test_transforms_are_built_from_yaml() -> None:
    flip, zoom_out, crop, distort = parse_yaml(TRANSFORMS_YAML).train_transforms
    assert isinstance(flip, A.HorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(zoom_out, SSDZoomOut)
    assert zoom_out.max_ratio == 4
    assert (crop.min_ious, crop.scale) == ((0.5, 0.7), (0.5, 1.0))
    assert distort.contrast == (0.8, 1.2)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("p: 0.5", "prob: 0.5"), ("brightness: 16", "brightnes: 16"), ("brightness: 16", "brightness: bright")],
)
def test_mistyped_transform_arguments_are_refused(right: str, wrong: str) -> None:
    with pytest.raises(Exception, match="train_transforms"):
        parse_yaml(TRANSFORMS_YAML.replace(right, wrong))


def test_data_modules_share_the_settings_of_their_base() -> None:
    shared = inspect.signature(DetectionDataModule.__init__).parameters
    for module in (coco_data, voc_data, yolo_data, shapes_data):
        own = inspect.signature(module.__init__).parameters
        is_drawn = module is shapes_data  # has no bad boxes, and both of its splits
        missing = {"max_bad_fraction", "val_fraction", "num_folds", "fold"} if is_drawn else set()
        assert set(shared) - set(own) == missing
        for name in set(shared) & set(own) - {"self", "root"}:  # what is drawn has a root by default
            assert str(own[name]) == str(shared[name]), (module, name)


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(coco_data, "data")
    text = " ".join(parser.format_help().split())
    for words in ("the folder of the data set", "images per process and step", "folder of images, or one image"):
        assert words in text


def test_every_public_name_is_there_and_importing_the_package_is_light() -> None:
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


# -- real data, where it is there --------------------------------------------------------------------------------------


@pytest.mark.skipif(not BCCD.is_dir(), reason="the real data set is not here")
def test_blood_cells_in_voc_format(caplog: pytest.LogCaptureFixture) -> None:
    data = voc_data(BCCD, train=["train"], val=["val"], batch_size=8, num_workers=0)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert data.class_names == ["Platelets", "RBC", "WBC"]
    assert (len(data.annotations("train")), len(data.annotations("val"))) == (205, 87)
    assert "BloodImage_00343" in caplog.text
    assert "BloodImage_00338" in caplog.text
    assert next(iter(data.train_dataloader())).images.shape == (8, 3, 300, 300)


@pytest.mark.skipif(not COCO128.is_dir(), reason="the real data set is not here")
def test_coco128_in_coco_format() -> None:
    data = coco_data(COCO128, batch_size=8, num_workers=0)
    assert data.num_classes == 80
    assert (data.category_ids[0], data.category_ids[-1]) == (1, 90)
    assert len(data.train_dataloader()) == 16
    assert next(iter(data.val_dataloader())).images.shape == (8, 3, 300, 300)
