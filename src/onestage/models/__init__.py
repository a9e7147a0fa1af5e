"""The detectors."""

from onestage.models.ssd import SSD, SSD160, SSD300, SSD512

__all__ = ["SSD", "SSD160", "SSD300", "SSD512"]
