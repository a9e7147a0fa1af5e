"""Bad images: skipped with a message, or read with a note; never a crash, a hang or a wrong pixel."""

import io
import os
import resource
import struct
import sys
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from bad_data import HEIGHT, WIDTH, coco_content, doctor, found, write_coco, write_image
from data_modules import coco_data
from PIL import Image

from onestage.cli import main
from onestage.data.folder import ImageFolder
from onestage.data.image_headers import check_headers
from onestage.data.images import read_image
from onestage.errors import ImageError

PAGE = b"<!DOCTYPE html><html>404</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
UNREADABLE = "image unreadable"


def write_set(root: Path, files: Mapping[str, bytes], sizes: Mapping[str, tuple[int, int]] | None = None) -> Path:
    """Write a COCO file of a good image and these, which have no annotated (height, width) unless it is given."""
    content = coco_content(len(files) + 1)
    for entry, name in zip(content["images"][1:], files, strict=True):
        height, width = (sizes or {}).get(name, (0, 0))
        entry |= {"file_name": name, "height": height, "width": width}
    file = write_coco(root, content)
    for name, data in files.items():
        (root / "train" / name).write_bytes(data)
    return file


def encoded(width: int, height: int, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(WIDTH, HEIGHT, "JPEG", exif=exif)


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_are_skipped_by_doctor_and_training(tmp_path: Path) -> None:
    jpeg = write_image(tmp_path / "a.jpg").read_bytes()
    png = write_image(tmp_path / "a.png").read_bytes()
    bad = {
        "empty.jpg": (b"", UNREADABLE, "is empty (0 bytes)"),
        "page.jpg": (PAGE, UNREADABLE, "web page"),
        "nuls.jpg": (bytes(5000), UNREADABLE, "not an image"),
        "pointer.jpg": (LFS, UNREADABLE, "git lfs pull"),
        "torn.jpg": (jpeg[: len(jpeg) // 2], UNREADABLE, "is cut off"),
        "almost.jpg": (jpeg[:-1], UNREADABLE, f"is cut off: {len(jpeg) - 1} bytes of JPEG"),
        "torn.png": (png[: len(png) // 2], UNREADABLE, "is cut off"),
        "bomb.png": (png_of(20_000, 20_000), UNREADABLE, "claims far more pixels"),
        "largest.png": (png_of(2**31 - 1, 2**31 - 1), UNREADABLE, "claims far more pixels"),
        "other.jpg": (turned(6), "image size", "annotated as 60 x 60"),
        "small.png": (encoded(7, 500), "image too small", "is 7 x 500 px; both sides must be at least 8 px"),
    }
    sizes = {"other.jpg": (60, 60)}
    file = write_set(tmp_path, {name: content for name, (content, _, _) in bad.items()}, sizes)
    code, report = doctor(file)
    skipped = {Path(finding["place"]).name: finding for finding in report["findings"] if finding["effect"] == "skipped"}
    assert (code, set(skipped)) == (3, set(bad))
    for name, (_, rule, words) in bad.items():
        assert skipped[name]["rule"] == rule
        assert words in f"{skipped[name]['problem']}\n{skipped[name]['remedy']}"
    data = coco_data(tmp_path, train=file, val=file, image_size=64, max_bad_fraction=0.99)
    data.setup("fit")
    assert data.annotations("train").image_ids.tolist() == [1]
    assert len(data.annotations("train").skipped) == len(bad)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in list(bad)[:-1]:
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / "train" / name, sizes.get(name))
    unit = 1 if sys.platform == "darwin" else 1024
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ) * unit < 200e6  # nothing was allocated for bombs


def test_unusual_images_are_read_some_with_a_note(tmp_path: Path) -> None:
    frames = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "blue")]}
    files = {
        "frames.gif": (encoded(WIDTH, HEIGHT, "GIF", **frames), "animation"),
        "frames.tif": (encoded(WIDTH, HEIGHT, "TIFF", **frames), "animation"),
        "png.jpg": (encoded(WIDTH, HEIGHT), ""),
        "half.jpg": (turned(3), ""),
        "shown.jpg": (turned(6), ""),
        "stored.jpg": (turned(6), ""),
        "long.png": (encoded(20_000, 30), "extreme shape"),
    }
    sizes = {"half.jpg": (HEIGHT, WIDTH), "shown.jpg": (WIDTH, HEIGHT), "stored.jpg": (HEIGHT, WIDTH)}
    code, report = doctor(write_set(tmp_path, {name: content for name, (content, _) in files.items()}, sizes))
    rules = {(Path(finding["place"]).name, finding["rule"]) for finding in report["findings"]}
    assert code == 0, report["findings"]
    assert {(name, rule) for name, (_, rule) in files.items() if rule} <= rules
    for name in files:  # the first frame, in its colour
        assert read_image(tmp_path / "train" / name, sizes.get(name))[0, 0] == pytest.approx([255, 0, 0], abs=3)


def test_odd_names_are_read_and_printed_with_repr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a" * 251 + ".jpg", "🐈 in Ångström.jpg", "line\nbreak.jpg", "\x1b[31mred\x1b[0m \tand'quote.jpg"]
    jpegs = {name: write_image(tmp_path / "x.jpg", seed).read_bytes() for seed, name in enumerate(names, 1)}
    code, report = doctor(write_set(tmp_path, jpegs))
    assert (code, report["splits"][0]["num_images"]) == (0, 5)
    file = write_set(tmp_path, dict.fromkeys(names, b""))
    assert main(["doctor", str(file)]) == 3
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\t" not in text
    for image in (str(tmp_path / "train" / name) for name in names):
        assert f"\n  {image if image.isprintable() else repr(image)}: is empty (0 bytes)" in text


def test_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes(write_image(tmp_path / "sub" / "a.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "sub" / "a.jpg").write_bytes(b"")
    checks = check_headers(ImageFolder(tmp_path).read("test"))
    assert [check.is_usable for check in checks] == [True, False]


def test_what_is_no_regular_file_is_skipped_and_never_waited_for(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, coco_content()), tmp_path / "train"
    for name in ("a1.jpg", "a2.jpg", "a3.jpg"):
        (folder / name).unlink()
    os.mkfifo(folder / "a1.jpg")
    (folder / "a2.jpg").mkdir()
    (folder / "a3.jpg").symlink_to(tmp_path / "nowhere.jpg")
    results: list[tuple[int, dict]] = []
    thread = threading.Thread(target=lambda: results.append(doctor(file)), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    code, findings = results[0][0], found(results[0][1], "image missing")
    assert (code, [finding["effect"] for finding in findings]) == (3, ["skipped"] * 3)
    assert "'a1.jpg' is not in" in findings[0]["problem"]
