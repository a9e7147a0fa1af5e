"""The one decoder: every format as upright 8-bit RGB, and anything else refused with its name."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from broken_files import png_that_claims
from image_sets import exif_of
from PIL import Image, ImageOps

from onestage.data.image_headers import check_header
from onestage.data.images import ImageHeader, open_image, read_image, read_plain_jpeg
from onestage.errors import ImageError

RNG = np.random.default_rng(0)


def picture(height: int = 48, width: int = 64) -> Image.Image:
    """Smooth and asymmetric, so that a turn or a mixed-up channel shows after JPEG too."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * y, 3 * x, 255 - 2 * x - y], axis=2).astype(np.uint8))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def jpeg_bytes(height: int = 48, width: int = 64, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(height, width).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".gif"])
def test_lossless_formats_give_the_pixels_as_rgb(tmp_path, suffix) -> None:
    few_colours = picture().quantize(64).convert("RGB")  # a GIF holds no more than 256
    path = save(tmp_path / f"a{suffix}", few_colours, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    np.testing.assert_array_equal(image, np.asarray(few_colours))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 2}])
def test_jpeg_is_decoded_as_pillow_does(tmp_path, options) -> None:
    path = save(tmp_path / "a.jpg", picture(), **options)
    np.testing.assert_allclose(read_image(path), np.asarray(Image.open(path)), atol=3)


def pillow_header(content: bytes) -> ImageHeader | None:
    """Return the header that Pillow reads; None if it refuses the file."""
    try:
        return open_image("a.jpg", io.BytesIO(content))[1]
    except ImageError:
        return None


@pytest.mark.filterwarnings("ignore")  # of Pillow about damaged metadata
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_header_of_a_plain_jpeg_is_that_of_pillow_or_left_to_it(mode) -> None:
    exif = exif_of(6)
    exif.update({0x010F: "maker", 0x011A: 72.0, 0x0128: 2})
    options = {"exif": exif, "icc_profile": b"profile", "comment": b"text", "dpi": (72, 72), "progressive": True}
    options |= {"restart_marker_blocks": 2, "xmp": b"<x/>"}
    contents = []
    for names in ((), *((name,) for name in options), tuple(options)):
        buffer = io.BytesIO()
        picture().convert(mode).save(buffer, "JPEG", **{name: options[name] for name in names})
        contents.append(buffer.getvalue())
    read = [read_plain_jpeg(content) for content in contents]
    assert read == list(map(pillow_header, contents))
    assert [header[:4] for header in read if header] == [("JPEG", 48, 64, n) for n in (1, 6, 1, 1, 1, 1, 1, 1, 6)]
    end_of_header = contents[-1].index(b"\xff\xda") + 10
    for place in range(end_of_header):  # every byte damaged, and the file cut there
        assert read_plain_jpeg(contents[-1][:place]) is None
        value = (0, 2, 255, contents[-1][place] ^ 1)[place % 4]
        damaged = contents[-1][:place] + bytes([value]) + contents[-1][place + 1 :]
        header = read_plain_jpeg(damaged)
        assert header is None or header == pillow_header(damaged), place


GREEN = (10, 200, 30)
# Mode of Pillow, colour in it, expected RGB, formats that hold it; all worked out by hand.
MODES = [
    ("1", 1, (255, 255, 255), ".png .tif .bmp .gif"),
    ("L", 77, (77, 77, 77), ".png .tif .bmp .gif .jpg .webp"),
    ("LA", (77, 9), (77, 77, 77), ".png .tif"),
    ("RGB", GREEN, GREEN, ".png .tif .bmp .webp .gif .jpg"),
    ("RGBX", (*GREEN, 9), GREEN, ".tif .jpg"),
    ("RGBA", (*GREEN, 200), GREEN, ".png .tif .webp"),
    ("RGBA", (*GREEN, 0), GREEN, ".png .tif"),  # shown, and not painted over
    ("CMYK", (255, 0, 0, 0), (0, 255, 255), ".tif .jpg"),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0), ".tif .jpg"),
    ("CMYK", (0, 0, 0, 155), (100, 100, 100), ".tif .jpg"),
    ("YCbCr", (76, 85, 255), (254, 0, 0), ".tif .jpg"),  # R = Y + 1.402 (Cr - 128), B = Y + 1.772 (Cb - 128)
    ("LAB", (255, 128, 128), (255, 255, 255), ".tif"),  # L of 255; a and b of 128 are 0
    ("I;16", 0xABCD, (0xAB,) * 3, ".png .tif"),
    ("I;16B", 0x12FF, (0x12,) * 3, ".tif"),
]
PIXELS = [  # of OpenCV, as BGR
    (np.uint8, 77, (77, 77, 77), ".png .tif .bmp .webp .jpg"),
    (np.uint8, (30, 200, 10), GREEN, ".png .tif .bmp .webp .jpg"),
    (np.uint8, (30, 200, 10, 99), GREEN, ".png .tif .webp"),
    (np.uint16, 0x12FF, (0x12,) * 3, ".png .tif"),
    (np.uint16, 0x00FF, (0, 0, 0), ".png .tif"),  # and a warning; see below
    (np.uint16, (0x00FF, 0x1234, 0xABCD), (0xAB, 0x12, 0), ".png .tif"),
    (np.uint16, (0x00FF, 0x1234, 0xABCD, 9), (0xAB, 0x12, 0), ".png .tif"),
]
FLOATS = [("F", 0.5), ("I", 3), *((kind, n) for kind in (np.float32, np.float64, np.int32) for n in (1, (1, 2, 3)))]


