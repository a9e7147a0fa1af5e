"""The Python door to a trained model: `onestage.load(path)`, then `predict` and `evaluate`."""

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageOps

from onestage.data.datamodule import DetectionDataModule
from onestage.data.dataset import Sample, collate
from onestage.data.images import RGBImage, read_image
from onestage.data.resize import Resize
from onestage.data.source import Source
from onestage.errors import ConfigError, ImageError, require
from onestage.evaluation.coco import coco_record
from onestage.evaluation.drawing import draw_boxes
from onestage.reliability.checkpoints import load_weights, read_checkpoint, unusable
from onestage.reliability.stored_config import config_of
from onestage.training.module import CHECKPOINT_KEY, DetectionModule, usual_memory_format
from onestage.training.run import link_data_to_model
from onestage.training.trainer import DetectionTrainer, device_of
from onestage.types import PADDING, Detections, Detector, JSONDict, Metrics

ImageLike = str | Path | Image.Image | RGBImage
DEFAULT_SCORE = 0.5  # of a model that was never evaluated
EXACT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's 8-bit modes


def load(
    path: str | Path, *, device: str | None = None, detector: Detector | None = None, resize: Resize | None = None
) -> "Predictor":
    """Load a trained model; its data set is not needed. Nothing in the file is run.

    Raises CheckpointError if the file is missing, damaged, no checkpoint of this project, or of another detector.

    Args:
        path: a checkpoint (runs/.../checkpoints/best.ckpt), or a .safetensors file with its .json beside it.
        device: such as cpu or cuda:1; None: the GPU if there is one.
        detector: receives the weights. Only needed for a class of your own, and for a checkpoint of a Trainer that
            `onestage fit` did not start: neither has a configuration that can be built.
        resize: how images were resized for that detector; None: stretched to its image_size.
    """
    module, data = _build(path) if detector is None else _wrap(path, detector, resize)
    load_weights(module, path, data.class_names)
    return Predictor(module, data, torch.device(device or device_of("auto")))


def _build(path: str | Path) -> tuple[DetectionModule, DetectionDataModule]:
    """Build model and data settings from the checked configuration in a checkpoint, as the commands do."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionModule, "model", skip={"optimizer", "schedule"})
    parser.add_class_arguments(DetectionDataModule, "data", skip={"train_transforms", "sampling"})
    link_data_to_model(parser)
    try:
        built = parser.instantiate_classes(parser.parse_object(config_of(path)))
    except (ArgumentError, TypeError, ValueError) as error:
        problem = f"holds a configuration that this version cannot build: {str(error).splitlines()[0][:300]}"
        raise unusable(path, problem, "Use the version of onestage that wrote it.") from error
    return built.model, built.data


def _wrap(path: str | Path, detector: Detector, resize: Resize | None) -> tuple[DetectionModule, DetectionDataModule]:
    """Return the user's detector as a module, with the classes of the checkpoint."""
    saved = read_checkpoint(path)[CHECKPOINT_KEY]
    stored = ((saved.get("config") or {}).get("data") or {}).get("resize")
    if stored is not None and resize is None:
        name = stored.get("class_path") if isinstance(stored, dict) else stored
        raise ConfigError(f"load: {path} was trained with data.resize: {name!r:.99}.\nPass the same: resize=...")
    size: Any = {"image_size": saved["image_size"]} if resize is None and saved.get("image_size") else {}
    names, ids = list(saved["class_names"]), list(saved["category_ids"])
    return DetectionModule(detector), DetectionDataModule(resize=resize, class_names=names, category_ids=ids, **size)


