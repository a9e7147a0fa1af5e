import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from annotation_sets import hand_written
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from onestage.evaluation.drawing import draw_sheet
from onestage.evaluation.figures import draw_labels, draw_training, save_figure, training_curves
from onestage.training.callbacks import EpochTable, add_row


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_row_of_a_validation_replaces_that_of_the_same_step_and_of_later_ones(tmp_path):
    path = tmp_path / "epochs.csv"
    for step, value in ((4, 0.1), (8, 0.2), (12, 0.3)):
        add_row(path, {"step": step, "val/mAP": value})
    add_row(path, {"step": 8, "val/mAP": float("nan"), "val/loss": 1.5})  # repeated by a resumed run
    assert rows_of(path) == [
        {"step": "4", "val/mAP": "0.1", "val/loss": ""},
        {"step": "8", "val/mAP": "", "val/loss": "1.5"},
    ]


def test_losses_of_a_row_are_means_since_the_row_before_also_after_a_resume(tmp_path):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_step=4, current_epoch=1, is_global_zero=True, sanity_checking=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING), optimizers=[optimizer],
        callback_metrics={"val/loss": torch.tensor(2.0), "train/loss": torch.tensor(9.0), "val/mAP": torch.tensor(0.0)},
    )  # fmt: skip
    module = SimpleNamespace(metrics={"mAP": float("nan"), "AP50": 0.5})
    table = EpochTable(tmp_path / "epochs.csv")
    for halved, box in ((1.0, 4.0), (float("nan"), 6.0)):
        outputs = {"loss": torch.tensor(halved), "box_loss": torch.tensor(box), "predictions": None}
        table.on_train_batch_end(trainer, module, outputs, None, 0)
    resumed = EpochTable(tmp_path / "epochs.csv")
    resumed.load_state_dict(table.state_dict())
    resumed.on_train_batch_end(trainer, module, {"loss": torch.tensor(2.0), "box_loss": torch.tensor(5.0)}, None, 1)
    resumed.on_validation_end(trainer, module)
    (row,) = rows_of(tmp_path / "epochs.csv")
    assert float(row.pop("seconds")) > 0
    # (2 * 1 + 2 * 2) / 2 without the batch that was not finite; (4 + 6 + 5) / 3
    train, val = {"train/loss": "3", "train/box_loss": "5"}, {"val/loss": "2", "val/mAP": "", "val/AP50": "0.5"}
    assert row == {"epoch": "2", "step": "4", "lr": "0.25", **train, **val}
    assert resumed.state_dict() == {}


def test_sums_of_a_checkpoint_continue_on_the_device_of_the_losses(tmp_path):
    table, trainer = EpochTable(tmp_path / "epochs.csv"), SimpleNamespace(accumulate_grad_batches=1)
    table.load_state_dict({"loss": [2.0, 1.0]})
    table.on_train_batch_end(trainer, None, {"loss": torch.zeros((), device="meta")}, None, 0)
    assert table._sums["loss"].device.type == "meta"


def test_curves_have_the_losses_one_rate_and_map_and_are_thinned_by_averaging():
    rows = [{"step": str(n), "train/loss": str(10 - n), "lr-SGD/pg1": "0.1", "lr-SGD/pg2": "0.1"} for n in range(4)]
    rows.append({"step": "4", "train/loss": "nan", "val/mAP": "0.5", "epoch": "0", "train/skipped_steps": "1"})
    assert training_curves(rows, max_points=2) == {
        "loss": {"train/loss": [(0.5, 9.5), (2.5, 7.5)]},
        "learning rate": {"lr-SGD/pg1": [(0.5, pytest.approx(0.1)), (2.5, pytest.approx(0.1))]},
        "mAP": {"val/mAP": [(4.0, 0.5)]},
    }
    assert [axes.get_title() for axes in draw_training(training_curves(rows)).axes] == ["loss", "learning rate", "mAP"]


def test_labels_are_drawn_by_class_size_and_centre(tmp_path):
    boxes = [[[0.0, 0.0, 20.0, 20.0], [41.0, 61.0, 61.0, 81.0]], [[0.0, 0.0, 5.0, 5.0]], []]
    sizes = np.array([[100, 80], [0, 0], [50, 50]], np.int32)  # the size of the second image is not known
    figure = draw_labels(hand_written([[1, 1], [0], []], boxes, sizes=sizes, class_names=("$cat", "dog")))
    by_class, by_size, by_place = figure.axes
    assert [bar.get_width() for bar in by_class.patches] == [1, 2]  # the most frequent class on top
    assert sum(bar.get_height() for bar in by_size.patches) == 3
    heat = by_place.collections[0].get_array()
    assert heat.sum() == 2 and heat[28, 25] == 1  # y 71 / 100, x 51 / 80, in 40 bins
    save_figure(tmp_path / "labels.png", figure)
    assert Image.open(tmp_path / "labels.png").width == 1800


def test_sheet_is_a_square_of_pictures_with_empty_places_left_white():
    nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    sheet = draw_sheet(np.zeros((3, 300, 400, 3), np.uint8), [nothing] * 3, ["cat"])
    assert sheet.shape == (600, 800, 3)
    assert [int(sheet[y, x].sum()) for y, x in ((0, 0), (0, 400), (300, 0), (300, 400))] == [0, 0, 0, 765]
