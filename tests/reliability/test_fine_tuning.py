"""A new run from weights: what fits is loaded, the rest starts fresh; frozen stages."""

import json
import shutil
from pathlib import Path

import checkpoint_files
import pytest
import tiny_run
import torch
from tiny_run import folder_of
from tiny_training import TinyDetectorWithBatchNorm

from onestage.data.scenes import SHAPE_NAMES
from onestage.data.shapes import draw_shapes
from onestage.errors import CheckpointError, ConfigError
from onestage.models import SSD300
from onestage.reliability.checkpoints import load_fitting_weights, read_checkpoint
from onestage.training.module import DetectionModule

HEAD = "detector.class_head.levels.0"
NAMES = ["a", "b", "c"]


def module_of(num_classes: int, **settings: object) -> DetectionModule:
    return DetectionModule(TinyDetectorWithBatchNorm(num_classes), **settings)


def write_checkpoint(path: Path, module: DetectionModule, names: list[str] = NAMES) -> Path:
    """Write a checkpoint with all weights of the module moved by one."""
    saved = checkpoint_files.changed("state_dict", {name: value + 1 for name, value in module.state_dict().items()})
    saved["onestage"] |= {"class_names": names, "category_ids": [*range(1, len(names) + 1)]}
    return checkpoint_files.write(path, saved)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "best.ckpt", module_of(3))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (NAMES, None),
        (["c", "b", "a"], "in both, but of other classes"),
        (["a", "b"], f"{HEAD}.bias: (12,) there, (8,) here"),
    ],
)
def test_what_fits_is_loaded_and_the_rest_is_listed_and_starts_at_the_prior(trained, caplog, names, reason):
    module = module_of(len(names))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with caplog.at_level("INFO"):
        load_fitting_weights(module, str(trained), names)
    saved = torch.load(trained, weights_only=True)["state_dict"]
    for name, tensor in module.state_dict().items():
        is_fresh = reason is not None and name.startswith("detector.class_head.")
        assert torch.equal(tensor, before[name] if is_fresh else saved[name]), name
    assert (reason or "init_from: ") in caplog.text
    if reason:
        prior = module.state_dict()[f"{HEAD}.bias"].sigmoid()
        assert torch.allclose(prior, torch.full_like(prior, 0.01))


def test_file_of_another_network_or_with_nan_is_refused(trained):
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"holds no tensor that fits the backbone"):
        load_fitting_weights(DetectionModule(SSD300(2)), str(trained), NAMES)
    content = torch.load(trained, weights_only=True)
    content["state_dict"][f"{HEAD}.bias"][0] = float("nan")
    torch.save(content, trained)
    with pytest.raises(CheckpointError, match="NaN"):
        load_fitting_weights(module_of(3), str(trained), NAMES)
    with pytest.raises(ConfigError, match="has no published weights"):
        load_fitting_weights(module_of(3), "torchvision_coco", NAMES)


def test_frozen_stages_keep_weights_and_batch_norm_statistics():
    module = module_of(2, freeze=2).train()
    before = {name: tensor.clone() for name, tensor in module.detector.backbone.state_dict().items()}
    optimizer = module.make_optimizer()
    module.detector.backbone(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))[1].sum().backward()
    optimizer.step()
    changed = {name for name, tensor in module.detector.backbone.state_dict().items() if not before[name].equal(tensor)}
    assert not [name for name in changed if name.startswith(("to_conv4.conv1", "to_conv4.conv2"))]
    assert {"to_conv4.conv3_1.weight", "to_conv4.conv3_1_bn.running_mean"} <= changed
    assert module_of(2).state_dict().keys() == module.state_dict().keys()  # a checkpoint fits either
    with pytest.raises(ConfigError, match=r"model\.freeze must be in \[0, 5\], the stages of VGG"):
        module_of(2, freeze=6)


def test_fit_starts_from_the_weights_of_another_run(drawn, tmp_path, capsys):
    best = write_checkpoint(tmp_path / "best.ckpt", DetectionModule(tiny_run.ForgetfulDetector(6)), [*SHAPE_NAMES])
    options = ("--init_from", str(best), "--model.freeze", "5", "--trainer.max_steps", "1", "--resume", "auto")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, *options)) == 0
    assert "tensors are loaded from" in capsys.readouterr().err
    last = folder_of(tmp_path) / "checkpoints" / "last.ckpt"
    old, new = (read_checkpoint(path)["state_dict"] for path in (best, last))
    names = [name for name in new if ".conv1_1." in name or ".conv5_1." in name]
    assert names
    assert all(torch.equal(old[name], new[name]) for name in names)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--init_from", str(best), "--resume", str(best))) == 2


@pytest.mark.slow
def test_fine_tuning_on_half_of_the_drawn_classes_beats_scratch_at_equal_steps(tmp_path):
    def fit(data: Path, experiment: str, steps: int, *options: str) -> Path:
        settings = {
            "data.path": data, "experiment": experiment, "runs_dir": tmp_path / "runs", "drawn_images": 0,
            "trainer.max_steps": steps, "trainer.max_epochs": -1, "trainer.check_val_every_n_epoch": 100,
            "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "model.channels_last": "false",
            "model.schedule.warmup_steps": 20,
        }  # fmt: skip
        words = [f"--{key}={value}" for key, value in settings.items()]
        assert tiny_run.onestage("fit", "--config", "shapes_ssd", *words, *options) == 0
        return tmp_path / "runs" / experiment / "version_0"

    def mean_average_precision(run: Path) -> float:
        results = json.loads((run / "results.json").read_text())
        assert len(results["per_class"]) == 3
        return results["metrics"]["mAP"]

    for name in ("one", "other"):
        draw_shapes(tmp_path / name, num_train=400, num_val=60, seed=0)
    first = keep_classes(tmp_path / "one", {"circle", "square", "triangle"})
    second = keep_classes(tmp_path / "other", {"star", "ring", "cross"})
    weights = fit(first, "first", 300) / "checkpoints" / "last.ckpt"
    tuned = mean_average_precision(fit(second, "tuned", 60, "--init_from", str(weights)))
    scratch = mean_average_precision(fit(second, "scratch", 60))
    print(tuned, scratch)
    assert tuned > scratch + 0.02


def keep_classes(folder: Path, names: set[str]) -> Path:
    """Remove the other classes of a drawn set from its COCO files, and its VOC lists, which would be read instead."""
    shutil.rmtree(folder / "ImageSets", ignore_errors=True)
    shutil.rmtree(folder / "Annotations", ignore_errors=True)
    for file in folder.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        content["categories"] = [entry for entry in content["categories"] if entry["name"] in names]
        ids = {entry["id"] for entry in content["categories"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] in ids]
        file.write_text(json.dumps(content))
    return folder
