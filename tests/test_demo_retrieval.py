"""The demo model answers right through our own export, engine, index and search, on pictures no training has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import index, vectors_by_key

from engines.build import main as make_engines
from export.demo_captions import relevance, retrieval_scores
from export.demo_pictures import held_out_gallery
from pipeline.search import Index

DEMO = Path(__file__).resolve().parents[1] / "export" / "demo"
R1_MIN, P9_MIN = 0.80, 0.90


@pytest.mark.usefixtures("tiny_model")  # the session's artifact folder
def test_held_out_pictures_and_combinations_are_found(tmp_path: Path) -> None:
    gallery = held_out_gallery(tmp_path / "gallery")
    assert make_engines(["--model", str(DEMO), "--runtime", "ort-cpu"]) == 0
    ran = index(gallery.folder, tmp_path / "index", "--model", DEMO)
    assert ran.code == 0, ran.stderr
    assert ran.report["embedded"] == len(gallery.records) >= 500
    by_key = vectors_by_key(tmp_path / "index")
    keys = [record.file for record in gallery.records]
    image_emb_nd = np.stack([np.frombuffer(by_key[key][1], np.float16) for key in keys]).astype(np.float32)
    shown = [record.attributes for record in gallery.records]
    with Index.open(tmp_path / "index") as opened:
        for name, queries in gallery.queries.items():
            text_emb_qd = np.stack([opened.embed(query.text) for query in queries])
            scores = retrieval_scores(image_emb_nd, text_emb_qd.astype(np.float32), relevance(queries, shown))
            assert scores["r1"] >= R1_MIN, (name, scores)
            assert scores["p9"] >= P9_MIN, (name, scores)
            for query_d in text_emb_qd[:20]:  # what a user gets is what was scored
                best = np.sort(image_emb_nd @ query_d.astype(np.float32))[::-1][:9]
                np.testing.assert_allclose(opened.search(query_d, 9).scores, best, atol=1e-3)
            found = opened.search(queries[0].text, len(keys))
            right = relevance(queries[:1], [shown[keys.index(key)] for key in found.keys])[0].astype(bool)
            assert found.relevance[right][:9].mean() > 0.7 > 0.1 > found.relevance[~right].mean(), queries[0].text
        shown_by_key = dict(zip(keys, shown, strict=True))
        nine = [shown_by_key[key] for key in opened.search("a blue star").keys]  # what `make demo` asks
        assert [(picture.colour, picture.shape) for picture in nine] == [("blue", "star")] * 9
