import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from onestage.errors import CheckpointError
from onestage.models import VGG, TorchvisionBackbone
from onestage.models.vgg import L2Norm


def test_l2_norm_scales_each_cell_to_length_20() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    assert_close(L2Norm(2)(features).flatten(), torch.tensor([12.0, 16.0, 0.0, 0.0]))  # 20 * 3/5, 20 * 4/5
    large = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    assert_close(L2Norm(4)(large).flatten(), torch.full((4,), 10.0, dtype=torch.float16))  # 20 / sqrt(4)


def test_vgg_with_its_own_pool5_gives_the_maps_of_a_pyramid() -> None:
    small = {"depths": (1,) * 5, "widths": (2, 4, 5, 6, 7), "fc_width": 8, "fc6_dilation": 1, "stem_stride": 2}
    backbone = VGG(**small, strides=(8, 16, 32))
    conv4, conv5, fc7 = backbone(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    assert backbone.out_channels == (6, 7, 8)
    assert [tuple(m.shape) for m in (conv4, conv5, fc7)] == [(1, 6, 8, 12), (1, 7, 4, 6), (1, 8, 2, 3)]
    # The last convolutions see the maximum of 2 x 2 cells of conv5.
    pooled = conv5.view(1, 7, 2, 2, 3, 2).amax(dim=(3, 5))
    assert_close(backbone.to_fc7[-4:](pooled), fc7)
    halved = VGG(**small, strides=(16, 32))(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    assert [tuple(m.shape) for m in halved] == [(1, 6, 4, 6), (1, 8, 2, 3)]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (128, 256, 512)),
        ("mobilenet_v3_small", (24, 48, 576)),
        pytest.param("vgg16_bn", (512, 512, 512), marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", (40, 112, 1280), marks=pytest.mark.slow),
        pytest.param("convnext_tiny", (192, 384, 768), marks=pytest.mark.slow),
        pytest.param("regnet_y_400mf", (104, 208, 440), marks=pytest.mark.slow),
        pytest.param("densenet121", (512, 1024, 1024), marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x1_0", (116, 232, 1024), marks=pytest.mark.slow),
    ],
)
def test_torchvision_backbone_returns_the_last_block_of_each_stride(name, channels) -> None:
    backbone = TorchvisionBackbone(name, strides=(8, 16, 32)).eval()
    maps = backbone(torch.zeros(1, 3, 96, 160, dtype=torch.uint8))
    assert backbone.out_channels == channels
    sizes = [(c, 96 // s, 160 // s) for c, s in zip(channels, (8, 16, 32), strict=True)]
    assert [tuple(m.shape[1:]) for m in maps] == sizes


def test_regnet_whose_widths_are_computed_with_tensors_is_built_without_memory() -> None:
    with torch.device("meta"):
        backbone = TorchvisionBackbone("regnet_y_400mf")
    assert {weight.device.type for weight in backbone.body.state_dict().values()} == {"meta"}


def test_torchvision_weights_from_a_file_give_the_features_of_the_classifier(tmp_path) -> None:
    model = resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    backbone = TorchvisionBackbone("resnet18", weights=str(tmp_path / "resnet18.pth"), norm="frozen").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images))))))
    assert_close(backbone.features(images)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"lacks .* it holds another model.\nSet TorchvisionBackbone.weights"):
        TorchvisionBackbone("resnet34", weights=str(tmp_path / "resnet18.pth"))


def test_frozen_stages_and_norms_have_neither_gradients_nor_running_statistics() -> None:
    backbone = TorchvisionBackbone("resnet18")
    backbone.freeze(1)
    body = backbone.train().body
    modules = {"bn1": False, "layer1.1.bn2": False, "layer2.0.bn1": True}
    assert {name: body.get_submodule(name).training for name in modules} == modules
    frozen = {name.split(".")[0] for name, parameter in body.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    modules = list(TorchvisionBackbone("resnet18", norm="frozen").modules())
    assert not [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    assert any(isinstance(module, FrozenBatchNorm2d) for module in modules)
