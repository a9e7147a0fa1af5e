"""Installation of a data set from archives, and unpacking of hostile ones."""

import io
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from onestage.cli import main
from onestage.download import download as download_module
from onestage.download.download import PARTS, Part, extract, install
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


def make_archive(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    """Write a zip or tar file by its suffix. kind: of a tar's members."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                info = zipfile.ZipInfo("placeholder")
                info.filename = name  # the constructor would clean it
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
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
    ("files", "message"), [({"../evil": b"c"}, "not safe to unpack"), ({"readme.txt": b"c"}, "VOC2007 is missing")]
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "out").mkdir(parents=True)
    return tmp_path / "a" / "out"


@pytest.mark.parametrize("name", ["archive.tar", "archive.zip"])
def test_files_and_folders_are_unpacked_within_the_limit(name, folder, tmp_path):
    files = {path: b"content" for path in ("x/a.txt", "x/y/b.txt", "./c.txt")}  # 21 bytes
    archive = make_archive(tmp_path / name, files)
    with pytest.raises(DataError, match="unpacks to"):
        extract(archive, folder, max_bytes=20)
    assert found(folder) == []
    extract(archive, folder, max_bytes=21)
    assert found(folder) == ["c.txt", "x/a.txt", "x/y/b.txt"]
    assert (folder / "x/y/b.txt").read_bytes() == b"content"


@pytest.mark.parametrize("suffix", ["tar", "zip"])
@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/tmp/onestage_evil", "..\\evil"])
def test_member_never_leaves_the_folder(suffix, name, folder, tmp_path):
    archive = make_archive(tmp_path / f"archive.{suffix}", {name: b"evil"})
    try:
        extract(archive, folder, max_bytes=100)
    except DataError as reason:
        assert "not safe to unpack" in str(reason)
    inside = {str(path) for path in folder.rglob("*")}
    assert {str(path) for path in folder.parent.rglob("*")} - inside == {str(folder)}
    assert not Path("/tmp/onestage_evil").exists()


@pytest.mark.parametrize("suffix", ["tar", "zip"])
@pytest.mark.parametrize("name", ["", ".", "x" * 300, "a/" + "y" * 300])
def test_member_without_a_usable_name_is_refused(suffix, name, folder, tmp_path):
    with pytest.raises(DataError, match=r"is damaged|no file system"):
        extract(make_archive(tmp_path / f"archive.{suffix}", {name: b"x"}), folder, max_bytes=100)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_out_of_the_folder_and_devices_are_refused(kind, folder, tmp_path):
    with pytest.raises(DataError, match="not safe to unpack"):
        extract(make_archive(tmp_path / "archive.tar", {"evil": b""}, kind), folder, max_bytes=100)
    assert list(folder.iterdir()) == []


def test_zip_with_a_false_size_writes_no_more_than_it_declares(folder, tmp_path):
    archive = make_archive(tmp_path / "archive.zip", {"bomb": b"\0" * 1_000_000})
    archive.write_bytes(archive.read_bytes().replace(struct.pack("<I", 1_000_000), struct.pack("<I", 1000)))
    with pytest.raises(DataError):
        extract(archive, folder, max_bytes=10_000)
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 1000


@pytest.mark.parametrize("name", ["", "PK\x03\x04 no zip", "<html>", "archive.tar", "archive.zip"])
def test_other_files_and_truncated_archives_are_refused(name, folder, tmp_path):
    content = name.encode()
    if name.startswith("archive"):
        content = make_archive(tmp_path / name, {"a.txt": b"content" * 100}).read_bytes()[
            : 700 if "tar" in name else -30
        ]
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(DataError, match="is damaged, not an archive"):
        extract(tmp_path / "archive", folder, max_bytes=100)
