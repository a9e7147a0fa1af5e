"""Every part of the data refuses settings out of range, with the value and the rule."""

import pytest

from onestage.data import VOC, DetectionDataModule, Letterbox, RepeatFactorSampling, ShortestEdge, Stretch
from onestage.data.augmentation import SSDAugmentation, SSDMinIoUCrop, SSDPhotometricDistort, SSDZoomOut
from onestage.data.transforms import ScaleJitter
from onestage.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SSDZoomOut, {"max_ratio": 0.5}, "SSDZoomOut: max_ratio must be >= 1; 1 keeps the image, got 0.5"),
        (SSDZoomOut, {"fill": (0, 0, 300)}, r"fill must be .*, got \(0, 0, 300\)"),
        (SSDMinIoUCrop, {"min_ious": (0.5, 1.5)}, r"min_ious must be each in \[0, 1\]"),
        (ScaleJitter, {"scale": (0.1, 1.0)}, r"scale .* must be \[low, high\] .*, got \(0.1, 1.0\)"),
        (SSDPhotometricDistort, {"brightness": -1}, r"brightness must be in \[0, 255\], got -1"),
        (SSDAugmentation, {"image_size": 32, "mirror_p": 1.5}, r"mirror_p must be in \[0, 1\], got 1.5"),
        (Stretch, {"size": 0}, r"Stretch: size must be >= 1, got 0\."),
        (ShortestEdge, {"canvases": []}, r"ShortestEdge: canvases must be at least one \(height, width\)"),
        (Letterbox, {"size": 64, "fill": (0, 0, 256)}, r"Letterbox: fill must be .*\[0, 255\], got \(0, 0, 256\)"),
        *[(RepeatFactorSampling, {"threshold": t}, r"data\.sampling\.threshold must be in") for t in (0, -1, 1.5, NAN)],
        (VOC, {"path": "any", "train": []}, r"data\.source\.train must be a list of at least one name, got \[\]"),
        (DetectionDataModule, {"image_size": 16}, "data.image_size must be >= 32, got 16"),
        (DetectionDataModule, {"image_size": 64, "resize": Stretch(96)}, "must be 96, the size of data.resize, got 64"),
        (DetectionDataModule, {"batch_size": 0}, "data.batch_size must be >= 1, got 0"),
        (DetectionDataModule, {"worker_timeout_seconds": NAN}, "data.worker_timeout_seconds must be > 0, got nan"),
        (DetectionDataModule, {"max_bad_fraction": 1.5}, r"data.max_bad_fraction must be in \[0, 1\], got 1.5"),
        (DetectionDataModule, {"category_ids": [1, 2]}, "data.category_ids must be one id for each"),
        (DetectionDataModule, {"val_fraction": 1.0}, r"data.val_fraction must be in \(0, 1\), got 1.0"),
        (DetectionDataModule, {"val_fraction": 0.2, "num_folds": 5}, "data.val_fraction conflicts with data.num_folds"),
        (DetectionDataModule, {"num_folds": 5, "fold": 5}, r"data.fold must be in \[0, 5\), got 5"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
