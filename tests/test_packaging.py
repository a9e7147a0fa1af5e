"""What is around the package: the lock, the Make targets, the image, the workflow, the licence."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="make is not installed")

PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))

# An address that packages are fetched from. Which registry serves an installation is for its user to say.
REGISTRY_ADDRESS = re.compile(r"https?://\S+/(simple|packages|whl|wheels)\b|--(extra-)?index-url[ =]+\S*://")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# requirements.lock


def lock_entries(lock: str) -> list[str]:
    """Return one logical line per package, its continuation lines joined."""
    joined = lock.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def lock_violations(lock: str) -> Iterator[str]:
    for entry in lock_entries(lock):
        requirement, *hashes = entry.split("--hash=")
        if not re.fullmatch(r"[a-z0-9-]+==\S+( ; .+)?", requirement.strip()):
            yield f"not one exact version: {requirement.strip()}"
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", text.strip()) for text in hashes):
            yield f"no sha256 hash: {requirement.strip()}"
    yield from (
        f"an address: {line}" for line in lock.splitlines() if "://" in line or "file:" in line or " @ " in line
    )


def locked_requirements() -> list[Requirement]:
    return [Requirement(entry.split("--hash=")[0].strip()) for entry in lock_entries(text_of("requirements.lock"))]


def direct_dependencies() -> list[Requirement]:
    """Return the run-time, build and development requirements of pyproject.toml."""
    project = tomllib.loads(text_of("pyproject.toml"))
    groups = project["dependency-groups"]
    named = [item for group in groups.values() for item in group if isinstance(item, str)]
    return [
        Requirement(text)
        for text in [*project["build-system"]["requires"], *project["project"]["dependencies"], *named]
    ]


def test_the_lock_gives_every_package_an_exact_version_and_hashes_and_no_address() -> None:
    assert len(lock_entries(text_of("requirements.lock"))) > 50
    assert list(lock_violations(text_of("requirements.lock"))) == []


@pytest.mark.parametrize(
    "lock",
    [
        "torch==2.15.0\n",
        "torch>=2.15 --hash=sha256:" + "0" * 64,
        "torch==2.15.0 --hash=sha256:0123",
        "torch @ file:///wheels/torch.whl --hash=sha256:" + "0" * 64,
        "--index-url http" + "s://example.org/simple\n",
    ],
)
def test_a_lock_that_could_install_something_else_is_caught(lock: str) -> None:
    assert list(lock_violations(lock))


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
def test_the_lock_holds_each_direct_dependency_once_within_its_range(python: str, system: str, machine: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
    }
    locked: dict[str, list[str]] = {}
    for pin in locked_requirements():
        if pin.marker is None or pin.marker.evaluate(environment):
            locked.setdefault(pin.name, []).append(str(pin.specifier).removeprefix("=="))
    for needed in direct_dependencies():
        versions = locked.get(canonicalize_name(needed.name), [])
        assert len(versions) == 1, f"{needed.name} is locked {len(versions)} times; run make lock"
        assert needed.specifier.contains(versions[0], prereleases=True), (
            f"{needed}: locked {versions[0]}; run make lock"
        )


def test_the_lowest_python_is_the_same_everywhere() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
    assert "sys.version_info < (3, 11)" in text_of("Makefile")
    assert "--python-version 3.11" in text_of("Makefile")


# Makefile


def make_targets() -> set[str]:
    """Return the targets that a person types: those without a file of their name."""
    names = re.findall(r"^([a-z][a-z-]*):(?! export)", text_of("Makefile"), re.MULTILINE)
    return set(names)


def make(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ONESTAGE_ENV", "CONFIG", "ARGS", "CKPT", "PYTHON", "GPUS")
    }
    assert MAKE is not None
    return subprocess.run(
        [MAKE, "--no-print-directory", *words], capture_output=True, text=True, cwd=folder, env=inherited | environment
    )


@pytest.fixture
def fresh_folder(tmp_path: Path) -> Path:
    """Return a folder in which nothing was installed or trained yet."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_make
def test_help_lists_every_target_in_one_line_each() -> None:
    done = make("help")
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert sorted(listed) == sorted(make_targets())
    assert max(len(line) for line in done.stdout.splitlines()) <= 120


