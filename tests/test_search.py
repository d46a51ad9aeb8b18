"""Filters, facets, pages, groups and relevance say what brute force over the same rows says."""

from __future__ import annotations

import datetime
import errno
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from pictures import write_folder
from PIL import Image, ImageDraw
from runs import index as run_index
from store_model import DIM, SPACE, run, vector_of

from pipeline.contact_sheet import CAPTION_PX, CELL_PX, CELLS_MAX, GAP_PX, PAPER, Cell, contact_sheet
from pipeline.search import Hit, Index, Query, QueryError, Term, UnknownName, Where, columns, relevance
from pipeline.search.command import main
from pipeline.store import generation

ROWS = 400
Metadata = dict[str, Any]
TAXA = [
    {"label": "Cardinalis cardinalis", "species": "Cardinalis cardinalis", "common_name": "Northern Cardinal",
     "genus": "Cardinalis", "class": "Aves", "supercategory": "Birds"},
    {"label": "Ardea cinerea", "species": "Ardea cinerea", "common_name": "Grey Heron", "genus": "Ardea",
     "class": "Aves", "supercategory": "Birds"},
    {"label": "Morus alba", "species": "Morus alba", "common_name": "White Mulberry", "genus": "Morus",
     "class": "Magnoliopsida", "supercategory": "Plants"},
    {"label": "Morus bassanus", "species": "Morus bassanus", "genus": "Morus", "class": "Aves",
     "supercategory": "Birds"},
    {},
]  # fmt: skip


def metadata_of(number: int) -> Metadata:
    day = datetime.date(2018, 1, 1) + datetime.timedelta(days=5 * number)
    values: Metadata = {
        **TAXA[number * 7 % 5],
        "license": ["CC BY", "CC0", "CC BY-NC"][number % 7 % 3],
        "stars": number % 4,
    }
    if number % 9:
        values["date"] = f"{day} 10:00:00+00:00"
        values |= {"latitude": number % 180 - 90.0, "longitude": (number * 11) % 360 - 180.0}
    return values


