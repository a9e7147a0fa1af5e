"""The command `onestage tune`: search settings of `onestage fit`, one run per trial."""

import csv
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from onestage.errors import ConfigError, DataError, NonFiniteError, ResourceError, missing_package, require
from onestage.files import atomic_write

STUDY_FILE, TABLE_FILE = "study.db", "trials.csv"
FAILED = (ResourceError.exit_code, NonFiniteError.exit_code)  # may be the fault of the values: the search continues
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}:{NUMBER}(:log)?")


def tune(
    *,
    config: list[Path],
    search: list[str],
    trials: int = 20,
    set: list[str] | None = None,
    folder: Path = Path("runs/tune"),
) -> int:
    """Search settings of a training for the best metric, with Optuna's TPE sampler.

    Each trial is a run of `onestage fit`, judged by best_checkpoint.monitor. The same command continues a search that
    was stopped, its last run included. The last line is the command that trains with the best values.

    onestage tune --config shapes_ssd --trials 20 --search model.optimizer.init_args.lr=1e-4:1e-2:log

    Args:
        config: configurations, as for `onestage fit`.
        search: KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=a,b,c for each setting; whole numbers if both limits are.
        trials: number of trials, those of earlier starts included.
        set: KEY=VALUE of all trials, such as data.path=mine trainer.max_epochs=20.
        folder: of the runs, the study (study.db, SQLite) and the table (trials.csv).
    """
    require(trials >= 1, "tune: trials", trials, ">= 1")
    given = [word for path in config for word in ("--config", str(path))] + [f"--{item}" for item in set or ()]
    choices = parse_search(search)
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise missing_package("tune", "onestage[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: getattr(optuna.distributions, kind)(**limits) for key, (kind, limits) in choices.items()}
    state = optuna.trial.TrialState
    try:
        folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{(folder / STUDY_FILE).absolute()}",
            study_name=shlex.join([*given, "--search", *search]),  # another search in this folder is another study
            load_if_exists=True,
            direction="maximize",
        )
    except Exception as error:  # of the file system or of SQLAlchemy
        problem = f"tune: {folder} cannot hold a study: {str(error).partition(chr(10))[0]}"
        raise ConfigError(f"{problem}\nGive another --folder.") from error
    while len(study.get_trials(states=[state.COMPLETE, state.FAIL])) < trials:
        # Seeded by the number of trials: with one seed a continued search would repeat its first values.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        trial: Any = next(iter(study.get_trials(states=[state.RUNNING])), None) or study.ask(space)
        name, options = f"trial_{trial.number}", options_of(trial.params)
        code = _fit([*given, *options], folder, name)
        if code in FAILED:
            study.tell(trial.number, state=state.FAIL)
        elif code != 0:
            return code
        else:
            study.tell(trial.number, _result(folder / name))
        value = study.trials[trial.number].value
        print(f"{name}: {'failed' if value is None else f'{value:.4f}'} {' '.join(options)}", flush=True)
        _write_table(folder / TABLE_FILE, study.trials)
    if not study.get_trials(states=[state.COMPLETE]):
        raise ConfigError(f"tune: none of {trials} trials succeeded.\nThe reasons: {folder}/trial_*.log")
    best = study.best_trial
    print(f"best: trial_{best.number}, {best.value:.4f}; all: {folder / TABLE_FILE}")
    print(shlex.join(["onestage", "fit", *given, *options_of(best.params)]))
    return 0


def parse_search(items: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, for each key, the name of Optuna's distribution and its arguments.

    ConfigError if an item is none of KEY=LOW:HIGH, KEY=LOW:HIGH:log, KEY=a,b,c, or a key comes twice.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for item in items:
        key, _, text = item.partition("=")
        limits, values = RANGE.fullmatch(text), text.split(",")
        kind, arguments = "CategoricalDistribution", dict[str, Any](choices=values)
        is_valid = len(values) > 1 and all(values)
        if limits:
            is_whole = limits[1].isdigit() and limits[2].isdigit()
            low, high = (int(limit) if is_whole else float(limit) for limit in (limits[1], limits[2]))
            kind = "IntDistribution" if is_whole else "FloatDistribution"
            arguments = {"low": low, "high": high, "log": bool(limits[3])}
            is_valid = low < high and (low > 0 or not limits[3])
        rule = "KEY=LOW:HIGH with LOW < HIGH, KEY=LOW:HIGH:log with LOW > 0, or KEY=a,b,c; each key once"
        require(bool(key) and is_valid and key not in found, "tune: search", item, rule)
        found[key] = kind, arguments
    return found


def options_of(values: dict[str, Any]) -> list[str]:
    """Return the options of `onestage fit` for the values of a trial."""
    return [f"--{key}={value}" for key, value in values.items()]


def _fit(words: list[str], folder: Path, name: str) -> int:
    """Run a trial, or continue it, and return its exit code; its output goes to <name>.log."""
    words = [*words, f"--runs_dir={folder}", f"--experiment={name}", "--resume=auto"]
    log = folder / f"{name}.log"
    with log.open("a", encoding="utf-8") as output:
        fit = subprocess.Popen([sys.executable, "-m", "onestage.cli", "fit", *words], stdout=output, stderr=output)
        # `fit` saves and ends, then this process ends with its code. Ctrl-C reaches both.
        on_interrupt = signal.signal(signal.SIGINT, lambda *_: None)
        on_terminate = signal.signal(signal.SIGTERM, lambda *_: fit.terminate())
        code = fit.wait()
        signal.signal(signal.SIGINT, on_interrupt), signal.signal(signal.SIGTERM, on_terminate)
    if code:
        print(log.read_text(encoding="utf-8", errors="replace").rpartition("error: ")[2].strip(), file=sys.stderr)
    return code if code >= 0 else 128 - code


def _result(folder: Path) -> float:
    """Return the monitored metric of the run of a trial that `fit` has started last, in [0, 1]; higher is better."""
    run = max(folder.glob("version_*/config.yaml"), key=lambda file: file.stat().st_mtime_ns).parent
    monitor = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["best_checkpoint"]["monitor"]
    file = run / "results.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"] if file.is_file() else {}
    value = metrics.get(monitor.removeprefix("val/"))
    if value is None:
        problem = f"tune: best_checkpoint.monitor is {monitor}, which {file} does not have"
        raise DataError(f"{problem}.\nChoose a metric of the evaluation: --set best_checkpoint.monitor=val/mAP")
    return float(value)


def _write_table(file: Path, trials: list[Any]) -> None:
    keys = sorted({key for trial in trials for key in trial.params})
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["trial", "state", "value", *keys])
        for trial in trials:
            writer.writerow([trial.number, trial.state.name, trial.value, *(trial.params.get(key) for key in keys)])
