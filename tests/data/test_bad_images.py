"""Bad images: skipped with a message, or read with a note; never a crash, a hang or a wrong pixel."""

import io
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from bad_data import HEIGHT, WIDTH, coco_content, doctor, write_coco, write_image
from broken_files import BROKEN, write_broken
from data_modules import coco_data
from image_sets import exif_of
from PIL import Image

from onestage.cli import main
from onestage.data.folder import ImageFolder
from onestage.data.image_headers import check_headers
from onestage.data.images import read_image
from onestage.errors import ImageError

PROBLEMS = {  # said of files in BROKEN; of all others that they are no images, or a decoder's words
    "empty.jpg": "is empty (0 bytes)",
    "page.png": "web page",
    "pointer.jpg": "git lfs pull",
    "cut.jpg": "is cut off: 900 bytes of JPEG",
    "without_end.jpg": "is cut off",
    "cut.png": "is cut off",
    "bomb.png": "claims far more pixels",
    "largest.png": "claims far more pixels",
    "bomb.bmp": "claims far more pixels",
    "huge.jpg": "has 629145600 bytes",
    **{name: f"'{name}' is not in" for name in ("pipe.jpg", "socket.jpg", "dangling.jpg", "loop.jpg", "zero.jpg")},
}
ONLY_DECODING_SHOWS = ("checksum.png", "cut.bmp", "cut.tif")


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
    return encoded(WIDTH, HEIGHT, "JPEG", exif=exif_of(orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bad_images_are_skipped_by_doctor_and_training(tmp_path) -> None:
    broken = [name for name in BROKEN if name.isprintable()]
    bad = {name: ("image missing" if "' is" in PROBLEMS.get(name, "") else "image unreadable") for name in broken}
    bad |= {"folder.jpg": "image missing", "other.jpg": "image size", "small.png": "image too small"}
    problems = {"other.jpg": "annotated as 60 x 60", "small.png": "is 7 x 500 px; both sides must be at least 8 px"}
    sizes, files = {"other.jpg": (60, 60)}, {"other.jpg": turned(6), "small.png": encoded(7, 500)}
    file, folder = write_set(tmp_path, {name: files.get(name, b"") for name in bad}, sizes), tmp_path / "train"
    for name in (*broken, "folder.jpg"):
        (folder / name).unlink()
        (folder / name).mkdir() if name == "folder.jpg" else write_broken(folder / name)
    code, report = doctor(file, "--decode", "--max_bad_fraction", "1")  # which waits for no pipe
    skipped = [finding for finding in report["findings"] if finding["rule"] in set(bad.values())]
    assert (code, len(skipped)) == (3, len(bad))
    in_training = [finding["place"] for finding in skipped if finding["effect"] == "error"]  # once they are read
    assert {Path(place).name for place in in_training} == set(ONLY_DECODING_SHOWS)
    for name, rule in bad.items():
        (one,) = (one for one in skipped if one["place"].endswith(f"/{name}") or f"'{name}'" in one["problem"])
        assert one["rule"] == rule
        assert (PROBLEMS | problems).get(name, "") in f"{one['problem']}\n{one['remedy']}"
    data = coco_data(tmp_path, train=file, val=file, image_size=64, max_bad_fraction=0.99)
    data.setup("fit")
    used = [Path(path).name for path in data.annotations("train").image_paths.tolist()]
    assert used == ["a0.jpg", *(name for name in bad if name in ONLY_DECODING_SHOWS)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in bad.keys() - {"small.png"}:
        with pytest.raises(ImageError, match=name):
            read_image(folder / name, sizes.get(name))
    unit = 1 if sys.platform == "darwin" else 1024
    used_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert used_bytes < 200e6  # nothing was allocated for bombs


def test_unusual_images_are_read_some_with_a_note(tmp_path) -> None:
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


def test_odd_names_are_read_and_printed_with_repr(tmp_path, capsys) -> None:
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


def test_name_that_is_no_utf_8_is_read(tmp_path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes(write_image(tmp_path / "sub" / "a.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "sub" / "a.jpg").write_bytes(b"")
    checks = check_headers(ImageFolder(tmp_path).read("test"))
    assert [check.is_usable for check in checks] == [True, False]