def test_every_target_is_phony() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", text_of("Makefile"), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == make_targets()


@needs_make
def test_plain_make_shows_the_help() -> None:
    assert make().stdout == make("help").stdout


@needs_make
def test_train_in_a_fresh_folder_installs_from_the_lock_with_hashes_and_then_trains(fresh_folder: Path) -> None:
    lines = make(
        "--dry-run", "train", "CONFIG=configs/voc_ssd300.yaml", "ARGS=--trainer.max_epochs=1", folder=fresh_folder
    )
    commands = lines.stdout.splitlines()
    assert sum("--require-hashes" in line and "-r requirements.lock" in line for line in commands) == 1
    assert commands[-1] == "exec .venv/bin/onestage fit --config configs/voc_ssd300.yaml --trainer.max_epochs=1"


@needs_make
def test_an_environment_that_is_given_is_used_as_it_is(fresh_folder: Path) -> None:
    done = make("--dry-run", "train", folder=fresh_folder, ONESTAGE_ENV="/opt/venv")
    assert done.stdout.split() == ["exec", "/opt/venv/bin/onestage", "fit", "--config", "configs/shapes_ssd.yaml"]


@needs_make
def test_a_finished_install_is_not_repeated_until_the_lock_changes(fresh_folder: Path) -> None:
    (fresh_folder / ".venv").mkdir()
    ready = fresh_folder / ".venv" / ".ready"
    ready.touch()
    assert "pip install" not in make("--dry-run", "setup", folder=fresh_folder).stdout
    newer = ready.stat().st_mtime + 10
    os.utime(fresh_folder / "requirements.lock", (newer, newer))
    assert "pip install" in make("--dry-run", "setup", folder=fresh_folder).stdout


@needs_make
def test_an_install_that_was_cut_off_is_begun_again(fresh_folder: Path) -> None:
    (fresh_folder / ".venv" / "lib").mkdir(parents=True)
    (fresh_folder / ".venv" / ".unfinished").touch()
    half_a_package = fresh_folder / ".venv" / "lib" / "half"
    half_a_package.touch()
    python = fresh_folder / "python"  # passes the check of its version, and fails to make an environment
    python.write_text('#!/bin/sh\n[ "$1" = -c ]\n', encoding="utf-8")
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", folder=fresh_folder)
    assert done.returncode != 0
    assert not half_a_package.exists()
    assert (fresh_folder / ".venv" / ".unfinished").exists()


@needs_make
@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_a_python_that_is_missing_or_too_old_ends_in_one_message(python: str, fresh_folder: Path) -> None:
    done = make("train", f"PYTHON={python}", folder=fresh_folder)
    assert done.returncode == 2
    assert f"{python} is not Python 3.11 or newer" in done.stderr
    assert "PYTHON=python3.12" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh_folder / ".venv").exists()


@needs_make
@pytest.mark.parametrize("target", ["eval", "predict"])
def test_without_a_checkpoint_the_message_says_how_to_get_one(target: str, fresh_folder: Path) -> None:
    done = make(target, folder=fresh_folder, ONESTAGE_ENV="/opt/venv")
    assert done.returncode == 2
    assert "run make train, or name one with CKPT=path" in done.stderr


@needs_make
def test_eval_takes_the_newest_best_checkpoint_and_a_config_only_if_one_is_given(fresh_folder: Path) -> None:
    for age, run in ((100, "voc/version_0"), (0, "shapes/version_1"), (50, "shapes/version_0")):
        checkpoint = fresh_folder / "runs" / run / "checkpoints" / "best.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        os.utime(checkpoint, (1_000_000_000 - age, 1_000_000_000 - age))
    newest = "runs/shapes/version_1/checkpoints/best.ckpt"
    plain = make("--dry-run", "eval", folder=fresh_folder, ONESTAGE_ENV="e")
    assert plain.stdout.splitlines()[-1].split() == ["exec", "e/bin/onestage", "validate", "--ckpt_path", newest]
    given = make("--dry-run", "predict", "CKPT=a.ckpt", "CONFIG=b.yaml", folder=fresh_folder, ONESTAGE_ENV="e")
    words = ["exec", "e/bin/onestage", "predict", "--config", "b.yaml", "--ckpt_path", "a.ckpt"]
    assert given.stdout.splitlines()[-1].split() == words


