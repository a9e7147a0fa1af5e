"""Find the checkpoint that `fit --resume` continues from; check that it fits."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from onestage.errors import CheckpointError, ConfigError
from onestage.evaluation.results import installed_versions
from onestage.files import read_file
from onestage.reliability.checkpoints import LAST, PREVIOUS, load_weights, read_checkpoint, stored_step, unusable
from onestage.training.module import CHECKPOINT_KEY, DetectionModule
from onestage.training.optimization import shards_parameters
from onestage.training.run import version_of
from onestage.types import AnnotationSet, JSONDict

# The keys that decide what a run computes, on any devices, with any number of workers, in any folder.
DECISIVE = ("seed_everything", "init_from", "model", "data", "ema", "trainer")
DECISIVE_IN_TRAINER = (
    "max_epochs", "max_steps", "max_time", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches", "overfit_batches", "sync_batchnorm",
    "check_val_every_n_epoch", "val_check_interval",
)  # fmt: skip
BATCH_SIZE, MEMORY_FORMAT = "data.batch_size", "model.channels_last"  # `auto` continues with the run's own
# The place of the data may change: the fingerprints in the checkpoint tell whether the data are the same.
INDECISIVE_IN_DATA = (
    "path", "root", "cache", "num_workers", "prefetch_factor", "predict_dir", "worker_start_method",
    "worker_timeout_seconds",
)  # fmt: skip
PATHS_IN_DATA = ("_annotations", "_images")  # ends of keys; of such a path only the last name counts
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")  # a run may be lengthened
OPTIMIZER = "optimizer_states"  # Lightning's key; missing in checkpoints that hold weights alone

MAX_CONFIG_BYTES = 256 << 10  # of config.yaml; a full one has 10 kB, and YAML takes seconds for each MB
MAX_SETTINGS = 100_000
READ_BYTES = 2 << 30  # image files of so many bytes together are read, in seconds; of more only the sizes are compared
READ_THREADS = 8  # a disk answers several at a time; hashing releases the interpreter lock


class Resumed(NamedTuple):
    """The state to continue from."""

    checkpoint: Path
    folder: Path | None  # the run that is continued in place; None: a new run starts from this state
    global_step: int
    config: JSONDict  # stored in the checkpoint: `model` and `data`

    def adopt(self, settings: Any) -> None:
        """Replace channels_last `auto` and, in a continued run, auto_batch by what the run has decided."""
        channels_last = _stored_model(self.config).get("channels_last")
        if settings.model.channels_last == "auto" and isinstance(channels_last, bool):
            settings.model.channels_last = channels_last
        if self.folder is not None and settings.auto_batch is not False:
            settings.data.batch_size, settings.auto_batch = int(self.config["data"]["batch_size"]), False


def find_checkpoint(resume: str, ckpt_path: str | None, config: JSONDict) -> Resumed | None:
    """Return the state that `fit` continues from; None: a new run starts.

    resume: `auto`, `none`, or a checkpoint or run folder. ckpt_path: Lightning's option, the same as naming the
    checkpoint in `resume`. config: of this run, as config.yaml will hold it. CheckpointError if the checkpoint, or
    every checkpoint of the run, is damaged.
    """
    if ckpt_path is not None and resume != "none":
        raise ConfigError(f"--resume {resume} and --ckpt_path {ckpt_path} conflict; pass only one.")
    word = resume if ckpt_path is None else ckpt_path
    if word == "none":
        return None
    if word == "auto":
        return _find_run(Path(config["runs_dir"]) / config["experiment"], config)
    folder = Path(word) / "checkpoints"
    if os.path.isdir(folder):  # noqa: PTH112 # Path.is_dir raises if the name is too long
        newest = newest_checkpoint(folder)
        if newest is None:
            raise CheckpointError(f"{folder} has no checkpoint to continue from.\nStart anew with --resume none.")
        return newest
    return _resumed(Path(word), read_checkpoint(word))


def _resumed(file: Path, checkpoint: JSONDict) -> Resumed:
    return Resumed(file, None, int(checkpoint["global_step"]), checkpoint[CHECKPOINT_KEY].get("config") or {})


def _stored_model(config: JSONDict) -> JSONDict:
    model = config.get("model")
    return model if isinstance(model, dict) else {}


def _find_run(experiment_folder: Path, config: JSONDict) -> Resumed | None:
    """Find the newest run with the same configuration and a checkpoint."""
    found = experiment_folder.glob("version_*") if os.path.isdir(experiment_folder) else ()  # noqa: PTH112
    for folder in sorted((path for path in found if version_of(path) >= 0), key=version_of, reverse=True):
        difference = _find_difference(folder / "config.yaml", config)
        newest = newest_checkpoint(folder / "checkpoints") if difference is None else None
        if newest is not None:
            place = f"{newest.checkpoint.name} (optimizer step {newest.global_step})"
            rank_zero_info(f"resume auto: continuing {folder} from {place}")
            return newest._replace(folder=folder)
        rank_zero_info(f"resume auto: not {folder}, because {difference or 'it has no checkpoint'}")
    rank_zero_info(f"resume auto: nothing to continue in {experiment_folder}; a new run starts")
    return None


def newest_checkpoint(folder: Path) -> Resumed | None:
    """Return the readable checkpoint with the highest stored step; CheckpointError if all are damaged.

    The time of a file is that of its last copy. Files with weights alone, of a user's ModelCheckpoint, are ignored.
    """
    # Unreadable files come first, for their warnings. At equal steps `last`, of the end of an epoch, is the latest.
    found = [(stored_step(file), file) for file in folder.glob("*.ckpt")]
    found.sort(key=lambda pair: (pair[0] >= 0, -pair[0], pair[1].name != LAST, pair[1].name != PREVIOUS, pair[1]))
    problems = []
    for _, file in found:
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            problems.append(str(error).partition("\n")[0])
            rank_zero_info(f"resume: {problems[-1]} Trying the one before it.")
            continue
        if OPTIMIZER in checkpoint:
            return _resumed(file, checkpoint)
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"no checkpoint in {folder} can be used:\n  {lines}\nStart anew with --resume none.")
    return None


def _find_difference(config_file: Path, config: JSONDict) -> str | None:
    """Return how the run of a configuration file differs from this one, or None."""
    try:
        text = read_file(config_file, CheckpointError, "a run's configuration", "", MAX_CONFIG_BYTES)
        then = decisive_settings(yaml.safe_load(text))
    except (CheckpointError, yaml.YAMLError, ValueError, RecursionError):
        return f"its {config_file.name} cannot be read"
    now = decisive_settings(config)
    if config.get("auto_batch", False) is not False:
        now[BATCH_SIZE] = then.get(BATCH_SIZE)
    if now.get(MEMORY_FORMAT) == "auto":
        now[MEMORY_FORMAT] = then.get(MEMORY_FORMAT)
    lengthened = [key for key in LENGTHS if then.get(key) != now.get(key) and _is_longer(then.get(key), now.get(key))]
    if lengthened and then.get("trainer.check_val_every_n_epoch") == then.get("trainer.max_epochs"):
        lengthened.append("trainer.check_val_every_n_epoch")  # it was lowered to the length of the shorter run
    for key in sorted((then.keys() | now.keys()) - set(lengthened)):
        if then.get(key) != now.get(key):
            return f"it had {key} {then.get(key)!r}, now {now.get(key)!r}"
    for key in lengthened:
        rank_zero_info(f"resume auto: {key} {then.get(key)} -> {now.get(key)}; model.schedule spans the new length")
    return None


def _is_longer(then: Any, now: Any) -> bool:
    before, after = (float("inf") if value in (None, -1) else value for value in (then, now))
    return isinstance(before, int | float) and isinstance(after, int | float) and after >= before


def decisive_settings(config: Any) -> dict[str, Any]:
    """Return the settings that decide what a run computes, by their dotted keys; ValueError if it is no configuration.

    config: as in config.yaml.
    """
    if not isinstance(config, dict) or not isinstance(config.get("trainer") or {}, dict):
        raise ValueError("keys and values are missing")
    chosen = {key: config.get(key) for key in DECISIVE}
    chosen["trainer"] = {key: (config.get("trainer") or {}).get(key) for key in DECISIVE_IN_TRAINER}
    settings = {}
    for number, (key, value) in enumerate(_leaves(chosen)):
        if number > MAX_SETTINGS:  # a few aliases can stand for billions of values
            raise ValueError("too many values")
        name = key.rpartition(".")[2]
        if not key.startswith("data."):
            settings[key] = value
        elif name not in INDECISIVE_IN_DATA:
            settings[key] = Path(value).name if name.endswith(PATHS_IN_DATA) and isinstance(value, str) else value
    return settings


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def require_resumable(
    path: Path, module: DetectionModule, data: Any, strategy: Strategy, allow_data_change: bool
) -> None:
    """Raise CheckpointError if a checkpoint has another model, optimizer, classes, kind of strategy or data set."""
    checkpoint = load_weights(module, path, data.class_names)
    loops = checkpoint.get("loops")
    has_progress = isinstance(loops, dict) and bool(loops.get("fit_loop"))  # else Lightning starts at step 0, silently
    if not isinstance(checkpoint.get(OPTIMIZER), list) or not has_progress:
        remedy = f"Resume from a last.ckpt, or start a new run from these weights: --init_from {path}"
        raise unusable(path, "holds weights alone, without the optimizer and the progress of a run", remedy)
    _require_same_strategy(path, checkpoint, strategy)
    saved = checkpoint[CHECKPOINT_KEY]
    _require_same_optimizer(path, saved, module)
    now = {} if allow_data_change else fingerprints(data.annotations("train"))
    for (key, value), noun in zip(now.items(), ("annotations", "images"), strict=False):
        if saved.get(key, value) != value:
            raise CheckpointError(
                f"the training {noun} have changed since {path} was written (fingerprint {value}, then "
                f"{saved[key]!r:.99}).\nRestore them, or continue with the new ones by --allow_data_change true, or "
                "start a new run by --resume none."
            )
    versions = installed_versions()
    others = [f"{name} {then}" for name, then in saved.get("versions", {}).items() if versions.get(name) != then]
    if others:
        rank_zero_info(f"resume: {path} was written with {', '.join(others)}; the last digits may differ.")


def _require_same_strategy(path: Path, checkpoint: JSONDict, strategy: Strategy) -> None:
    """Refuse an optimizer state with another numbering of the parameters.

    The numbers follow our two parameter groups, but under a strategy that splits weights they follow the model.
    """
    try:
        groups = [list(group["params"]) for state in checkpoint[OPTIMIZER] for group in state["param_groups"]]
        numbers = [number for group in groups for number in group]
        is_split = numbers != sorted(numbers)
    except (TypeError, KeyError) as error:
        raise unusable(path, f"has no `{OPTIMIZER}` that `onestage fit` wrote", "Use another one.") from error
    if sum(map(bool, groups)) > 1 and is_split != shards_parameters(strategy):  # with one group the order is the same
        whole, split = "whole weights, such as ddp or one process", "split weights, such as fsdp"
        written_by, this_run = (split, whole) if is_split else (whole, split)
        problem = f"was written by a strategy with {written_by}; this run's has {this_run}"
        raise unusable(path, f"{problem}. The optimizer state fits one", "Set trainer.strategy as it was then.")


def _require_same_optimizer(path: Path, saved: JSONDict, module: DetectionModule) -> None:
    """Refuse another of torch's optimizers, whose state has other names."""
    stored = _stored_model(saved.get("config") or {}).get("optimizer")
    then = str(stored.get("class_path")) if isinstance(stored, dict) else ""
    now = type(module.make_optimizer())
    is_torch = then.startswith("torch.optim.") and now.__module__.startswith("torch.optim.")
    if is_torch and then.rpartition(".")[2] != now.__name__:
        problem = f"has the state of {then}; this run's model.optimizer is {now.__name__}, which cannot use it"
        remedy = f"Set model.optimizer: {then}, or start a new run from its weights: --init_from {path}"
        raise unusable(path, problem, remedy)


