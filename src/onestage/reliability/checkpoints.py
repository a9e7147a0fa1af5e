"""Checkpoint files: written atomically, read without running anything in them."""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from onestage.data.annotations import quoted
from onestage.errors import CheckpointError, ResourceError
from onestage.files import atomic_write, printable, read_file
from onestage.models.weights import CLASS_OUTPUT
from onestage.training.loggers import first_line
from onestage.training.module import CHECKPOINT_KEY, CHECKPOINT_SCHEMA, DetectionModule

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
MAX_VALUES = 1_000_000  # keys and values in a checkpoint, tensors counted as one; 100,000 classes need 200,000
MAX_PICKLE_BYTES = 1 << 20  # torch takes 10 s for a million opcodes; 25,000 class names need 700 kB
MAX_JSON_BYTES = 8 << 20  # "[],[],[]" becomes thirty times as many bytes
MAX_CHARACTERS = 16 << 20  # of all texts, each time they are used: a pickle may repeat one a million times
MAX_DEPTH = 100  # of nested lists and dictionaries
MAX_FRESH_SHOWN = 20  # tensors that a fine-tuning starts without
SHARED_KEYS = {"schema", "detector", "class_names", "category_ids"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints on a local file system: a name always stands for a whole file.

    Lightning moves a file from the temporary folder over the old one: between two file systems that is a copy, which
    a kill or a full disk truncates. It also ignores a permission error.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or raise ResourceError and keep the earlier file."""
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as `read_checkpoint` does; `weights_only` is always true."""
        return read_checkpoint(path, mapped=False)  # the training must not depend on the file any more


def read_checkpoint(path: str | Path, *, mapped: bool = True) -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU. No code in it is run. CheckpointError if that is not possible.

    path: a .ckpt file, or a .safetensors file with its .json file beside it. mapped: read tensors from the file when
    they are used; a command reads the configuration first.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a FIFO would block
            what = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is not a file"
            raise unusable(path, what)
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _load_archive(path, mapped)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(path)[:300]} cannot be read: {error.strerror or error}.\n"
            "Check the path, and that this user may read the file and enter its folder."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or CHECKPOINT_KEY not in checkpoint:
        problem = f"was not written by `onestage fit` (no `state_dict` or no `{CHECKPOINT_KEY}` in it)"
        remedy = "Weights of torchvision are given as --init_from or as `weights` of the backbone."
        raise unusable(path, problem, remedy)
    fault = _find_oversized_value(checkpoint, path.stat().st_size)
    ours = checkpoint[CHECKPOINT_KEY]
    schema = ours.get("schema") if isinstance(ours, dict) else CHECKPOINT_SCHEMA
    if fault is None and schema != CHECKPOINT_SCHEMA:
        problem = f"has schema {schema!r:.99}; this version of onestage reads schema {CHECKPOINT_SCHEMA}"
        raise unusable(path, problem, "Use the version that wrote it; its number is in the run's results.json.")
    fault = fault or _find_wrong_type(checkpoint)
    if fault is not None:
        raise unusable(path, fault, "`onestage fit` does not write such a file.")
    return checkpoint


def stored_step(file: Path) -> int:
    """Return the optimizer step in a checkpoint without reading its tensors, or -1."""
    try:
        return int(_load_archive(file, mapped=True, check_bytes=False)["global_step"]) if file.is_file() else -1
    except Exception:  # `read_checkpoint` names the problem if this file is chosen
        return -1


def unusable(path: str | Path, problem: str, remedy: str = "") -> CheckpointError:
    """Return the error about a checkpoint; it names others that lie there."""
    path = Path(path)
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")  # of a run's folder, or an experiment's
    others: list[str] = []
    with contextlib.suppress(OSError):
        folder, num_patterns = (path, 3) if path.is_dir() else (path.parent, 1)
        files = {file for pattern in patterns[:num_patterns] for file in folder.glob(pattern)}
        others = sorted(map(printable, files - {path}))
    instead = f"Other checkpoints there: {', '.join(others[:5])}" if others else "To create one: make train."
    return CheckpointError("\n".join(filter(None, (f"checkpoint {path} {problem}.", remedy, instead))))


