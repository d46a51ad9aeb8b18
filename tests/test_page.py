"""Promise: whoever opens the page finds pictures with words, a picture, a keyboard or a phone, and is never left alone.

A real browser drives the real service over a real index. What a healthy service does not do (being slow, full, broken,
or a generation ahead) is put in the way of the page's requests.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image
from runs import index

from engines.build import main as make_engines
from export.demo_pictures import write_pictures

DEMO = Path(__file__).resolve().parents[1] / "export" / "demo"
SERVICE = ["-m", "pipeline.serve"]
PICTURES = 144  # of each colour and shape four
LICENCES = ("CC BY 4.0", "CC0 1.0", "CC BY-NC 4.0")
HOSTILE = "<img src=x onerror=alert(1)> \u202etxt.exe"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 860}
START_S = 60.0


class Site(NamedTuple):
    url: str
    root: Path  # tar files
    out: Path  # the index

    def index(self) -> None:
        ran = index(self.root, self.out, "--model", DEMO, source="tar")
        assert ran.code == 0, ran.stderr


def write_tar(path: Path, folder: Path, keys: list[str]) -> None:
    """Pictures, and beside each what is known about it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, key in enumerate(keys):
            known = {"label": key.split("/")[0].replace("-", " "), "license": LICENCES[number % 3]}
            known["class"] = "Round" if "circle" in key or "ring" in key else "Straight"
            known["date"] = f"{2010 + number % 10}-06-30"
            known |= {"latitude": number % 50, "longitude": -number}
            known["rights_holder"] = HOSTILE if number % 5 == 0 else "Maximiliane Featherstonehaugh-Abernathy"
            known["license_url"] = "https://creativecommons.org/licenses/"
            stem, kind = key.rsplit(".", 1)
            sample = ((f"{stem}.{kind}", (folder / key).read_bytes()), (f"{stem}.json", json.dumps(known).encode()))
            for name, content in sample:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    write_pictures(folder, PICTURES, seed=11)
    for name, size in (("blue-star/wide.png", (1500, 150)), ("blue-star/tall.png", (150, 1500))):
        Image.new("RGB", size, (60, 60, 220)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def site(tiny_model: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service over an index of the demo model. Also a browser's worth of metadata, some of it hostile."""
    assert tiny_model.exists(), "its artifact folder is that of this session"
    assert make_engines(["--model", str(DEMO), "--runtime", "ort-cpu"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("site")
    site = Site(f"http://127.0.0.1:{port}/", home / "tars", home / "shapes-index")
    site.root.mkdir()
    keys = sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*.*"))
    write_tar(site.root / "shapes.tar", drawn, keys)
    site.index()
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, *SERVICE, "--out", str(site.out), "--port", str(port)]
        service = subprocess.Popen(command, stdout=said, stderr=said)
        end_s = time.monotonic() + START_S
        while not answers(site.url + "healthz"):
            said.seek(0)
            assert service.poll() is None, f"the service ended with {service.returncode}: {said.read()}"
            assert time.monotonic() < end_s, f"the service is not up after {START_S:g} s: {said.read()}"
            time.sleep(0.1)
        yield site
        service.terminate()
        assert service.wait(30) in (0, -15)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


class Visitor:
    """A page in a browser window of its own, and what a test asks of it again and again."""

    def __init__(self, browser: Any, site: Site, **options: Any) -> None:
        options = {"viewport": DESK, "color_scheme": "light"} | options
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.on(
            "request", lambda asked: None if asked.url.startswith(site.url) else self.foreign.append(asked.url)
        )
        self.site = site

    def open(self, query: str = "") -> None:
        self.page.goto(self.site.url + query)
        if query:
            self.wait_for_answer()

    def ask(self, text: str) -> None:
        self.page.fill("#q", text)
        self.page.press("#q", "Enter")
        self.wait_for_answer()

    def until(self, expression: str) -> None:
        """Wait until it holds in the page. (Playwright's own way evaluates inside the page, which its CSP forbids.)"""
        wait_until(lambda: bool(self.page.evaluate(expression)), 10.0, expression)

    def wait_for_answer(self) -> None:
        self.until(
            "document.querySelector('#results').ariaBusy !== 'true'"
            " && document.querySelector('#grid li:not(.skeleton)') !== null"
        )

    def wait_until_calm(self) -> None:
        """Until it has loaded as much as it wants without anybody scrolling."""
        calm = "document.querySelector('#results').ariaBusy !== 'true' && !document.querySelector('.skeleton')"
        self.until(f"new Promise((done) => setTimeout(() => done({calm}), 300))")

    def wait_for_words(self, selector: str, words: str) -> None:
        self.page.locator(selector, has_text=re.compile(words)).wait_for()

    @property
    def labels(self) -> list[str]:
        return self.page.locator("#grid li:not(.skeleton) .label").all_inner_texts()

    @property
    def address(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.page.url).query).items()}

    def focused(self) -> int:
        """Number of the tile that has the focus, -1 for none."""
        found: int = self.page.evaluate(
            "[...document.querySelectorAll('#grid > li')].indexOf(document.activeElement.closest('li'))"
        )
        return found


Open = Callable[..., Visitor]


@pytest.fixture
def facets(site: Site) -> list[str]:
    """The columns of which the service counts values; what stands on them is skipped where it counts none."""
    found: list[str] = about(site)["facets"]
    if not {"label", "licence"} <= set(found):
        pytest.skip(f"the service offers no counts of labels and licences: api/about names the facets {found}")
    return found


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Open]:
    """Opens visitors. Afterwards none has met an error in the console or asked anybody else for anything."""
    visitors: list[Visitor] = []

    def enter(**options: Any) -> Visitor:
        visitors.append(Visitor(browser, site, **options))
        return visitors[-1]

    yield enter
    for visitor in visitors:
        visitor.context.close()
        assert not visitor.errors
        assert not visitor.foreign


