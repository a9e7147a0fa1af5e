from pathlib import Path

import pytest

from onestage.errors import ConfigError
from onestage.training.runs import RUN_FOLDER_VARIABLE, new_run_folder


@pytest.fixture(autouse=True)
def no_inherited_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_versions_count_up_and_gaps_are_not_filled(tmp_path: Path) -> None:
    (tmp_path / "shapes" / "version_4").mkdir(parents=True)
    (tmp_path / "shapes" / "version_old").mkdir()
    assert new_run_folder(str(tmp_path), "shapes").name == "version_5"
    assert new_run_folder(str(tmp_path), "shapes").name == "version_6"
    assert new_run_folder(str(tmp_path), "voc").name == "version_0"


def test_a_process_started_by_another_shares_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_run_folder(str(tmp_path), "shapes")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run_folder(str(tmp_path), "shapes") == first
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["version_0"]


def test_a_place_that_cannot_be_written_is_named_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*cannot be written(.|\n)*--runs_dir"):
        new_run_folder(str(tmp_path / "file"), "shapes")