@lru_cache(maxsize=1)  # asked for when a run is resumed and again when it starts
def fingerprints(annotations: AnnotationSet) -> dict[str, str]:
    """Return short hashes by their keys in a checkpoint.

    `data_fingerprint` covers names, boxes and labels, `image_fingerprint` every byte of the image files, or their sizes
    if they are larger than READ_BYTES together. Folders do not count.
    """
    paths = [Path(path) for path in annotations.image_paths.tolist()]
    digest = hashlib.sha256()
    digest.update("\0".join(path.name for path in paths).encode(errors="surrogateescape"))
    for array in (annotations.image_ids, annotations.box_offsets, annotations.boxes, annotations.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    for flags in (annotations.is_crowd, annotations.is_difficult):
        digest.update(np.packbits(flags).tobytes())
    digest.update(repr((annotations.class_names, annotations.category_ids)).encode())
    return {"data_fingerprint": digest.hexdigest()[:16], "image_fingerprint": _hash_images(paths)}


def _hash_images(paths: Sequence[Path]) -> str:
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]  # the loader reports missing files
    if sum(sizes) > READ_BYTES:
        return f"sizes:{hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}"
    with ThreadPoolExecutor(READ_THREADS) as pool:
        content = b"".join(pool.map(_hash_file, paths))
    return f"bytes:{hashlib.sha256(content).hexdigest()[:16]}"


def _hash_file(path: Path) -> bytes:
    try:
        if not path.is_file():  # a FIFO would block
            return b"no file"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"unreadable"
