import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from command_line import message_of, run, run_on
from evaluation_data import annotation_set, detections
from PIL import Image

from onestage.data.annotations import BOX_EMPTY
from onestage.evaluation.coco import CocoEvaluator
from onestage.evaluation.results import write_results
from onestage.report.collection import write_after_run
from onestage.report.report import chart, write_page

HOSTILE = "<script>alert('x')</script>\"&"
BOX, OTHER = [10.0, 10.0, 60.0, 60.0], [100.0, 100.0, 150.0, 160.0]
VOID = {"meta", "link", "img", "br", "path", "polyline", "circle", "td", "th", "tr"}  # td, th: HTML closes these itself
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Check that tags close in order; collect text, tags and the attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text, self.sources = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.sources += [value for name, value in attrs if name in ("src", "href", "data", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def write_run(folder: Path, *, found: bool = True) -> Path:
    """Write what a training leaves: three images, the first with one object found and one missed, the last empty."""
    names = (HOSTILE, "dog")
    annotations = annotation_set([[BOX, OTHER], [BOX], []], [[0, 1], [0], []], names)
    object.__setattr__(annotations, "findings", (BOX_EMPTY.broken(f"{HOSTILE}.json", "a box has no size"),))
    paths = np.array([f"/data/{HOSTILE.replace('/', '')}{n}.jpg" for n in range(3)])
    object.__setattr__(annotations, "image_paths", paths)
    boxes, scores, labels = ([[BOX], [], [OTHER]], [[0.9], [], [0.8]], [[0], [], [1]]) if found else ([[]] * 3,) * 3
    evaluator = CocoEvaluator(annotations)
    evaluator.update(torch.arange(3), detections(boxes, scores, labels))
    evaluation = evaluator.evaluation()
    write_results(folder / "results.json", "validate", evaluation.metrics, evaluation, seconds=2.0, num_images=3)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "mine"}, "seed_everything": len(boxes[0])}))
    rows = [{"step": step, "train/loss": 3 / (1 + step), "val/mAP": "" if step < 9 else 0.25} for step in range(10)]
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    shutil.copy(folder / "metrics.csv", folder / "epochs.csv")
    data = SimpleNamespace(
        class_names=list(names), annotations=lambda stage: annotations, shared=[],
        read_image=lambda stage, row: np.full((400, 800, 3), 40 * row, np.uint8),
    )  # fmt: skip
    module = SimpleNamespace(evaluator=evaluator, score_threshold=evaluation.analysis.score_threshold)
    write_after_run(folder, "fit", module, data, draw=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "shapes" / "version_0"
    place.mkdir(parents=True)
    return write_run(place)


def test_page_is_one_file_with_everything_escaped_and_nothing_from_outside(folder, capsys) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "alert" in page.text
    assert page.text.count(HOSTILE) >= 6  # table, curves, confusion, histogram, data check, names of files
    pictures = [source for source in page.sources if source.startswith("data:image/jpeg;base64,")]
    assert len(pictures) == 2 + 3  # the two with an error, and all as random ones
    assert {*page.sources} - {*pictures} == {"data:,"}
    assert "url(" not in text and "@import" not in text
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in pictures]
    assert {*sizes} == {(600, 300)}
    words = ("onestage fit --config", "seed_everything", "a box has no size", "1 missed, 0 wrong", "0 missed, 0 wrong")
    assert [word for word in words if word not in page.text] == []
    assert run("report", str(folder)) == 0
    assert capsys.readouterr().out.strip() == f"report: {folder / 'report.html'}"
    assert (folder / "report.html").read_text() == text


def test_run_without_detections_and_with_half_of_its_files_has_a_page(tmp_path) -> None:
    write_run(tmp_path, found=False)
    assert "3 missed" not in Page((tmp_path / "report.html").read_text()).text
    for name in ("config.yaml", "metrics.csv", "epochs.csv"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "report")
    page = Page(write_page([tmp_path], tmp_path / "page.html").read_text())
    assert "config.yaml is missing" in page.text and "stopped before its report was written" in page.text
    assert "nan" not in page.text


def test_points_of_a_chart_are_where_the_pencil_puts_them() -> None:
    drawn = chart("t", {"a": [(0, 0.0), (5, 50.0), (10, 100.0)], "b": [(0, float("nan"))], "c": [(10, None)]})
    assert drawn["lines"] == {"a": "44.0,206.0 198.0,107.0 352.0,8.0"}  # axes from 44 to 352 and from 206 up to 8
    assert drawn["x_ticks"] == [(44.0, "0"), (105.6, "2"), (167.2, "4"), (228.8, "6"), (290.4, "8"), (352.0, "10")]
    assert [text for _, text in drawn["y_ticks"]] == ["0", "20", "40", "60", "80", "100"]
    assert len(chart("t", {"a": [(0, 0.0), (1, 3e-4)]})["y_ticks"]) == 4  # a third of it is just below a power of ten
    assert [text for _, text in chart("t", {"a": [(3, 0.0)]})["x_ticks"]] == ["3", "3.2", "3.4", "3.6", "3.8", "4"]