def jpeg_of(drawn: Path, label: str) -> Path:
    return next(path for path in sorted((drawn / label).iterdir()) if path.suffix == ".jpg")


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_what_one_sees_first_says_what_is_here(visit: Open) -> None:
    visitor = visit()
    visitor.open()
    visitor.wait_for_words("#about", rf"{PICTURES + 2} pictures, indexed \d+ \w+ 20\d\d")
    assert visitor.page.evaluate("document.activeElement.id") == "q"


@pytest.mark.usefixtures("facets")
def test_what_one_can_ask_is_made_of_what_is_here(visit: Open) -> None:
    visitor = visit()
    visitor.open()
    visitor.page.locator("#examples a").first.click()
    visitor.wait_for_answer()
    assert visitor.address["q"] in visitor.labels[0], "an example made of a label finds it"


def test_words_find_pictures_and_each_says_what_it_is_and_whose(visit: Open) -> None:
    visitor = visit()
    visitor.open()
    visitor.ask("a red circle")
    assert visitor.labels[:2] == ["red circle"] * 2
    tile = visitor.page.locator("#grid li").first
    assert tile.locator("img").get_attribute("alt") == "1: red circle"
    scores = [float(score) for score in visitor.page.locator("#grid .score span").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    assert any(licence in tile.locator(".rights").inner_text() for licence in LICENCES)
    tile.locator("img").evaluate("image => image.decode()")
    visitor.wait_for_words("#status", f"{PICTURES + 2} pictures")
    assert HOSTILE[:20] in " ".join(visitor.page.locator(".rights").all_inner_texts()), "markup is shown as text"
    assert "\u202e" not in visitor.page.content(), "what turns text round is shown by its number"
    assert "\\u202e" in visitor.page.content()


DROP = """([bytes, name, type]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0))], name, { type }));
  for (const kind of HOW) {
    const how = { bubbles: true, cancelable: true };
    const event = kind === 'paste' ? new ClipboardEvent(kind, { ...how, clipboardData: carried })
      : new DragEvent(kind, { ...how, dataTransfer: carried });
    document.querySelector('main').dispatchEvent(event);
  }
}"""


@pytest.mark.parametrize("how", ["drop", "paste", "choose"])
def test_a_picture_finds_others_like_it(visit: Open, drawn: Path, how: str) -> None:
    visitor = visit()
    visitor.open()
    path = jpeg_of(drawn, "green-star")
    if how == "choose":
        visitor.page.set_input_files("#file", path)
    else:
        events = "['dragover', 'drop']" if how == "drop" else "['paste']"
        encoded = base64.b64encode(path.read_bytes()).decode()
        visitor.page.evaluate(DROP.replace("HOW", events), [encoded, path.name, "image/jpeg"])
    visitor.wait_for_answer()
    assert visitor.labels[:2] == ["green star"] * 2
    assert path.stem in visitor.page.locator("#grid a.open").first.evaluate(
        "one => { one.click(); return document.querySelector('#view-facts').innerText; }"
    )
    visitor.page.keyboard.press("Escape")
    assert path.name in visitor.page.locator("#asked").inner_text()
    assert visitor.page.locator("#asked canvas").is_visible(), "its preview"
    assert visitor.page.locator("#drop").is_hidden()
    assert visitor.page.locator("#share").is_hidden(), "a link cannot carry a picture"
    visitor.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    visitor.until("document.querySelectorAll('#grid li:not(.skeleton)').length > 24")
    visitor.page.reload()
    visitor.wait_for_words("#notice", "A link cannot carry a picture")


def test_what_is_no_picture_is_refused_in_words(visit: Open, tmp_path: Path) -> None:
    visitor = visit()
    visitor.open("?q=a+ring")
    (tmp_path / "note.txt").write_text("hello")
    visitor.page.set_input_files("#file", tmp_path / "note.txt")
    visitor.wait_for_words("#toast", "note.txt is no picture but text/plain")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    visitor.page.set_input_files("#file", tmp_path / "broken.jpg")
    visitor.page.locator("#notice.bad").wait_for()
    assert len(visitor.page.locator("#notice").inner_text()) > 20
    assert not visitor.page.locator("#notice button").count(), "the same bytes would be refused again"
    assert len(visitor.errors) == 1, "the browser's own note of a 4xx"
    visitor.errors.clear()


def test_more_like_this_keeps_the_filters(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+yellow+cross&taxon=Straight&date_to=2018")
    visitor.page.locator("#grid .open").first.click()
    visitor.page.locator("#view-alike").click()
    visitor.page.wait_for_url("**similar=*")
    visitor.wait_for_answer()
    assert visitor.address["taxon"] == "Straight"
    assert visitor.address["date_to"] == "2018"
    assert not any(label.endswith(("circle", "ring")) for label in visitor.labels)
    visitor.page.locator("summary", has_text="Label").click()
    choice = visitor.page.locator(".menu button", has_text="yellow cross")
    count = choice.locator("span").inner_text()
    choice.click()
    visitor.wait_for_words("#status", f"^{count} picture")
    assert set(visitor.labels) == {"yellow cross"}


def test_more_like_this_from_a_tile_and_back(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+yellow+cross")
    visitor.page.locator("#grid li").nth(1).hover()
    visitor.page.locator("#grid .alike").nth(1).click()
    visitor.page.wait_for_url("**similar=*")
    visitor.wait_for_answer()
    assert "yellow" in visitor.labels[0]
    assert visitor.page.locator("#asked img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    visitor.page.go_back()
    visitor.page.wait_for_url("**q=a+yellow+cross")
    assert visitor.page.input_value("#q") == "a yellow cross"
    visitor.page.locator("#asked").wait_for(state="hidden")


# ---- looking round --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("facets")
def test_filters_have_counts_narrow_the_answer_and_stand_in_the_address(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+shape")
    visitor.page.locator("summary", has_text="Licence").click()
    assert not grave_trouble(visitor.page)
    choice = visitor.page.locator(".menu button", has_text="CC0 1.0")
    count = int(choice.locator("span").inner_text())
    assert 40 < count < 60
    choice.click()
    visitor.wait_for_words("#status", f"^{count} pictures")
    assert visitor.address["licence"] == "CC0 1.0"
    assert all("CC0 1.0" in rights for rights in visitor.page.locator("li:not(.skeleton) .rights").all_inner_texts())
    visitor.page.locator("summary", has_text="Label").click()
    visitor.page.get_by_placeholder("Find a label").fill("red ci")
    visitor.page.keyboard.press("Enter")
    visitor.page.wait_for_url("**label=red*")
    visitor.wait_for_answer()
    assert set(visitor.labels) == {"red circle"}
    visitor.page.locator("#active button", has_text="Label: red circle").click()
    visitor.wait_for_words("#status", f"^{count} pictures")
    visitor.page.goto(visitor.page.url + "&label=nowhere")
    visitor.wait_for_words("#notice", "No picture has the label 'nowhere'; there are e.g. [a-z ,]+[.]")
    visitor.page.locator("#notice button").click()
    visitor.wait_for_words("#status", f"^{PICTURES + 2} pictures")


def test_filters_are_written_where_there_is_nothing_to_choose_from(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+shape&label=red+ring")
    menu = visitor.page.locator("form.menu")

    def write(name: str, value: str) -> None:
        visitor.page.locator("summary", has_text="More filters").click()
        menu.locator(f"[name={name}]").fill(value)
        visitor.page.keyboard.press("Enter")

    write("taxon", "rond")
    visitor.wait_for_words("#notice", "No picture has the taxon 'rond'; near it: Round")
    write("taxon", " round ")
    visitor.wait_for_words("#status", "^4 pictures")
    assert visitor.address == {"q": "a shape", "label": "red ring", "taxon": "round"}
    visitor.page.locator("#active button", has_text="Label").click()
    visitor.wait_for_words("#status", f"^{PICTURES // 6 * 2} pictures")
    write("key", "*/red-ring/*")
    visitor.wait_for_words("#status", "^4 pictures")
    assert set(visitor.labels) == {"red ring"}
    write("date_from", "soon")
    assert "date_from" not in visitor.address, "the browser says what a date looks like"
    menu.locator("[name=date_from]").fill("2010")
    menu.locator("[name=date_to]").fill("2019-06-29")
    assert not grave_trouble(visitor.page)
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_words("#active", "Until: 2019-06-29")
    visitor.wait_for_answer()
    assert menu.locator("[name=key]").input_value() == "*/red-ring/*", "what is in force stands in its box"
    write("date_from", "")
    visitor.page.wait_for_url(re.compile("^[^?]+[?](?!.*date_from)"))
    assert visitor.address["date_to"] == "2019-06-29"


def test_a_place_is_written_and_near_duplicates_come_as_one(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+blue+star&label=blue+star")
    count = len(visitor.labels)
    menu = visitor.page.locator("form.menu")
    visitor.page.locator("summary", has_text="More filters").click()
    menu.locator("[name=box]").fill("10,20,30")
    visitor.page.keyboard.press("Enter")
    assert "box" not in visitor.address, "the browser says what a place looks like"
    menu.locator("[name=box]").fill("-10, -180, 60, 0.5")
    menu.get_by_label("Near-duplicates as one").check()
    assert not grave_trouble(visitor.page)
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_words("#active", "Near-duplicates: as one")
    visitor.wait_for_answer()
    assert visitor.address["box"] == "-10, -180, 60, 0.5"
    assert len(visitor.labels) == count - 1, "the wide and the tall one show the same"
    assert [words for words in visitor.page.locator("#grid .copies").all_inner_texts() if words] == ["+1 alike"]
    assert visitor.page.locator("#end").inner_text() == ""
    visitor.page.locator("summary", has_text="More filters").click()
    menu.get_by_label("Near-duplicates as one").uncheck()
    menu.locator("[name=box]").fill("-10,0.5,60,180")
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_words("#notice", "No picture passes these filters")
    visitor.wait_for_words("#status", "^0 pictures$")
    assert "group" not in visitor.address


def test_an_answer_that_a_threshold_ends_says_so(visit: Open) -> None:
    visitor = visit()
    with urlopen(visitor.site.url + "api/search?q=a+shape&k=40", timeout=10) as response:
        lowest = json.load(response)["hits"][30]["score"] - 1e-4
    visitor.open(f"?q=a+shape&threshold={lowest}")
    visitor.page.mouse.wheel(0, 9000)
    visitor.wait_for_words("#end", "No other picture has this cosine")
    assert 31 <= len(visitor.labels) < 40
    visitor.wait_for_words("#status", f"^{PICTURES + 2} pictures")


def test_the_grid_fills_as_one_scrolls_and_every_picture_comes_once(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+shape")
    assert len(visitor.labels) < PICTURES
    top_px = visitor.page.locator("#grid li").nth(5).bounding_box()["y"]
    for _ in range(40):
        visitor.page.mouse.wheel(0, 3000)
        visitor.page.wait_for_timeout(50)
        if len(visitor.labels) == PICTURES + 2:
            break
    visitor.wait_for_words("#end", f"That was all: {PICTURES + 2} pictures")
    ids = visitor.page.locator("#grid li").evaluate_all("all => all.map((one) => one.dataset.id)")
    assert len(set(ids)) == len(ids) == PICTURES + 2
    visitor.page.evaluate("for (const image of document.images) image.loading = 'eager'")
    visitor.until("document.querySelectorAll('#grid img.whole').length === 2")
    whole = visitor.page.locator("#grid img.whole")
    assert {whole.nth(at).evaluate("one => one.naturalWidth > one.naturalHeight") for at in (0, 1)} == {True, False}, (
        "of the very wide and the very tall one all is shown"
    )
    assert whole.first.evaluate("one => getComputedStyle(one).objectFit") == "contain"
    visitor.page.evaluate("scrollTo(0, 0)")
    assert visitor.page.locator("#grid li").nth(5).bounding_box()["y"] == top_px, "pictures never move what is there"


def test_back_finds_the_answer_and_the_place_again(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+shape")
    visitor.page.mouse.wheel(0, 2500)
    visitor.until("scrollY > 700 && document.querySelectorAll('#grid li:not(.skeleton)').length > 24")
    visitor.until("document.querySelector('#results').ariaBusy !== 'true'")
    place, count = visitor.page.evaluate("[scrollY, document.querySelectorAll('#grid li').length]")
    visitor.ask("a blue ring")
    assert visitor.labels[0] == "blue ring"
    visitor.page.go_back()
    visitor.until("document.querySelector('#q').value === 'a shape'")
    assert visitor.page.evaluate("scrollY") == place
    assert len(visitor.labels) >= count
    visitor.page.go_forward()
    visitor.until("document.querySelector('#q').value === 'a blue ring'")
    assert visitor.labels[0] == "blue ring"


def test_the_large_view_tells_everything_and_its_link_opens_it_again(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+cyan+triangle")
    visitor.wait_until_calm()
    visitor.page.locator("#grid .open").nth(30).click()
    view = visitor.page.locator("#view")
    view.wait_for()
    facts = view.inner_text()
    for told in ("cosine", "number 31 of", "licence", "rights holder", "key"):
        assert told in facts
    assert view.locator("dd a").get_attribute("rel") == "noopener noreferrer"
    view.locator("#view-key").click()
    visitor.wait_for_words("#toast", "Key copied")
    key = visitor.page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch(r"shapes\.tar/[a-z]+-[a-z]+/\w+\.\w+", key)
    visitor.until("document.querySelector('#view-picture').src.includes('/picture/')")
    view.locator("#view-share").click()
    visitor.until("navigator.clipboard.readText().then((text) => text.includes('open='))")
    link = visitor.page.evaluate("navigator.clipboard.readText()")
    other = visit()
    other.page.goto(link)
    other.page.locator("#view").wait_for()
    other.wait_for_words("#view-score", "number 31 of")
    other.page.keyboard.press("Escape")
    view = other.page.locator("#view")
    view.wait_for(state="hidden")
    other.until("!location.search.includes('open')")
    assert other.labels[0] == "cyan triangle"


def test_all_of_it_works_by_keyboard(visit: Open) -> None:
    visitor = visit()
    visitor.open("?q=a+red+star")
    keys, view = visitor.page.keyboard, visitor.page.locator("#view")
    keys.press("/")
    assert visitor.page.evaluate("document.activeElement.id") == "q"
    keys.press("ArrowDown")
    assert visitor.focused() == 0
    columns = visitor.page.evaluate(
        "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length"
    )
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", None),
        ("Home", 0),
    ):
        last = len(visitor.labels) - 1  # at least: more tiles come as the end comes into sight
        keys.press(key)
        focused = visitor.focused()
        assert focused >= last if place is None else focused == place, key
    outline = visitor.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px", "the focus can be seen"
    keys.press("Enter")
    view.wait_for()
    keys.press("ArrowRight")
    visitor.wait_for_words("#view-score", "number 2 of")
    for _ in range(12):
        keys.press("Tab")
        inside = "document.activeElement === document.body || document.activeElement.closest('#view') !== null"
        assert visitor.page.evaluate(inside), "the focus stays in the dialog"
    keys.press("Escape")
    view.wait_for(state="hidden")
    visitor.until("!location.search.includes('open')")
    assert visitor.focused() == 1, "the focus is on the picture that was open"
    keys.press("ArrowUp")
    assert visitor.page.evaluate("document.activeElement.id") == "q"


# ---- when things go wrong -------------------------------------------------------------------------------------------


def refuse(status: int, words: str, **headers: str) -> Callable[[Any], None]:
    return lambda route: route.fulfill(status=status, json={"error": words}, headers=headers)


def test_a_slow_answer_says_so_and_leaves_no_hole(visit: Open) -> None:
    visitor = visit()
    held: list[Any] = []
    visitor.page.route("**/api/search?*", lambda route: held.append(route), times=1)
    visitor.page.goto(visitor.site.url + "?q=a+blue+ring")
    visitor.page.locator(".skeleton").first.wait_for()
    first_px = visitor.page.locator("#grid li").first.bounding_box()
    assert visitor.page.locator("#results").get_attribute("aria-busy") == "true"
    visitor.wait_for_words("#status", "takes longer than usual")
    held[0].continue_()
    visitor.wait_until_calm()
    assert visitor.page.locator(".skeleton").count() == 0
    last_px = visitor.page.locator("#grid li").first.bounding_box()
    assert [last_px[side] for side in ("x", "y", "width")] == [first_px[side] for side in ("x", "y", "width")]


def test_an_error_is_told_in_its_own_words_and_can_be_tried_again(visit: Open) -> None:
    visitor = visit()
    visitor.page.route("**/api/search?*", refuse(400, "q has an open quote; close it"))
    visitor.page.goto(visitor.site.url + "?q=%22a+ring")
    visitor.wait_for_words("#notice.bad", "q has an open quote; close it")
    assert visitor.page.locator("#notice button").count() == 0, "the same words would be refused again"
    assert visitor.page.locator(".keys").is_hidden(), "there is nothing to move among"
    visitor.page.unroute("**/api/search?*")
    visitor.page.route("**/api/search?*", refuse(500, "the disk is gone"))
    visitor.page.goto(visitor.site.url + "?q=a+ring")
    visitor.wait_for_words("#notice.bad", "the disk is gone")
    visitor.page.unroute("**/api/search?*")
    visitor.page.route("**/api/search?*", lambda route: route.abort())
    visitor.page.locator("#notice button").click()
    visitor.wait_for_words("#notice.bad", "cannot be reached")
    visitor.page.unroute("**/api/search?*")
    visitor.ask("a blue ring")
    visitor.wait_until_calm()
    assert visitor.page.locator("#notice").inner_text() == ""
    visitor.page.route("**/api/search?*", refuse(500, "the disk is gone"))
    visitor.page.mouse.wheel(0, 9000)
    visitor.wait_for_words("#end.bad", "the disk is gone")
    visitor.page.unroute("**/api/search?*")
    visitor.page.locator("#end button").click()
    visitor.until("document.querySelectorAll('#grid li:not(.skeleton)').length > 24")
    assert len(visitor.errors) == 4, "the browser's own notes"
    visitor.errors.clear()


def test_a_full_service_is_asked_again_when_it_says(visit: Open) -> None:
    visitor = visit()
    asked_s: list[float] = []

    def busy_once(route: Any) -> None:
        asked_s.append(time.monotonic())
        if len(asked_s) > 1:
            route.continue_()
        else:
            refuse(503, "256 requests are in hand", **{"Retry-After": "2"})(route)

    visitor.page.route("**/api/search?*", busy_once)
    visitor.open("?q=a+ring")
    assert 1.8 < asked_s[1] - asked_s[0] < 6
    assert len(visitor.errors) == 1
    visitor.errors.clear()


def test_one_is_told_how_to_sign_in_again(visit: Open) -> None:
    visitor = visit()
    visitor.page.route("**/api/**", refuse(401, "a token is needed"))
    visitor.page.goto(visitor.site.url + "?q=a+ring")
    visitor.wait_for_words("#notice", "You are signed out")
    assert visitor.page.locator("#notice a").get_attribute("href") == "login"
    visitor.errors.clear()


@pytest.mark.parametrize(("relevance", "said"), [(0.49, "No picture stands out"), (0.51, "^$")])
def test_where_nothing_stands_out_that_is_said(visit: Open, relevance: float, said: str) -> None:
    visitor = visit()

    def answer_so(route: Any) -> None:
        answer = route.fetch().json()
        answer["hits"] = [{**hit, "relevance": relevance} for hit in answer["hits"]]
        route.fulfill(json=answer)

    visitor.page.route("**/api/search?*", answer_so)
    visitor.open("?q=a+tax+form")
    visitor.wait_until_calm()
    assert re.search(said, visitor.page.locator("#notice").inner_text())
    tile = visitor.page.locator("#grid li").first
    assert tile.locator(".score span").inner_text() == str(round(100 * relevance))
    bar = "one => one.firstElementChild.getBoundingClientRect().width / one.getBoundingClientRect().width"
    assert tile.locator(".meter").evaluate(bar) == pytest.approx(relevance, abs=0.01)


def test_a_label_made_of_folders_reads_as_words_and_is_kept_as_it_is(visit: Open) -> None:
    visitor = visit()
    label = "Fruit__Apple_Pink-Lady"

    def answer_so(route: Any) -> None:
        answer = route.fetch().json()
        for hit in answer["hits"]:
            hit["metadata"] = {"label": label}
        route.fulfill(json=answer)

    visitor.page.route("**/api/search?*", answer_so)
    visitor.open("?q=an+apple")
    assert visitor.labels[0] == "Fruit Apple Pink-Lady"
    assert visitor.page.locator("#grid .rights").first.is_hidden(), "no empty line where there is no licence"
    visitor.page.locator("#grid .open").first.click()
    visitor.wait_for_words("#view-label", "^Fruit Apple Pink-Lady$")
    assert label in visitor.page.locator("#view-facts").inner_text()


def test_a_picture_that_has_gone_leaves_its_place_and_words(visit: Open) -> None:
    visitor = visit()
    visitor.page.route("**/thumb/**", refuse(404, "gone"))
    visitor.open("?q=a+ring")
    visitor.wait_for_words("#grid li:first-child .gone", "cannot be shown")
    box = visitor.page.locator("#grid li .open").first.bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1)
    visitor.page.close()  # so that no further thumbnail fails after the next line
    visitor.errors.clear()


def test_a_new_generation_while_one_looks(visit: Open, site: Site, drawn: Path) -> None:
    """The pages of one answer are of one generation: said unobtrusively, and one click shows the new one."""
    visitor = visit()
    visitor.open("?q=a+red+circle")
    visitor.wait_until_calm()
    before = len(visitor.labels)
    home = drawn.parent / "more"
    write_pictures(home, 6, seed=77)
    write_tar(site.root / "later.tar", home, sorted(str(path.relative_to(home)) for path in home.rglob("*.*")))
    site.index()
    try:
        wait_until(lambda: about(site)["rows"] == PICTURES + 2 + 6, 30.0, "the new generation")
        visitor.page.mouse.wheel(0, 9000)
        visitor.wait_for_words("#notice", "index was updated while you looked")
        assert len(visitor.labels) == before, "nothing of the new generation among the old"
        visitor.page.locator("#notice button").click()
        visitor.wait_for_words("#status", f"^{PICTURES + 2 + 6} pictures")
        assert visitor.page.locator("#notice").inner_text() == ""
    finally:
        visitor.page.close()  # it would ask for pictures that leave now
        (site.root / "later.tar").unlink()
        site.index()
        wait_until(lambda: about(site)["rows"] == PICTURES + 2, 30.0, "the last generation")


def about(site: Site) -> dict[str, Any]:
    with urlopen(site.url + "api/about", timeout=10) as response:
        told: dict[str, Any] = json.load(response)
        return told


# ---- every screen, everybody ----------------------------------------------------------------------------------------


def grave_trouble(page: Any) -> list[tuple[str, list[str]]]:
    """What axe calls serious or critical, and where."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "light"), (DESK, "dark")], ids=["phone, light", "desk, dark"])
def test_it_fits_every_screen_and_is_open_to_everybody(visit: Open, size: dict[str, int], scheme: str) -> None:
    visitor = visit(viewport=size, color_scheme=scheme, has_touch=size == PHONE, reduced_motion="reduce")
    page = visitor.page

    def check(what: str) -> None:
        assert not grave_trouble(page), what
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{what} fits the width"
        if folder := os.environ.get("NIGHTJAR_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{size['width']}-{scheme}-{what}.png")

    visitor.open()
    visitor.wait_for_words("#about", "pictures")
    check("start")
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)") == (scheme == "dark")
    visitor.open("?q=a+blue+star")
    visitor.wait_until_calm()
    check("answers")
    page.locator("#grid .open").first.click()
    page.locator("#view").wait_for()
    visitor.until("document.querySelector('#view-picture').src.includes('/picture/')")
    check("view")
    box = page.locator("#view").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= size["width"]
    page.route("**/api/search?*", refuse(500, "the disk is gone"))
    page.goto(visitor.site.url + "?q=a+ring")
    visitor.wait_for_words("#notice.bad", "the disk is gone")
    check("error")
    page.unroute("**/api/search?*")
    visitor.errors.clear()
    page.goto(visitor.site.url + "?q=a+ring&label=nowhere")
    visitor.wait_for_words("#notice", "No picture has the label")
    check("nothing")
    visitor.open("?q=a+blue+star")
    if size == PHONE:
        columns = page.evaluate(
            "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length"
        )
        assert columns == 2
        assert page.locator("#grid .alike").first.evaluate("one => getComputedStyle(one).opacity") != "0", (
            "no hover on a phone"
        )
