"""Which run and which checkpoint `fit --resume` goes on from, and whether it may."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from onestage.errors import CheckpointError, ConfigError
from onestage.evaluation.results import installed_versions
from onestage.reliability.checkpoint_files import load_weights, read_checkpoint, stored_step
from onestage.reliability.checkpoints import LAST, PREVIOUS
from onestage.reliability.fingerprint import fingerprints
from onestage.training.module import CHECKPOINT_KEY, DetectionModule
from onestage.training.optimization import shards_parameters
from onestage.training.run import version_of
from onestage.types import JSONDict

# The keys of a configuration that decide what a run computes. Two runs that agree on them are the same experiment, on
# whatever devices, with however many workers, wherever they write.
DECISIVE = ("seed_everything", "model", "data", "ema", "trainer")
DECISIVE_IN_TRAINER = (
    "max_epochs", "max_steps", "max_time", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "limit_train_batches", "overfit_batches",
    "check_val_every_n_epoch", "val_check_interval",
)  # fmt: skip
BATCH_SIZE = "data.batch_size"
OPTIMIZER = "optimizer_states"  # Lightning's key, in every checkpoint but those of weights alone
# Where the data lies is left out: whether it is the same the fingerprints in the checkpoint tell.
INDECISIVE_IN_DATA = ("root", "num_workers", "prefetch_factor", "predict_dir", "worker_timeout_seconds")
PATHS_IN_DATA = ("_annotations", "_images")  # keys with these ends: of the path, only the last name counts


class Resumed(NamedTuple):
    """Where a run goes on."""

    checkpoint: Path
    folder: Path | None  # the run that is continued in place; None: a new one begins from this state
    global_step: int

    @property
    def step_in_folder(self) -> int | None:
        """The optimizer step up to which the files of `folder` hold; None in a new folder."""
        return self.global_step if self.folder is not None else None


def find_checkpoint(resume: str, ckpt_path: str | None, config: JSONDict) -> Resumed | None:
    """Find what `fit --resume` goes on from; None: it begins a new run.

    Args:
        resume: `auto`, `none`, or a checkpoint or run folder.
        ckpt_path: a checkpoint, as Lightning has it; the same as naming it in `resume`.
        config: of this run, as config.yaml will hold it.

    Raises:
        ConfigError: both were given.
        CheckpointError: the checkpoint is damaged, or none of the run is whole.
    """
    if ckpt_path is not None and resume != "none":
        raise ConfigError(f"--resume {resume} and --ckpt_path {ckpt_path} say two things. Give one of them.")
    word = resume if ckpt_path is None else ckpt_path
    if word == "none":
        return None
    if word == "auto":
        return _find_run(Path(config["runs_dir"]) / config["experiment"], config)
    folder = Path(word) / "checkpoints"
    if _is_folder(folder):
        newest = newest_checkpoint(folder)
        if newest is None:
            raise CheckpointError(f"{folder} has no checkpoint to go on from.\nBegin again with --resume none.")
        return Resumed(newest[0], None, newest[1])
    return Resumed(Path(word), None, int(read_checkpoint(word)["global_step"]))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of a name that is too long, say: `read_checkpoint` has a message for that
        return False


def _find_run(experiment_folder: Path, config: JSONDict) -> Resumed | None:
    """Find the newest run with the same configuration and a checkpoint, and say what was found and what was not."""
    folders = [path for path in experiment_folder.glob("version_*") if version_of(path) >= 0]
    for folder in sorted(folders, key=version_of, reverse=True):
        difference = _difference(folder / "config.yaml", config)
        newest = newest_checkpoint(folder / "checkpoints") if difference is None else None
        if newest is not None:
            checkpoint, step = newest
            rank_zero_info(f"resume auto: going on in {folder} from {checkpoint.name} (optimizer step {step})")
            return Resumed(checkpoint, folder, step)
        rank_zero_info(f"resume auto: not {folder}, because {difference or 'it has no checkpoint'}")
    rank_zero_info(f"resume auto: nothing to go on from in {experiment_folder}; a new run begins")
    return None


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Return the whole checkpoint with the highest step and that step; name the damaged ones that would have been it.

    By the step that is stored inside: the time of a file says when it was copied or what a wrong clock showed. None
    if there is none, those aside that hold weights alone, as a ModelCheckpoint of the user's own may write them.

    Raises:
        CheckpointError: none is whole.
    """
    files = sorted(folder.glob("*.ckpt"), key=_preference)
    steps = {file: stored_step(file) for file in files}
    problems = []
    unread = [file for file in files if steps[file] < 0]  # first, only to be named
    by_step = sorted(set(files) - set(unread), key=lambda one: (-steps[one], _preference(one)))
    for file in [*unread, *by_step]:
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            problems.append(str(error).partition("\n")[0])
            rank_zero_info(f"resume: {problems[-1]} Falling back to the one before it.")
            continue
        if OPTIMIZER in checkpoint:
            return file, int(checkpoint["global_step"])
    if not problems:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} can be used:\n  " + "\n  ".join(problems) + "\nBegin again with --resume none."
    )