def test_several_runs_stand_side_by_side_with_an_interval_and_their_differences(folder, capsys) -> None:
    other = folder.with_name("version_1")
    other.mkdir()
    write_run(other, found=False)
    assert run("report", str(folder), str(other)) == 0
    out = folder.parent / "comparison.html"
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"report: {out}"
    page = Page(out.read_text())
    assert {"version_0/report.html", "version_1/report.html"} <= {*page.sources}
    mean = json.loads((folder / "results.json").read_text())["metrics"]["mAP"]
    assert f"{-100 * mean:+.1f} [" in page.text
    assert "seed_everything10" in re.sub(r"\s", "", page.text) and "data.path" not in page.text
    (other / "report" / "matches.npz").unlink()
    write_page([folder, other], out)
    assert "shapes/version_1 has no matches.npz" in Page(out.read_text()).text


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        (None, "", 2, "is not a folder"),
        ("results.json", None, 2, "has no results.json"),
        ("results.json", '{"metrics": {}}', 3, "are not those of this version"),
        ("metrics.csv", "step,train/loss\n1,x\n", 3, "are not those of this version"),
    ],
)
def test_bad_run_folder_is_one_message(file, content, code, message, folder, capsys) -> None:
    place = folder if file else folder / "nothing"
    if file and content is None:
        (folder / file).unlink()
    elif file:
        (folder / file).write_text(content)
    error = message_of(capsys, "report", str(place), code=code)
    assert message in error and len(error.splitlines()) <= 3


def test_page_is_written_to_a_name_of_a_page_only(folder, tmp_path, capsys) -> None:
    for name, problem in (("results.json", "a file that ends in .html"), ("results.json/a.html", "cannot be written")):
        assert problem in message_of(capsys, "report", str(folder), "--out", str(folder / name))
    assert run("report", str(folder), "--out", str(tmp_path / "new" / "a.html")) == 0


@pytest.mark.slow
def test_training_writes_its_page_which_is_small(trained, best, tmp_path, capsys) -> None:
    page = Page((trained / "report.html").read_text())
    assert (trained / "report.html").stat().st_size < 3_000_000
    assert "onestage fit --config" in page.text and "train: 32 images" in page.text and "onestage doctor" in page.text
    assert len([source for source in page.sources if source.startswith("data:image")]) >= 7 + 1
    again = run_on(best, "validate", tmp_path)
    assert f"report: {again / 'report.html'}" in capsys.readouterr().out
    assert "onestage validate --config" in (again / "report.html").read_text()
    assert run("validate", "--config", str(again / "config.yaml"), "--runs_dir", str(tmp_path)) == 0  # as the page says
    write_page([trained, again], tmp_path / "both.html")
    assert "+0.0 [+0.0, +0.0]" in Page((tmp_path / "both.html").read_text()).text


PROBE = """<pre id="probe"></pre><script>addEventListener("load", () => { probe.textContent = JSON.stringify({
  broken: [...document.images].filter((i) => !i.complete || !i.naturalWidth).length, images: document.images.length,
  requests: performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).map((r) => r.name),
  overflow: document.body.scrollWidth - document.body.clientWidth,
  width: document.documentElement.offsetWidth }) })</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are checked as text only")
@pytest.mark.parametrize("width", [360, 1600])
def test_browser_shows_the_page_without_errors_requests_or_sideways_scrolling(width, folder) -> None:
    page = folder / "report.html"
    # A second copy may run a script, which tells what the first one shows.
    probed = page.with_name("probed.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    style = f"<style>html {{ width: {width}px }}</style>"  # no window is narrower than 500
    probed.write_text(text.replace("</body>", style + PROBE))
    options = ["--window-size=1600,900", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={folder / 'profile'}"
    outputs = [
        subprocess.run(
            [str(CHROMIUM), "--headless", *options, profile, "--dump-dom", file.absolute().as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )
        for file in (page, probed)
    ]  # fmt: skip
    assert [line for output in outputs for line in output.stderr.splitlines() if "CONSOLE" in line] == []
    seen = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', outputs[1].stdout)[1])
    assert seen == {"broken": 0, "images": 5, "requests": [], "overflow": 0, "width": width}
