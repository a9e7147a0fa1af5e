import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from onestage.errors import CheckpointError
from onestage.models import Darknet19, Darknet53, YOLOv2, YOLOv3
from onestage.models.darknet import block_tensors, load_darknet, reorganise

ONCE = (1, 1, 1, 1, 1)


def tiny(kind: str, num_classes: int = 3, **settings):
    if kind == "v3":
        return YOLOv3(num_classes, backbone=Darknet53(2, ONCE), **settings)
    return YOLOv2(num_classes, backbone=Darknet19(2), **settings)


def count(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def write_file(path, header: bytes, num_values: int) -> np.ndarray:
    values = np.random.default_rng(0).uniform(0.1, 1, num_values).astype("<f4")  # a variance is positive
    path.write_bytes(header + values.tobytes())
    return values


def test_reorganise_equals_the_loops_of_darknet_and_not_pixel_unshuffle() -> None:
    channels, height, width, stride = 8, 4, 6, 2
    features = torch.arange(2.0 * channels * height * width)
    expected = torch.zeros_like(features)
    out_channels = channels // stride**2
    for b in range(2):
        for k in range(channels):
            for j in range(height):
                for i in range(width):
                    in_index = i + width * (j + height * (k + channels * b))
                    offset = k // out_channels
                    w2, h2 = i * stride + offset % stride, j * stride + offset // stride
                    out_index = w2 + width * stride * (h2 + height * stride * (k % out_channels + out_channels * b))
                    expected[in_index] = features[out_index]
    found = reorganise(features.view(2, channels, height, width))
    assert torch.equal(found, expected.view(2, 4 * channels, height // 2, width // 2))
    assert not torch.equal(found, F.pixel_unshuffle(features.view(2, channels, height, width), 2))


@pytest.mark.parametrize(
    ("kind", "num_classes", "num_values", "file_size", "backbone_size"),
    [
        (YOLOv2, 20, 50_676_061, 202_704_260, 79_327_120),  # yolov2-voc.weights, darknet19_448.conv.23
        (YOLOv2, 80, 50_983_561, 203_934_260, 79_327_120),  # yolov2.weights
        (YOLOv3, 80, 62_001_757, 248_007_048, 162_482_580),  # yolov3.weights, darknet53.conv.74
    ],
)
def test_networks_have_the_sizes_of_published_files(kind, num_classes, num_values, file_size, backbone_size) -> None:
    with torch.device("meta"):
        detector = kind(num_classes)
    header = 20 if kind is YOLOv3 else 16
    assert count(detector.darknet_tensors()) == num_values == (file_size - header) // 4
    assert 4 * count(block_tensors(detector.backbone)) + header == backbone_size


@pytest.mark.parametrize(
    ("kind", "header", "seen"),
    [("v3", struct.pack("<iiiQ", 0, 2, 0, 2**33 + 5), 2**33 + 5), ("v2", struct.pack("<iiiI", 0, 1, 0, 77), 77)],
)
def test_file_of_darknet_survives_a_round_trip_byte_by_byte(kind, header, seen, tmp_path) -> None:
    path, again = tmp_path / "a.weights", tmp_path / "b.weights"
    values = write_file(path, header, count(tiny(kind).darknet_tensors()))
    detector = tiny(kind, pretrained=str(path)).to(memory_format=torch.channels_last)
    assert int(detector.images_seen) == seen
    detector.save_darknet(again)
    assert again.read_bytes() == path.read_bytes()

    first = next(m for m in detector.modules() if isinstance(m, nn.BatchNorm2d))  # of two channels: 2 + 2 + 2 + 2
    assert first.bias.tolist() == values[:2].tolist()
    assert first.weight.tolist() == values[2:4].tolist()
    assert first.running_var.tolist() == values[6:8].tolist()


def test_three_heads_give_the_outputs_of_the_one_convolution_in_the_file(tmp_path) -> None:
    path = tmp_path / "a.weights"
    values = write_file(path, struct.pack("<iiiQ", 0, 2, 0, 0), count(tiny("v3").darknet_tensors()))
    detector = tiny("v3", pretrained=str(path)).eval()
    channels, outputs = 16, 3 * (5 + 3)  # the last layer in the file: the finest level
    weight = torch.from_numpy(values[-channels * outputs :]).view(outputs, channels, 1, 1)
    bias = torch.from_numpy(values[-(channels + 1) * outputs : -channels * outputs])
    maps = [torch.randn(1, channels * 2**level, 4 // 2**level, 4 // 2**level) for level in range(3)]
    expected = F.conv2d(maps[0], weight, bias).permute(0, 2, 3, 1).reshape(1, -1, 8)
    heads = (detector.box_head, detector.quality_head, detector.class_head)
    assert_close(torch.cat([head(maps)[:, :48] for head in heads], dim=2), expected)


def test_backbone_starts_from_a_file_of_its_own_layers(tmp_path) -> None:
    path = tmp_path / "darknet.weights"
    values = write_file(path, struct.pack("<iiiI", 0, 1, 0, 9), count(block_tensors(Darknet19(2))))
    backbone = Darknet19(2, weights=str(path))
    assert backbone.stages[-1][-1].conv.weight.flatten().tolist() == values[-(64 * 32 * 9) :].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"PK\x03\x04", r"must start with darknet's version, got \[\d+\]"),
        (struct.pack("<iiiQ", 0, 2, 0, 0) + bytes(400), "must hold 101 numbers, got 100"),
        (struct.pack("<iiiQ", 0, 2, 0, 0) + b"\xff" * 404, "must hold finite numbers"),
    ],
)
def test_other_files_are_refused_with_a_remedy(content, message, tmp_path) -> None:
    path = tmp_path / "a.weights"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_darknet(str(path), "pretrained", [torch.zeros(101)])
    assert str(error.value).startswith(f"pretrained: {path}")
    assert "Set pretrained to a darknet file of this network and these classes, or to null." in str(error.value)
