"""How often an image is shown in an epoch, by the classes on it: sampling against class imbalance."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from onestage.errors import ConfigError
from onestage.types import AnnotationSet


class Sampling(ABC):
    """Says how many times an epoch shows each image, on average. `TrainingSampler` draws the whole numbers."""

    @abstractmethod
    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return the expected number of times that an epoch shows each image, [N], >= 0."""


class RepeatFactorSampling(Sampling):
    """Repeats the images of rare classes: LVIS's r_c = max(1, sqrt(t / f_c)) (arXiv:1908.03195, appendix B).

    f_c is the fraction of images with class c; an image is shown max r_c times over its classes, one without objects
    once. So an epoch is longer than the set.

    Args:
        threshold: t, the fraction of images below which a class counts as rare, > 0 and at most 1. LVIS: 0.001.

    Raises:
        ConfigError: the threshold is out of its range.
    """

    def __init__(self, threshold: float = 0.001) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"data.sampling.threshold is {threshold:g}; it must be in 0..1, and more than 0.\n"
                "Set data.sampling.init_args.threshold: 0.001, LVIS's value, or more for a small set."
            )
        self.threshold = threshold

    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return r_i = max over the classes of image i of r_c, [N], >= 1."""
        images, classes = _pairs(annotations)
        fractions = np.bincount(classes, minlength=len(annotations.class_names)) / max(len(annotations), 1)
        with np.errstate(divide="ignore"):  # a class without objects has no image to repeat
            class_repeats = np.maximum(1.0, np.sqrt(self.threshold / fractions))
        repeats = np.ones(len(annotations))
        np.maximum.at(repeats, images, class_repeats[classes])
        return repeats


class ClassBalancedSampling(Sampling):
    """Shows every class equally often, as if a class were drawn first and then one of its images.

    An epoch stays as long as the set: of the N' images with objects, image i is shown N' / K sum_c 1 / N_c times, over
    its classes c, N_c the number of images with c and K the number of classes that occur; images without objects are
    shown once. It is the strongest remedy, and shows the few images of a rare class very often. Class-aware sampling:
    arXiv:1512.05830, section 3.2.
    """

    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return the expected number of times each image is shown, [N]; they add up to N."""
        images, classes = _pairs(annotations)
        images_of_class = np.bincount(classes, minlength=len(annotations.class_names))
        num_classes = max(int(np.count_nonzero(images_of_class)), 1)
        repeats = np.ones(len(annotations))
        with_objects = np.unique(images)
        repeats[with_objects] = 0.0
        np.add.at(repeats, images, len(with_objects) / num_classes / images_of_class[classes])
        return repeats


def checked_repeats(sampling: Sampling, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
    """Return the repeats of every image, [N].

    Raises:
        ConfigError: the rule gives something else, such as NaN, a negative number, or none at all.
    """
    repeats = np.asarray(sampling.repeats(annotations), dtype=np.float64)
    if repeats.shape != (len(annotations),) or not (repeats >= 0).all() or not 0 < repeats.sum() < np.inf:
        raise ConfigError(
            f"data.sampling: {type(sampling).__name__} gives repeats of shape {repeats.shape}, "
            f"{repeats.min(initial=0):g} to {repeats.max(initial=0):g}; it must give one number >= 0 for each of the "
            f"{len(annotations)} images.\n"
            "Correct its method `repeats`."
        )
    return repeats


def _pairs(annotations: AnnotationSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return every (image, class on it) once. Crowds do not count: nothing is learnt from them."""
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
    is_target = ~annotations.is_crowd
    num_classes = len(annotations.class_names)
    pairs = np.unique(images[is_target] * num_classes + annotations.labels[is_target])
    return pairs // num_classes, pairs % num_classes
