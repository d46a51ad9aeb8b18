"""Promise: the page about a run tells the truth, whatever the files are called, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_model
from pictures import noisy_jpeg, write_folder
from PIL import Image
from runs import index, run_module
from store_model import DIM

from pipeline.exits import DONE, USAGE
from pipeline.history import POINTS_MAX, SAMPLE_ROWS, Sample, Throughput
from pipeline.messages import Tick
from pipeline.report import thumbnails
from pipeline.report.looks import NEAREST, look
from pipeline.report.page import PARTS, ReportError, write_report
from pipeline.report.thumbnails import EDGE_PX, Request, Thumbnails
from pipeline.store import Generation

SCRIPT = "<script>alert(1)<script>.jpg"
HANDLER = "\"><img src=x onerror='alert(2)'>.jpg"
TEMPLATE = "{{ 7 * 7 }}.jpg"
TURNED = "\u202egpj.live\u202c שלום 🦉👩‍🔬.jpg"
PAGE_BYTES_MAX = 3_000_000


class Page(HTMLParser):
    """What a browser would find in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        source = path.read_text(encoding="utf-8")
        self.feed(source)
        (tiles,) = re.findall(r'<ul class="sum">(.*?)</ul>', source, re.DOTALL)
        self.sum = [int(number.replace(",", "")) for number in re.findall(r"<b>([\d,]+)</b>", tiles)]
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    @property
    def pictures(self) -> list[Image.Image]:
        """All images, which must be JPEGs inside the page."""
        sources = [value for name, value in self.attributes if name == "src"]
        head = "data:image/jpeg;base64,"
        assert all(source.startswith(head) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))) for source in sources]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An index after two nights: the second one brings new, renamed, lost, odd and broken pictures."""
    photos, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("out") / "index"
    paths = write_folder(photos, 60)
    (photos / "empty.jpg").write_bytes(b"")
    assert index(photos, out, "--model", tiny_model).code == 0
    write_folder(photos / "tonight", 30, first_seed=100)
    for number, name in enumerate((SCRIPT, HANDLER, TEMPLATE, TURNED)):
        (photos / name).write_bytes(noisy_jpeg(200 + number))
        (photos / f"cut {name}").write_bytes(noisy_jpeg(300 + number)[:-900])
    paths[0].unlink()
    paths[1].rename(photos / "renamed.jpg")
    assert index(photos, out, "--model", tiny_model).code == 0
    return out


@pytest.fixture
def copy(nights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nights, tmp_path / "index", symlinks=True))


def change(out: Path, run: int, **values: Any) -> None:
    path = out / "runs" / f"{run}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_sum_on_the_page_is_that_of_the_record(nights: Path) -> None:
    record = json.loads((nights / "runs" / "2.json").read_text())
    page = Page(write_report(nights, 2))
    inputs, *parts = page.sum
    assert [inputs, *parts] == [record["inputs"], *(record[part] for part in PARTS)]
    assert inputs == sum(parts) == 98
    assert dict(zip(PARTS, parts, strict=True)) == {
        "unchanged": 58, "embedded": 34, "copied": 1, "quarantined": 5, "pending": 0,
    }  # fmt: skip
    assert "34 new pictures, 1 known one under another name, 2 gone; 4 could not be read; all 98 are" in page.text
    assert "The sum is right" in page.text
    for number in ("last run 61", "last run 60", "last run 1"):
        assert number in page.text


def test_a_sum_that_is_wrong_is_not_called_right(copy: Path) -> None:
    change(copy, 2, copied=2)
    page = Page(write_report(copy, 2))
    assert "The sum is wrong" in page.text
    assert "The sum is right" not in page.text


def test_a_record_holds_what_the_page_and_later_readers_need(nights: Path) -> None:
    record = json.loads((nights / "runs" / "2.json").read_text())
    assert sum(record["throughput"]["rows"]) == pytest.approx(38, abs=0.1), "34 embedded and 4 that did not decode"
    assert set(record["phases_s"]) == {"listing", "embedding", "publishing"}
    assert record["commits"]["number"] >= 1
    assert 0 < record["commits"]["seconds"] <= record["phases_s"]["embedding"]
    assert sum(record["phases_s"].values()) <= record["seconds"]
    assert len(record["sample_ids"]) == 34
    assert record["engines"][0]["parity"]["error_over_spread"] <= record["engines"][0]["parity"]["error_allowed"]
    assert record["quarantine"]["truncated"]["count"] == 4
    assert record["quarantine"]["empty"]["examples"][0]["key"] == "empty.jpg"
    assert {"python", "numpy", "pillow"} <= set(record["versions"])
    assert record["disk"]["generations"]["bytes"] > 0


def test_names_are_shown_as_text_whatever_is_in_them(nights: Path) -> None:
    path = write_report(nights, 2)
    page = Page(path)
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base", "link"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for key in (SCRIPT, HANDLER, TEMPLATE):
        assert f"cut {key}" in page.text
    assert "\\u202egpj.live\\u202c שלום 🦉👩‍🔬.jpg" in page.text, "what turns the text round is shown by its number"
    assert "\u202e" not in path.read_text(encoding="utf-8")


def test_pictures_are_inside_the_page_and_small(nights: Path) -> None:
    page = Page(write_report(nights, 2))
    assert len(page.pictures) == 6 * (1 + NEAREST) + 4, "six new ones with their neighbours, four that are cut off"
    for picture in page.pictures:
        picture.load()
        assert max(picture.size) <= EDGE_PX
        assert not picture.getexif()
    assert not [value for name, value in page.attributes if name == "href" and "://" in value]


def test_without_its_source_the_page_says_that_there_are_no_thumbnails(copy: Path) -> None:
    record = json.loads((copy / "runs" / "2.json").read_text())
    change(copy, 2, source={**record["source"], "root": "/nowhere/at/all"}, embedded=0)
    page = Page(write_report(copy, 2))
    assert not page.pictures
    assert "No thumbnails could be made" in page.text
    assert "/nowhere/at/all" in page.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedded": 0, "copied": 0, "deleted": 0, "quarantined_new": 0, "unchanged": 93, "sample_ids": []},
         ["Nothing new: all 98 are accounted for", "no engine was started", "No picture was embedded"]),
        ({"exit": 130, "generation": None, "pending": 5, "unchanged": 53},
         ["Stopped early", "5 are still to do", "interrupted", "--source folder", "once a run completes"]),
        ({"exit": 5}, ["budget", "pipeline.index --source folder"]),
        ({"exit": 3}, ["--max-quarantined", "look at the quarantine"]),
        ({"exit": 6}, ["--max-deleted 100"]),
        ({"exit": 7}, ["pipeline.verify", "--repair"]),
        ({"generation": 77}, ["Generation 77, which this run published, is no longer kept"]),
        ({"model_change": {"shown": "<old>", "new": "<new>", "pictures": 9, "queries": 8, "overlap": 0.75,
                           "same_label_shown": 0.5, "same_label_new": None}},
         ["<old> gives way to <new>", "75\N{NO-BREAK SPACE}% of the answers"]),
        ({"throughput": {"width_s": 1.0, "rows": [], "lane_s": [], "bound": []}}, ["Too short for a chart"]),
        ({"quarantine": {}, "quarantined": 0, "unchanged": 63}, ["Empty: every picture could be read"]),
        ({"source": {"kind": "tar", "root": "s3://user:secret@host/bucket", "options": {}}}, ["s3://***@host/bucket"]),
    ],
)  # fmt: skip
def test_every_end_of_a_run_gives_a_page(copy: Path, changes: dict[str, Any], words: list[str]) -> None:
    change(copy, 2, **changes)
    page = Page(write_report(copy, 2))
    for told in words:
        assert " ".join(told.split()) in page.text
    assert "secret" not in page.text


def test_a_page_stays_small_however_much_is_quarantined(copy: Path) -> None:
    row = {
        "key": "ä/" * 2000 + ".jpg", "words": "<" * 500, "locator": "x", "size_bytes": 9, "attempts": 1,
        "first_seen": 1, "last_seen": 2,
    }  # fmt: skip
    reasons = ("truncated", "corrupt", "empty", "too_large", "not_an_image", "timeout", "decoder_crash", "read_error")
    each = {reason: {"count": 12_500, "examples": [row] * 24} for reason in reasons}
    change(copy, 2, quarantine=each, quarantined=100_000, inputs=100_093)
    path = write_report(copy, 2)
    assert path.stat().st_size < PAGE_BYTES_MAX
    assert "12,476 that are only counted here" in Page(path).text


def test_of_many_quarantined_the_record_describes_some_and_counts_all(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 2)
    for number in range(40):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff no picture %d" % number)
    out = tmp_path / "index"
    assert index(tmp_path / "photos", out, "--model", tiny_model).code == 0
    (found,) = json.loads((out / "runs" / "1.json").read_text())["quarantine"].values()
    assert (found["count"], len(found["examples"])) == (40, 24)
    assert "first run" in Page(write_report(out, 1)).text


def test_the_command_writes_the_last_run_and_says_where(nights: Path, tmp_path: Path) -> None:
    ran = run_module("pipeline.report", "--out", nights)
    assert (ran.code, Path(ran.stdout.strip())) == (DONE, nights / "runs" / "2.html")
    missing = run_module("pipeline.report", "--out", nights, "--run", 9)
    assert missing.code == USAGE
    assert "no record of run 9, only of 1, 2" in missing.stderr
    nothing = run_module("pipeline.report", "--out", tmp_path)
    assert nothing.code == USAGE
    assert "pipeline.index" in nothing.stderr
    assert "example" in run_module("pipeline.report", "--help").stdout
    (nights / "runs" / "3.json").write_text("{")
    with pytest.raises(ReportError, match="no JSON"):
        write_report(nights, 3)
    (nights / "runs" / "3.json").unlink()


# ---- what the page is made of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_s", [1.0, 599.0, 36_000.0])
def test_throughput_keeps_every_picture_in_few_points(length_s: float) -> None:
    rng, throughput, rows, end_s = np.random.default_rng(1), Throughput(), 0, 0.0
    while end_s < length_s:
        seconds = float(rng.uniform(0.2, 9.0))
        end_s += seconds
        wait_s = seconds if end_s > length_s / 2 else 0.0
        tick = Tick(rows=int(rng.integers(1, 500)), encode_wait_s=wait_s, seconds=seconds)
        rows += tick.rows
        throughput.add(tick, end_s)
    told = throughput.as_json()
    assert len(told["rows"]) <= POINTS_MAX
    assert sum(told["rows"]) == pytest.approx(rows, abs=0.01 * len(told["rows"]))
    assert sum(told["lane_s"]) == pytest.approx(end_s, rel=0.01)
    assert len(told["rows"]) * told["width_s"] >= end_s > (len(told["rows"]) - 1) * told["width_s"]
    if length_s > 9:
        half = len(told["bound"]) // 2
        assert set(told["bound"][: half - 9]) == {"engine"}
        assert set(told["bound"][half + 9 :]) == {"decode"}


def test_a_sample_is_bounded_and_of_the_whole_run() -> None:
    sample = Sample()
    for start in range(0, 50_000, 500):
        sample.add(range(start, start + 500))
    assert len(set(sample.ids)) == SAMPLE_ROWS
    assert np.mean(sample.ids) == pytest.approx(25_000, rel=0.1)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values)).astype(np.float16)


@pytest.mark.parametrize(("shift", "words"), [(0.0, "a random pick"), (0.8, "clearly differ"), (9.0, "nothing like")])
def test_neighbours_are_exact_and_drift_is_told_from_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, words: str
) -> None:
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((1000, DIM))
    wide[900:, 0] += shift
    vectors = {b"%d" % at: unit(wide[at]) for at in range(1000)}
    vectors[b"950"] = vectors[b"10"]
    monkeypatch.setattr(store_model, "vector_of", lambda content, _space: vectors[content])
    store_model.run(tmp_path, {f"{content.decode()}.jpg": content for content in vectors})
    with Generation.open(tmp_path) as generation:
        rows = np.arange(generation.rows)
        emb_nd, keys = generation.vectors(rows).astype(np.float32), generation.keys(rows)
        new = [row for row in rows if int(keys[row].removesuffix(".jpg")) >= 900]
        looks = look(generation, generation.ids(np.array(new)).tolist(), len(new))
    assert looks.drift is not None
    assert words in looks.drift.words()
    assert (looks.rows, looks.searched, looks.asked, looks.drift.rows) == (1000, 1000, 100, 100)
    cosines = emb_nd @ emb_nd.T
    np.fill_diagonal(cosines, -1)
    assert looks.near_duplicates == np.count_nonzero(cosines[new].max(axis=1) > 0.99) >= 1
    for sample in looks.samples:
        best = np.sort(cosines[sample.row])[::-1][:NEAREST]
        assert [score for _, score in sample.nearest] == pytest.approx(best.tolist(), abs=1e-3)
        assert all(row != sample.row for row, _ in sample.nearest)


def test_too_few_pictures_have_no_drift(tmp_path: Path) -> None:
    store_model.run(tmp_path, {f"{at}.jpg": b"%d" % at for at in range(30)})
    with Generation.open(tmp_path) as generation:
        ids = generation.ids(np.arange(30)).tolist()
        assert "too few" in look(generation, ids[:3], 3).no_drift
        assert "all there is" in look(generation, ids, 30).no_drift
        assert look(generation, [], 0).samples == []


BROKEN = """
import os, signal, time
import pipeline.headers
sniff = pipeline.headers.sniff
def broken(encoded):
    if encoded.endswith(b"CRASH-HERE"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if encoded.endswith(b"HANG-HERE"):
        time.sleep(3600)
    return sniff(encoded)
pipeline.headers.sniff = broken
"""


def test_a_picture_that_crashes_or_hangs_its_decoder_costs_only_its_own_thumbnail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(thumbnails, "PICTURE_S", 2.0)
    bomb = io.BytesIO()
    Image.new("1", (11_000, 10_000)).save(bomb, "PNG")
    files = {
        "good.jpg": noisy_jpeg(1), "crash.jpg": noisy_jpeg(2) + b"CRASH-HERE", "cut.jpg": noisy_jpeg(3)[:-700],
        "hang.jpg": noisy_jpeg(4) + b"HANG-HERE", "words.jpg": b"no picture", "bomb.png": bomb.getvalue(),
        "last.jpg": noisy_jpeg(5),
    }  # fmt: skip
    for name, encoded in files.items():
        (tmp_path / name).write_bytes(encoded)
    files["gone.jpg"] = b""
    with Thumbnails() as made:
        found = {
            name: made.make(Request("folder", str(tmp_path), {}, name.encode(), len(encoded)))
            for name, encoded in files.items()
        }
        assert made.excuse() == ""
    assert [name for name, thumbnail in found.items() if thumbnail] == ["good.jpg", "cut.jpg", "last.jpg"]
    assert "died" in found["crash.jpg"].words
    assert "no picture after 2 s" in found["hang.jpg"].words
    assert "11000 x 10000" in found["bomb.png"].words
    assert "No such file" in found["gone.jpg"].words


# ---- in a browser ---------------------------------------------------------------------------------------------------

# Contrast of every text with what it stands on, by the formula of WCAG 2.
CONTRASTS = """
() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
    if (!text || !element.checkVisibility()) continue;
    let under = element;
    while (parse(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
    const colours = [getComputedStyle(element).color, getComputedStyle(under).backgroundColor];
    const pair = colours.map(c => light(parse(c).slice(0, 3))).sort((a, b) => b - a);
    found.push([text.slice(0, 40), (pair[0] + .05) / (pair[1] + .05)]);
  }
  return found;
}"""
CONTRAST_MIN = 4.5  # WCAG AA


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [390, 1280])
def test_a_browser_shows_it_on_every_screen_and_loads_nothing(
    nights: Path, browser: Any, scheme: str, width_px: int
) -> None:
    path = write_report(nights, 2)
    page = browser.new_page(viewport={"width": width_px, "height": 844}, color_scheme=scheme)
    said: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert not said
    assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("[...document.images].every(image => image.alt)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
    assert dark == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert not [entry for entry in contrasts if entry[1] < CONTRAST_MIN]
    page.close()
