import warnings

import pytest
import torch
from tiny_training import TinyData, TinyDetector, quiet_trainer, tiny_batch

from onestage.errors import ConfigError
from onestage.training.module import DetectionModule, check_compiler
from onestage.training.optimization import WarmupSchedule
from onestage.training.trainer import DetectionTrainer
from onestage.types import Losses


class ThreeTerms(TinyDetector):
    loss_terms = ("classification", "box", "objectness")

    def loss(self, predictions, targets):
        losses = super().loss(predictions, targets)
        return Losses({**losses.terms, "objectness": predictions.class_logits.square().mean()}, losses.num_positives)


def test_loss_is_weighted_sum_of_all_declared_terms():
    module = DetectionModule(ThreeTerms(num_classes=2), loss_weights={"box": 0.5, "objectness": 3.0})
    terms = {"classification": torch.tensor(1.0), "box": torch.tensor(4.0), "objectness": torch.tensor(2.0)}
    losses = module.weighted_loss(Losses(terms, torch.tensor(1)))
    assert losses["loss"] == 1 + 0.5 * 4 + 3 * 2
    assert {name.removesuffix("_loss"): value for name, value in losses.items() if name != "loss"} == terms


@pytest.mark.parametrize("declared", [("classification",), ("classification", "box", "objectness")])
def test_undeclared_and_missing_terms_are_refused(declared):
    detector = TinyDetector(num_classes=2)
    detector.loss_terms = declared
    losses = detector.loss(detector(tiny_batch([0]).images), tiny_batch([0]).targets)
    with pytest.raises(ConfigError, match=r"terms box, classification, but TinyDetector.loss_terms declares .*\n"):
        DetectionModule(detector).weighted_loss(losses)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"boxes": 1.0}, "must be a loss term of TinyDetector: classification, box, got 'boxes'"),
        ({"box": -1.0}, r"model\.loss_weights\.box must be finite and >= 0, got -1\.0\.\n.*focal"),
        ({"classification": float("inf")}, "classification must be finite"),
    ],
)
def test_invalid_loss_weights_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        DetectionModule(TinyDetector(num_classes=2), loss_weights=weights)


def test_every_term_is_logged_in_training_and_averaged_in_validation(tmp_path):
    class Validated(TinyData):
        val_dataloader = TinyData.train_dataloader

        def annotations(self, stage):
            from evaluation_data import annotation_set

            boxes = [tiny_batch([index]).targets.boxes[0, :1].tolist() for index in range(self.num_images)]
            return annotation_set(boxes, [[index % 2] for index in range(self.num_images)], self.class_names)

    detector = ThreeTerms(num_classes=2)
    module = DetectionModule(detector, lambda groups: torch.optim.SGD(groups, lr=0.0), loss_weights={"box": 0.0})
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=1, limit_val_batches=1.0, precision="32-true")
    trainer.fit(module, datamodule=Validated(num_images=6, batch_size=4))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = ("loss", "classification_loss", "box_loss", "objectness_loss")
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= set(logged)
    total = logged["val/classification_loss"] + logged["val/objectness_loss"]
    assert logged["val/loss"] == pytest.approx(total, rel=1e-4)
    assert {"val/mAP", "val/AP50", "val/AR100"} <= set(logged)
    with torch.no_grad():  # of one batch of all six images
        batch = tiny_batch(list(range(6)))
        whole = detector.eval().loss(detector(batch.images), batch.targets)
    assert logged["val/box_loss"] == pytest.approx(float(whole.terms["box"]), rel=1e-4)


def test_other_canvas_than_the_detectors_is_refused(tmp_path):
    data = TinyData(num_images=2, batch_size=1)
    data.canvases = ((64, 64), (64, 96))
    with pytest.raises(ConfigError, match=r"data\.image_size.*\(64, 96\)"):
        quiet_trainer(DetectionTrainer, tmp_path, max_steps=1).fit(DetectionModule(TinyDetector(2)), datamodule=data)


@pytest.mark.parametrize("channels_last", [True, False, "auto"])
def test_memory_format_reaches_weights_and_images(tmp_path, channels_last):
    formats = []

    class Seen(TinyDetector):
        def forward(self, images):
            formats.append(images.is_contiguous(memory_format=torch.channels_last))
            return super().forward(images)

    module = DetectionModule(Seen(num_classes=2), schedule=WarmupSchedule(warmup_steps=0), channels_last=channels_last)
    quiet_trainer(DetectionTrainer, tmp_path, max_steps=1).fit(module, datamodule=TinyData(num_images=2, batch_size=2))
    weight = next(parameter for parameter in module.parameters() if parameter.ndim == 4)
    assert isinstance(module.channels_last, bool)
    assert formats == [module.channels_last]
    assert weight.is_contiguous(memory_format=torch.channels_last) == module.channels_last


@pytest.mark.parametrize("warmup_steps", [0, 1000])
def test_schedule_that_needs_the_run_length_is_refused_in_a_run_without_end(tmp_path, warmup_steps):
    schedule = WarmupSchedule(kind="cosine", warmup_steps=warmup_steps)
    module = DetectionModule(TinyDetector(num_classes=2), schedule=schedule)
    with pytest.raises(ConfigError, match=r"kind must be constant in a run without end, got 'cosine'\.\n.*max_epochs"):
        trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=-1)
        trainer.fit(module, datamodule=TinyData(num_images=4, batch_size=1))


def test_compile_without_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"false without a C\+\+ compiler .*\n.*model\.compile: false"):
        check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        check_compiler()


@pytest.mark.parametrize(("warmup_steps", "warned"), [(3, True), (2, False)])
def test_warmup_longer_than_half_the_run_is_warned_of(tmp_path, warmup_steps, warned):
    module = DetectionModule(TinyDetector(num_classes=2), schedule=WarmupSchedule(warmup_steps=warmup_steps))
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=2)  # 2 x 4 images / 2 = 4 steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=TinyData(num_images=4, batch_size=2))
    assert any("warmup_steps is 3, but the run has 4 steps" in str(one.message) for one in caught) is warned
