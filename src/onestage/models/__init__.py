"""The detectors and backbones."""

from onestage.models.backbone import Backbone, TorchvisionBackbone
from onestage.models.retinanet import RetinaNet
from onestage.models.ssd import SSD, SSD128, SSD160, SSD300, SSD512
from onestage.models.vgg import VGG

__all__ = ["SSD", "SSD128", "SSD160", "SSD300", "SSD512", "VGG", "Backbone", "RetinaNet", "TorchvisionBackbone"]
