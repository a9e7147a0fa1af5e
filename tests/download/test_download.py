"""Installation of a data set from archives."""

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from onestage.cli import main
from onestage.download import download as download_module
from onestage.download.download import PARTS, Part, install
from onestage.download.fetch import RemoteFile
from onestage.errors import ConfigError, DataError

WHOLE = ["VOC2007/JPEGImages/1.jpg", "VOC2007/JPEGImages/2.jpg", "val2017/3.jpg"]


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the servers."""
    folder = tmp_path / "offered"
    folder.mkdir()

    def copy(remote: RemoteFile, target: Path, mirrors: Sequence[str]) -> Path:
        if not (target / remote.name).exists():
            if not (folder / remote.name).exists():
                raise DataError(f"{remote.name} cannot be downloaded")
            shutil.copy(folder / remote.name, target)
        return target / remote.name

    monkeypatch.setattr(download_module, "fetch", copy)
    return folder


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip or tar file by its suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def offer(offered: Path, name: str, files: dict[str, bytes]) -> RemoteFile:
    return RemoteFile(name, (), "", make_archive(offered / name, files).stat().st_size)


@pytest.fixture
def parts(offered: Path) -> tuple[Part, ...]:
    """A folder from two tar files, as in VOC, and one from a zip file, as in COCO."""
    first = offer(offered, "trainval.tar", {"VOCdevkit/VOC2007/JPEGImages/1.jpg": b"one"})
    second = offer(offered, "test.tar", {"VOCdevkit/VOC2007/JPEGImages/2.jpg": b"two"})
    third = offer(offered, "val2017.zip", {"val2017/3.jpg": b"three"})
    return (Part("VOC2007", "VOCdevkit/VOC2007", (first, second)), Part("val2017", "val2017", (third,)))


def found(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_archives_are_merged_removed_and_fetched_once(parts, offered, tmp_path, capsys):
    install(parts, tmp_path / "data" / "set")
    assert found(tmp_path / "data" / "set") == WHOLE
    shutil.rmtree(offered)
    capsys.readouterr()
    install(parts, tmp_path / "data" / "set")
    assert capsys.readouterr().out == "VOC2007: exists, skipped\nval2017: exists, skipped\n"


def test_kept_archives_are_used_again(parts, offered, tmp_path):
    install(parts, tmp_path / "set", keep_archives=True)
    shutil.rmtree(offered)
    shutil.rmtree(tmp_path / "set" / "val2017")
    install(parts, tmp_path / "set", keep_archives=True)
    assert found(tmp_path / "set")[-3:] == WHOLE


def test_failed_download_keeps_complete_folders(parts, offered, tmp_path):
    (offered / "val2017.zip").unlink()
    with pytest.raises(DataError, match=r"val2017\.zip cannot be downloaded"):
        install(parts, tmp_path / "set")
    assert [name for name in found(tmp_path / "set") if not name.startswith(".downloads")] == WHOLE[:2]


@pytest.mark.parametrize(
    ("files", "message"), [({"../evil": b"c"}, "cannot be unpacked"), ({"readme.txt": b"c"}, "No such file")]
)
def test_failed_unpacking_leaves_no_folder(offered, tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        install((Part("VOC2007", "VOCdevkit/VOC2007", (offer(offered, "a.tar", files),)),), tmp_path / "set")
    assert [path.name for path in (tmp_path / "set").iterdir()] == [".downloads"]
    assert not (tmp_path / "evil").exists()


def test_full_disk_and_bad_mirrors_are_reported_before_the_download(parts, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="mirrors must be URLs that start with"):
        install(parts, tmp_path / "set", mirrors=["file:///etc"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match=r"(?s)GB are needed.*--root"):
        install(parts, tmp_path / "set")
    assert found(tmp_path / "set") in ([], [".downloads/.lock"])


def test_second_process_is_refused_until_the_first_one_dies(parts, tmp_path):
    (tmp_path / "set" / ".downloads").mkdir(parents=True)
    program = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True), sys.stdin.read()"
    words = [sys.executable, "-c", program, str(tmp_path / "set" / ".downloads" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is downloading into it"):
            install(parts, tmp_path / "set")
        other.kill()
        other.wait()
    install(parts, tmp_path / "set")
    assert found(tmp_path / "set") == WHOLE


@pytest.mark.parametrize(
    ("name", "folders"), [("voc", ["VOC2007", "VOC2012"]), ("coco", ["annotations", "val2017", "train2017"])]
)
def test_command_knows_servers_and_checksums_and_prints_the_next_command(name, folders, monkeypatch, capsys, tmp_path):
    assert [part.folder for part in PARTS[name]] == folders
    for remote in (remote for part in PARTS[name] for remote in part.archives):
        assert (len(remote.md5), len(remote.servers)) == (32, 2)
        assert remote.servers[0].startswith("https://")
    asked = []
    monkeypatch.setattr(download_module, "install", lambda parts, root, **options: asked.append((parts, root, options)))
    assert main(["download", name, "--root", str(tmp_path), "--mirrors", "http://mirror.example"]) == 0
    assert asked == [(PARTS[name], tmp_path, {"mirrors": ["http://mirror.example"], "keep_archives": False})]
    printed = capsys.readouterr().out
    assert f"onestage fit --config configs/{name}_ssd300.yaml --data.source.path {tmp_path}" in printed
    assert f"onestage doctor {tmp_path}" in printed
    assert main(["download", "imagenet"]) == 2
