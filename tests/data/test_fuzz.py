"""Thousands of damaged files: each is read or refused with a message; no traceback, no dead process, no bomb.

As a program, in the process of each test: mutate a good sample of each format and read it.
"""

import faulthandler
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from bad_data import coco_content, write_coco
from peak_memory import peak_bytes
from processes import finish, start

from onestage.convert.conversion import convert_splits
from onestage.data.coco import parse_coco
from onestage.data.image_headers import check_header
from onestage.data.images import read_image
from onestage.data.layouts import find_splits, read_splits
from onestage.data.voc import parse_voc
from onestage.data.yolo import YOLO
from onestage.doctor.anchors import find_anchors
from onestage.doctor.checks import examine
from onestage.doctor.report import as_json, as_text
from onestage.errors import OnestageError

MAX_BYTES = 1 << 30
MAX_SECONDS = 2.0  # of processor time, which a busy machine does not stretch
DOCTOR_EVERY = 5  # mutations
TOKENS = [
    b"-1", b"0", b"NaN", b"1e999", b"9" * 400, b"null", b"[]", b"{}", b'"', b"'", b"<", b">", b"&x;", b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf", b"..", b"/", b"\\", b"\n", b"\r\n", b"\x1b[31m", b"true", b"[" * 2000, b"<a>" * 2000, b"- ", b": ",
    "狗".encode(), b"1e-320", b"*x", b"&x ", b"!!python/object:os.system ",
]  # fmt: skip


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change some bytes, or put in, repeat or take out a piece."""
    result = bytearray(content)
    for _ in range(draw.randint(1, 2)):
        place = draw.randrange(len(result) + 1)
        end = min(len(result), place + draw.choice([1, 2, 8, 40, 400]))
        kind = draw.choice([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])  # a number is what most mistakes are made with
        if kind == 0:
            result[place:end] = bytes(draw.randrange(256) for _ in range(end - place))
        elif kind == 1:
            result[place:end] = b""
        elif kind == 2:
            result[place:place] = draw.choice(TOKENS)
        elif kind == 3:
            result[place:place] = result[place:end] * draw.randint(1, 50)
        elif kind == 4:
            del result[place:]
        else:
            digits = [n for n, byte in enumerate(result) if 48 <= byte <= 57]
            if digits:
                where = draw.choice(digits)
                result[where : where + 1] = draw.choice(TOKENS)
    return bytes(result)


def samples(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Each format -> the file to mutate, and how it is read."""
    pixels = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8), (5, 5), 0)
    names = [f"image.{suffix}" for suffix in ("jpg", "png", "gif", "webp", "tif")]
    for name in names:
        PIL.Image.fromarray(pixels).save(folder / name)
    write_coco(folder, coco_content(2), "coco")
    for to in ("voc", "yolo"):
        convert_splits(find_splits([folder / "coco.json"]), to, folder / to)

    calls = itertools.count()

    def reader(path: Path, parse: Callable[[], object]) -> Callable[[], object]:
        def read() -> object:
            if next(calls) % DOCTOR_EVERY == 0:  # it must have something to say, whatever the parser says
                diagnosis, _ = examine(read_splits(find_splits([path])), anchors, near_copies=False)
                assert as_text(diagnosis)
                assert as_json(diagnosis, diagnosis.exit_code)
            return parse()

        return read

    anchors = find_anchors("SSD160", "voc")
    coco_reader = reader(folder / "coco.json", lambda: parse_coco(folder / "coco.json", folder / "coco"))
    voc_reader = reader(folder / "voc", lambda: parse_voc(folder / "voc", ["train"]))
    yolo_reader = reader(folder / "yolo" / "data.yaml", lambda: YOLO(folder / "yolo" / "data.yaml").read("train"))

    def image_reader(name: str) -> Callable[[], object]:
        return lambda: (check_header(str(folder / name)), read_image(folder / name))

    return {
        "COCO": (folder / "coco.json", coco_reader),
        "VOC": (folder / "voc" / "Annotations" / "a0.xml", voc_reader),
        "VOC list": (folder / "voc" / "ImageSets" / "Main" / "train.txt", voc_reader),
        "YOLO": (folder / "yolo" / "labels" / "train" / "a0.txt", yolo_reader),
        "YOLO settings": (folder / "yolo" / "data.yaml", yolo_reader),
        **{name: (folder / name, image_reader(name)) for name in names},
    }


def main(folder: Path, num_mutations: int, seed: int) -> None:
    faulthandler.enable()
    report = {}
    for name, (file, read) in samples(folder).items():
        good = file.read_bytes()
        assert not getattr(read(), "findings", ())
        draw = random.Random(f"{seed} {name}")
        slowest, num_noticed = 0.0, 0
        for number in range(num_mutations):
            file.write_bytes(mutate(good, draw))
            start = time.process_time()
            try:
                num_noticed += bool(getattr(read(), "findings", ()))
            except OnestageError as reason:
                num_noticed += 1
                assert str(file) in str(reason) or str(folder) in str(reason), str(reason)
                assert "\x1b" not in str(reason), repr(str(reason))
            except BaseException:
                print(f"{name}, mutation {number}: {file.read_bytes()[:300]!r}", file=sys.stderr)
                raise
            slowest = max(slowest, time.process_time() - start)
        file.write_bytes(good)
        report[name] = {"slowest": slowest, "noticed": num_noticed}
    print(json.dumps({"peak_bytes": peak_bytes(), "formats": report}))


@pytest.mark.parametrize("num_mutations", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(tmp_path, num_mutations) -> None:
    out, _ = finish(start(__file__, tmp_path, num_mutations, num_mutations), seconds=1800)
    report = json.loads(out.splitlines()[-1])
    assert report["peak_bytes"] < MAX_BYTES
    assert {name: of["slowest"] for name, of in report["formats"].items() if of["slowest"] > MAX_SECONDS} == {}
    # Were little noticed, the mutations would test little.
    noticed = {name: of["noticed"] / num_mutations for name, of in report["formats"].items()}
    assert all(share > 0.01 for share in noticed.values()), noticed


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
