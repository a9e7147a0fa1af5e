import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities import rank_zero_only

from onestage.errors import ConfigError, ResourceError
from onestage.reliability.runs import new_locked_folder, take_run_folder
from onestage.training.run import is_first_process


def test_versions_count_up_and_gaps_are_not_filled(tmp_path: Path) -> None:
    (tmp_path / "shapes" / "version_4").mkdir(parents=True)
    (tmp_path / "shapes" / "version_old").mkdir()
    assert new_locked_folder(str(tmp_path), "shapes", is_writer=True).name == "version_5"
    assert new_locked_folder(str(tmp_path), "shapes", is_writer=True).name == "version_6"
    assert new_locked_folder(str(tmp_path), "voc", is_writer=True).name == "version_0"


@pytest.mark.parametrize(("rank", "node"), [(1, "0"), (0, "1")])
def test_only_the_first_process_makes_a_folder(monkeypatch: pytest.MonkeyPatch, rank: int, node: str) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setenv("NODE_RANK", node)
    assert not is_first_process(SimpleNamespace(trainer=SimpleNamespace(num_nodes=2)))


def test_a_place_that_cannot_be_written_is_named_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*cannot be written(.|\n)*--runs_dir"):
        new_locked_folder(str(tmp_path / "file"), "shapes", is_writer=True)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("method", ["mkdir", "open"])
def test_a_machine_that_refuses_a_folder_is_no_error_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, method: str
) -> None:
    """A new folder, and that of a run that goes on."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ResourceError, match=f"{tmp_path}.*{os.strerror(number)}(.|\n)*--runs_dir") as refused:
        new_locked_folder(str(tmp_path), "shapes", is_writer=True) if method == "mkdir" else take_run_folder(tmp_path)
    assert refused.value.exit_code == 5
