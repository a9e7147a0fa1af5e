"""Bad images: skipped with a message, or read with a note; never a crash, a hang or a wrong pixel."""

import os
import resource
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_data import HEIGHT, WIDTH, coco_content, doctor, found, write_coco, write_image
from data_modules import coco_data
from PIL import Image

from onestage.data.image_headers import check_header, check_headers
from onestage.data.images import read_image
from onestage.errors import ImageError

PAGE = b"<!DOCTYPE html><html>404</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def one_image(tmp_path: Path, name: str = "a1.jpg", size: tuple[int, int] | None = None) -> tuple[Path, Path]:
    """A COCO file of four images and the path of the second, whose size the file does not give unless asked for."""
    content = coco_content()
    content["images"][1] = {"id": 2, "file_name": name}
    if size is not None:
        content["images"][1] |= {"height": size[0], "width": size[1]}
    file = write_coco(tmp_path, content)
    return file, tmp_path / "train" / name


def assert_skipped(file: Path, image: Path, rule: str, *expected: str, options: tuple[str, ...] = ()) -> None:
    """Doctor names the image and exits with 3; if the header shows it, training starts without the image."""
    code, report = doctor(file, *options)
    (finding,) = found(report, rule)
    assert (code, finding["effect"], finding["place"]) == (3, "skipped", str(image))
    assert finding["remedy"]
    for words in expected:
        assert words in f"{finding['problem']}\n{finding['remedy']}"
    if not options:
        data = coco_data(file.parent, train=file, val=file, image_size=64)
        data.setup("fit")
        assert data.annotations("train").image_ids.tolist() == [1, 3, 4]
        assert str(image) in data.annotations("train").skipped[0]


def assert_readable(file: Path, image: Path, rule: str | None) -> np.ndarray:
    """Doctor exits with 0 and reports `rule`, if any; the decoder returns 8-bit RGB."""
    code, report = doctor(file)
    assert code == 0, report["findings"]
    if rule is not None:
        assert [finding["place"] for finding in found(report, rule)] == [str(image)]
    pixels = read_image(image)
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    return pixels


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty (0 bytes)"), (PAGE, "web page"), (b"\0" * 5000, "not an image"), (LFS, "git lfs pull")],
    ids=["empty", "web page", "NULs", "LFS"],
)
def test_file_that_is_no_image_is_skipped(tmp_path: Path, content: bytes, expected: str) -> None:
    file, image = one_image(tmp_path)
    image.write_bytes(content)
    assert_skipped(file, image, "image unreadable", expected)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_truncated_jpeg_is_skipped(tmp_path: Path, share: float) -> None:
    file, image = one_image(tmp_path)
    content = image.read_bytes()
    image.write_bytes(content[: int(share * len(content))])
    assert_skipped(file, image, "image unreadable", str(int(share * len(content))))
    with pytest.raises(ImageError, match="cut off or damaged"):
        read_image(image)


def test_corrupt_png_is_skipped_and_the_process_lives(tmp_path: Path) -> None:
    file, image = one_image(tmp_path, "a1.png")
    content = bytearray(image.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)  # in the compressed pixels: the header cannot tell
    image.write_bytes(bytes(content))
    assert_skipped(file, image, "image unreadable", "damaged", options=("--decode",))
    image.write_bytes(bytes(content[:middle]))
    assert_skipped(file, image, "image unreadable", "cut off")


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_bomb_is_refused_before_anything_is_allocated(tmp_path: Path, side: int) -> None:
    file, image = one_image(tmp_path, "a1.png")
    image.write_bytes(png_of(side, side))
    assert len(image.read_bytes()) < 100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_skipped(file, image, "image unreadable")
    with pytest.raises(ImageError, match=r"a1\.png"):
        read_image(image)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 200e6


