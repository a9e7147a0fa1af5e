"""Layouts and faults in one table: recognised, with the right roles, the same to doctor and training, and lossless."""

import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from bad_data import doctor, found
from jsonargparse import ArgumentParser
from layout_files import (
    LABEL,
    XML,
    coco_folder,
    coco_with_a_sub_folder,
    edit_json,
    picture,
    voc_folder,
    voc_image,
    voc_lists,
    yolo_images,
)  # fmt: skip
from PIL import Image

from onestage.convert.conversion import convert_splits
from onestage.data import DetectionDataModule
from onestage.data.layouts import describe_source, find_splits, read_splits, recognise
from onestage.doctor.anchors import find_anchors
from onestage.doctor.checks import Diagnosis, examine
from onestage.errors import ConfigError, DataError

ANCHORS = find_anchors("SSD160", "voc")


def expand(path: str) -> list[str]:
    """Return the paths that a path with {a,b} stands for."""
    start, brace, rest = path.partition("{")
    choices, _, end = rest.partition("}")
    return [other for choice in choices.split(",") for other in expand(start + choice + end)] if brace else [path]


def files(*paths: str, texts: Mapping[str, str] | None = None) -> Callable[[Path], None]:
    """Write pictures, XML files with a dog and labels, by suffix, and texts by name."""

    def write(root: Path) -> None:
        for file in [root / name for path in paths for name in expand(path)] + [root / name for name in texts or ()]:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = XML.replace("NAME", "dog") if file.suffix == ".xml" else LABEL
            picture(file) if file.suffix == ".jpg" else file.write_text(content)
        for name, text in (texts or {}).items():
            (root / name).write_text(text)

    return write


def coco(*names: str, **changes: int) -> Callable[[Path], None]:
    return lambda root: coco_folder(root, *names, **changes)


def voc(**stems_by_list: str) -> Callable[[Path], None]:
    return lambda root: voc_folder(root, **stems_by_list)


SPLITS = ("images/train/{a,b,c}.jpg", "labels/train/{a,b,c}.txt", "images/val/{d,e,f}.jpg", "labels/val/{d,e,f}.txt")
MAIN = "ImageSets/Main"


def coco_official(root: Path) -> None:
    coco_folder(root, "train2017", "val2017", "test2017")
    for name in ("captions_val2017", "person_keypoints_val2017"):
        (root / "annotations" / f"{name}.json").write_text("[]")


def coco_moved(*moves: str, name: str = "train", **values: str) -> Callable[[Path], None]:
    """Write a COCO folder, then move files and folders: "from>to". values: put before the values of the images."""

    def write(root: Path) -> None:
        coco_folder(root, *name.split())
        file = root / "annotations" / f"instances_{name}.json"
        for key, before in values.items():
            for number in range(4):
                edit_json(file, "images", [number], **{key: f"{before}a{number}.jpg"})
        for start, _, end in (move.partition(">") for move in moves):
            (root / end).parent.mkdir(parents=True, exist_ok=True)
            (root / start).rename(root / end)
        if not any((root / "annotations").iterdir()):
            (root / "annotations").rmdir()

    return write


coco_roboflow = coco_moved(
    *(f"annotations/instances_{name}.json>{name}/_annotations.coco.json" for name in ("train", "valid", "test")),
    name="train valid test",
)


