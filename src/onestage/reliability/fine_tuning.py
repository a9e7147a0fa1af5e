"""Begin a new run from trained weights: `onestage fit --init_from`."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from onestage.data.annotations import quoted
from onestage.files import printable
from onestage.models.weights import CLASS_OUTPUT
from onestage.reliability.checkpoints import read_checkpoint, require_finite, unusable
from onestage.training.module import CHECKPOINT_KEY, DetectionModule

OWN_SUFFIXES = (".ckpt", ".safetensors")
MAX_LINES = 20


def load_fitting_weights(module: DetectionModule, path: str, class_names: Sequence[str]) -> None:
    """Load the tensors that fit, and report those that do not: they keep their fresh values.

    Args:
        module: as it was built: its class head starts at the prior.
        path: a .ckpt or .safetensors file of this project, or torchvision's weights of this detector: torchvision_coco,
            or the path of a state dict.
        class_names: of the data. The class outputs are loaded only if the file has the same classes in this order.

    Raises:
        CheckpointError: the file cannot be read, has weights that are not finite, or nothing in it fits.
        ConfigError: there are no published weights of this detector.
    """
    if Path(path).suffix in OWN_SUFFIXES:
        saved = read_checkpoint(path)
        weights, classes = saved["state_dict"], list(saved[CHECKPOINT_KEY]["class_names"])
    else:
        published = module.detector.published_state("init_from", path)
        weights, classes = {f"detector.{name}": tensor for name, tensor in published.items()}, []
    require_finite(path, weights)
    has_same_classes = classes == list(class_names)
    fitting, fresh = {}, []
    for name, own in module.state_dict().items():
        given, shape = weights.get(name), tuple(own.shape)
        if given is None:
            fresh.append(f"{name}: missing there, {shape} here")
        elif given.shape != own.shape:
            fresh.append(f"{name}: {tuple(given.shape)} there, {shape} here")
        elif CLASS_OUTPUT.fullmatch(name.removeprefix("detector.")) and not has_same_classes:
            fresh.append(f"{name}: {shape} in both, but of other classes")
        else:
            fitting[name] = given
    if not any(name.startswith("detector.backbone.") for name in fitting):
        problem = "holds no tensor that fits the backbone of the configured detector:\n  " + "\n  ".join(fresh[:3])
        raise unusable(path, problem, "Set model.detector to the detector that it was trained with.")
    module.load_state_dict(fitting, strict=False)
    text = f"init_from: {len(fitting)} of {len(fitting) + len(fresh)} tensors are loaded from {printable(path)}"
    if fresh:
        text = f"{text}; these start fresh:\n  {quoted(fresh, MAX_LINES)}"
    rank_zero_info(text)