@pytest.mark.parametrize("suffix", [".gif", ".tif"])
def test_first_frame_of_several_is_taken_with_a_warning(tmp_path: Path, suffix: str) -> None:
    file, image = one_image(tmp_path, f"a1{suffix}")
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "green")]
    frames[0].save(image, save_all=True, append_images=frames[1:])
    assert assert_readable(file, image, "animation")[0, 0].tolist() == [255, 0, 0]


def test_suffix_of_another_format_is_noted(tmp_path: Path) -> None:
    file, image = one_image(tmp_path)
    write_image(image.with_suffix(".png"), seed=8).replace(image)
    assert assert_readable(file, image, "suffix of another format").shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_follows_the_annotated_size(tmp_path: Path, orientation: int) -> None:
    sides = (HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT)
    for annotated in {sides, (HEIGHT, WIDTH)}:
        file, image = one_image(tmp_path, size=annotated)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(read_image(image)).resize((WIDTH, HEIGHT)).save(image, exif=exif)
        code, report = doctor(file)
        assert (code, len(found(report, "turned by EXIF"))) == (0, 1)
    file, image = one_image(tmp_path, size=(60, 60))
    Image.new("RGB", (WIDTH, HEIGHT)).save(image, exif=exif)
    assert_skipped(file, image, "image size", "annotated as 60 x 60")


def test_smallest_images_are_skipped_and_long_ones_reported(tmp_path: Path) -> None:
    file, image = one_image(tmp_path)
    Image.new("RGB", (7, 500)).save(image)
    assert_skipped(file, image, "image too small", "is 7 x 500 px", "at least 8 px")
    Image.new("RGB", (20_000, 30)).save(image)
    assert_readable(file, image, "extreme shape")


def test_what_is_no_regular_file_is_skipped_and_never_waited_for(tmp_path: Path) -> None:
    file, image = one_image(tmp_path)
    for name in ("a1.jpg", "a2.jpg", "a3.jpg"):
        (image.parent / name).unlink()
    os.mkfifo(image)
    (image.parent / "a2.jpg").mkdir()
    (image.parent / "a3.jpg").symlink_to(tmp_path / "nowhere.jpg")
    results: list[tuple[int, dict]] = []
    thread = threading.Thread(target=lambda: results.append(doctor(file)), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    code, findings = results[0][0], found(results[0][1], "image missing")
    assert (code, [finding["effect"] for finding in findings]) == (3, ["skipped"] * 3)
    assert "'a1.jpg' is not in" in findings[0]["problem"]


@pytest.fixture
def not_root() -> Iterator[None]:
    """For root no file is unreadable; so be someone else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_file_is_skipped(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _, image = one_image(tmp_path)
    image.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    request.getfixturevalue("not_root")
    check = check_header(str(image))
    assert not check.is_usable
    assert "Permission denied" in check.findings[0].problem
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(image)


@pytest.mark.parametrize(
    "name",
    ["a" * 251 + ".jpg", "🐈 in Ångström.jpg", "line\nbreak.jpg", "\x1b[31mred\x1b[0m \tand'quote.jpg"],
)
def test_odd_names_are_read_and_printed_with_repr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from onestage.cli import main

    content = coco_content()
    content["images"][1]["file_name"] = name
    file = write_coco(tmp_path, content)
    image = write_image(tmp_path / "train" / "x.jpg", seed=1).rename(tmp_path / "train" / name)
    code, report = doctor(file)
    assert (code, report["splits"][0]["num_images"]) == (0, 4)
    image.write_bytes(b"")
    capsys.readouterr()
    assert main(["doctor", str(file)]) == 3
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\t" not in text
    shown = str(image) if name.isprintable() else repr(str(image))
    assert f"\n  {shown}: is empty (0 bytes)" in text


def test_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    from onestage.data.folder import list_images

    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes(write_image(tmp_path / "sub" / "a.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "sub" / "a.jpg").write_bytes(b"")
    checks = check_headers(list_images(tmp_path, ["cat"], [1]))
    assert [check.is_usable for check in checks] == [True, False]