def in_archive(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Write into a folder that is all the visible content of another, as of an archive packed on a Mac."""

    def write_below(root: Path) -> None:
        write(root / "export")
        (root / "export.zip").write_bytes(b"PK")
        (root / "__MACOSX").mkdir()
        for file in [*root.rglob("*.xml"), *root.rglob("*.txt"), *root.rglob("*.jpg")]:
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7")

    return write_below


def coco_in_capitals(root: Path) -> None:
    coco_folder(root, "train", "val")
    edit_json(root / "annotations" / "instances_train.json", "images", [0], file_name="a0.JPG")
    (root / "train" / "a1.jpg").rename(root / "train" / "a1.JPG")
    (root / "annotations" / "instances_val.json").rename(root / "annotations" / "instances_val.JSON")
    (root / "annotations").rename(root / "Annotations")


def yolo(*folders: str, yaml: str = "", names: str = "classes.txt", labels: str = "") -> Callable[[Path], None]:
    """Write folders of images, each with a folder of labels beside it; and data.yaml, or a file of class names."""

    def write(root: Path) -> None:
        for folder in folders:
            stems = " ".join(f"{stem}{sum(map(ord, folder)) % 97}" for stem in "abc")
            yolo_images(root, folder, labels or folder.replace("images", "labels"), stems)
        if yaml:
            (root / "data.yaml").write_text(yaml)
        elif names:
            (root / names).write_text("cat\n")

    return write


def yolo_list(*lines: str) -> Callable[[Path], None]:
    return files(*SPLITS[:2], texts={"list.txt": "\n".join(lines), "data.yaml": "train: list.txt\nnames: {0: cat}\n"})


voc_roboflow = files("train/{a,b,c}.{jpg,xml}", "valid/{d,e,f}.{jpg,xml}", "test/{g,h,i}.{jpg,xml}")
yolo_cvat = files(
    "obj_train_data/{a,b,c}.{jpg,txt}", "obj_valid_data/d.{jpg,txt}",
    texts={
        "train.txt": "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in "abc"),
        "valid.txt": "data/obj_valid_data/d.jpg\n", "obj.names": "cat\n",
        "obj.data": "classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = x\n",
    },
)  # fmt: skip


def coco_pair(change: Callable[[Path], object], num_images: int = 4) -> Callable[[Path], None]:
    """Write a COCO folder with train and val, then change it."""

    def write(root: Path) -> None:
        coco_folder(root, "train", "val", num_images=num_images)
        change(root)

    return write


def edited(split: str, table: str, rows: list[int] | slice = slice(None), **values: object) -> Callable[[Path], None]:
    return coco_pair(lambda root: edit_json(root / f"annotations/instances_{split}.json", table, rows, **values))


def with_image(image: Image.Image, name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        image.save(root / "train" / name)
        file = root / "annotations" / "instances_train.json"
        edit_json(file, "images", [0], file_name=name, width=image.width, height=image.height)
        edit_json(file, "annotations", [0, 1], bbox=[1, 1, 10, 10], area=100)

    return coco_pair(write)


def two_missing_and_two_torn(root: Path) -> None:
    for number in range(4):
        path = root / "train" / f"a{number}.jpg"
        path.unlink() if number < 2 else path.write_bytes(path.read_bytes()[:400])


def voc_val(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        voc_folder(root, train="a b", val="c")
        (root / "Annotations" / "c.xml").write_text(XML.replace("NAME", name) if name else "<annotation/>")

    return write


def voc_torn_xml(root: Path) -> None:
    voc_folder(root, train="a b c", val="d")
    (root / "Annotations" / "a.xml").write_text("<annotation>")


def unused_files(root: Path) -> None:
    yolo("images/train", "images/val")(root)
    (root / "labels" / "train" / "gone.txt").write_text(LABEL)
    (root / "images" / "train" / "photo.avif").write_bytes(b"AVIF")
    for name in ("more/x.jpg", "more/y.jpg"):
        picture(root / name)


def copied(root: Path) -> None:
    shutil.copyfile(root / "train" / "a1.jpg", root / "val" / "a2.jpg")


FLOAT = Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))
DEEP = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
RED = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
FOURS = {"train": 4, "val": 4}
PAIR = {"train": 3, "val": 3}
YAML = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"


class Case(NamedTuple):
    write: Callable[[Path], None]
    splits: dict[str, int]  # role -> images that stay
    rules: frozenset[str] | set[str] = frozenset()  # of doctor's findings, among others
    stops: bool = False  # doctor names an error, and training does not start
    unused: int = 0  # files that are counted as not used


CASES = {
    "COCO: the official archive": Case(coco_official, {**FOURS, "test": 4}, unused=2),
    "COCO: Roboflow": Case(coco_roboflow, {**FOURS, "test": 4}),
    "COCO: one file of any name": Case(coco("zoo", num_images=6), {"train": 6}),
    "COCO: several training files": Case(coco("train2014", "train2017", "minitrain", "val2014"), FOURS, unused=10),
    "COCO: separators and numbers as text": Case(
        lambda root: coco_with_a_sub_folder(root, "\\", width="100"), {"train": 4}
    ),
    "COCO: Label Studio on Windows": Case(
        coco_moved("x>images", "annotations/instances_x.json>result.json", name="x", file_name="images\\"),
        {"train": 4},
    ),
    "COCO: no training split": Case(coco("val", "test"), {"val": 4, "test": 4}, {"no training split"}, stops=True),
    "COCO: words and capitals": Case(coco("mine_Train", "EVAL", "trains", "trainval"), FOURS, unused=10),
    "COCO: FiftyOne": Case(coco_moved("annotations/instances_train.json>labels.json", "train>data"), {"train": 4}),
    "COCO: a folder for each split": Case(
        coco_moved(*(f"annotations/instances_{it}.json>{it}/labels.json" for it in ("train", "val")), name="train val"),
        FOURS,
    ),
    "COCO: paths of another machine": Case(coco_moved(file_name="C:\\mine\\train\\"), {"train": 4}),
    "COCO: paths from the annotations": Case(coco_moved(file_name="../train/"), {"train": 4}),
    "COCO: capitals of Windows": Case(coco_in_capitals, FOURS),
    "COCO: a folder of any name, whose first image is missing": Case(
        lambda root: [coco_moved("train>my photos")(root), (root / "my photos" / "a0.jpg").unlink()],
        {"train": 3}, {"image missing"},
    ),
    "COCO: names of URLs": Case(
        coco_moved("train/a0.jpg>train/x a0.jpg", file_name="https://host/train/x%20"), {"train": 1},
        {"annotation file"}, stops=True, unused=3,
    ),
    "VOC: lists, also of a class": Case(
        voc(train="a b", valid="c", test="d", dog_train="a"),
        {"train": 2, "val": 1, "test": 1},
    ),
    "VOC: two years": Case(lambda root: [
        voc_folder(root / "VOCdevkit/VOC2007", trainval="a b", test="c", train="a", val="b"),
        voc_folder(root / "VOCdevkit/VOC2012", trainval="d e", train="d", val="e"),
    ], {"train": 4, "val": 1}),
    "VOC: images and annots, beside a folder for testing": Case(
        files("images/{a,b,c}.jpg", "annots/{a,b,c}.xml", "test/{d,e,f}.{jpg,xml}"), {"train": 3, "test": 3}
    ),
    "VOC: a folder for each camera": Case(files("{cam1,cam2/deep}/{a,b,c}.{jpg,xml}"), {"train": 6}),
    "VOC: folders of splits": Case(files(
        "train/images/{a,b,c}.jpg", "train/annotations/{a,b,c}.xml",
        "val/images/{d,e,f}.jpg", "val/annotations/{d,e,f}.xml",
    ), PAIR),
    "VOC: a list of Windows": Case(files("JPEGImages/{a,b,c,d,e}.jpg", "Annotations/{a,b,c,d,e}.xml", texts={
        f"{MAIN}/train.txt": "C:\\sets\\JPEGImages\\a.jpg\r\nJPEGImages/b\r\nc.jpg\r\nd\r\n", f"{MAIN}/val.txt": "e",
    }), {"train": 4, "val": 1}),
    "VOC: Datumaro's lists of classes, and sub-folders": Case(files(
        "JPEGImages/{sub/a,b,c}.jpg", "Annotations/{sub/a,b,c}.xml",
        texts={f"{MAIN}/default.txt": "sub/a\nb\nc\n", f"{MAIN}/dog_default.txt": "a\n"},
    ), {"train": 3}),
    "VOC: other spellings, and names that end with a number": Case(files(
        "JPEGImages/{e\u0301,b,1,c,d,1 1}.jpg", "Annotations/{\u00e9,b,1,c,d,1 1}.xml",
        texts={f"{MAIN}/train.txt": "\u00e9\nb.JPG\n1 1\n1 -1\nc.xml\n", f"{MAIN}/val.txt": "d\n"},
    ), {"train": 5, "val": 1}),
    "VOC: PaddlePaddle": Case(files("JPEGImages/{a,b,c}.jpg", "Annotations/{a,b,c}.xml", texts={
        "train_list.txt": "".join(f"./JPEGImages/{stem}.jpg ./Annotations/{stem}.xml\n" for stem in "ab"),
        "val_list.txt": "./JPEGImages/c.jpg ./Annotations/c.xml\n",
    }), {"train": 2, "val": 1}),
    "VOC: FiftyOne": Case(files("data/{a,b,c}.jpg", "labels/{a,b,c}.xml"), {"train": 3}),
    "VOC: Roboflow, in a folder of an archive": Case(in_archive(voc_roboflow), {**PAIR, "test": 3}),
    "VOC: the class names of another tool beside the lists": Case(
        lambda root: [voc(train="a b", val="c")(root), (root / "classes.txt").write_text("dog\n")],
        {"train": 2, "val": 1},
    ),
    "VOC: the class names of another tool beside images": Case(
        files("JPEGImages/{a,b,c}.jpg", "Annotations/{a,b,c}.xml", texts={"classes.txt": "dog\n"}), {"train": 3}
    ),
    "COCO: the class names of another tool beside them": Case(
        coco_pair(lambda root: (root / "classes.txt").write_text("cat\ndog\n")), FOURS
    ),
    "VOC: an unused list": Case(voc(train="a b", val="c", north="d"), {"train": 2, "val": 1}, unused=3),
    "YOLO: Label Studio": Case(yolo("images"), {"train": 3}),
    "YOLO: Label Studio beside a folder for testing": Case(yolo("images", "test/images"), {"train": 3, "test": 3}),
    "YOLO: lists beside a folder for testing": Case(files(
        "images/{a,b,c}.jpg", "labels/{a,b,c}.txt", "test/{d,e}.{jpg,txt}",
        texts={"train.txt": "images/a.jpg\nimages/b.jpg", "val.txt": "images/c.jpg", "classes.txt": "cat"},
    ), {"train": 2, "val": 1, "test": 2}),
    "YOLO: labels beside images": Case(yolo("."), {"train": 3}),
    "YOLO: folders named as COCO's": Case(yolo("images/train2017", "images/val2017"), PAIR),
    "YOLO: Roboflow, in a folder of an archive": Case(
        in_archive(yolo("train/images", "valid/images", yaml=YAML)), PAIR
    ),
    "YOLO: other words for the splits": Case(
        yolo("Training/images", "dev/images", "holdout/images"), {**PAIR, "test": 3}
    ),
    "YOLO: Roboflow for darknet": Case(files(
        "train/{a,b,c}.{jpg,TXT}", "valid/{d,e,f}.{jpg,TXT}", texts={"train/_darknet.labels": "cat\n"}
    ), PAIR),
    "YOLO: capitals of Windows": Case(files(*SPLITS, texts={
        "Data.YAML": "train: train.TXT\nval: images/val\nnames: [cat]\n",
        "train.TXT": "".join(f"images/train/{stem}.JPG\n" for stem in "abc"),
    }), PAIR),
    "YOLO: LabelImg's classes beside the labels": Case(
        files(*SPLITS, texts={f"labels/{split}/classes.txt": "cat\n" for split in ("train", "val")}), PAIR
    ),
    "YOLO: classes that differ by folder": Case(
        files(*SPLITS, texts={"labels/train/classes.txt": "cat\n", "labels/val/classes.txt": "dog\n"}), {},
        {"annotation file"}, stops=True,
    ),
    "YOLO: lists alone, and the system's files": Case(files(
        "Images/{a,b,c,d,@eaDir/thumb}.jpg", "Labels/{a,b,c,d}.txt",
        texts={"train.txt": "data/Images/a.jpg\r\ndata/Images/b.jpg\r\n", "valid.txt": "Images/c.jpg\nImages/d.jpg\n"},
    ), {"train": 2, "val": 2}, {"no class names"}),
    "YOLO: lists whose first image is gone, and one of stems": Case(files(
        "images/{a,b,c}.jpg", "labels/{a,b,c}.txt",
        texts={"train.txt": "images/x.jpg\nimages/a.jpg\nimages/b.jpg", "val.txt": "images/y.jpg\nimages/c.jpg",
               "test.txt": "c", "classes.txt": "cat"},
    ), {"train": 2, "val": 1}, {"image missing"}, unused=2),
    "YOLO: a YAML file of any name, and a test split that is not there": Case(files(
        "train/images/{a,b,c}.jpg", "train/labels/{a,b,c}.txt", "valid/images/{d,e,f}.jpg", "valid/labels/{d,e,f}.txt",
        texts={"mine.yaml": YAML + "test: ../test/images\n", "hyp.yaml": "lr0: 0.01\n"},
    ), PAIR, unused=1),
    "YOLO: folders that are no splits": Case(yolo("images/device1", "images/valley"), {"train": 6}),
    "YOLO: a class without name": Case(
        lambda root: [yolo("images/train")(root), (root / "classes.txt").write_text("cat\n\ndog\n")], {},
        {"annotation file"}, stops=True,
    ),
    "YOLO: no class names, flat": Case(yolo("images", names=""), {"train": 3}, {"no class names"}),
    "YOLO: neither class names nor objects": Case(
        lambda root: yolo_images(root, "images", "labels", text=""), {}, {"annotation file"}, stops=True
    ),
    "YOLO: CVAT and darknet": Case(yolo_cvat, {"train": 3, "val": 1}),
    "YOLO: a list of Windows": Case(
        yolo_list("C:\\sets\\mine\\images\\train\\a.jpg", "images\\train\\b.jpg", ".\\images\\train\\c.jpg"),
        {"train": 3},
    ),
    "YOLO: a list of no existing image": Case(
        yolo_list("images/x.jpg", "../../y.jpg"), {}, {"annotation file"}, stops=True
    ),
    "YOLO: valid beside val": Case(yolo("images/train", "images/val", "images/valid"), PAIR, unused=4),
    "COCO: a copy in two splits": Case(coco_pair(copied), FOURS, {"copy in two splits"}),
    "COCO: a float TIFF": Case(with_image(FLOAT, "f.tif"), {"train": 3, "val": 4}, {"image unreadable"}, unused=1),
    "COCO: a 16-bit PNG": Case(with_image(DEEP, "f.png"), FOURS, {"16 bits"}, unused=1),
    "COCO: a transparent PNG": Case(with_image(RED, "f.png"), FOURS, {"transparency"}, unused=1),
    "VOC: one image in two splits": Case(
        voc(train="a b", val="b c"), {"train": 2, "val": 2},
        {"same images in two splits"},
    ),
    "COCO: no objects": Case(edited("train", "annotations", iscrowd="1"), FOURS, {"no objects"}, stops=True),
    "VOC: a split of negatives": Case(voc_val(""), {"train": 2, "val": 1}, {"image without objects"}),
    "VOC: an unknown VOC class": Case(voc_val("cow"), {"train": 2, "val": 1}, {"class unknown in training"}, True),
    "COCO: other categories": Case(edited("val", "categories", [0], name="cow"), FOURS, {"classes differ"}, True),
    "COCO: an image listed twice": Case(
        edited("train", "images", [1], file_name="a0.jpg"), {"train": 3, "val": 4}, {"image listed twice"},
        unused=1,
    ),
    "COCO: ids as floats": Case(edited("train", "annotations", [0, 1], image_id=1.0), FOURS),
    "COCO: bad boxes": Case(edited("train", "annotations", [0, 3], bbox=None), FOURS, {"object malformed"}),
    "COCO: missing and torn images, too many together": Case(
        coco_pair(two_missing_and_two_torn, num_images=9), {"train": 5, "val": 9}, {"annotation file"}, True
    ),
    "VOC: a torn XML file": Case(voc_torn_xml, {"train": 2, "val": 1}, {"label file malformed"}),
    "COCO: too few images to divide": Case(coco("train", num_images=2), {"train": 2}, {"too few images"}, stops=True),
    "YOLO: files that nothing uses": Case(unused_files, PAIR, unused=4),
}  # fmt: skip


def diagnose(path: Path) -> tuple[Diagnosis, dict[str, int]]:
    """Return doctor's findings, and the number of usable images of each split, in order."""
    splits = read_splits(find_splits([path]))
    diagnosis, usable = examine(splits, ANCHORS, near_copies=False)
    return diagnosis, {name: len(annotations) for name, annotations in usable.items()}


def start_training(path: Path) -> DetectionDataModule | None:
    """Do what `fit` and `test` do with data before their first batch; return None if that stops."""
    data = DetectionDataModule(path=path, image_size=64, batch_size=1, num_workers=0)
    try:
        for call in ("fit", "test"):
            data.setup(call)
        data.train_dataloader()
    except (DataError, ConfigError):
        return None
    return data


@pytest.mark.parametrize("name", CASES)
def test_doctor_and_training_agree_on_roles_findings_and_what_is_unused(name, tmp_path) -> None:
    case = CASES[name]
    case.write(tmp_path)
    assert recognise(tmp_path).format == name.partition(":")[0]
    diagnosis, num_images = diagnose(tmp_path)
    assert num_images == case.splits
    effects = {finding.rule: finding.effect for finding in diagnosis.findings}
    assert case.rules <= effects.keys()
    assert ("error" in effects.values()) == case.stops
    assert sum(finding.num_items for finding in diagnosis.findings if finding.rule == "not used") == case.unused
    data = start_training(tmp_path)
    assert (data is None) == case.stops
    if data is not None:
        sets = {id(part): part for part in map(data.annotations, ("train", "val", "test"))}.values()
        assert sum(map(len, sets)) == sum(case.splits.values())
        skipped = {line for part in sets for line in part.skipped}
        assert skipped == {finding.line for finding in diagnosis.findings if finding.effect == "skipped"}


def contents(path: Path) -> dict[str, Counter[bytes]]:
    """Return the bytes of the images of each split."""
    splits = read_splits(find_splits([path]))
    return {
        split.name: Counter(Path(image).read_bytes() for image in split.annotations.image_paths.tolist())
        for split in splits
        if split.annotations is not None
    }


HARD_TO_CONVERT = [
    "COCO: the official archive", "COCO: separators and numbers as text", "VOC: a folder for each camera",
    "VOC: two years", "VOC: Datumaro's lists of classes, and sub-folders", "YOLO: CVAT and darknet",
    "YOLO: Roboflow, in a folder of an archive",
]  # fmt: skip


@pytest.mark.parametrize("name", HARD_TO_CONVERT)
def test_no_image_and_no_split_is_lost_in_conversions(name, tmp_path) -> None:
    source = tmp_path / "in"
    CASES[name].write(source)
    before = contents(source)
    for number, to in enumerate(("voc", "yolo", "coco")):
        target = tmp_path / f"{number}"
        convert_splits(find_splits([source]), to, target, images="link")
        source = target
        assert contents(target) == before


LABELME, VIA = '{"shapes": [], "imagePath": "a.jpg"}', '{"a.jpg1": {"regions": []}}'
CVAT, REMEDY = "<annotations><image/></annotations>", "(.|\n)*(Export the data set as|Known are)"
NO_TRAIN = {"images/data.yaml": "trani: .\nnames: [cat]\n"}


@pytest.mark.parametrize(
    ("write", "path", "message"),
    [
        (files(), "gone", "no such file or folder"),
        (files(texts={"notes.md": ""}), "notes.md", "is not a folder, JSON or YAML file"),
        (files(texts={"notes.md": ""}), "", r"holds 1 \.md(.|\n)*Known are: COCO"),
        (coco("north", "south"), "", r"no file says .* which split(.|\n)*one by one"),
        (files("{a,b}.jpg", texts={"a.json": LABELME, "b.json": LABELME}), "", "look like labelme's files" + REMEDY),
        (files("{a,b}.jpg", texts={"v/a.json": VIA, "v/b.json": VIA}), "", "look like files of VIA" + REMEDY),
        (files("{a,b}.jpg", texts={"annotations.xml": CVAT}), "", "holds .*look like CVAT's own XML" + REMEDY),
        (files("labels/{a,b}.txt", texts={"classes.txt": "cat\n"}), "", "holds annotations, but no images"),
        (
            files("JPEGImages/a.jpg"), "JPEGImages",
            r"it holds 1 \.jpg\.\nGive the folder of the whole data set\. Known are: COCO",
        ),
        *[
            (files("images/a.jpg", texts=NO_TRAIN), path, r"has no split 'train'.*\nName its images with train:")
            for path in ("images", "images/data.yaml")
        ],
    ],
)  # fmt: skip
def test_path_without_a_data_set_is_refused_with_what_is_there(write, path, message, tmp_path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        find_splits([tmp_path / path])
    with pytest.raises(DataError):
        DetectionDataModule(path=tmp_path / path).setup("fit")


def test_obj_data_is_taken_and_of_several_other_settings_files_one_must_be_given(tmp_path) -> None:
    yolo_cvat(tmp_path / "cvat")
    assert recognise(tmp_path / "cvat" / "obj.data").splits == ("train", "val")
    tmp_path /= "yolo"
    yolo("images/train", names="")(tmp_path)
    for name in ("a.yaml", "b.yml"):
        (tmp_path / name).write_text("train: images/train\nnames: [cat]\n")
    (split,) = read_splits(find_splits([tmp_path]))
    assert "a.yaml, b.yml all have names" in split.findings[0].problem
    assert read_splits(find_splits([tmp_path / "b.yml"]))[0].annotations is not None


def test_command_counts_what_is_unused_and_says_how_to_train(tmp_path) -> None:
    unused_files(tmp_path)
    code, report = doctor(tmp_path)
    assert (code, report["training_command"]) == (0, f"make train DATA={tmp_path}")
    problems = " ".join(finding["problem"] for finding in found(report, "not used"))
    for words in ("2 images are in no split", "1 images are of a type that is not read (.avif)", "gone.txt"):
        assert words in problems
    lines = describe_source(recognise(tmp_path))
    assert [line.partition(":")[0].strip() for line in lines] == [f"YOLO data set {tmp_path}", "train", "val"]


def test_command_for_several_files_trains_on_them(tmp_path) -> None:
    coco_folder(tmp_path, "train2017", "val2017", "mine")
    files = [tmp_path / "annotations" / f"instances_{name}.json" for name in ("val2017", "train2017", "mine")]
    assert [split.name for split in find_splits(files)] == ["train", "mine", "val"]
    assert [split.name for split in find_splits(files[:1] * 2)] == ["val (1)", "val (2)"]
    assert recognise(files[0]).splits == ("train",)  # a single file is what a training trains on
    command = doctor(*files[:2])[1]["training_command"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data")
    words = shlex.split(command)
    data = parser.instantiate(parser.parse_args(words[words.index("--data.source") :])).data
    data.setup("fit")
    assert [str(tmp_path / f"{name}2017/a0.jpg") for name in ("train", "val")] == [
        str(data.annotations(stage).image_paths[0]) for stage in ("train", "val")
    ]


def test_voc_splits_get_one_order_of_classes(tmp_path) -> None:
    voc_image(tmp_path, "a", name="dogs")
    voc_image(tmp_path, "b", name="dog")
    voc_lists(tmp_path, train="a", val="b")
    train, val = read_splits(find_splits([tmp_path]))
    assert train.annotations is not None
    assert val.annotations is not None
    assert train.annotations.class_names == val.annotations.class_names == ("dog", "dogs")
    assert (train.annotations.labels.tolist(), val.annotations.labels.tolist()) == ([1], [0])
    assert "has no 'dog'" in val.findings[0].problem
