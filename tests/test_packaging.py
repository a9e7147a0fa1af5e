"""The lock, the Make targets, the image and the workflow."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Which registry serves an installation is the user's decision.
REGISTRY_ADDRESS = re.compile(r"https?://\S+/(simple|packages|whl|wheels)\b|--(extra-)?index-url[ =]+\S*://")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def lock_entries() -> list[str]:
    joined = text_of("requirements.lock").replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def test_lock_pins_every_package_to_one_version_with_hashes_and_no_address() -> None:
    assert len(lock_entries()) > 50
    for entry in lock_entries():
        requirement, *hashes = entry.split("--hash=")
        assert re.fullmatch(r"[a-z0-9-]+==\S+( ; .+)?", requirement.strip()), requirement
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes), requirement
    assert "://" not in text_of("requirements.lock")


def test_lock_holds_every_direct_dependency_within_its_range() -> None:
    pins = [Requirement(entry.split("--hash=")[0].strip()) for entry in lock_entries()]
    locked = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    project = tomllib.loads(text_of("pyproject.toml"))
    groups = [item for group in project["dependency-groups"].values() for item in group if isinstance(item, str)]
    for text in [*project["build-system"]["requires"], *project["project"]["dependencies"], *groups]:
        needed = Requirement(text)
        version = locked[canonicalize_name(needed.name)]
        assert needed.specifier.contains(version, prereleases=True), f"{needed}: locked {version}; run make lock"


def test_no_file_names_a_package_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split()] or sorted((ROOT / "src").rglob("*.py"))
    texts = {path: path.read_bytes().decode(errors="replace") for path in paths if path.is_file()}
    assert [path.name for path, text in texts.items() if path != Path(__file__) and REGISTRY_ADDRESS.search(text)] == []


@pytest.mark.slow
def test_wheel_holds_the_configurations_and_stubs(tmp_path) -> None:
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out", "."]
    subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"onestage/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.yaml")} <= {*names}
    assert {"onestage/__init__.pyi", "onestage/report/page.html"} <= {*names}


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    own = ("MAKE", "MFLAGS", "ONESTAGE_ENV")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return subprocess.run(["make", *words], cwd=folder, env=outside, capture_output=True, text=True)


def test_train_in_a_fresh_folder_installs_the_lock_with_hashes_and_passes_the_data_path(tmp_path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    plan = make("--dry-run", "train", "DATA=my data", "ARGS=--trainer.max_epochs 2", folder=tmp_path).stdout
    install = plan.index("pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock")
    train = plan.index("onestage fit --config configs/shapes_ssd.yaml --data.path 'my data' --trainer.max_epochs 2")
    assert install < train


STUB = """#!/bin/sh
case "$2" in
  venv) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  pip) case "$*" in *-quiet*) ;; *) echo Collecting everything ;; esac
       if [ -n "$BROKEN" ]; then echo "ERROR: hashes differ" >&2; exit 1; fi ;;
esac
"""


def test_setup_prints_a_line_per_stage_and_what_pip_says_when_it_fails(tmp_path, monkeypatch) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("BROKEN", "yes")
    failed = make("setup", "PYTHON=./python", folder=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("ERROR: hashes differ\n")
    monkeypatch.delenv("BROKEN")
    done = make("setup", "PYTHON=./python", folder=tmp_path)  # again from the beginning
    assert done.returncode == 0 and done.stderr == ""
    stages = ("creating", "installing", "installing", "done")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["setup:", stage] for stage in stages]
    assert "Nothing to be done" in make("setup", "PYTHON=./python", folder=tmp_path).stdout


@pytest.mark.parametrize("target", ["eval", "predict"])
def test_without_a_checkpoint_the_message_says_how_to_get_one(target, tmp_path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = make(target, "ONESTAGE_ENV=none", folder=tmp_path)
    assert done.returncode == 2
    assert "make train" in done.stderr


def test_workflow_and_ci_call_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    called = re.findall(r"^make ([a-z -]+)", "\n".join([*commands, text_of(".ci/run")]), re.MULTILINE)
    assert {name for line in called for name in line.split()} <= targets


def test_image_installs_the_lock_and_runs_without_root() -> None:
    dockerfile = text_of("Dockerfile")
    assert "pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock" in dockerfile
    assert re.search(r"^USER \d{4,}:\d{4,}$", dockerfile, re.MULTILINE)
    for source in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source
