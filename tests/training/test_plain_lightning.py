"""Uses of Lightning and torch that their manuals show: other loaders, precisions, callbacks."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from image_sets import noise
from PIL import Image
from tiny_training import TinyData, TinyDetector, quiet_trainer, tiny_batch
from torch.utils.data import DataLoader, SequentialSampler

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.data import EvaluationSampler, ShortestEdge, from_datasets
from onestage.errors import ConfigError
from onestage.losses import ClassWeights, SigmoidFocalLoss
from onestage.models import RetinaNet, TorchvisionBackbone
from onestage.training.module import DetectionModule
from onestage.training.optimization import WarmupSchedule
from onestage.types import Batch, Detections, Targets


def module_of(detector: Any = None, **settings: Any) -> DetectionModule:
    return DetectionModule(detector or TinyDetector(num_classes=2), schedule=WarmupSchedule(warmup_steps=0), **settings)


def samples(count: int) -> list[Any]:
    return [
        (Image.new("RGB", (64, 64), (index, 0, 0)), {"boxes": [[4.0, 4, 40, 40]], "labels": [index % 2]})
        for index in range(count)
    ]


def shapes_data(count: int = 8, **settings: Any) -> Any:
    settings = {"image_size": 64, "batch_size": 2, "num_workers": 0, **settings}
    return from_datasets(samples(count), samples(2), class_names=["even", "odd"], **settings)


def loader(count: int = 4) -> DataLoader[Any]:
    return TinyData(count, 2).train_dataloader()


def test_loaders_train_and_validate_without_a_data_module(tmp_path):
    module = module_of()
    trainer = quiet_trainer(pl.Trainer, tmp_path, max_epochs=1, limit_val_batches=1.0)
    with pytest.warns(UserWarning, match="only losses are evaluated"):
        trainer.fit(module, train_dataloaders=loader(), val_dataloaders=loader())
    assert trainer.global_step == 2
    assert "val/loss" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["onestage"]
    assert saved["class_names"] == ["class_0", "class_1"]
    assert saved["image_size"] == 64
    trainer.validate(module, dataloaders=shapes_data().val_dataloader(), verbose=False)
    assert "mAP" in module.metrics  # its data set has annotations
    found = trainer.predict(module, dataloaders=loader(2))
    assert found[0]["boxes"].shape[::2] == (2, 4)


def test_what_needs_a_data_module_says_so(tmp_path):
    loss = SigmoidFocalLoss(class_weights=ClassWeights())
    weighted = DetectionModule(TinyDetector(num_classes=2, classification_loss=loss))
    for module in (weighted, module_of(reference_batch_size=32)):
        trainer = quiet_trainer(pl.Trainer, tmp_path, max_steps=1)
        with pytest.raises(ConfigError, match=r"need a data module\.\nPass datamodule="):
            trainer.fit(module, train_dataloaders=loader())


def test_foreign_batch_is_refused_with_a_remedy(tmp_path):
    foreign = DataLoader([(torch.zeros(3, 64, 64), 1)])
    with pytest.raises(ConfigError, match=r"a batch must be an onestage.types.Batch, got 'list'\.\n.*collate"):
        quiet_trainer(pl.Trainer, tmp_path, max_steps=1).fit(module_of(), train_dataloaders=foreign)


def test_calling_the_module_detects_and_torchscript_is_refused_with_the_export_that_works():
    module = module_of().eval()
    found = module(tiny_batch([0, 1]).images)
    expected = module.detector.detect(module.detector(tiny_batch([0, 1]).images))
    assert isinstance(found, Detections)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    images = tiny_batch([0, 1]).images
    with pytest.raises(ConfigError, match=r"Export with torch\.export\.export\(module, \(images,\)\)"):
        module.to_torchscript()
    exported = torch.export.export(module, (images,)).module()
    assert all(torch.equal(*pair) for pair in zip(exported(images), module(images), strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_weights_train_and_evaluate_on_exact_boxes(tmp_path, precision, monkeypatch):
    module = module_of()
    numbers, loss = [], module.detector.loss

    def seen(predictions, targets):
        numbers.append(targets.boxes.dtype)
        return loss(predictions, targets)

    monkeypatch.setattr(module.detector, "loss", seen)
    trainer = quiet_trainer(pl.Trainer, tmp_path, max_epochs=1, limit_val_batches=1.0, precision=precision)
    trainer.fit(module, datamodule=shapes_data())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert "mAP" in module.metrics
    assert set(numbers) == {torch.float32}


def test_anchors_are_those_of_float32_after_half():
    expected = AnchorGrid([AnchorShapes(8, ((101.3, 33.7),))])([(2, 2)]).boxes
    half = AnchorGrid([AnchorShapes(8, ((101.3, 33.7),))]).half()([(2, 2)])
    assert half.boxes.dtype == half.strides.dtype == torch.float32
    assert torch.equal(half.boxes, expected)


def test_batch_without_images_has_zero_loss_and_no_detections():
    module, batch = module_of(), tiny_batch([0])
    empty = Batch(batch.images[:0], Targets(*(p[:0] for p in batch.targets)), *(p[:0] for p in batch[2:]))
    predictions = module.predict_batch(empty)
    losses = module.weighted_loss(module.detector.loss(predictions, empty.targets))
    losses["loss"].backward()
    assert losses["loss"].item() == 0
    assert all(len(part) == 0 for part in module.detect(empty))


def test_overfit_batches_repeats_the_same_images_in_shares_of_equal_size(tmp_path):
    seen = []

    class Recording(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.image_indices.tolist())

    trainer = quiet_trainer(pl.Trainer, tmp_path, max_epochs=3, overfit_batches=2, callbacks=[Recording()])
    trainer.fit(module_of(), datamodule=shapes_data())
    assert seen == [[0, 1], [2, 3]] * 3
    dataset = shapes_data(7).train_dataloader().dataset
    shares = [EvaluationSampler(dataset, batch_size=2, rank=rank, world_size=2, is_even=True) for rank in range(2)]
    assert [list(share) for share in shares] == [[0, 2, 4], [1, 3, 5]]
    assert isinstance(shares[0], SequentialSampler)  # Lightning replaces all others


def test_results_do_not_depend_on_the_batch_where_images_have_two_canvases(tmp_path):
    torch.manual_seed(0)
    # Its squeeze and excitation makes every output depend on the whole canvas.
    backbone = TorchvisionBackbone("mobilenet_v3_small", (8, 16, 32))
    detector = RetinaNet(2, backbone=backbone, channels=16, tower_convs=0, score_threshold=0.0, max_detections=9)
    for parameter in (*detector.class_head.parameters(), *detector.box_head.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)  # scores and boxes that differ
    module = module_of(detector)
    images = [Image.fromarray(noise(*((60, 100), (100, 60))[seed % 3 == 0], seed)) for seed in range(7)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    val = [(image, {"boxes": [[8.0, 8, 40, 40]], "labels": [seed % 2]}) for seed, image in enumerate(images)]
    results = []
    for batch_size, num_batches in ((1, 7), (2, 4), (9, 2)):
        settings = {"resize": ShortestEdge(32, 64), "batch_size": batch_size, "num_workers": 0, "predict_dir": tmp_path}
        data = from_datasets(None, val, class_names=["even", "odd"], **settings)
        trainer = quiet_trainer(pl.Trainer, tmp_path, limit_val_batches=1.0)
        (logged,) = trainer.validate(module, datamodule=data, verbose=False)
        found = trainer.predict(module, datamodule=data)
        assert (len(found), len(data.predict_dataloader())) == (num_batches, num_batches)
        results.append((logged, {key: torch.cat([batch[key] for batch in found]) for key in found[0]}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-3, rtol=1e-4)