class Predictor:
    """A trained model.

    Attributes:
        module: the Lightning module with the weights; `module.detector` is the torch model.
        class_names: [K] in label order.
        category_ids: [K] the data set's own id of each label.
        device: where it computes.
        score_threshold: the score with the best F1 in the evaluation of the checkpoint, in [0, 1].
    """

    def __init__(self, module: DetectionModule, data: DetectionDataModule, device: torch.device) -> None:
        self.module, self.data, self.device = module, data, device
        self.class_names, self.category_ids = tuple(data.class_names), tuple(data.category_ids)
        best = module.score_threshold  # which `evaluate` changes
        self.score_threshold = DEFAULT_SCORE if best is None else best
        module.channels_last = usual_memory_format(device.type, "32-true")
        module.to(device).eval()

    @overload
    def predict(
        self, images: list[ImageLike] | tuple[ImageLike, ...], *, score: float | None = None, batch_size: int = 16
    ) -> "list[ImageDetections]": ...

    @overload
    def predict(self, images: ImageLike, *, score: float | None = None, batch_size: int = 16) -> "ImageDetections": ...

    def predict(self, images: Any, *, score: float | None = None, batch_size: int = 16) -> Any:
        """Detect on one image and return `ImageDetections`, or on each of a list and return a list of them.

        Raises ImageError if an image cannot be decoded, or is no 8-bit RGB image.

        Args:
            images: a path, a PIL image, or [H, W, 3] uint8 RGB (OpenCV reads BGR: pass `image[..., ::-1]`).
            score: lowest score of a returned detection, in [0, 1]; None: that with the best F1 in the evaluation of the
                checkpoint.
            batch_size: images that the network takes at once.
        """
        threshold = self.score_threshold if score is None else score
        require(0 <= threshold <= 1, "predict: score", score, "in [0, 1]")
        require(batch_size >= 1, "predict: batch_size", batch_size, ">= 1")
        if not isinstance(images, list | tuple):
            return self._detect([to_rgb(images)], threshold)[0]
        starts = range(0, len(images), batch_size)
        parts = ([to_rgb(image) for image in images[start : start + batch_size]] for start in starts)
        return [found for part in parts for found in self._detect(part, threshold)]

    @torch.inference_mode()
    def _detect(self, images: Sequence[RGBImage], threshold: float) -> "list[ImageDetections]":
        self.module.to(self.device).eval()  # `evaluate` leaves it on the CPU
        samples, resize = [], self.data.resize
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            canvas = resize.canvas_of(height, width)
            pixels, placement = resize.apply(image, canvas), resize.place(height, width, canvas)
            chw, nothing = torch.from_numpy(pixels).permute(2, 0, 1), (torch.zeros(0, 4), torch.zeros(0).long())
            samples.append(Sample(chw, *nothing, row, (height, width), placement))
        found: dict[int, ImageDetections] = {}
        for shape in {sample.image.shape for sample in samples}:  # one batch for each canvas
            batch = collate([sample for sample in samples if sample.image.shape == shape])
            detections = self.module.detect(move_data_to_device(batch, self.device))
            for row, *values in zip(batch.image_indices.tolist(), *(part.cpu() for part in detections), strict=True):
                kept = (values[2] != PADDING) & (values[1] >= threshold)
                boxes, scores, labels = (part[kept].numpy() for part in values)
                found[row] = ImageDetections(boxes, scores, labels, self.class_names, self.category_ids)
        return [found[row] for row in range(len(images))]

    def evaluate(
        self,
        source: Source | str | Path,
        *,
        split: Literal["val", "test"] = "val",
        batch_size: int | None = None,
        num_workers: int | Literal["auto"] = "auto",
    ) -> "Evaluation":
        """Return COCO's twelve numbers on a data set, as `onestage validate` or `onestage test` does in float32.

        Args:
            source: such as onestage.data.COCO("mine"), or the path of a data set whose layout is recognised. Its
                classes must be those of the model. A source without this split is divided as it was for training.
            split: the images to evaluate.
            batch_size: images that the network takes at once; None: as in training.
            num_workers: processes that load images.
        """
        names = ("resize", "val_fraction", "num_folds", "fold", "max_bad_fraction")
        settings: dict[str, Any] = {name: getattr(self.data, name) for name in names}
        settings |= {"batch_size": batch_size or self.data.batch_size, "class_names": list(self.class_names)}
        settings |= {"source" if isinstance(source, Source) else "path": source, "num_workers": num_workers}
        data = DetectionDataModule(**settings)
        parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        quiet: Any = dict.fromkeys(parts, False)
        devices: Any = [self.device.index or 0] if self.device.type == "cuda" else 1
        trainer = DetectionTrainer(accelerator=self.device.type, devices=devices, precision="32-true", **quiet)
        run = trainer.validate if split == "val" else trainer.test
        run(self.module, datamodule=data, verbose=False)
        evaluator = self.module.evaluator
        return Evaluation(self.module.metrics, evaluator.evaluation().per_class if evaluator is not None else {})


class Evaluation(dict[str, float]):
    """COCO's twelve numbers by name (mAP, AP50, ...), in [0, 1], NaN where there is no object to find.

    Attributes:
        per_class: AP of each class by name.
    """

    def __init__(self, metrics: Metrics, per_class: Metrics) -> None:
        super().__init__(metrics)
        self.per_class = per_class


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The n detections of one image, best first."""

    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy in pixels of the original image
    scores: npt.NDArray[np.float32]  # [n] in [0, 1]
    labels: npt.NDArray[np.int64]  # [n] 0..K-1
    class_names: tuple[str, ...]  # [K]
    category_ids: tuple[int, ...]  # [K]

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """The class name of each detection, [n]."""
        return [self.class_names[label] for label in self.labels]

    def draw(self, image: ImageLike) -> Image.Image:
        """Return the image with boxes, names and scores; `.save("out.jpg")` writes it. Small images are enlarged."""
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        detections = Detections(*(torch.from_numpy(part) for part in (self.boxes, self.scores, self.labels)))
        drawn = draw_boxes(to_rgb(image), *nothing, detections, self.class_names, score_threshold=0.0)
        return Image.fromarray(drawn)

    def to_coco(self, image_id: int) -> list[JSONDict]:
        """Return COCO result records, with the data set's own category ids and boxes as [x, y, width, height]."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return [coco_record(image_id, self.category_ids[label], box, score) for box, score, label in rows]

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`; ImportError if that package is not installed."""
        try:
            import supervision
        except ImportError:
            raise ImportError("to_supervision: supervision is not installed. Run: pip install supervision") from None
        names = {"class_name": np.array(self.names, dtype=np.str_)}
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=names)


def to_rgb(image: ImageLike) -> RGBImage:
    """Return [H, W, 3] uint8 RGB of a path, a PIL image (upright, by its EXIF orientation) or such an array.

    ImageError if it is none of them, or has another number of channels or bits.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode not in EXACT_MODES:
            remedy = "Scale it to 8 bits, or pass the path of the file."
            raise ImageError(f"image: a PIL image must have 8 bits per channel, got mode {image.mode!r}.\n{remedy}")
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    shape: Any = getattr(image, "shape", ())
    kind = getattr(image, "dtype", type(image).__name__)
    if not isinstance(image, np.ndarray) or kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        remedy = "Pass a path, a PIL image, or [height, width, 3] uint8 RGB: (255 * image).astype('uint8') of 0..1."
        found = f"{kind} of shape {tuple(shape)}" if shape else kind
        raise ImageError(f"image: must be a path, a PIL image or an array [H, W, 3] uint8, got {found}.\n{remedy}")
    return np.ascontiguousarray(image)
