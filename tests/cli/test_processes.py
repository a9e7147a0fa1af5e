"""Several processes on the CPU, started as a user starts them: the numbers, the weights and the files of one."""

import csv
import json
import socket
import subprocess
from pathlib import Path

import processes
import pytest
import torch
import yaml
from command_line import message_of, run
from processes import finish

NUM_TRAIN, NUM_VAL, NUM_STEPS = 40, 7, 20  # 10 batches of 4 images an epoch
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(words, launcher=(), environment=None) -> subprocess.Popen[str]:
    return processes.start(*launcher, "-m", "onestage.cli", *words, environment=environment)


def results_of(runs: Path) -> dict[str, object]:
    """Return what is to be equal: all but the times."""
    (path,) = runs.glob("*/*/results.json")
    assert [folder.name for folder in path.parent.parent.iterdir()] == ["version_0"]
    # Scores, and so thresholds, differ in the last digits: a convolution may take another path for another batch.
    results = json.loads(path.read_text(), parse_float=lambda text: round(float(text), 5))
    return {name: value for name, value in results.items() if name not in ("seconds", "images_per_second")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of 20 steps on 40 drawn images of 64 px, with an average of the weights."""
    folder = tmp_path_factory.mktemp("tiny")
    source = {"path": str(folder / "shapes"), "num_train": NUM_TRAIN, "num_val": NUM_VAL}
    sgd = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    experiment = {
        "data": {
            "source": {"class_path": "onestage.data.Shapes", "init_args": source},
            "image_size": 64, "batch_size": 2, "num_workers": 0,
        },
        "model": {
            "detector": {"class_path": "tiny_training.TinyDetector"}, "channels_last": False,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": sgd},
            "schedule": {"kind": "cosine", "warmup_steps": 5},
        },
        "trainer": {
            "max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False,
            "enable_model_summary": False, "log_every_n_steps": 1, "gradient_clip_val": 1.0,
        },
        "ema": {"decay": 0.9},
        "drawn_images": 0,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def fit_words(config: Path, runs: Path, *more: str) -> list[str]:
    recorder = ["--trainer.callbacks+=process_parts.Recorder", f"--trainer.callbacks.folder={runs}/recorded"]
    return ["fit", "--config", str(config), "--runs_dir", str(runs / "runs"), *recorder, *more]


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one process with 4 images a batch."""
    folder = tmp_path_factory.mktemp("one")
    assert run(*fit_words(config, folder, "--data.batch_size=4")) == 0
    return folder


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes with 2 images a batch each, started by torchrun."""
    folder = tmp_path_factory.mktemp("two")
    words = fit_words(config, folder, "--trainer.devices=2", "--trainer.strategy=ddp")
    out, _ = finish(start(words, TORCHRUN))
    assert out.strip().splitlines()[-1].startswith("results: ")
    (run_folder,) = folder.glob("runs/*/*")
    assert run_folder.name == "version_0"
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (run_folder / "checkpoints").iterdir()}
    assert {"config.yaml", "metrics.csv", "results.json"} <= {path.name for path in run_folder.iterdir()}
    return folder


def recorded(folder: Path) -> list[list[dict[str, object]]]:
    files = sorted((folder / "recorded").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def checkpoint(folder: Path, name: str) -> dict[str, object]:
    (path,) = folder.glob(f"runs/*/version_0/checkpoints/{name}.ckpt")
    return dict(torch.load(path, weights_only=True))


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(one, two):
    (alone,), (first, second) = recorded(one), recorded(two)
    mean = [(left["loss"] + right["loss"]) / 2 for left, right in zip(first, second, strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor([step["loss"] for step in alone]), rtol=1e-4, atol=1e-5)
    ours, theirs = checkpoint(two, "last"), checkpoint(one, "last")
    assert ours["global_step"] == theirs["global_step"] == NUM_STEPS
    for key in ("state_dict", "current_model_state", "optimizer_states"):  # the average, the weights, the momentum
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    tables = [next(folder.glob("runs/*/version_0/epochs.csv")).open() for folder in (one, two)]
    last = [list(csv.DictReader(table))[-1] for table in tables]
    for name in ("val/loss", "val/classification_loss", "val/box_loss"):
        # Weighted by positives, the mean does not depend on how images are shared among batches and processes.
        assert float(last[0][name]) == pytest.approx(float(last[1][name]), rel=1e-4)
    start_of_run = torch.tensor([step["loss"] for step in alone])
    assert start_of_run[-5:].mean() < 0.8 * start_of_run[:5].mean()  # and something was learnt in these steps


@pytest.mark.slow
def test_two_and_three_processes_evaluate_an_odd_number_of_images_like_one(config, two, tmp_path):
    """Three are started by Lightning; seven images are 3 + 2 + 2."""
    (best,) = two.glob("runs/*/version_0/checkpoints/best.ckpt")
    words = ["validate", "--config", str(config), "--ckpt_path", str(best), "--runs_dir"]
    assert run(*words, str(tmp_path / "one")) == 0
    out, _ = finish(start([*words, str(tmp_path / "three"), "--trainer.devices=3", "--trainer.strategy=ddp"]))
    assert out.strip().splitlines()[-1].startswith("results: ")
    alone = results_of(tmp_path / "one")
    assert alone == results_of(two / "runs") == results_of(tmp_path / "three")
    assert alone["metrics"]["mAP"] > 0


def test_auto_batch_prints_and_records_batch_and_learning_rate(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("onestage.training.measurement.gc.collect", lambda: 0)  # seconds with other tests' objects
    options = ["--auto_batch", "64", "--model.reference_batch_size", "4", "--trainer.max_epochs", "1"]
    assert run(*fit_words(config, tmp_path, *options)) == 0
    said = capsys.readouterr().err
    assert f"auto_batch: data.batch_size {NUM_TRAIN} per process within 57.60 GiB on cpu" in said
    assert "learning rate: 0.02 x 40 / 4 = 0.2 (processes 1 x batch_size 40 x accumulate_grad_batches 1" in said
    (saved,) = tmp_path.glob("runs/*/version_0/config.yaml")
    settings = yaml.safe_load(saved.read_text())
    assert settings["data"]["batch_size"] == NUM_TRAIN
    assert settings["auto_batch"] is False
    assert checkpoint(tmp_path, "best")["onestage"]["config"]["data"]["batch_size"] == NUM_TRAIN


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_machines_with_one_process_equal_one_machine_with_two(launcher, config, two, tmp_path):
    """No SLURM is needed: srun starts the command on each machine with these variables set."""
    words = fit_words(config, tmp_path, "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp")
    meet = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if launcher == "torchrun":
        nodes = [start(words, ["-m", "torch.distributed.run", f"--node_rank={node}", *meet]) for node in (0, 1)]
    else:
        nodes = [start(words, (), job | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}) for node in (0, 1)]
    for node in nodes:
        finish(node)
    ours, theirs = checkpoint(tmp_path, "last"), checkpoint(two, "last")
    assert same_bits(ours["state_dict"], theirs["state_dict"])
    assert same_bits(ours["current_model_state"], theirs["current_model_state"])
    assert results_of(tmp_path / "runs") == results_of(two / "runs")


@pytest.mark.slow
def test_fsdp_takes_the_same_steps_as_ddp(config, two, tmp_path):
    """On CPUs by a class for tests: Lightning's own asks for GPUs. Weight decay shows who is taken for a bias."""
    strategy = "--trainer.strategy={class_path: process_parts.CPUFSDP}"
    out, _ = finish(start(fit_words(config, tmp_path, "--trainer.devices=2", strategy, "--ema.decay=null"), TORCHRUN))
    assert out.strip().splitlines()[-1].startswith("results: ")
    ours = checkpoint(tmp_path, "last")["state_dict"]
    torch.testing.assert_close(ours, checkpoint(two, "last")["current_model_state"], rtol=1e-4, atol=1e-6)

    # The momentum is numbered through the model here, and there through our parameter groups.
    (split,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    _, err = finish(start(fit_words(config, tmp_path, "--resume", str(split))), exit_code=2)
    assert "by a strategy with split weights" in err
    (whole,) = two.glob("runs/*/version_0/checkpoints/last.ckpt")
    words = fit_words(config, tmp_path, "--trainer.devices=2", strategy, "--ema.decay=null", "--resume", str(whole))
    _, err = finish(start(words, TORCHRUN), exit_code=1)  # torchrun's own
    assert "by a strategy with whole weights" in err


@pytest.mark.slow
def test_resumed_fsdp_run_equals_an_uninterrupted_one(config, tmp_path):
    strategy = ["--trainer.devices=2", "--trainer.strategy={class_path: process_parts.CPUFSDP}", "--ema.decay=null"]
    constant = [*strategy, "--model.schedule.kind=constant"]  # a schedule that does not know the length of the run
    finish(start(fit_words(config, tmp_path / "whole", *constant), TORCHRUN))
    finish(start(fit_words(config, tmp_path / "part", *constant, "--trainer.max_epochs=1"), TORCHRUN))
    (last,) = (tmp_path / "part").glob("runs/*/version_0/checkpoints/last.ckpt")
    finish(start(fit_words(config, tmp_path / "rest", *constant, "--resume", str(last)), TORCHRUN))
    whole, rest = checkpoint(tmp_path / "whole", "last"), checkpoint(tmp_path / "rest", "last")
    assert whole["global_step"] == rest["global_step"] == NUM_STEPS
    assert same_bits(whole["state_dict"], rest["state_dict"])


@pytest.mark.slow
def test_processes_agree_on_the_auto_batch(config, tmp_path):
    words = fit_words(config, tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp", "--auto_batch", "64")
    finish(start(words, TORCHRUN))
    first, second = recorded(tmp_path)
    assert [len(batch["images"]) for batch in first] == [len(batch["images"]) for batch in second] == [20, 20]
    (saved,) = tmp_path.glob("runs/*/version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["data"]["batch_size"] == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--trainer.strategy=fsdp", "--ema.decay=null"], "requires a GPU"), (["--trainer.strategy=dpp"], "'dpp'")],
)
def test_strategy_that_cannot_run_here_is_one_message(config, tmp_path, capsys, options, said):
    assert said in message_of(capsys, "fit", "--config", str(config), "--runs_dir", str(tmp_path), *options)