@needs_make
def test_a_signal_to_make_reaches_the_training(fresh_folder: Path) -> None:
    command = fresh_folder / "e" / "bin" / "onestage"
    command.parent.mkdir(parents=True)
    command.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys\n"
        "def save(*_):\n    pathlib.Path('saved').touch()\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\nprint('up', flush=True)\nsignal.pause()\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    assert MAKE is not None
    words = [MAKE, "train", "ONESTAGE_ENV=e", 'ARGS=--trainer.devices="[0]"']  # quotes: make calls a shell
    with subprocess.Popen(words, cwd=fresh_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while run.stdout.readline().strip() != "up":
            assert run.poll() is None
        run.terminate()
        run.wait(timeout=120)
    assert (fresh_folder / "saved").exists()


@needs_make
def test_docker_train_maps_the_user_and_drops_every_privilege(fresh_folder: Path) -> None:
    words = make("--dry-run", "docker-train", "GPUS=all", folder=fresh_folder).stdout
    for expected in ("--init", "--gpus all", "--shm-size", "--cap-drop ALL", "no-new-privileges", "--user", "--volume"):
        assert expected in words
    assert "--gpus" not in make("--dry-run", "docker-train", "GPUS=", folder=fresh_folder).stdout


def test_the_workflow_the_hooks_and_ci_call_only_targets_that_exist() -> None:
    workflow = yaml.safe_load(text_of(".github/workflows/ci.yml"))
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands += [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    commands += text_of(".ci/run").splitlines()
    called = [word for line in commands if line.startswith("make ") for word in line.split()[1:] if "=" not in word]
    assert {"lint", "types", "test"} <= set(called) <= make_targets()
    assert workflow["permissions"] == {"contents": "read"}


# Dockerfile


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return (INSTRUCTION, rest) of each logical line."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined]


def copied_sources() -> list[str]:
    return [word for name, rest in instructions(text_of("Dockerfile")) if name == "COPY" for word in rest.split()[:-1]]


@pytest.mark.parametrize("source", copied_sources())
def test_what_the_image_copies_exists_and_reaches_the_engine(source: str) -> None:
    assert (ROOT / source).exists()
    assert f"!{source}" in text_of(".dockerignore").splitlines()


def test_the_engine_gets_nothing_that_the_image_does_not_copy() -> None:
    lines = [line for line in text_of(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied_sources())


def test_the_image_installs_with_the_same_pip_commands_as_setup() -> None:
    def pip_commands(text: str) -> list[str]:
        return re.findall(r"-m pip (install .+?)$", text, re.MULTILINE)

    assert pip_commands(text_of("Dockerfile")) == pip_commands(text_of("Makefile"))


def test_the_image_runs_without_root_and_takes_signals_itself() -> None:
    last = dict(instructions(text_of("Dockerfile")))
    assert re.fullmatch(r"\d+:\d+", last["USER"])
    assert not last["USER"].startswith("0")
    assert last["ENTRYPOINT"] == '["onestage"]'
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert "ONESTAGE_ENV=/opt/venv" in shlex.split(last["ENV"])
    assert "TMPDIR=/app/runs/.tmp" in shlex.split(last["ENV"])


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "Dockerfile"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


# The repository


def test_the_licence_is_apache_2_and_whole() -> None:
    licence = text_of("LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert re.findall(r"^   (\d)\. ", licence, re.MULTILINE) == list("123456789")
    assert "END OF TERMS AND CONDITIONS" in licence
    assert tomllib.loads(text_of("pyproject.toml"))["project"]["license"] == "Apache-2.0"


def tracked_texts() -> dict[str, str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip(f"git: {done.stderr}")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in paths if path.is_file()}


def test_no_file_of_the_repository_names_where_packages_come_from() -> None:
    assert [name for name, text in tracked_texts().items() if REGISTRY_ADDRESS.search(text)] == []


@pytest.mark.parametrize("line", ["http" + "s://host.example/simple", "--index-url http" + "://host.example/root"])
def test_an_address_of_packages_would_be_found(line: str) -> None:
    assert REGISTRY_ADDRESS.search(line)