def require_resumable(
    path: Path, module: DetectionModule, data: Any, strategy: Strategy, allow_data_change: bool
) -> None:
    """Check that this run can go on from a checkpoint, before anything of it is taken over.

    Lightning loads it; of the configuration in it nothing is: that of the file and the command line holds.

    Raises:
        CheckpointError: it is of another model, optimizer, set of classes or kind of strategy, or the data has changed.
    """
    load_weights(module, path, data.class_names)
    checkpoint = read_checkpoint(path)
    if OPTIMIZER not in checkpoint:
        raise CheckpointError(
            f"{path} holds weights alone, without the optimizer and the progress of a run.\n"
            "Resume from a last.ckpt; to begin a new run from weights see model.detector.init_args.pretrained."
        )
    _require_same_kind(path, checkpoint, strategy)
    saved = checkpoint[CHECKPOINT_KEY]
    _require_same_optimizer(path, saved, module)
    if not allow_data_change:
        _require_same_data(path, saved, fingerprints(data.annotations("train")))
    versions = installed_versions()
    other = [
        f"{name} {version}" for name, version in saved.get("versions", {}).items() if versions.get(name) != version
    ]
    if other:
        rank_zero_info(f"resume: {path} was written with {', '.join(other)}; the last digits may differ.")


def _require_same_kind(path: Path, checkpoint: JSONDict, strategy: Strategy) -> None:
    """Refuse an optimizer not numbered as this run's: Lightning would give weights each other's momentum.

    It is numbered through our two parameter groups, but under a strategy that splits weights through the model.
    """
    groups = [group["params"] for state in checkpoint[OPTIMIZER] for group in state["param_groups"]]
    numbers = [number for group in groups for number in group]
    is_split = numbers != sorted(numbers)
    if sum(map(bool, groups)) > 1 and is_split != shards_parameters(strategy):  # of one group the order is the same
        kinds = ("whole weights, such as ddp or one process", "split weights, such as fsdp")
        raise CheckpointError(
            f"{path} was written by a strategy with {kinds[is_split]}; this run's has {kinds[not is_split]}, and "
            "the state of the optimizer does not go from one to the other.\nSet trainer.strategy as it was then."
        )


def _require_same_optimizer(path: Path, saved: JSONDict, module: DetectionModule) -> None:
    """Refuse another of torch's optimizers, whose state has other names. A factory of the user's own is not judged."""
    stored = ((saved.get("config") or {}).get("model") or {}).get("optimizer") or {}
    then = str(stored.get("class_path"))
    now = type(module.make_optimizer())
    is_torch = then.startswith("torch.optim.") and now.__module__.startswith("torch.optim.")
    if is_torch and then.rpartition(".")[2] != now.__name__:
        raise CheckpointError(
            f"{path} has the state of {then}; this run's model.optimizer is {now.__name__}, which has no use for it.\n"
            f"Set model.optimizer: {then}, or begin a new run from these weights by "
            "model.detector.init_args.pretrained."
        )


def _require_same_data(path: Path, saved: JSONDict, now: dict[str, str]) -> None:
    problems = {
        "data_fingerprint": "annotations are not those that {} was trained on: images or boxes were added, removed or "
        "changed",
        "image_fingerprint": "images are not those that {} was trained on: names and boxes are the same, but at least "
        "one file has other content",
    }
    for key, problem in problems.items():
        then = saved.get(key, now[key])  # a checkpoint of an older version may not say
        if then != now[key]:
            raise CheckpointError(
                f"the training {problem.format(path)} (fingerprint {now[key]}, then {then}).\n"
                "Put them back, or go on with the new ones by --allow_data_change true, or begin a new run by --resume "
                "none."
            )


def _preference(file: Path) -> tuple[int, str]:
    # Of equal steps: `last` is written at the end of an epoch, `best` at the end of the validation before it.
    names = (LAST, PREVIOUS)
    return (names.index(file.name) if file.name in names else len(names), file.name)


def saved_batch_size(folder: Path) -> int:
    """The batch size of the run in `folder`, which `--auto_batch` found when it began and must not find anew."""
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return int(saved["data"]["batch_size"])


def _difference(config_file: Path, config: JSONDict) -> str | None:
    """In what the run of a configuration file is another one, or None."""
    try:
        saved = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return f"its {config_file.name} cannot be read"
    if not isinstance(saved, dict):
        return f"its {config_file.name} holds no configuration"
    then, now = (dict(_leaves(_decisive(one))) for one in (saved, config))
    if config.get("auto_batch", False) is not False:
        now[BATCH_SIZE] = then.get(BATCH_SIZE)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            return f"it had {key} {then.get(key)!r}, now {now.get(key)!r}"
    return None


def _decisive(config: JSONDict) -> JSONDict:
    chosen = {key: config.get(key) for key in DECISIVE}
    chosen["trainer"] = {key: (config.get("trainer") or {}).get(key) for key in DECISIVE_IN_TRAINER}
    data: dict[str, Any] = dict(config.get("data") or {})
    data["init_args"] = {
        key: Path(value).name if key.endswith(PATHS_IN_DATA) and isinstance(value, str) else value
        for key, value in (data.get("init_args") or {}).items()
        if key not in INDECISIVE_IN_DATA
    }
    return {**chosen, "data": data}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
