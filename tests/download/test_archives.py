import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from onestage.download.archives import Limits, extract
from onestage.errors import DataError


def make_tar(path: Path, members: list[tuple[str, bytes | None, bytes]]) -> Path:
    """Write a tar of (name, content, kind); content None: without."""
    with tarfile.open(path, "w") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content or b"")
            info.linkname = "/etc/passwd"
            archive.addfile(info, io.BytesIO(content or b""))
    return path


def make_zip(path: Path, members: list[tuple[str, bytes]], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # the constructor would tidy it up
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def make(kind: str, path: Path, names: list[str]) -> Path:
    if kind == "tar":
        return make_tar(path, [(name, b"content", tarfile.REGTYPE) for name in names])
    return make_zip(path, [(name, b"content") for name in names])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "out").mkdir(parents=True)
    return tmp_path / "a" / "out"


def found(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_files_and_folders_are_unpacked(kind: str, folder: Path, tmp_path: Path) -> None:
    extract(make(kind, tmp_path / "archive", ["x/a.txt", "x/y/b.txt", "c.txt", "./d.txt"]), folder)
    assert found(folder) == ["c.txt", "d.txt", "x/a.txt", "x/y/b.txt"]
    assert (folder / "x/y/b.txt").read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "C:evil"])
def test_member_that_leads_out_is_refused_before_anything_is_written(
    kind: str, name: str, folder: Path, tmp_path: Path
) -> None:
    archive = make(kind, tmp_path / "archive", ["good.txt", name])
    with pytest.raises(DataError, match="leads out of the folder"):
        extract(archive, folder)
    assert found(folder.parent) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "archive", [("good", b"1", tarfile.REGTYPE), ("evil", None, kind)])
    with pytest.raises(DataError, match="'evil' is a link, a device or encrypted"):
        extract(archive, folder)
    assert found(folder) == []


def test_link_in_a_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "archive", [("evil", b"/etc/passwd")], mode=0o120777)
    with pytest.raises(DataError, match="is a link"):
        extract(archive, folder)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archive_with_too_many_members_or_bytes_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    archive = make(kind, tmp_path / "archive", [f"{n}.txt" for n in range(5)])  # 7 bytes each
    with pytest.raises(DataError, match="one of more than 4 members"):
        extract(archive, folder, Limits(num_members=4))
    with pytest.raises(DataError, match="unpack to more than"):
        extract(archive, folder, Limits(num_bytes=34))
    assert found(folder) == []
    extract(archive, folder, Limits(num_members=5, num_bytes=35))
    assert len(found(folder)) == 5


def test_zip_bomb_is_refused_by_its_declared_size(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "archive", [("bomb", b"\0" * 50_000_000)])
    assert archive.stat().st_size < 100_000
    with pytest.raises(DataError, match="unpack to more than"):
        extract(archive, folder, Limits(num_bytes=1_000_000))


def test_zip_that_lies_about_a_size_writes_no_more_than_it_said(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "archive", [("bomb", b"\0" * 1_000_000)])
    content = archive.read_bytes().replace(struct.pack("<I", 1_000_000), struct.pack("<I", 1000))
    archive.write_bytes(content)
    with pytest.raises(DataError):
        extract(archive, folder, Limits(num_bytes=10_000))
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 1000


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("names", [["a.txt", "a.txt"], ["a.txt", "A.TXT"], ["a", "a/b"], ["x/../a", "a"]])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_collide_are_refused(kind: str, names: list[str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"twice|lies in what is a file|leads out"):
        extract(make(kind, tmp_path / "archive", names), folder)
    assert found(folder) == []


def test_file_of_another_archive_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    extract(make("tar", tmp_path / "one", ["shared.txt"]), folder)
    extract(make("tar", tmp_path / "two", ["shared.txt", "own.txt"]), folder)
    assert found(folder) == ["own.txt", "shared.txt"]
    (folder / "shared.txt").write_bytes(b"changed")
    with pytest.raises(DataError, match="is there with other content"):
        extract(tmp_path / "two", folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"<html>", b"\x1f\x8b\x08 gzip", b"\0" * 100])
def test_what_is_no_archive_is_refused_or_empty(content: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    if content.strip(b"\0"):
        with pytest.raises(DataError, match="damaged, or no archive"):
            extract(tmp_path / "archive", folder)
    assert found(folder) == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archive_that_was_cut_off_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    archive = make(kind, tmp_path / "archive", ["a.txt", "b.txt"])
    archive.write_bytes(archive.read_bytes()[: 700 if kind == "tar" else -30])
    with pytest.raises(DataError):
        extract(archive, folder)