def _load_archive(path: Path, mapped: bool, check_bytes: bool = True) -> Any:
    """Load a torch archive. check_bytes: compare the checksums too, which torch.load does not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise unusable(path, "is a Git LFS pointer, not the file itself", "Run: git lfs pull")
    if not head.startswith(b"PK"):
        problem = f"is not a torch checkpoint: it begins with {head[:16]!r}" if head else "is empty (0 bytes)"
        raise unusable(path, problem)
    try:
        with zipfile.ZipFile(path) as archive:
            _require_harmless(path, archive, size)
            damaged = archive.testzip() if check_bytes else None
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # zipfile, struct and zlib raise a dozen kinds between them
        raise unusable(path, f"is truncated or damaged ({size:,} bytes; {first_line(error)[:200]})") from error
    if damaged is not None:
        raise unusable(path, f"is damaged: the checksum of {printable(damaged)} is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen kinds here, among them those of pickle
        problem = f"cannot be loaded as plain tensors and numbers ({first_line(error)[:200]})"
        remedy = "Only checkpoints written by this project are read; nothing in it was run."
        raise unusable(path, problem, remedy) from error


def _require_harmless(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what can become gigabytes: compressed and overlapping members, and buffers without content."""
    members = archive.infolist()
    declared = sum(member.file_size for member in members)
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        problem = f"is compressed: {size:,} bytes that would become {declared:,}. torch never compresses"
        raise unusable(path, problem, "It was not unpacked. Use the file that `onestage fit` wrote.")
    pickles = [member for member in members if member.filename.endswith(".pkl")]
    if sum(member.file_size for member in pickles) > MAX_PICKLE_BYTES:
        raise unusable(path, f"has more than {MAX_PICKLE_BYTES:,} bytes beside its tensors. It was not loaded")
    # bytearray is the one callable that torch accepts and that allocates memory by itself.
    if any(b"bytearray" in archive.read(member) for member in pickles):
        raise unusable(path, "asks for memory that it does not fill. It was not loaded")


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read the two files of `onestage export` as a checkpoint without optimizer."""
    description = path.with_suffix(".json")
    remedy = "Both are written by: onestage export --ckpt_path runs/.../checkpoints/best.ckpt"
    try:
        content = read_file(description, CheckpointError, "the description of the weights", remedy, MAX_JSON_BYTES)
        ours, weights = json.loads(content), load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise unusable(path, f"with {description.name} cannot be read ({str(error)[:200]})", remedy) from error
    if not isinstance(ours, dict) or not ours.keys() >= SHARED_KEYS:
        raise unusable(description, f"has not all of {', '.join(sorted(SHARED_KEYS))}", remedy)
    return {"state_dict": weights, CHECKPOINT_KEY: ours, "global_step": ours.get("global_step", 0)}


def _find_oversized_value(checkpoint: dict[str, Any], file_size: int) -> str | None:
    """Find what needs more memory than the file stores, or more time than a real checkpoint."""
    waiting: list[tuple[str, Any, int]] = [(_short(key), value, 1) for key, value in checkpoint.items()]
    storages: dict[int, int] = {}
    num_values, num_characters = 0, 0
    while waiting:
        place, node, depth = waiting.pop()
        num_values += 1
        num_characters += len(node) if isinstance(node, str | bytes | bytearray) else 0
        if num_values > MAX_VALUES or num_characters > MAX_CHARACTERS or depth > MAX_DEPTH:
            return f"has more than {MAX_VALUES:,} values, {MAX_CHARACTERS:,} characters or {MAX_DEPTH} levels"
        if isinstance(node, dict):
            waiting += [(place, key, depth) for key in node]
            waiting += [(f"{place}.{_short(key)}"[-200:], value, depth + 1) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            waiting += [(f"{place}.{index}"[-200:], value, depth + 1) for index, value in enumerate(node)]
        elif isinstance(node, Tensor):
            if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized:
                return f"has a tensor as `{place}` that is sparse, quantized or not on the CPU"
            size, stored = node.nbytes, node.untyped_storage().nbytes()
            if size > stored:
                return f"has a tensor of {size:,} bytes as `{place}`, of which {stored:,} are stored, again and again"
            storages[node.untyped_storage().data_ptr()] = stored
            if sum(storages.values()) > file_size:
                return f"has tensors of more bytes than the file, up to `{place}`"
    return None


def _short(key: object) -> str:
    return key[:200] if isinstance(key, str) else type(key).__name__


def _find_wrong_type(checkpoint: dict[str, Any]) -> str | None:
    """Find an entry of this project, not of Lightning, that has another type."""
    ours = checkpoint[CHECKPOINT_KEY]
    if not isinstance(ours, dict):
        return f"must hold a dictionary as `{CHECKPOINT_KEY}`, got {type(ours).__name__}"
    step, side = checkpoint.get("global_step"), ours.get("image_size")
    names, categories, config = ours.get("class_names"), ours.get("category_ids"), ours.get("config")
    rules = {
        "state_dict": (_is_dict_of(Tensor, checkpoint["state_dict"]), "tensors by name"),
        "global_step": (type(step) is int and step >= 0, "a number of steps"),
        "onestage.detector": (isinstance(ours.get("detector"), str), "a class name"),
        "onestage.image_size": (side is None or (type(side) is int and side > 0), "pixels or nothing"),
        "onestage.class_names": (_is_list_of(str, names), "a list of names"),
        "onestage.category_ids": (_is_list_of(int, categories), "a list of whole numbers"),
        "onestage.config": (config is None or _is_plain_dict(config), "plain keys and values"),
        "onestage.versions": (_is_dict_of(str, ours.get("versions", {})), "versions by package"),
    }
    return next((f"must hold {rule} as `{place}`" for place, (is_right, rule) in rules.items() if not is_right), None)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _is_dict_of(kind: type, value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(item, kind) for k, item in value.items())


def _is_plain_dict(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # a tensor; a loop; too deep
        return False
    return isinstance(value, dict)


def load_weights(module: DetectionModule, path: str | Path, class_names: Sequence[str]) -> dict[str, Any]:
    """Load the weights of a checkpoint into a module; return the checkpoint.

    CheckpointError if it is unreadable, or holds another detector, other classes or other shapes.
    """
    checkpoint = read_checkpoint(path)
    saved, weights, detector = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"], module.detector
    for name, value in (("detector", type(detector).__name__), ("image_size", detector.image_size)):
        if value is not None and saved.get(name) != value:  # a detector without image_size takes many sizes
            problem = f"holds {name} {saved.get(name)!r:.99}, the configuration {name} {value}"
            raise unusable(path, problem, "Leave out --config to use the checkpoint's own configuration.")
    if list(saved["class_names"]) != list(class_names):
        then, now = (", ".join(map(printable, names)) for names in (saved["class_names"], class_names))
        counts = f"{len(saved['class_names'])} classes, the data has {len(class_names)}"
        problem = f"was trained on {counts}; they must be the same, in the same order"
        remedy = f"To train it on these classes: onestage fit --init_from {path}"
        raise unusable(path, problem, f"Of the checkpoint: {then}\nOf the data: {now}\n{remedy}")
    require_finite(path, weights)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:6])
        raise unusable(path, f"does not fit the configured detector:\n{lines}") from error
    module.restore_threshold(saved.get("score_threshold"))
    return checkpoint


def load_fitting_weights(module: DetectionModule, path: str, class_names: Sequence[str]) -> None:
    """Load the tensors that fit, and report those that do not: they keep their fresh values.

    Args:
        module: as it was built: its class head starts at the prior.
        path: a .ckpt or .safetensors file of this project, or torchvision's weights of this detector: torchvision_coco,
            or the path of a state dict. CheckpointError if nothing in it fits.
        class_names: of the data. The class outputs are loaded only if the file has the same classes in this order.
    """
    if Path(path).suffix in (".ckpt", ".safetensors"):
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
        text = f"{text}; these start fresh:\n  {quoted(fresh, MAX_FRESH_SHOWN)}"
    rank_zero_info(text)


def require_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a weight is NaN or infinite."""
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        problem = f"has NaN or infinite weights in {len(broken)} of {len(weights)} tensors: {', '.join(broken[:5])}"
        raise unusable(path, problem, "Use an earlier one.")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def keep_previous(path: Path) -> None:
    """Give last.ckpt the second name previous.ckpt, before a newer file takes its first."""
    with atomic_write(path.with_name(PREVIOUS)) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def require_writable(path: Path) -> None:
    """Raise ResourceError, before the training, if the file `path` cannot be written."""
    if path.is_dir():
        raise ResourceError(f"{path}: is a folder; the checkpoint cannot be written. Remove or rename that folder.")
    with atomic_write(path.with_name(".write_test")) as temporary:
        temporary.write_bytes(b"onestage")
    path.with_name(".write_test").unlink(missing_ok=True)