PICTURES = {f"{'north' if number % 3 else 'south'}/{number:04d}_a%.jpg": b"picture %d" % (number - number % 40 // 38)
            for number in range(ROWS)}  # fmt: skip
METADATA = {key: metadata_of(number) for number, key in enumerate(PICTURES)}
QUERY = vector_of(b"question")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    out = tmp_path_factory.mktemp("search") / "index"
    run(out, PICTURES, metadata=METADATA)
    with Index.open(out) as index:
        yield index


@pytest.fixture(params=["coded", "read again"])
def index(request: pytest.FixtureRequest, opened: Index, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Small pieces, and once with columns that have too many values to be kept."""
    monkeypatch.setattr(generation, "COLUMN_PIECE", 64)
    if request.param == "read again":
        monkeypatch.setattr(columns, "CODES_MAX", 1)
    with Index.open(Path(opened.generation._table.filename).parents[2]) as fresh:
        yield fresh


def in_box(values: Metadata, south: float, west: float, north: float, east: float) -> bool:
    if "latitude" not in values or not south <= values["latitude"] <= north:
        return False
    longitude = values["longitude"]
    return bool(west <= longitude <= east if west <= east else longitude >= west or longitude <= east)


@pytest.mark.parametrize(
    ("where", "passes"),
    [
        (Where(), lambda key, _: True),
        (Where(label="morus ALBA"), lambda _, values: values.get("label") == "Morus alba"),
        (Where(taxon="aves"), lambda _, values: values.get("class") == "Aves"),
        (Where(taxon="northern  cardinal"), lambda _, values: values.get("genus") == "Cardinalis"),
        (Where(taxon="Morus"), lambda _, values: values.get("genus") == "Morus"),
        (Where(taxon="birds"), lambda _, values: values.get("supercategory") == "Birds"),
        (Where(licence="cc by"), lambda _, values: values["license"] == "CC BY"),
        (Where(values=(("stars", "3"),)), lambda _, values: values["stars"] == 3),
        (Where(values=(("class", "Aves"), ("license", "CC0"))),
         lambda _, values: values.get("class") == "Aves" and values["license"] == "CC0"),
        (Where(date=("2019", "2020-06")), lambda _, values: "2019" <= values.get("date", "") < "2020-07"),
        (Where(date=("2019-03-07", "2019-03-07")), lambda _, values: values.get("date", "").startswith("2019-03-07")),
        (Where(date=(None, "2018")), lambda _, values: "" < values.get("date", "") < "2019"),
        (Where(box=(0, -20, 45.0, 100)), lambda _, values: in_box(values, 0, -20, 45, 100)),
        (Where(box=(-90, 170, 90, -170)), lambda _, values: in_box(values, -90, 170, 90, -170)),
        (Where(key="north/*1?_a%.jpg"), lambda key, _: fnmatchcase(key, "north/*1?_a%.jpg")),
        (Where(key="*/0001_a%.jpg"), lambda key, _: key.endswith("/0001_a%.jpg")),
        (Where(taxon="Aves", licence="CC0", date=("2019", None), key="south*"),
         lambda key, values: values.get("class") == "Aves" and values["license"] == "CC0"
         and values.get("date", "") >= "2019" and key.startswith("south")),
    ],
)  # fmt: skip
def test_every_row_that_passes_answers_and_no_other(
    where: Where, passes: Callable[[str, Metadata], bool], index: Index
) -> None:
    want = {key for key, values in METADATA.items() if passes(key, values)}
    assert want, "a filter that nothing passes tests nothing"
    found = index.search(QUERY, ROWS, where=where)
    assert found.total == len(want)
    assert set(found.keys) == want
    assert (np.diff(found.scores) <= 0).all()
    exact = [float(vector_of(PICTURES[key]).astype(np.float32) @ QUERY.astype(np.float32)) for key in found.keys]
    np.testing.assert_allclose(found.scores, exact, atol=1e-3)
    pages = [index.search(QUERY, 7, offset=offset, where=where).rows for offset in range(0, len(want), 7)]
    np.testing.assert_array_equal(np.concatenate(pages), found.rows)
    np.testing.assert_array_equal(index.search(QUERY, 7, where=where).rows, pages[0], "also when asked again")


def test_only_two_signs_of_a_key_pattern_are_special(opened: Index) -> None:
    for pattern in ("*/00_1*", "%", "north", "[n]*", "NORTH*"):
        assert opened.search(QUERY, where=Where(key=pattern)).total == 0, pattern


def test_what_is_described_belongs_to_its_row(index: Index) -> None:
    found = index.search(QUERY, 30, where=Where(taxon="Aves"))
    for hit, score, stands_out in zip(found.hits, found.scores, found.relevance, strict=True):
        assert hit.metadata == METADATA[hit.key]
        assert (hit.score, hit.relevance) == (score, stands_out)
        assert hit.source.root == "/photos"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Where(taxon="northern cardnal"), "Northern Cardinal"),
        (Where(label="Ardea"), "Ardea cinerea"),
        (Where(licence="WTFPL 2.0 or so"), "there are e.g. CC BY"),
        (Where(taxon="alba"), "near it: Morus alba"),
        (Where(label="cinerea-ardea"), "Ardea cinerea"),
        (Where(values=(("colour", "red"),)), "no metadata column 'colour'; it has: class, common_name"),
        (Where(values=(("stars", "many"),)), "'many' is none"),
    ],
)
def test_a_name_that_nothing_has_gets_the_nearest_ones(where: Where, words: str, opened: Index) -> None:
    with pytest.raises(QueryError, match=words):
        opened.search(QUERY, where=where)


def test_an_index_without_the_column_says_so(tmp_path: Path) -> None:
    run(tmp_path / "index", {"a.jpg": b"a", "b.jpg": b"b"})
    with Index.open(tmp_path / "index") as index:
        assert index.facet_columns == []
        for name, where in (
            ("label", Where(label="x")), ("taxon", Where(taxon="x")), ("licence", Where(licence="x")),
            ("date", Where(date=("2019", None))), ("box", Where(box=(0, 0, 1, 1))),
        ):  # fmt: skip
            with pytest.raises(QueryError, match=f"for the filter '{name}'; it can be filtered by: key; .* none"):
                index.search(QUERY, where=where)
        with pytest.raises(QueryError, match="for the filter 'taxon'"):
            index.facets(fields=["taxon"])


def test_a_part_of_a_name_finds_the_names_that_have_it(tmp_path: Path) -> None:
    fruit = ["Apple__Golden-Delicious", "Apple__Granny-Smith", "Apple__Pink-Lady", "Apple__Red-Delicious", "Banana",
             "Lime", "Melon__Honeydew", "Pear__Anjou", "Papaya"]  # fmt: skip
    keys = [f"{number}.jpg" for number in range(len(fruit))]
    metadata = {key: {"label": f"Fruit__{name}"} for key, name in zip(keys, fruit, strict=True)}
    run(tmp_path / "index", {key: key.encode() for key in keys}, metadata=metadata)
    with Index.open(tmp_path / "index") as index:
        for asked, near in (
            ("pink-lady", ["Fruit__Apple__Pink-Lady"]), ("PinkLady", ["Fruit__Apple__Pink-Lady"]),
            ("pink laddy", ["Fruit__Apple__Pink-Lady"]), ("papya", ["Fruit__Papaya"]),
            ("apple", [f"Fruit__{name}" for name in fruit[:4]]),
        ):  # fmt: skip
            with pytest.raises(UnknownName) as error:
                index.search(QUERY, where=Where(label=asked))
            assert str(error.value).partition("near it: ")[2].split(", ")[: len(near)] == near, asked


def test_facets_count_what_passes(opened: Index) -> None:
    where = Where(date=("2019", "2020"), key="north*")
    passing = [values for key, values in METADATA.items()
               if key.startswith("north") and "2019" <= values.get("date", "") < "2021"]  # fmt: skip
    facets = opened.facets(where)
    assert list(facets) == opened.facet_columns
    assert set(facets) == {"class", "common_name", "genus", "label", "license", "species", "supercategory"}
    for name, counts in facets.items():
        assert dict(counts) == Counter(values[name] for values in passing if name in values)
        assert [count for _, count in counts] == sorted((count for _, count in counts), reverse=True)
    everything = Counter(values["license"] for values in METADATA.values())
    assert dict(opened.facets(fields=["license"])["license"]) == everything
    assert opened.facet_fields == ["label", "taxon", "licence"]
    by_filter = opened.facets(where, ["taxon", "licence"])
    assert by_filter == {"taxon": facets["supercategory"], "licence": facets["license"]}
    with pytest.raises(QueryError, match="holds numbers"):
        opened.facets(fields=["stars"])


def test_facets_of_a_column_with_too_many_values_are_refused(opened: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CODES_MAX", 10)
    with Index.open(Path(opened.generation._table.filename).parents[2]) as fresh:
        with pytest.raises(QueryError, match="too many values"):
            fresh.facets(fields=["date"])


def test_rows_and_keys_add_up(opened: Index) -> None:
    keys = list(PICTURES)[100:103]
    a, b, c = (vector_of(PICTURES[key]).astype(np.float32) for key in keys)
    want = a - 0.5 * b + c
    want /= np.linalg.norm(want)
    found = opened.search(f'key:"{keys[0]}" - 0.5 * key:"{keys[1]}" + key:"{keys[2]}"', 5)
    vectors = opened.vectors(np.arange(ROWS)).astype(np.float32)
    np.testing.assert_allclose(found.scores, np.sort(vectors @ want)[::-1][:5], atol=2e-3)
    rows = [opened.search(f'key:"{key}"', 1).rows[0] for key in keys]
    assert opened.generation.keys(np.array(rows)) == keys
    terms = tuple(Term(row=int(row), weight=weight) for row, weight in zip(rows, (1, -0.5, 1), strict=True))
    np.testing.assert_array_equal(opened.search(Query(terms), 5).rows, found.rows)
    for query, words in (('key:"nowhere.jpg"', "no picture has the key"), (Query((Term(row=ROWS),)), "400 rows")):
        with pytest.raises(QueryError, match=words):
            opened.search(query)


def test_a_query_of_a_stranger_opens_no_file(opened: Index) -> None:
    with pytest.raises(QueryError, match="files cannot be named"):
        opened.search('file:"/etc/hostname"')


def test_near_duplicates_are_one_answer_and_pages_do_not_overlap(opened: Index) -> None:
    pages = [opened.search(QUERY, 50, offset=offset, group=True) for offset in range(0, ROWS, 50)]
    groups = [group.tolist() for page in pages for group in page.groups or []]
    assert sorted(row for group in groups for row in group) == list(range(ROWS)), "every row once"
    keys = [opened.generation.keys(np.array(group)) for group in groups]
    assert sum(len(group) > 1 for group in groups) == len(PICTURES) - len(set(PICTURES.values()))
    for group in keys:
        assert len({PICTURES[key] for key in group}) == 1
    np.testing.assert_array_equal([row for page in pages for row in page.rows], [group[0] for group in groups])


def test_variety_pages_do_not_overlap_and_begin_with_the_best(opened: Index) -> None:
    whole = opened.search(QUERY, ROWS, mmr=0.5)
    assert whole.rows[0] == opened.search(QUERY, 1).rows[0]
    assert sorted(whole.rows.tolist()) == list(range(ROWS))
    pages = [opened.search(QUERY, 90, offset=offset, mmr=0.5).rows for offset in range(0, ROWS, 90)]
    np.testing.assert_array_equal(np.concatenate(pages), whole.rows)
    np.testing.assert_array_equal(opened.search(QUERY, 40, mmr=1.0).rows, opened.search(QUERY, 40).rows)

    def likeness(rows: Any) -> float:
        vectors = opened.vectors(rows).astype(np.float32)
        return float((vectors @ vectors.T).mean())

    assert likeness(opened.search(QUERY, 20, mmr=0.2).rows) < likeness(opened.search(QUERY, 20).rows) - 0.1


def test_groups_variety_and_pages_go_together(opened: Index) -> None:
    """With a filter and a threshold, too: every row that passes comes once, heads as far apart as without pages."""
    where, lowest = Where(date=("2018", None)), float(np.quantile(opened.search(QUERY, ROWS).scores, 0.3))
    asked: dict[str, Any] = {"where": where, "threshold": lowest, "group": True, "mmr": 0.4}
    whole = opened.search(QUERY, ROWS, **asked)
    pages = [opened.search(QUERY, 11, offset=offset, **asked) for offset in range(0, len(whole) + 11, 11)]
    np.testing.assert_array_equal(np.concatenate([page.rows for page in pages]), whole.rows)
    assert [group.tolist() for page in pages for group in page.groups or []] == [g.tolist() for g in whole.groups or []]
    passing = opened.search(QUERY, ROWS, where=where, threshold=lowest)
    assert sorted(np.concatenate(whole.groups or []).tolist()) == sorted(passing.rows.tolist())
    assert len(whole) < len(passing), "some are near-duplicates"
    assert whole.rows.tolist() != opened.search(QUERY, ROWS, where=where, threshold=lowest, group=True).rows.tolist()
    heads = {content: rows[0] for rows in whole.groups or [] for content in [PICTURES[opened.generation.keys(rows)[0]]]}
    assert len(heads) == len(whole), "one head for each content"


def test_relevance_is_the_same_in_every_run_and_does_not_hang_on_filters(
    opened: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened.search(QUERY, ROWS)
    assert found.relevance[0] > 0.3 > 0.05 > float(np.median(found.relevance))
    monkeypatch.setattr(relevance, "SAMPLE_ROWS", 60)  # of 400
    drawn = []
    for _ in range(2):
        with Index.open(Path(opened.generation._table.filename).parents[2]) as again:
            drawn.append(again.search(QUERY, ROWS).relevance)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert 0 < float(np.abs(drawn[0] - found.relevance).max()) < 0.3, "a sample, and a fair one"
    monkeypatch.undo()
    assert (np.diff(found.relevance) <= 0).all()
    with Index.open(Path(opened.generation._table.filename).parents[2]) as again:
        np.testing.assert_array_equal(again.search(QUERY, ROWS).relevance, found.relevance)
    some = opened.search(QUERY, 5, where=Where(taxon="Morus"))
    at = np.searchsorted(-found.scores, -some.scores)
    np.testing.assert_array_equal(found.relevance[at], some.relevance)


def test_a_picture_stands_out_where_all_pictures_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pictures of one kind are for CLIP: cosines of .5 to .99 with each other."""
    common = vector_of(b"what they share").astype(np.float32)

    def alike(content: bytes, space: str = SPACE) -> npt.NDArray[np.float16]:
        share = 1 + 2 * (content[-1] % 7) / 6
        wide = share * common + vector_of(content, space).astype(np.float32)
        return (wide / np.linalg.norm(wide)).astype(np.float16)

    monkeypatch.setattr("store_model.vector_of", alike)
    run(tmp_path / "index", {f"{number}.jpg": b"%d" % number for number in range(300)})
    with Index.open(tmp_path / "index") as index:
        for row in range(0, 300, 10):
            found = index.search(Query((Term(row=row),)), 300)
            assert found.rows[0] == row
            assert found.relevance[0] > 0.95, "the picture itself"
            assert np.median(found.relevance) < 0.05
            assert (np.diff(found.relevance) <= 0).all()


def test_a_threshold_cuts_and_wrong_numbers_are_refused(opened: Index) -> None:
    scores = opened.search(QUERY, ROWS).scores
    cut = opened.search(QUERY, ROWS, threshold=float(scores[10]))
    assert len(cut) == int((scores >= scores[10]).sum())
    assert len(opened.search(QUERY, threshold=1.0)) == 0
    assert opened.search(QUERY, threshold=1.0, mmr=0.5, group=True).groups == []
    assert len(opened.search(QUERY, np.int64(3))) == 3
    for wrong in ({"k": 0}, {"k": 2.5}, {"offset": -1}, {"offset": 1.5}, {"mmr": 1.5}, {"threshold": 5}):
        with pytest.raises(ValueError, match=r"expected"):
            opened.search(QUERY, **wrong)


def test_what_is_no_question_is_refused_with_what_to_write(opened: Index) -> None:
    nan = np.full(DIM, np.nan, np.float16)
    for vector in (QUERY.astype(np.float32), 3 * QUERY, nan, 0 * QUERY, QUERY[:-1], np.stack([QUERY, QUERY])):
        for query in (vector, Query((Term(vector=vector), Term(row=0)))):
            with pytest.raises(QueryError, match=r"of length .*; expected float16 \(8,\) of length 1: \(vector / np"):
                opened.search(query)
    for query in (None, 3, ["a bird"]):
        with pytest.raises(QueryError, match="is no question; expected text"):
            opened.search(query)
    with pytest.raises(QueryError, match="is empty"):
        opened.search("")


def test_a_closed_index_says_that_it_is(opened: Index) -> None:
    with Index.open(Path(opened.generation._table.filename).parents[2]) as index:
        found = index.search(QUERY)
    for late in (lambda: index.search(QUERY), index.facets, lambda: found.hits, lambda: found.keys):
        with pytest.raises(ValueError, match="this Index is closed; ask inside"):
            late()
    index.close()


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_asks_what_the_api_asks(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_folder(tmp_path / "photos", 30)
    out = ("--out", tmp_path / "index", "--json")
    assert run_index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model).code == 0
    with Index.open(tmp_path / "index") as index:
        bird, beast = (index.embed(index.parse("bird", [template])) for template in ("a {}", "{} in flight"))
        ensemble = bird.astype(np.float32) + beast
        want = index.search((ensemble / np.linalg.norm(ensemble)).astype(np.float16), 3)
        got = answer(capsys, "bird", "--template", "a {}", "--template", "{} in flight", "-k", 3, *out)
        assert [hit["row"] for hit in got["hits"]] == want.rows.tolist()
        np.testing.assert_allclose([hit["score"] for hit in got["hits"]], want.scores, atol=2e-3)
        minus = index.search(index.parse('"a bird" - 0.5 * "a cat"'), 5, offset=5, where=Where(label="odd"))
        got = answer(capsys, '"a bird" - 0.5 * "a cat"', "-k", 5, "--offset", 5, "--label", "odd", *out)
        assert [hit["key"] for hit in got["hits"]] == minus.keys
        assert got["total"] == minus.total == 15
        assert [hit["relevance"] for hit in got["hits"]] == minus.relevance.tolist()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(paths[3].read_bytes())))
    stdin = answer(capsys, "--image", "-", "-k", 4, *out)
    assert stdin == {**answer(capsys, "--image", paths[3], "-k", 4, *out), "query": "-"}
    assert stdin["hits"] == answer(capsys, "--like", "odd/00003.jpg", "-k", 4, *out)["hits"]
    with Index.open(tmp_path / "index") as index:
        terms = (Term(text="a cat"), Term(picture=paths[3].read_bytes()), Term(key="even/00004.jpg"))
        all_count = index.search(Query(terms), 4).hits
    got = answer(capsys, "a cat", "--image", paths[3], "--like", "even/00004.jpg", "-k", 4, *out)
    assert [hit["key"] for hit in got["hits"]] == [hit.key for hit in all_count]
    np.testing.assert_allclose([hit["score"] for hit in got["hits"]], [hit.score for hit in all_count], atol=1e-4)
    for words, reason in (
        (["--taxon", "x"], "for the filter 'taxon'; it can be filtered by: label, key;"),
        (["--date", "soon"], "write 2019"), (["--box", "1,2"], "south,west"),
        (["--label", "od"], "near it: odd"), (["--where", "label"], "COLUMN=VALUE"), (["--mmr", "2"], "--mmr is 2"),
        (["--offset", "-1"], "--offset is -1"), (["--template", "photo"], "has no {}"),
        (["--threshold", "5"], "it is a cosine, -1 to 1"), (["--box", "-35,west"], "the box '-35,west' is none"),
        (["--grid", "nine"], "write e.g. --grid nine.png"), (["--grid", tmp_path / "no/nine.png"], "cannot be written"),
        (["--grid", tmp_path], "does not end as a picture does"),
        (["--image", tmp_path], "cannot be read: Is a directory; give a picture file"),
        (["--image", tmp_path / "no.jpg"], "cannot be read: No such file"),
    ):  # fmt: skip
        assert main(["a bird", "--out", str(tmp_path / "index"), *map(str, words)]) == 2
        out, error = capsys.readouterr()
        assert reason in error
        assert (out, error.count("\n")) == ("", 1)
    for text, reason in (("", "is empty; write what"), (f'file:"{tmp_path}/no.jpg"', "cannot be read: No such file")):
        assert main([text, "--out", str(tmp_path / "index")]) == 2
        assert reason in capsys.readouterr().err
    assert main(["a bird", "--box", "-35,110,-10,155", "--out", str(tmp_path / "index")]) == 2
    assert "the box" not in capsys.readouterr().err, "it is read, and this index has no places"


