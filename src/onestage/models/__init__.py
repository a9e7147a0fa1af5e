"""The detectors and backbones.

Constructors raise ConfigError for an argument that is out of its range or conflicts with another, CheckpointError for
weights that cannot be fetched or read, or do not fit.
"""

from onestage.models.backbone import TorchvisionBackbone
from onestage.models.darknet import Darknet19, Darknet53
from onestage.models.detector import Backbone
from onestage.models.fcos import FCOS
from onestage.models.retinanet import RetinaNet
from onestage.models.ssd import SSD, SSD128, SSD160, SSD256, SSD300, SSD512
from onestage.models.ssdlite import MobileNetV3, SSDLite320
from onestage.models.vgg import VGG
from onestage.models.yolo import YOLOv2, YOLOv3

__all__ = ["FCOS", "SSD", "SSD128", "SSD160", "SSD256", "SSD300", "SSD512", "RetinaNet", "SSDLite320"]
__all__ += ["VGG", "Backbone", "Darknet19", "Darknet53", "MobileNetV3", "TorchvisionBackbone", "YOLOv2", "YOLOv3"]