def flat(kind: object, colour: object, path: Path) -> Path:
    """Write an image of one colour."""
    if isinstance(kind, str):
        options = {"lossless": True} if path.suffix == ".webp" else {"quality": 95}
        return save(path, Image.new(kind, (16, 16), colour), **options)
    pixels = np.full((16, 16, *np.shape(colour)), colour, dtype=kind)
    assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_WEBP_QUALITY, 101] if path.suffix == ".webp" else [])
    return path


@pytest.mark.parametrize(("kind", "colour", "expected", "suffixes"), [*MODES, *PIXELS])
def test_every_mode_and_depth_is_decoded_to_hand_computed_values(tmp_path, kind, colour, expected, suffixes) -> None:
    for suffix in suffixes.split():
        path = flat(kind, colour, tmp_path / f"a{suffix}")
        image = read_image(path)
        np.testing.assert_allclose(image[[0, 8], [0, 8]], [expected] * 2, atol=3 if suffix == ".jpg" else 1)
        said = {finding.rule for finding in check_header(str(path)).findings}
        assert ("16 bits" in said) == (kind is np.uint16 or "16" in str(kind))
        has_alpha = kind in ("LA", "RGBA") or (np.shape(colour) == (4,) and kind in (np.uint8, np.uint16))
        assert ("transparency" in said) == has_alpha


def tiff(path: Path, strips: list[bytes], **tags: list[int]) -> Path:
    """Write an uncompressed TIFF of 16 x 16 px, little-endian (TIFF 6.0, section 2). tags: other values or fields."""
    fields = {256: [16], 257: [16], 258: [8], 259: [1], 262: [1], 273: [0] * len(strips), 277: [1], 278: [16]}
    fields |= {279: [len(strip) for strip in strips]} | {int(tag[1:]): values for tag, values in tags.items()}
    data, num_bytes = b"".join(strips), 8 + sum(map(len, strips))
    starts = np.cumsum([8, *map(len, strips)])[:-1].tolist()
    entries, values = b"", b""
    for tag, numbers in sorted((fields | {273: starts}).items()):
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        entries += struct.pack("<HHI", tag, 3, len(numbers))
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", num_bytes + len(values))
        values += packed if len(packed) > 4 else b""
    folder = struct.pack("<H", len(fields)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", num_bytes + len(values)) + data + values + folder)
    return path


@pytest.mark.parametrize(
    ("photometric", "values", "expected"),
    [(2, (0x0AFF, 0xC8FF, 0x1EFF), GREEN), (5, (0xFFFF, 0x0000, 0x00FF, 0x00FF), (0, 255, 255))],
)
def test_planes_of_16_bits_give_their_upper_8(tmp_path, photometric, values, expected) -> None:
    planes, number = [struct.pack("<H", value) * 256 for value in values], len(values)
    path = tiff(tmp_path / "a.tif", planes, t258=[16] * number, t262=[photometric], t277=[number], t284=[2])
    assert read_image(path)[8, 8].tolist() == list(expected)
    assert [finding.rule for finding in check_header(str(path)).findings] == ["16 bits"]


@pytest.mark.parametrize(
    ("content", "tags", "problem"),
    [
        *((None, value, "values, which have no fixed range; it must|is not an image that can be") for value in FLOATS),
        (bytes.fromhex("abcabc") * 128, {"t258": [12]}, "holds 12 bits; it must be 8 or 16 bits, from 0 for black"),
        (b"\x9c" * 256, {"t339": [2]}, "holds signed values; it must"),
        (b"\x12\x34" * 256, {"t258": [16], "t262": [0]}, "holds 16 bits from 0 for white; it must"),
        (b"\1" * 256, {"t262": [3], "t320": [10, 200, 30] * 256}, "holds colours of 8 bits in a table of 16; it must"),
    ],
)
def test_values_without_a_range_or_read_wrong_are_refused_by_their_header(tmp_path, content, tags, problem) -> None:
    path = tmp_path / "a.tif"
    flat(*tags, path) if content is None else tiff(path, [content], **tags)
    check = check_header(str(path))
    assert not check.is_usable
    with pytest.raises(ImageError, match=problem) as caught:
        read_image(path)
    assert str(caught.value).startswith(check.findings[0].line)


def test_ycck_of_a_jpeg_is_decoded(tmp_path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (155, 127, 127, 0)), quality=100)
    content = path.read_bytes()  # with 100, 128, 128, 255 in its blocks: 255 - ink
    place = content.index(b"Adobe") + 11
    path.write_bytes(content[:place] + b"\2" + content[place + 1 :])  # now these are Y Cb Cr K: gray ink of 100
    np.testing.assert_allclose(read_image(path)[8, 8], (155,) * 3, atol=2)