EVIL = "a[/b]/[red]lab/:dog:\x1b]0;owned\x07\n\u202egpj.jpg"
STYLE = re.compile(r"\x1b\[\d+m")  # of a table's head
LONG = f"{'a folder/' * 20}picture.jpg"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_names_are_printed_as_they_are_and_do_not_speak_to_the_terminal(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "index", {EVIL: b"a"}, metadata={EVIL: {"label": EVIL}})
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--like", EVIL, "--out", str(tmp_path / "index")]) == 0
    shown = STYLE.sub("", capsys.readouterr().out)
    told = EVIL.translate({0x1B: "\\x1b", 0x07: "\\x07", 0x0A: "\\n", 0x202E: "\\u202e"})
    assert shown.count(told) == 2, "as label and as key"
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert main(["--like", EVIL, "--label", "\x1b[2J", "--out", str(tmp_path / "index")]) == 2
    assert told in capsys.readouterr().err


def test_a_pipe_gets_a_line_for_each_answer_and_a_terminal_all_of_each_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    others = {f"{number}.jpg": b"%d" % number for number in range(9)}
    label = f"a {'long ' * 30}label"
    run(
        tmp_path / "index", {"best.jpg": b"torn", "copy.jpg": b"torn", LONG: b"b", **others},
        metadata={LONG: {"label": label}},
    )  # fmt: skip
    args = ["--like", "best.jpg", "--out", str(tmp_path / "index"), "--group", "-k", "11"]
    assert main(args) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(number) for number in range(1, 12)]
    assert lines[0][3:] == ["best.jpg", "best.jpg", "(damaged)  +1 near-duplicates"]
    assert [line[3:] for line in lines if "folder" in line[4]] == [[label, LONG]]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(args) == 0
    shown = STYLE.sub("", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    assert "relevance" in shown
    assert shown.count("folder/") == 20, "folded, not cut"
    assert shown.count("long") == 30


def test_a_reader_that_has_seen_enough_is_no_error(opened: Index) -> None:
    """As in `| head -c 80`: the answer is larger than what a pipe holds."""
    out = str(Path(opened.generation._table.filename).parents[2])
    command = [sys.executable, "-m", "pipeline.search", "--like", opened.search(QUERY, 1).keys[0], "-k", "400"]
    with subprocess.Popen([*command, "--json", "--out", out], stdout=-1, stderr=-1) as process:  # pipes
        assert process.stdout
        assert process.stderr
        process.stdout.read(80)
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_answers_are_printed_before_the_contact_sheet_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    run(tmp_path / "index", {"a.jpg": b"a"})
    assert main(["--like", "a.jpg", "--out", str(tmp_path / "index"), "--grid", str(tmp_path / "nine.png")]) == 1
    out, err = capsys.readouterr()
    assert "a.jpg" in out
    assert "No space left" in err


def test_an_index_without_pictures_is_told_from_a_filter_that_nothing_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "embed", lambda *_: QUERY)
    for pictures, words in (
        ({"a.jpg": b"a"}, "nothing: no picture passes all filters\n"),
        ({}, "nothing: there is no picture in the index\n"),
    ):
        run(tmp_path / "index", pictures)
        assert main(["a bird", "--key", "b*", "--out", str(tmp_path / "index")]) == 0
        assert capsys.readouterr() == ("", words)


