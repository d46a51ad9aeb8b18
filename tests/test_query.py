"""What people write is read as they mean it, and its parts add up as documented."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search.diverse import NEAR_DUPLICATE_COSINE, marginal_relevance, near_duplicates
from pipeline.search.query import Query, QueryError, Term, combine, parse_query
from pipeline.search.relevance import LOWER, WIDTH_MIN, Background, Spread, stretched
from pipeline.search.where import Where, parse_box, parse_dates
from pipeline.store.scan import score


def unit(*rows: list[float]) -> npt.NDArray[np.float16]:
    wide = np.array(rows, np.float32)
    unit_nd: npt.NDArray[np.float16] = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    return unit_nd


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a red car", [Term(text="a red car")]),
        ('"red car" - "person"', [Term(text="red car"), Term(text="person", weight=-1)]),
        ('"red car"-person', [Term(text="red car"), Term(text="person", weight=-1)]),
        ('2*"sea" + .5 * "a boat"', [Term(text="sea", weight=2), Term(text="a boat", weight=0.5)]),
        ('-"snow" + "wolf"', [Term(text="snow", weight=-1), Term(text="wolf")]),
        ("“red car” - “person”", [Term(text="red car"), Term(text="person", weight=-1)]),  # as phones type them
        ('"the \\"best\\" of"', [Term(text='the "best" of')]),
        ('key:"a/b c.jpg" + 0.5*"at night"', [Term(key="a/b c.jpg"), Term(text="at night", weight=0.5)]),
        ('"at night" + key:a/b.jpg', [Term(text="at night"), Term(key="a/b.jpg")]),
        ('file:"x.jpg" + file:"y.jpg"', [Term(file="x.jpg"), Term(file="y.jpg")]),
        # Nothing is special without a quote at the beginning.
        ('a 12" record - new', [Term(text='a 12" record - new')]),
        ("-5 degrees", [Term(text="-5 degrees")]),
        ("semi-aquatic + key:x", [Term(text="semi-aquatic + key:x")]),
    ],
)
def test_queries_are_read_as_people_write_them(text: str, terms: list[Term]) -> None:
    assert list(parse_query(text).terms) == terms


@given(st.text().filter(str.strip), st.text().filter(str.strip))
def test_any_text_can_be_quoted(first: str, second: str) -> None:
    quoted = [text.replace("\\", "\\\\").replace('"', '\\"') for text in (first, second)]
    terms = parse_query(f'"{quoted[0]}" - 0.25 * "{quoted[1]}"').terms
    assert [(term.text, term.weight) for term in terms] == [(first, 1), (second, -0.25)]


@pytest.mark.parametrize("text", ['"a" "b"', '"a" -', '"a" - b c', '0 * "a"', '"a" - 0*"b"', '"a" ** "b"'])
def test_an_expression_that_cannot_be_read_says_where(text: str) -> None:
    with pytest.raises(QueryError, match=r"cannot be read from|above 0"):
        parse_query(text)


@pytest.mark.parametrize("text", ['"red', '"red" - "a \\"car\\"', '2 * key:"a/b.jpg', '"two\nlines', "“red"])
def test_a_quote_that_is_not_closed_is_named(text: str) -> None:
    with pytest.raises(QueryError, match="has a quote that is not closed; close it, or write"):
        parse_query(text)


def test_a_term_is_one_thing_and_a_template_has_its_place() -> None:
    with pytest.raises(ValueError, match="one of text, picture, row"):
        Term(text="a", row=1)
    with pytest.raises(ValueError, match="given: none"):
        Term()
    with pytest.raises(ValueError, match="weight of row is 0"):
        Term(row=1, weight=0)
    for empty in ("", " \n", '""', '"a" - " "'):
        with pytest.raises(QueryError, match="is empty; write what to look for"):
            parse_query(empty)
    with pytest.raises(QueryError, match="has no"):
        Query((Term(text="a"),), ("a photo",))


def test_vectors_add_up_by_weight_and_stay_unit_vectors() -> None:
    a, b = unit([1, 0, 0], [0, 1, 0])
    assert combine([a], [3.0]) is a, "of one, itself to the bit"
    np.testing.assert_allclose(combine([a, b], [1, 1]), unit([1, 1, 0])[0], atol=1e-3)
    np.testing.assert_allclose(combine([a, b], [2, -1]), unit([2, -1, 0])[0], atol=1e-3)
    np.testing.assert_allclose(combine([a], [-1]), -a, atol=1e-3)
    with pytest.raises(QueryError, match="cancel out"):
        combine([a, a], [1, -1])


@pytest.mark.parametrize(
    ("text", "dates"),
    [
        ("2019", ("2019", "2019")),
        ("2019..2020-06", ("2019", "2020-06")),
        ("2019-06-30..", ("2019-06-30", None)),
        ("..2019", (None, "2019")),
    ],
)
def test_dates_are_read_as_people_write_them(text: str, dates: tuple[str | None, str | None]) -> None:
    assert parse_dates(text) == dates
    assert Where(date=dates).date == dates


def test_dates_and_boxes_that_are_none_are_refused() -> None:
    for date in (("yesterday", None), (None, "2019-6"), ("2020", "2019")):
        with pytest.raises(QueryError, match=r"date"):
            Where(date=date)
    for box in ((50.0, 0.0, 40.0, 10.0), (-91.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, float("nan"))):
        with pytest.raises(QueryError, match="south,west,north,east"):
            Where(box=box)
    with pytest.raises(QueryError, match="south,west,north,east"):
        parse_box("1,2,3")


def test_near_duplicates_come_under_their_best() -> None:
    near = NEAR_DUPLICATE_COSINE + 0.003
    emb_nd = unit([1, 0, 0], [0, 1, 0], [near, (1 - near**2) ** 0.5, 0], [0, 0, 1], [0, 0.999, 0.02])
    assert near_duplicates(emb_nd) == [[0, 2], [1, 4], [3]]
    assert near_duplicates(emb_nd[:0]) == []


def test_variety_is_what_the_weight_says_and_a_longer_page_begins_like_a_short_one() -> None:
    rng = np.random.default_rng(0)
    centres = unit(*np.eye(4, 16).tolist())
    emb_nd = unit(*(centres[np.arange(40) // 10] + 0.05 * rng.standard_normal((40, 16))).tolist())
    scores = np.linspace(0.4, 0.2, 40, dtype=np.float32)  # best first: ten of each centre in turn
    assert marginal_relevance(emb_nd, scores, 1.0, 12) == list(range(12))
    varied = marginal_relevance(emb_nd, scores, 0.3, 12)
    assert varied[0] == 0
    assert sorted(number // 10 for number in varied[:4]) == [0, 1, 2, 3], "one of each before a second of any"
    assert marginal_relevance(emb_nd, scores, 0.3, 5) == varied[:5]
    assert len(set(marginal_relevance(emb_nd, scores, 0.3, 99))) == 40
    assert marginal_relevance(emb_nd[:0], scores[:0], 0.3, 5) == []


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
def test_the_background_has_the_quantiles_that_numpy_finds(rows: int) -> None:
    emb_nd = unit(*np.random.default_rng(rows).standard_normal((rows, 8)).tolist())
    scan = type("Scan", (), {"rows": rows, "gather": lambda _, wanted: emb_nd[wanted]})()
    spread = Background(scan).spread(emb_nd[0])
    middle, low = np.quantile(stretched(score(emb_nd, emb_nd[0])), [0.5, LOWER])
    assert spread.middle == pytest.approx(middle, rel=1e-12)
    assert spread.width == pytest.approx(max(middle - low, WIDTH_MIN), rel=1e-9)


def test_relevance_rises_with_the_score_as_it_says() -> None:
    spread = Spread(middle=float(np.arctanh(0.2)), width=0.02)
    scores = np.array([-1, 0.2, 0.23, 0.25, 0.27, 0.29, 1], np.float32)
    relevance = spread.relevance(scores)
    np.testing.assert_allclose(relevance, [0, 0.018, 0.2982, 0.7804, 0.9681, 0.9963, 1], atol=1e-3)
    assert (np.diff(relevance) >= 0).all()
