import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from onestage.download import installation
from onestage.download.download import Patience, RemoteFile
from onestage.download.installation import Part, install
from onestage.errors import DataError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ONE_ATTEMPT = Patience(attempts=1, wait_seconds=0.01, timeout_seconds=60)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which a web server offers it."""
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def offer(served: tuple[Path, str], name: str, files: dict[str, bytes]) -> RemoteFile:
    folder, url = served
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        with tarfile.open(folder / name, "w") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    content = (folder / name).read_bytes()
    return RemoteFile(name, (f"{url}/{name}",), hashlib.md5(content).hexdigest(), len(content))


@pytest.fixture
def parts(served: tuple[Path, str]) -> tuple[Part, ...]:
    """A data set of one folder in two tar files, and one in a zip file, as VOC and COCO have them."""
    first = offer(served, "trainval.tar", {"VOCdevkit/VOC2007/JPEGImages/1.jpg": b"one"})
    second = offer(served, "test.tar", {"VOCdevkit/VOC2007/JPEGImages/2.jpg": b"two"})
    third = offer(served, "val2017.zip", {"val2017/3.jpg": b"three"})
    return (Part("VOC2007", (first, second), "VOCdevkit/VOC2007"), Part("val2017", (third,), "val2017"))


def found(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["VOC2007/JPEGImages/1.jpg", "VOC2007/JPEGImages/2.jpg", "val2017/3.jpg"]


def run(parts: tuple[Part, ...], root: Path, **options: object) -> list[str]:
    lines: list[str] = []
    install(parts, root, patience=ONE_ATTEMPT, report=lines.append, **options)
    return lines


def test_parts_are_merged_and_archives_removed(parts: tuple[Part, ...], tmp_path: Path) -> None:
    run(parts, tmp_path / "data" / "set")
    assert found(tmp_path / "data" / "set") == WHOLE


def test_second_run_downloads_nothing(parts: tuple[Part, ...], served: tuple[Path, str], tmp_path: Path) -> None:
    run(parts, tmp_path / "set")
    for archive in served[0].iterdir():
        archive.unlink()
    assert run(parts, tmp_path / "set") == ["VOC2007: is there already", "val2017: is there already"]


def test_archives_can_be_kept_and_are_then_used(
    parts: tuple[Part, ...], served: tuple[Path, str], tmp_path: Path
) -> None:
    run(parts, tmp_path / "one", keep_archives=True)
    assert ".downloads/val2017.zip" in found(tmp_path / "one")
    for archive in served[0].iterdir():
        archive.unlink()
    (tmp_path / "one" / "val2017" / "3.jpg").unlink()
    (tmp_path / "one" / "val2017").rmdir()
    run(parts, tmp_path / "one", keep_archives=True)
    assert found(tmp_path / "one")[-3:] == WHOLE


def test_failure_keeps_what_is_whole_and_leaves_no_half(
    parts: tuple[Part, ...], served: tuple[Path, str], tmp_path: Path
) -> None:
    (served[0] / "val2017.zip").unlink()
    with pytest.raises(DataError, match=r"(?s)val2017\.zip cannot be downloaded.*404"):
        run(parts, tmp_path / "set")
    assert [name for name in found(tmp_path / "set") if not name.startswith(".downloads")] == WHOLE[:2]


def test_archive_that_fails_while_it_is_unpacked_leaves_no_folder(served: tuple[Path, str], tmp_path: Path) -> None:
    good = offer(served, "good.tar", {"VOCdevkit/VOC2007/a": b"a"})
    evil = offer(served, "evil.tar", {"VOCdevkit/VOC2007/b": b"b", "../evil": b"c"})
    with pytest.raises(DataError, match="leads out of the folder"):
        run((Part("VOC2007", (good, evil), "VOCdevkit/VOC2007"),), tmp_path / "set")
    names = [path.name for path in (tmp_path / "set").iterdir()]
    assert names == [".downloads"]
    assert not (tmp_path / "evil").exists()


def test_archive_of_something_else_is_refused(served: tuple[Path, str], tmp_path: Path) -> None:
    other = offer(served, "other.tar", {"readme.txt": b"hello"})
    with pytest.raises(DataError, match="holds no VOCdevkit/VOC2007"):
        run((Part("VOC2007", (other,), "VOCdevkit/VOC2007"),), tmp_path / "set")


def test_disk_is_checked_before_anything_is_downloaded(
    parts: tuple[Part, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match="GB are needed"):
        run(parts, tmp_path / "set")
    assert found(tmp_path / "set") == []


def test_mirror_is_asked_first(parts: tuple[Part, ...], served: tuple[Path, str], tmp_path: Path) -> None:
    away = tuple(
        part._replace(archives=tuple(one._replace(urls=("http://127.0.0.1:9/x",)) for one in part.archives))
        for part in parts
    )
    run(away, tmp_path / "set", mirrors=[served[1]])
    assert found(tmp_path / "set") == WHOLE


@pytest.mark.parametrize(
    ("name", "folders"), [("voc", ["VOC2007", "VOC2012"]), ("coco", ["annotations", "val2017", "train2017"])]
)
def test_scripts_name_servers_checksums_and_the_next_command(
    name: str, folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = __import__(f"download_{name}")
    assert [part.folder for part in script.PARTS] == folders
    for remote in (remote for part in script.PARTS for remote in part.archives):
        assert len(remote.md5) == 32
        assert len(remote.urls) == 2
        assert remote.urls[0].startswith("https://")
        assert all(url.endswith(f"/{remote.name}") for url in remote.urls)
    asked = []
    monkeypatch.setattr(installation, "install", lambda parts, root, **options: asked.append((parts, root, options)))
    monkeypatch.setattr(sys, "argv", ["download", "--root", str(tmp_path), "--mirror", "http://mirror.example"])
    code = installation.run_installation(script.__doc__, script.PARTS, "data/x", script._next_steps)
    assert (code, asked) == (
        0,
        [(script.PARTS, tmp_path, {"mirrors": ["http://mirror.example"], "keep_archives": False})],
    )
    said = capsys.readouterr().out
    assert f"onestage fit --config configs/{name}_ssd300.yaml --data.root {tmp_path}" in said
    assert "onestage doctor" in said


def test_script_ends_with_the_exit_code_of_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = RemoteFile("a.tar", ("http://127.0.0.1:9/a.tar",), "0" * 32, 1)
    monkeypatch.setattr(installation, "install", partial(install, patience=ONE_ATTEMPT))
    monkeypatch.setattr(sys, "argv", ["download", "--root", str(tmp_path)])
    assert installation.run_installation("", (Part("x", (gone,), "x"),), "data/x", str) == 3
    assert "a.tar cannot be downloaded" in capsys.readouterr().out
