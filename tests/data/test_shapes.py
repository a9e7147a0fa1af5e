"""The embedded data set: what is drawn, and the folder it is drawn into."""

import json
from pathlib import Path

import numpy as np
import pytest

from onestage.data import scenes
from onestage.data.coco import parse_coco
from onestage.data.images import read_image
from onestage.data.scenes import SHAPE_NAMES, draw_scene
from onestage.data.shapes import SHAPE_CATEGORY_IDS, draw_shapes
from onestage.data.voc import parse_voc
from onestage.errors import DataError


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "num_images", "first_id"), [("train", 32, 1), ("val", 7, 33)])
def test_both_formats_of_a_split_are_the_same_set(drawn, split, num_images, first_id) -> None:
    coco = parse_coco(drawn / "annotations" / f"instances_{split}.json", drawn / "JPEGImages")
    voc = parse_voc(drawn, [split], class_names=SHAPE_NAMES)
    assert len(coco) == num_images
    assert coco.class_names == voc.class_names == SHAPE_NAMES
    assert coco.category_ids == SHAPE_CATEGORY_IDS
    assert coco.image_ids.tolist() == list(range(first_id, first_id + num_images))
    for name in ("image_paths", "sizes", "box_offsets", "boxes", "labels", "is_crowd", "is_difficult"):
        np.testing.assert_array_equal(getattr(coco, name), getattr(voc, name), err_msg=name)
    assert coco.skipped == voc.skipped == ()
    assert len(coco.boxes) > num_images


def test_the_images_are_those_of_the_scenes(drawn) -> None:
    annotations = parse_coco(drawn / "annotations/instances_train.json", drawn / "JPEGImages")
    for index in range(4):
        scene = draw_scene(0, index)
        image = read_image(str(annotations.image_paths[index]), tuple(annotations.sizes[index].tolist()))
        assert np.abs(image.astype(int) - scene.image).mean() < 12  # JPEG, and its coarser colours
        np.testing.assert_array_equal(annotations.boxes[annotations.objects(index)], scene.boxes)
        np.testing.assert_array_equal(annotations.areas[annotations.objects(index)], scene.areas)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(drawn, tmp_path) -> None:
    draw_shapes(tmp_path / "again", num_train=32, num_val=7, seed=0)
    assert snapshot(tmp_path / "again") == snapshot(drawn)
    draw_shapes(tmp_path / "other", num_train=1, num_val=1, seed=4)
    assert snapshot(tmp_path / "other")["JPEGImages/000001.jpg"] != snapshot(drawn)["JPEGImages/000001.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # nothing unfinished is left


def test_more_objects_in_training_images_leave_validation_as_it_is(drawn, tmp_path) -> None:
    draw_shapes(tmp_path / "dense", num_train=32, num_val=7, seed=0, max_objects=12)
    dense, sparse = snapshot(tmp_path / "dense"), snapshot(drawn)
    assert dense["annotations/instances_val.json"] == sparse["annotations/instances_val.json"]
    assert dense["JPEGImages/000039.jpg"] == sparse["JPEGImages/000039.jpg"]
    numbers = [len(json.loads(files["annotations/instances_train.json"])["annotations"]) for files in (dense, sparse)]
    assert numbers[0] > 1.5 * numbers[1]


def test_clutter_adds_edges_to_the_images() -> None:
    def edges(clutter: int) -> float:
        images = [draw_scene(3, index, 1, clutter).image.astype(int) for index in range(8)]
        return sum(float(np.abs(np.diff(image, axis=1)).mean()) for image in images)

    assert edges(0) < edges(1) < edges(6)


def test_a_finished_folder_is_touched_only_for_other_settings_and_lost_images(tmp_path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()  # an empty folder is filled
    draw_shapes(folder, num_train=2, num_val=1, seed=0)
    (folder / "ImageSets" / "note.txt").write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    draw_shapes(folder, num_train=2, num_val=1, seed=0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    draw_shapes(folder, num_train=3, num_val=2, seed=0)
    assert len(list((folder / "JPEGImages").iterdir())) == 5
    whole = snapshot(folder)
    (folder / "JPEGImages/000002.jpg").unlink()
    draw_shapes(folder, num_train=3, num_val=2, seed=0)
    assert snapshot(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_foreign_folder_or_file_is_never_replaced(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine too")
    with pytest.raises(DataError, match=r"cannot be written(.|\n)*data\.source\.path"):
        draw_shapes(tmp_path / "file" / "shapes", num_train=1, num_val=1, seed=0)
    for name in ("mine", "file"):
        with pytest.raises(DataError, match=rf"{name}: is not empty and was not drawn here(.|\n)*data\.source\.path"):
            draw_shapes(tmp_path / name, num_train=1, num_val=1, seed=0)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine too"


def test_boxes_lie_inside_and_hold_the_area_of_a_plausible_shape() -> None:
    drawn_scenes = [draw_scene(0, index) for index in range(60)]
    for scene in drawn_scenes:
        height, width = scene.image.shape[:2]
        assert np.all(scene.boxes[:, :2] >= 0)
        assert np.all(scene.boxes[:, 2:] <= [width, height])
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        assert np.all(sides >= 8)
        fill = scene.areas / sides.prod(axis=1)
        assert np.all((fill > 0.15) & (fill <= 1))
    numbers = np.array([len(scene.labels) for scene in drawn_scenes])
    assert 1 <= np.count_nonzero(numbers == 0) <= 10  # about 6 %
    assert numbers.max() >= 5
    labels = np.bincount(np.concatenate([scene.labels for scene in drawn_scenes]), minlength=len(SHAPE_NAMES))
    assert labels.min() > 0.1 * labels.sum()
    assert len({scene.image.shape for scene in drawn_scenes}) == len(scenes.CANVAS_SIZES)


def test_the_box_of_a_circle_is_as_tight_as_the_pencil_says() -> None:
    # To OpenCV whole numbers are the middles of pixels: a circle of radius 20 around pixel (50, 40) reaches the
    # middles of pixels 30 and 70, 20 and 60, which its outline covers whole. Edges: 30 and 71, 20 and 61.
    circle = [(20 * scenes._polygon(360)).astype(np.float32)]
    mask = scenes._rasterise(circle, np.array([50.0, 40.0]), (100, 100)) >= 0.5
    assert scenes._tight_box(mask) == (30, 20, 71, 61)
    assert np.pi * 20**2 < np.count_nonzero(mask) < np.pi * 21**2
