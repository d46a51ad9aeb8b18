"""The embedded demo: pictures that are what they say, and a small model directory that is a real CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export import demo_model
from export.demo_captions import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PAIRS,
    SHAPES,
    Attributes,
    Query,
    full_query,
    phrase,
    relevance,
    retrieval_scores,
    short_query,
)
from export.demo_pictures import (
    INKS,
    OUTLINES,
    PAPERS,
    held_out_attributes,
    held_out_queries,
    make_picture,
    random_attributes,
    random_short_edge,
    write_pictures,
)
from export.source import quiet_transformers

DEMO = Path(demo_model.__file__).parent / "demo"
BYTES_MAX = 4_000_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- pictures


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    def contents(name: str, seed: int) -> dict[str, bytes]:
        write_pictures(tmp_path / name, 12, seed)
        return {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}

    first = contents("a", 7)
    assert contents("b", 7) == first
    assert contents("c", 8) != first


def test_written_pictures_are_a_folder_source_with_captions_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    records = write_pictures(folder, 64, 3)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {r.file for r in records}
    assert {r.attributes.label for r in records} == {f"{colour}-{shape}" for colour, shape in PAIRS}
    for record, stored in zip(records, json.loads((tmp_path / "pictures-captions.json").read_text()), strict=True):
        assert record.file.split("/")[0] == record.attributes.label
        assert (stored["file"], stored["caption"]) == (record.file, record.caption)
        assert Attributes(**stored["attributes"]) == record.attributes
        with Image.open(folder / record.file) as image:
            assert image.size == (record.width, record.height)
            image.load()
    with pytest.raises(ValueError, match="count is 0"):
        write_pictures(folder, 0, 3)


def test_edges_are_mixed_and_between_64_and_3000_pixels() -> None:
    draw = rng()
    edges = np.array([random_short_edge(draw) for _ in range(5000)])
    assert edges.min() >= 64
    assert edges.max() * 4 / 3 <= 3000
    assert 0.8 < np.mean((edges >= 200) & (edges <= 600)) < 0.95
    assert 0.005 < np.mean(edges >= 900) < 0.04


def test_a_picture_shows_its_attributes() -> None:
    """Ink where the position says, on the right paper, in as many pieces as the count."""
    draw = rng(1)
    for _ in range(40):
        image, _, shown = make_picture(draw, short_edge=200)
        pixels = np.asarray(image).astype(int)
        height, width = pixels.shape[:2]
        ink, paper = INKS[shown.colour], PAPERS[shown.background]
        ink_far, paper_far = (np.abs(pixels - np.array(colour)).max(2) for colour in (ink, paper))
        inked = ink_far < paper_far
        assert 0.01 < inked.mean() < 0.4
        ys, xs = np.nonzero(inked)
        square = min(width, height)
        outside = (np.abs(xs - width / 2) > square / 2) | (np.abs(ys - height / 2) > square / 2)
        assert outside.mean() < 0.05, "a centre crop would cut off more than a tip"
        if shown.count == 1:
            right, low = (xs.mean() - width / 2) / square, (ys.mean() - height / 2) / square
            assert (right > 0.06) == ("right" in shown.position)
            assert (low < -0.06) == ("top" in shown.position)
        else:
            quarters = {(x, y) for x, y in zip(xs > width / 2, ys > height / 2, strict=True)}
            assert len(quarters) == shown.count


# --- captions and truth


def test_training_never_draws_a_held_out_combination() -> None:
    assert sorted(SHAPES) == sorted(OUTLINES)
    for place, names in enumerate((COLOURS, SHAPES)):
        assert all(sum(combination[place] == name for combination in HELD_OUT) == 2 for name in names)
    assert {(colour, shape, paper) for colour, shape in PAIRS for paper in BACKGROUNDS} > HELD_OUT
    drawn = demo_model.draw_some(0, 0, 150).attributes
    assert not {(a.colour, a.shape, a.background) for a in drawn} & HELD_OUT
    draw = rng()
    everything = {(a.colour, a.shape, a.background) for a in (random_attributes(draw) for _ in range(2000))}
    assert everything > HELD_OUT, "this test could not have failed"


def test_captions_read_as_people_write_them() -> None:
    assert phrase(colour="red", shape="circle", counts=(1,)).text == "a red circle"
    assert phrase(shape="cross", counts=(2, 3, 4)).text == "crosses"
    assert full_query(Attributes("green", "square", "white", 3)).text == "three green squares on a white background"
    single = Attributes("blue", "star", "black", 1, "small", "top left")
    assert full_query(single).text == "a small blue star at the top left on a black background"


def test_relevance_is_agreement_in_everything_that_is_named() -> None:
    one = Attributes("red", "circle", "white", 1, "small", "middle")
    three = Attributes("red", "circle", "black", 3)
    queries = [Query("any", shape="circle"), Query("one", counts=(1,)), Query("several", counts=(2, 3, 4)),
               Query("placed", colour="red", position="middle"), Query("paper", background="black"),
               Query("wrong", colour="blue", shape="circle")]  # fmt: skip
    want = [[True, True], [True, False], [False, True], [True, False], [False, True], [False, False]]
    assert relevance(queries, [one, three]).tolist() == want
    draw = rng(2)
    for _ in range(200):
        shown = random_attributes(draw)
        assert relevance([short_query(shown, draw), full_query(shown, draw)], [shown]).all()


def test_scores_know_right_from_wrong() -> None:
    relevant = np.zeros((2, 20), bool)
    relevant[0, 4] = relevant[1, 5:17] = True
    image_emb = np.zeros((20, 2), np.float32)
    image_emb[4, 0] = image_emb[5:17, 1] = 1
    assert retrieval_scores(image_emb, np.eye(2, dtype=np.float32), relevant) == {"r1": 1.0, "p9": 1.0}
    assert retrieval_scores(image_emb, np.eye(2, dtype=np.float32)[::-1], relevant)["r1"] == 0.0
    image_emb[:3, 1] = 2  # three wrong pictures before the twelve right ones
    assert retrieval_scores(image_emb, np.eye(2, dtype=np.float32), relevant)["p9"] == pytest.approx(6 / 9)
    with pytest.raises(ValueError, match="mean 9 or more"):
        retrieval_scores(image_emb, np.eye(2, dtype=np.float32)[:1], relevant[:1])


def test_gallery_asks_about_seen_and_unseen_combinations() -> None:
    shown = held_out_attributes(1000)
    assert len(shown) >= 500
    for name, queries in held_out_queries(shown).items():
        meant = relevance(queries, shown).sum(1)
        assert meant.min() >= 1
        assert (meant < 9).sum() >= 100, "captions for R@1"
        assert (meant >= 9).sum() >= 12, "texts for P@9"
        unseen = {(query.colour, query.shape, query.background) in HELD_OUT for query in queries}
        assert unseen == {name == "unseen"}


# --- tokenizer and model directory


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return quiet_transformers().CLIPTokenizer.from_pretrained(DEMO, local_files_only=True)


def test_every_word_is_one_token_and_any_text_survives(tokenizer: Any) -> None:
    draw = rng(3)
    for _ in range(100):
        text = full_query(random_attributes(draw), draw).text
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == len(text.split()) + 2 <= demo_model.CONTEXT
    assert tokenizer.decode(tokenizer("zwölf Gänse")["input_ids"], skip_special_tokens=True) == "zwölf gänse"


def test_end_token_is_the_last_and_both_pooling_rules_find_it(tokenizer: Any) -> None:
    text_config = json.loads((DEMO / "config.json").read_text())["text_config"]
    end = tokenizer.eos_token_id
    assert end == len(tokenizer) - 1 == text_config["vocab_size"] - 1 == text_config["eos_token_id"]
    assert tokenizer.pad_token_id == end != 2
    ids = np.array(tokenizer(["a red circle", "word " * 99], padding="max_length", truncation=True)["input_ids"])
    assert ids.shape == (2, demo_model.CONTEXT)
    assert ids.argmax(1).tolist() == (ids == end).argmax(1).tolist() == [4, demo_model.CONTEXT - 1]


def test_tokenizers_library_and_merges_give_the_same_ids(tokenizer: Any) -> None:
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    merges = [tuple(line.split()) for line in (DEMO / "merges.txt").read_text().splitlines()[1:]]
    vocabulary = json.loads((DEMO / "vocab.json").read_text())
    rebuilt = quiet_transformers().CLIPTokenizer(vocab=vocabulary, merges=merges)
    for text in ("three green squares on a white background", "An Image of crosses!", "Turdus merula 42", ""):
        assert fast.encode(text).ids == tokenizer(text)["input_ids"] == rebuilt(text)["input_ids"]


def test_shipped_directory_is_small_complete_and_loads_offline() -> None:
    assert sum(p.stat().st_size for p in DEMO.iterdir()) <= BYTES_MAX
    transformers = quiet_transformers()
    model = transformers.CLIPModel.from_pretrained(DEMO, local_files_only=True)
    assert model.dtype == torch.float32
    processor = transformers.CLIPImageProcessorPil.from_pretrained(DEMO, local_files_only=True)
    image = make_picture(rng(4), short_edge=300).image
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], demo_model.normalise(demo_model.shrink(image)[None])[0]), "trained on other pixels"
    with torch.inference_mode():
        assert model.get_image_features(pixel_values=pixels).pooler_output.isfinite().all()


def test_a_short_training_lowers_the_loss(tmp_path: Path) -> None:
    tokenizer = demo_model.write_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = demo_model.new_model(len(tokenizer))
    losses = demo_model.train(model, tokenizer, demo_model.draw_some(0, 0, 200), steps=12, batch=48, seed=0)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