@pytest.mark.parametrize(("mode", "suffixes"), [("P", ".png .tif .gif .bmp"), ("PA", ".tif")])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_palettes_of_any_depth_give_their_colours(tmp_path, mode, suffixes, bits) -> None:
    indices, options = Image.new("P", (16, 16), 1), {"bits": bits} if mode == "P" else {}
    indices.putpalette([200, 0, 0, *GREEN])
    for suffix in suffixes.split():
        path = save(tmp_path / f"a{suffix}", indices.convert(mode), **options)
        assert read_image(path)[8, 8].tolist() == list(GREEN)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".gif", {}), (".webp", {"lossless": True}), (".tif", {}), (".png", {}), (".jpg", {"format": "MPO"})],
)
def test_of_an_animation_or_several_jpegs_the_first_is_taken(tmp_path, suffix, options) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(read_image(path), np.asarray(frames[0]), atol=3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_is_applied_unless_the_annotated_size_is_that_without_it(tmp_path, orientation, suffix) -> None:
    path = save(tmp_path / f"a{suffix}", picture(), exif=exif_of(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    for image in (read_image(path), read_image(path, (0, 0)), read_image(path, expected.shape[:2])):
        np.testing.assert_allclose(image, expected, atol=3)
    assert read_image(path).shape[:2] == ((64, 48) if orientation >= 5 else (48, 64))
    if orientation >= 5 and suffix == ".jpg":  # annotated without the turn
        np.testing.assert_allclose(read_image(path, (48, 64)), np.asarray(Image.open(path)), atol=3)


def test_damaged_exif_and_data_behind_the_end_of_a_jpeg_are_no_harm(tmp_path) -> None:
    path = save(tmp_path / "a.jpg", picture(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(path).shape == (48, 64, 3)
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes() + b"\0" * 100 + b"maker's notes")
    assert read_image(tmp_path / "a.jpg").shape == (48, 64, 3)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".gif"])
def test_a_truncated_file_is_refused(tmp_path, suffix, fraction) -> None:
    noise = Image.fromarray(RNG.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    whole = save(tmp_path / f"whole{suffix}", noise).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "Replace the file" in str(caught.value)


def test_a_jpeg_cut_in_the_middle_is_refused_even_if_its_thumbnail_is_whole(tmp_path) -> None:
    content = jpeg_bytes(400, 400, exif=b"Exif\0\0" + jpeg_bytes(16, 16))
    (tmp_path / "whole.jpg").write_bytes(content)
    assert read_image(tmp_path / "whole.jpg").shape == (400, 400, 3)
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ImageError, match=r"cut\.jpg: is cut off or damaged"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (8_001, 8_000)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch, width, height) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(width, height))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"bomb\.png: claims .* at most 64 million(.|\n)*Shrink"):
        read_image(path)