def test_a_contact_sheet_shows_every_format_and_leaves_a_place_for_what_has_changed() -> None:
    red, heic = Image.new("RGB", (300, 200), (200, 0, 0)), io.BytesIO()
    pillow_heif.from_pillow(red).save(heic)
    sheet = contact_sheet("red", [Cell(encoded, "", 0.1) for encoded in (heic.getvalue(), b"no picture", None)], 3)
    middles_px = [GAP_PX + at * (CELL_PX + GAP_PX) + CELL_PX // 2 for at in (0, 1)]
    colours = [sheet.getpixel((x, CAPTION_PX + CELL_PX // 2)) for x in middles_px]
    assert colours[0] == pytest.approx((200, 0, 0), abs=8)
    assert colours[1] == PAPER


def test_a_contact_sheet_of_many_answers_is_bounded_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (contact_sheet("", [Cell(None, "", 0.0)], 1, first) for first in (1, 101))
    assert one != other, "answers keep their numbers from page to page"
    with monkeypatch.context() as patch:
        measured, length = set[int](), ImageDraw.ImageDraw.textlength
        patch.setattr(
            "PIL.ImageDraw.ImageDraw.textlength",
            lambda self, text, font: measured.add(len(text)) or length(self, text, font),
        )
        contact_sheet("", [Cell(None, "a page of words " * 100, 0.0)], 1)
        assert max(measured) <= CELL_PX + len("..."), "it is cut letter by letter"
    held: list[bool] = []

    def read(_: object, hits: list[Hit]) -> Iterator[bytes]:
        for _hit in hits:
            held.append(True)
            yield b"a picture of hundreds of megabytes"
            held.pop()

    small = io.BytesIO()
    Image.new("RGB", (32, 32)).save(small, "jpeg")

    def render(*_: object) -> bytes:
        assert held == [True], "one picture at a time"
        return small.getvalue()

    monkeypatch.setattr("pipeline.search.command._read", read)
    monkeypatch.setattr("pipeline.contact_sheet.render", render)
    run(tmp_path / "index", {f"{number}.jpg": b"%d" % number for number in range(130)})
    sheet = tmp_path / "sheet.jpg"
    args = ["--like", "7.jpg", "--out", str(tmp_path / "index"), "--grid", str(sheet), "-k", "120"]
    for more, words, sides in (
        ([], f"contact sheet: {sheet}, answers 1 to 100; the next: --offset 100\n", (10, 10)),
        (["--offset", "100"], f"contact sheet: {sheet}\n", (6, 5)),
    ):
        assert main([*args, *more]) == 0
        assert capsys.readouterr().err == words
        with Image.open(sheet) as shown:
            assert shown.format == "JPEG"
            width, height = sides[0] * (CELL_PX + GAP_PX), sides[1] * (CELL_PX + CAPTION_PX + GAP_PX)
            assert shown.size == (width + GAP_PX, height + CAPTION_PX + GAP_PX)
    with pytest.raises(ValueError, match="101 cells; expected at most 100 on one sheet"):
        contact_sheet("", [], CELLS_MAX + 1)
