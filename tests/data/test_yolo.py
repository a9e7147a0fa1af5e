from pathlib import Path

import numpy as np
import pytest
from data_modules import coco_data, yolo_data
from yolo_files import write_image, write_yolo

from onestage.data.yolo import parse_yolo
from onestage.errors import AnnotationError

COCO128 = Path(__file__).resolve().parents[2] / "../shared/data/coco128"


def test_yolo_fractions_become_edges_in_pixels(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n0 0.125 0.25 0.25 0.5\n", "b": "", "c": None})
    annotations = parse_yolo(data, "train")
    # centre (20, 10), 10 x 10 of a 40 x 20 image; centre (5, 5), 10 x 10
    assert annotations.boxes.tolist() == [[15, 5, 25, 15], [0, 0, 10, 10]]
    assert annotations.labels.tolist() == [1, 0]
    assert annotations.box_offsets.tolist() == [0, 2, 2, 2]  # images without objects stay
    assert annotations.sizes.tolist() == [[20, 40]] * 3
    assert annotations.areas.tolist() == [100, 100]
    assert (annotations.class_names, annotations.category_ids) == (("cat", "dog"), (1, 2))
    assert annotations.image_ids.tolist() == [1, 2, 3]


def test_yolo_label_order_is_that_of_the_expected_names(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n"})
    assert parse_yolo(data, "train", class_names=["dog", "cat"]).labels.tolist() == [0]
    with pytest.raises(AnnotationError, match=r"(?s)classes differ.*only expected: cow"):
        parse_yolo(data, "train", class_names=["dog", "cow"])


def test_yolo_outline_becomes_the_box_around_it(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": "0 0.25 0.5 0.5 0.25 0.75 0.75 0.5 1\n"})
    assert parse_yolo(data, "train").boxes.tolist() == [[10, 5, 30, 20]]


def test_yolo_keypoints_are_passed_over(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 1\n"})
    data.write_text(data.read_text() + "kpt_shape: [2, 3]\n")
    assert parse_yolo(data, "train").boxes.tolist() == [[15, 5, 25, 15]]


def test_yolo_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    from PIL import Image

    data = write_yolo(tmp_path, {"a": "0 0.5 0.5 1 0.5\n"})
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: 40 x 20 is shown as 20 x 40
    Image.new("RGB", (40, 20)).save(tmp_path / "images/train/a.png", exif=exif)
    assert parse_yolo(data, "train").boxes.tolist() == [[0, 10, 20, 30]]


# -- where things lie --------------------------------------------------------------------------------------------------

LABEL = "0 0.5 0.5 0.25 0.5\n"


def names_of(data: Path, split: str = "train") -> list[str]:
    annotations = parse_yolo(data, split)
    assert len(annotations.boxes) == len(annotations)  # every image found its label
    return [Path(path).name for path in annotations.image_paths]


def test_yolo_folder_is_as_good_as_its_yaml(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": LABEL, "b": LABEL})
    assert names_of(tmp_path) == names_of(data) == ["a.png", "b.png"]


def test_yolo_folders_alone_need_the_class_names(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"a": LABEL}).unlink()
    with pytest.raises(AnnotationError, match=r"(?s)classes\.txt.*data\.yaml"):
        parse_yolo(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert names_of(tmp_path) == ["a.png"]
    with pytest.raises(AnnotationError, match=r"no split 'val': neither images/val nor val/images"):
        parse_yolo(tmp_path, "val")


def test_yolo_roboflow_export_with_a_wrong_parent_and_valid_for_val(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_image(tmp_path / split / "images" / "a.jpg")
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "a.txt").write_text(LABEL)
    yaml = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"
    (tmp_path / "data.yaml").write_text(yaml)
    assert names_of(tmp_path) == names_of(tmp_path, "val") == ["a.jpg"]
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("cat\n")
    assert names_of(tmp_path, "val") == ["a.jpg"]


def test_yolo_split_of_lists_and_folders_takes_each_image_once(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": LABEL, "b": LABEL, "c": LABEL})
    write_yolo(tmp_path, {"d": LABEL}, split="more")
    (tmp_path / "list.txt").write_text("./images/train/c.png\n\nimages/train/a.png\r\nimages/train/a.png\n")
    data.write_text("train: [list.txt, images/more]\nnames: {0: cat, 1: dog}\n")
    assert names_of(data) == ["d.png", "a.png", "c.png"]  # in order of path


def test_yolo_path_of_another_machine_falls_back_to_the_folder_of_the_yaml(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": LABEL})
    data.write_text("path: /nowhere/datasets/mine\ntrain: images/train\nnames: [cat, dog]\n")
    assert names_of(data) == ["a.png"]


def test_yolo_labels_beside_the_images_and_images_in_coco_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text(LABEL)
    (tmp_path / "data.yaml").write_text("train: photos\nnames: [cat]\n")
    assert names_of(tmp_path) == ["a.png"]
    (tmp_path / "labels" / "photos").mkdir(parents=True)
    (tmp_path / "photos" / "a.txt").rename(tmp_path / "labels" / "photos" / "a.txt")
    (tmp_path / "data.yaml").write_text("train: images/photos\nnames: [cat]\n")
    assert names_of(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\n", "has no 'names'"),
        ("- a\n- b\n", "has no 'names'"),
        ("names: [cat, dog\n", r"data.yaml:\d+:\d+: is not YAML"),
        ("names: &n [cat]\ntrain: *n\n", "aliases"),
        ("names: []\ntrain: images/train\n", "names must be a list"),
        ("names: cat\ntrain: images/train\n", "names must be a list"),
        ("names: [cat, cat]\ntrain: images/train\n", "two classes are called 'cat'"),
        ("names: [cat, [dog]]\ntrain: images/train\n", "class 1 has no name"),
        ("names: [cat, dog]\ntrain: 3\n", "train must be a folder"),
        ("names: [cat, dog]\ntrain: images/gone\n", "'images/gone' is neither a folder nor a list"),
        ("names: [cat, dog]\nval: images/train\n", r"no split 'train' \(there are: val\)"),
        ("names: [cat, dog]\ntrain: labels\n", "holds no image"),
        ("names: [cat, dog]\npath: [a]\ntrain: images/train\n", "path is"),
        ("names: [cat, dog]\nkpt_shape: many\ntrain: images/train\n", "kpt_shape is 'many'"),
        ("names: " + "[" * 3000 + "]" * 3000, "is nested more than 10 deep"),
    ],
)
def test_yolo_settings_that_cannot_be_used_are_refused(tmp_path: Path, yaml: str, message: str) -> None:
    data = write_yolo(tmp_path, {"a": LABEL})
    data.write_text(yaml)
    with pytest.raises(AnnotationError, match=message):
        parse_yolo(data, "train")


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "./../outside.png", "a\0b"])
def test_yolo_list_that_leads_elsewhere_is_refused(tmp_path: Path, line: str) -> None:
    root = tmp_path / "set"
    data = write_yolo(root, {"a": LABEL})
    write_image(tmp_path / "outside.png")
    (root / "list.txt").write_text(f"images/train/a.png\n{line}\n")
    data.write_text("train: list.txt\nnames: [cat]\n")
    with pytest.raises(AnnotationError, match=r"list\.txt:2: .* is not a path below"):
        parse_yolo(data, "train")


def test_yolo_unreadable_image_is_left_out_and_named(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": LABEL, "b": LABEL})
    (tmp_path / "images/train/b.png").write_bytes(b"nothing")
    (tmp_path / "images/train/c.png").symlink_to(tmp_path / "gone.png")
    annotations = parse_yolo(data, "train")
    assert len(annotations) == 1
    assert "b.png" in annotations.skipped[0]
    assert "c.png" in annotations.skipped[1]


# -- the data module ---------------------------------------------------------------------------------------------------


def test_yolo_data_module_delivers_batches(tmp_path: Path) -> None:
    data_yaml = write_yolo(tmp_path, {name: LABEL for name in "abcd"})
    write_yolo(tmp_path, {"e": "1 0.5 0.5 0.25 0.5\n"}, split="val")
    data = yolo_data(data_yaml, image_size=64, batch_size=2, num_workers=0)
    data.setup("fit")
    assert (data.class_names, data.category_ids, data.has_test_split) == (["cat", "dog"], [1, 2], False)
    assert next(iter(data.train_dataloader())).images.shape == (2, 3, 64, 64)
    (batch,) = data.val_dataloader()
    assert batch.targets.labels[0, 0] == 1
    assert batch.targets.boxes[0, 0].tolist() == [24, 16, 40, 48]  # (15, 5, 25, 15) stretched from 40 x 20 to 64 x 64


@pytest.mark.skipif(not COCO128.is_dir(), reason="the real data set is not here")
def test_coco128_is_the_same_in_yolo_and_in_coco_form() -> None:
    for split in ("train", "val"):
        yolo = yolo_data(COCO128 / "yolo.yaml").annotations(split)
        coco = coco_data(COCO128).annotations(split)
        assert yolo.class_names == coco.class_names
        assert [Path(path).name for path in yolo.image_paths] == sorted(Path(path).name for path in coco.image_paths)
        assert len(yolo.boxes) == len(coco.boxes)
        assert np.bincount(yolo.labels, minlength=80).tolist() == np.bincount(coco.labels, minlength=80).tolist()
