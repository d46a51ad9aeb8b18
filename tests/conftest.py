"""Fixtures every test may use. Real photos are read in place; where they are absent their tests skip and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import make_tiny_model

if TYPE_CHECKING:
    from engines.build import Report

# Two threads for two cores: more only makes the tests fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")



def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped without one, a failure under REQUIRE_GPU=1")
    config.addinivalue_line("markers", "alone: weighs the whole GPU's memory, so nothing else may use it meanwhile")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: a GPU host that cannot run its GPU tests must not look like one that passed them."""
    if item.get_closest_marker("gpu") is None:
        return
    from pipeline.devices import gpu_trouble

    if not (problem := gpu_trouble()):
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(f"REQUIRE_GPU=1, but {problem}", pytrace=False)
    pytest.skip(problem)


BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
SHARED_DATA = Path(os.environ.get("NIGHTJAR_SHARED_DATA") or BESIDE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos, hard formats and broken files: beside the checkout, or NIGHTJAR_SHARED_DATA."""
    if not (SHARED_DATA / "MANIFEST.tsv").is_file():
        words = f"real photos are not here: no {SHARED_DATA}/MANIFEST.tsv; NIGHTJAR_SHARED_DATA names another place"
        if os.environ.get("REQUIRE_GPU") == "1":  # without them, the tests that compare pixels prove nothing
            pytest.fail(words, pytrace=False)
        pytest.skip(words)
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test of a session uses this one artifact folder (NIGHTJAR_ARTIFACTS), as a user's host does."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def all_engines(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A tiny model with every engine of this host, in an artifact folder of its own (one C++ compilation, 20 s)."""
    from engines.build import build_engines
    from export.random_model import write_random_model

    model = write_random_model(tmp_path_factory.mktemp("model") / "tiny", "tiny")
    return build_engines(str(model), root=tmp_path_factory.mktemp("artifacts"))


CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
