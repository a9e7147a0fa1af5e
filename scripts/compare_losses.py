#!/usr/bin/env python
"""Train one detector with every loss of configs/compare on equal terms, and report.

    python scripts/compare_losses.py                         on the drawn shapes
    python scripts/compare_losses.py --data path/to/voc      on a data set in VOC format, with the lists train and val
    python scripts/compare_losses.py --data path/to/voc --config configs/voc_ssd300.yaml    with another detector
    python scripts/compare_losses.py --time_steps            time a training step with each loss
    python scripts/compare_losses.py --report docs           write the page of the finished runs
    python scripts/compare_losses.py --quick                 two losses, minutes: does it work here?

Every loss trains on the same images in the same order from the same weights, with its own best of the given box loss
weights and learning rates, chosen on a separate seed. A run is an `onestage fit`; finished runs are kept, so the same
command continues an interrupted comparison.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

from comparison import outcomes, plan, runner
from comparison.plan import Study, StudyError

PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")


def main() -> int:
    """Make the missing runs, or write the report."""
    arguments = _parse()
    if not arguments.quick:
        return _compare(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-losses-") as folder:
        arguments.folder = Path(folder)
        is_page_kept = arguments.report is not None
        arguments.report = arguments.report or arguments.folder
        exit_code = _compare(arguments)
        if exit_code == 0 and not is_page_kept:
            print((arguments.folder / f"{arguments.page}.md").read_text(encoding="utf-8"))
        return exit_code


def _compare(arguments: argparse.Namespace) -> int:
    study = _study(arguments)
    fault = _fault(study, arguments.jobs)
    if fault is not None:
        print(fault, file=sys.stderr)
        return 2
    if arguments.time_steps or arguments.quick:
        from comparison import step_time

        step_time.measure(study.losses, study.folder / "step_times.json", rounds=2 if arguments.quick else 15)
    if (arguments.report is None and not arguments.time_steps) or arguments.quick:
        exit_code = _make_runs(study, arguments.jobs, time.time() + 60 * arguments.minutes)
        if exit_code:
            return exit_code
    if arguments.report is not None:
        from comparison import report

        report.write(study.folder, arguments.report, arguments.page)
    return 0


def _fault(study: Study, jobs: int) -> str | None:
    """Return the first invalid argument as a message, None if all are valid."""
    unknown = plan.unknown_losses(study.losses)
    if unknown:
        return f"--losses: unknown {', '.join(unknown)}; known: {', '.join(plan.all_losses())}"
    if study.data != "shapes" and not (Path(study.data) / "ImageSets" / "Main").is_dir():
        return f"--data {study.data} is not a data set in VOC format: ImageSets/Main is missing"
    if not study.config.is_file():
        return f"--config {study.config} is missing; experiments are in {plan.CONFIGS}"
    if study.selection_seed in study.seeds:
        return (
            f"--selection_seed {study.selection_seed} is among --seeds {' '.join(map(str, study.seeds))}: the "
            "seed that chooses rates and box weights cannot be reported too. Give another --selection_seed."
        )
    counts = {
        "epochs": study.epochs,
        "chosen_epochs": study.chosen_epochs,
        "num_train": study.num_train,
        "num_val": study.num_val,
        "jobs": jobs,
    }
    for name, count in counts.items():
        if count < 1:
            return f"--{name} must be >= 1, got {count}"
    for name, values in {"rates": study.rates, "box_weights": study.box_weights}.items():
        for value in values:
            if not 0 < value < math.inf:
                return f"--{name} must be finite and > 0, got {value:g}"
    seeds = [seed for seed in (study.selection_seed, *study.seeds) if not 0 <= seed < 2**32]
    return f"--seeds and --selection_seed must be in [0, 2^32), got {seeds[0]}" if seeds else None


def _make_runs(study: Study, jobs: int, deadline: float) -> int:
    """Make the runs that choose a box weight, then those that choose a learning rate, then the final runs.

    Returns:
        0, the exit code of a failed run, or 2 if the folder belongs to another comparison.
    """
    try:
        plan.write_settings(study)
        weight_runs = study.choosing.weight_runs()
        runner.make_runs(weight_runs, jobs, deadline)
        rate_runs = study.choosing.rate_runs(outcomes.best_runs(weight_runs))
        runner.make_runs(rate_runs, jobs, deadline)
        runner.make_runs(study.final_runs(outcomes.best_runs(rate_runs)), jobs, deadline)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    except runner.RunFailedError as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="shapes, or the folder of a data set in VOC format")
    parser.add_argument("--config", type=Path, default=plan.DEFAULT_CONFIG, help="the experiment; default: shapes_ssd")
    parser.add_argument("--losses", nargs="+", help="names of files in configs/compare; default: all")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3], help="learning rates of AdamW")
    parser.add_argument("--box_weights", nargs="+", type=float, default=[0.05, 0.2], help="of the box loss")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--selection_seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--num_train", type=int, default=400, help="drawn images, for shapes")
    parser.add_argument("--num_val", type=int, default=101)
    parser.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    parser.add_argument("--chosen_precision", choices=PRECISIONS, help="of the runs that choose; default: --precision")
    parser.add_argument("--chosen_epochs", type=int, help="of the runs that choose; default: --epochs")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="simultaneous runs, each on one thread")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--time_steps", action="store_true", help="time a step with each loss; makes no runs")
    parser.add_argument("--report", type=Path, help="folder of the page, its plot and its table; makes no runs")
    parser.add_argument("--page", default="loss_comparison", help="file name of page, plot and table")
    parser.add_argument("--quick", action="store_true", help="two losses, a tiny budget, nothing kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.losses, arguments.seeds = ["focal", "mining"], [1]
        arguments.rates, arguments.box_weights = [2e-3], [0.1]
        arguments.epochs, arguments.num_train, arguments.num_val = 1, 16, 7
    return arguments


def _study(arguments: argparse.Namespace) -> Study:
    return Study(
        folder=arguments.folder.resolve(),
        data=arguments.data,
        losses=tuple(arguments.losses or plan.all_losses()),
        rates=tuple(arguments.rates),
        box_weights=tuple(arguments.box_weights),
        selection_seed=arguments.selection_seed,
        seeds=tuple(arguments.seeds),
        epochs=arguments.epochs,
        num_train=arguments.num_train,
        num_val=arguments.num_val,
        precision=arguments.precision,
        chosen_precision=arguments.chosen_precision or arguments.precision,
        chosen_epochs=arguments.epochs if arguments.chosen_epochs is None else arguments.chosen_epochs,
        config=arguments.config.resolve(),
    )


def _end_on_signal(number: int, _frame: object) -> None:
    print(
        f"{signal.Signals(number).name}: running trainings are lost; repeat the command to continue",
        file=sys.stderr,
    )
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _end_on_signal)
    signal.signal(signal.SIGTERM, _end_on_signal)
    sys.exit(main())
