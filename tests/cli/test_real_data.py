"""Real photographs, where a checkout of them lies beside the project: blood cells (VOC) and COCO images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import REPOSITORY, run
from data_modules import coco_data, voc_data

SHARED_DATA = REPOSITORY.parent / "shared" / "data"
BCCD, COCO128 = SHARED_DATA / "bccd", SHARED_DATA / "coco128"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD images are not here")
needs_coco128 = pytest.mark.skipif(not COCO128.is_dir(), reason="the COCO images are not here")


@pytest.fixture
def eight_bccd(tmp_path: Path) -> list[str]:
    """Options for the first eight training images of BCCD as both splits."""
    root = tmp_path / "bccd"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    names = (BCCD / "ImageSets" / "Main" / "train.txt").read_text().split()[:8]
    (root / "ImageSets" / "Main" / "eight.txt").write_text("\n".join(names))
    shutil.copytree(BCCD / "Annotations", root / "Annotations")
    shutil.copytree(BCCD / "JPEGImages", root / "JPEGImages")
    return [
        "--data.source", "onestage.data.VOC", "--data.source.path", str(root),
        "--data.source.train=[eight]", "--data.source.val=[eight]",
    ]  # fmt: skip


@pytest.fixture
def eight_coco(tmp_path: Path) -> list[str]:
    """Options for the first eight training images of COCO128 as both splits."""
    content = json.loads((COCO128 / "annotations" / "instances_train2017.json").read_text())
    with_objects = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in with_objects][:8]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] in kept]
    file = tmp_path / "eight.json"
    file.write_text(json.dumps(content))
    images = str(COCO128 / "train2017")
    return [
        "--data.source", "onestage.data.COCO", "--data.source.path", str(COCO128),
        "--data.source.train", str(file), "--data.source.train_images", images,
        "--data.source.val", str(file), "--data.source.val_images", images,
    ]  # fmt: skip


@needs_bccd
def test_bccd_skips_its_two_degenerate_boxes_with_a_report():
    data = voc_data(BCCD, train=["train", "val", "test"], val=["val"], image_size=160)
    annotations = data.annotations("train")
    assert data.class_names == ["Platelets", "RBC", "WBC"]
    assert len(annotations.skipped) == 2
    assert {name for line in annotations.skipped for name in ("00338", "00343") if name in line} == {"00338", "00343"}


@needs_coco128
def test_coco128_keeps_its_ids_with_gaps():
    data = coco_data(COCO128, image_size=160)
    assert data.num_classes == 80
    assert (data.category_ids[0], data.category_ids[-1]) == (1, 90)


def overfit(options: list[str], runs: Path, steps: int) -> float:
    """Train the small model on eight images, without augmentation, and return the AP50 on the same."""
    words = [
        "--config", str(REPOSITORY / "configs" / "shapes_ssd.yaml"), *options, "--data.train_transforms=[]",
        "--data.image_size", "160", "--data.batch_size", "8", "--data.num_workers", "0",
        "--trainer.max_epochs", str(steps), "--trainer.check_val_every_n_epoch", str(steps // 4),
        "--runs_dir", str(runs), "--last_checkpoint.every_n_epochs", str(steps), "--trainer.enable_progress_bar=false",
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    assert run("fit", *words) == 0
    (results,) = runs.glob("*/*/results.json")
    return float(json.loads(results.read_text())["metrics"]["AP50"])


@needs_bccd
@pytest.mark.slow
def test_small_model_overfits_eight_images_of_bccd(eight_bccd, tmp_path):
    assert overfit(eight_bccd, tmp_path / "runs", steps=400) > 0.9


@needs_coco128
@pytest.mark.slow
def test_small_model_overfits_eight_images_of_coco(eight_coco, tmp_path):
    assert overfit(eight_coco, tmp_path / "runs", steps=400) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bccd", "coco"])
def test_ssd300_takes_a_few_steps_on_photographs(which, request, tmp_path):
    if not (BCCD if which == "bccd" else COCO128).is_dir():
        pytest.skip("the images are not here")
    options = request.getfixturevalue(f"eight_{which}")
    words = [
        "--config", str(REPOSITORY / "configs" / "voc_ssd300.yaml"), *options, "--model.detector.backbone_weights=null",
        "--data.image_size", "300", "--data.batch_size", "2", "--data.num_workers", "0", "--trainer.max_steps", "3",
        "--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps", "1", "--runs_dir", str(tmp_path), "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    assert run("fit", *words) == 0
    (metrics,) = tmp_path.glob("*/*/metrics.csv")
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    losses = [float(row[header.index("train/loss")]) for row in rows if row[header.index("train/loss")]]
    assert losses
    assert all(0 < loss < 100 for loss in losses)
    (checkpoint,) = tmp_path.glob("*/*/checkpoints/last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
