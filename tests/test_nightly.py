"""Every night, unattended: many sources and one index, budgets, somebody is told, and damage never reaches a reader."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from pictures import noisy_jpeg, write_folder
from prometheus_client.parser import text_string_to_metric_families
from runs import Ran, index, make_tiny_model, run_module, vectors_by_key
from test_sources_containers import tar_bytes
from test_verify import edit, shards, sign

from engines.spec import artifacts_root
from pipeline.config import Config, index_parser, parse_index
from pipeline.exits import BUDGET_SPENT
from pipeline.index import Indexed, run
from pipeline.nightly import night as nightly
from pipeline.nightly.config import WebhookTable
from pipeline.nightly.metrics import write_metrics
from pipeline.nightly.result import COUNTED, Tonight, work_words
from pipeline.nightly.tell import post
from pipeline.report.page import write_report
from pipeline.scheduler import LaneFailed
from pipeline.stop import Stop
from pipeline.store.files import take_lock


@contextmanager
def hook() -> Iterator[SimpleNamespace]:
    """A server that keeps what is posted to it, and answers with `status`."""
    told = SimpleNamespace(posts=[], status=204, url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.posts.append((self.path, self.headers.get("X-Token"), body))
            self.send_response(told.status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            told.posts.append((self.path, self.headers.get("X-Token"), None))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        told.url = f"http://127.0.0.1:{server.server_address[1]}/secret-path"
        yield told
        server.shutdown()


def night(folder: Path, env: dict[str, str] | None = None) -> Ran:
    return run_module("pipeline.nightly", "--config", folder / "nightly.toml", env=env)


def configure(folder: Path, model: Path, sources: list[str], more: str = "") -> None:
    tables = "".join(f'[[source]]\nkind = "folder"\nroot = "{folder / name}"\n' for name in sources)
    (folder / "nightly.toml").write_text(
        f'[index]\nout = "{folder / "index"}"\nmodel = "{model}"\nbudget = "2h"\n'
        f'[report]\nlog = "{folder / "log.jsonl"}"\nmetrics = "{folder / "night.prom"}"\npage = false\n{more}{tables}'
    )


def metrics(path: Path) -> dict[tuple[str, ...], float]:
    """(name, *label values but the index) -> value, read by Prometheus's own parser."""
    return {
        (sample.name, *(value for label, value in sample.labels.items() if label != "index")): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_nights_of_two_sources(tmp_path: Path, tiny_model: Path) -> None:
    """Good, bad, failing, and good again: three nights as a scheduler sees them."""
    a, b = tmp_path / "a", tmp_path / "b"
    write_folder(a, 10)
    write_folder(b / "more", 6, first_seed=50)
    (b / "empty.jpg").write_bytes(b"")
    with hook() as told:
        webhook = f'[webhook]\nurl = "{told.url}"\nheader = "X-Token"\nheader_env = "HOOK_TOKEN"\ntimeout = "5s"\n'
        configure(tmp_path, tiny_model, ["a", "b"], f'[verify]\nlevel = "sample"\nrows = 4\n{webhook}')
        secret = {"HOOK_TOKEN": "s3cret-token"}

        first = night(tmp_path, secret)
        assert first.code == 0, first.stderr
        report = first.report
        assert [report[name] for name in ("inputs", "embedded", "quarantined", "generation")] == [17, 16, 1, 1]
        assert [[one["inputs"], one["embedded"], one["run"]] for one in report["sources"]] == [[10, 10, 1], [7, 6, 2]]
        for name in ("inputs", "embedded", "quarantined", "quarantined_new", "unchanged", "copied", "pending"):
            assert report[name] == sum(one[name] for one in report["sources"]), name
        assert report["inputs"] == sum(
            report[name] for name in ("unchanged", "embedded", "copied", "quarantined", "pending")
        )
        assert told.posts == [], "nobody is woken by a good night"
        good = metrics(tmp_path / "night.prom")
        assert good["nightjar_exit_code",] == 0
        assert good["nightjar_pictures", f"folder {b}", "quarantined"] == 1

        # One root is not mounted, the other has a new picture: that one is searchable, and somebody is told.
        shutil.move(b, tmp_path / "away")
        (a / "new.jpg").write_bytes(noisy_jpeg(1000))
        second = night(tmp_path, secret)
        assert second.code == 2, second.stderr
        assert (second.report["embedded"], second.report["generation"]) == (1, 2)
        sample = second.report["verify"]["sample"]
        assert (sample["compared"], sample["away"]) == (4, 6), "a source that is away takes out its own pictures alone"
        assert [one["exit"] for one in second.report["sources"]] == [0, 2]
        assert {"new.jpg", "even/00000.jpg"} <= vectors_by_key(tmp_path / "index").keys()
        assert len(vectors_by_key(tmp_path / "index")) == 17, "what is not there tonight stays"
        ((path, header, body),) = told.posts
        assert (path, header) == ("/secret-path", "s3cret-token")
        assert body["exit"] == 2
        assert str(b) in body["text"]
        bad = metrics(tmp_path / "night.prom")
        assert bad["nightjar_exit_code",] == 2
        assert bad["nightjar_source_exit_code", f"folder {b}"] == 2
        assert bad["nightjar_last_run_timestamp_seconds",] > good["nightjar_last_run_timestamp_seconds",]
        success = "nightjar_last_success_timestamp_seconds"
        assert bad[success,] == good[success,], "a failure keeps the time of the last success"

        # Mounted, but empty: that source keeps what it has. Its pictures cannot be compared, and that is no damage.
        b.mkdir()
        third = night(tmp_path, secret)
        assert (third.code, third.report["generation"]) == (6, 2), third.stderr
        assert "7 of 7 known pictures are gone" in third.report["sources"][1]["error"]
        assert third.report["verify"]["sample"]["rows"] == 4
        assert len(vectors_by_key(tmp_path / "index")) == 17

        for words in (
            f"source 1 of 2: folder {a}, ", f"embedding {a}: 10/10  100 %, ",
            "source 1 of 2: 10 embedded, 0 copied, 0 newly quarantined, 0 deleted of 10 pictures",
            f"source 2 of 2: folder {b}, ", f"embedding {b}: ",
            "source 2 of 2: 6 embedded, 0 copied, 1 newly quarantined, 0 deleted of 7 pictures",
            "verifying: sample", "embedded again on cpu", "verified: 16 vectors read, 4 pictures embedded again, 0 ",
            "publishing", "readers see generation 1", f"and why: python -m pipeline.status --out {tmp_path / 'index'}",
        ):  # fmt: skip
            assert words in first.stderr, first.stderr
        assert ", the budget ends in " in first.stderr
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert any(line["message"].startswith(f"embedding {a}: 10/10  100 %, ") for line in log)
        assert [line["night"]["exit"] for line in log if "night" in line] == [0, 2, 6]
        assert all({"time", "level", "message"} <= line.keys() for line in log)
        shown = "".join([*(ran.stdout + ran.stderr for ran in (first, second, third)), json.dumps(log)])
        assert "s3cret-token" not in shown
        assert "secret-path" not in shown


def test_what_could_not_be_listed_is_told_everywhere(tmp_path: Path, tiny_model: Path) -> None:
    """A tar that is cut off holds nobody up, but no night with one looks like a whole one."""
    shards, out = tmp_path / "shards", tmp_path / "index"
    shards.mkdir()
    whole = tar_bytes({f"{number}.jpg": noisy_jpeg(number) for number in range(4)})
    (shards / "a.tar").write_bytes(whole)
    (shards / "b.tar").write_bytes(whole[: len(whole) // 4])
    (tmp_path / "nightly.toml").write_text(
        f'[index]\nout = "{out}"\nmodel = "{tiny_model}"\nmax_quarantined = 0\n[verify]\nlevel = "off"\n'
        f'[report]\nmetrics = "{tmp_path / "night.prom"}"\n[[source]]\nkind = "tar"\nroot = "{shards}"\n'
    )
    ran = night(tmp_path)
    assert (ran.code, ran.report["generation"]) == (3, 1), ran.stderr
    for told in (ran.report["unlisted"], ran.report["sources"][0]["unlisted"]):
        assert (told["count"], told["examples"][0]["key_prefix"]) == (1, "b.tar/")
    assert "1 part of the source could not be listed, such as b.tar/: " in ran.report["words"]
    assert f"tar {shards}: more newly quarantined, or not listed, than max_quarantined = 0" in ran.report["words"]
    assert metrics(tmp_path / "night.prom")["nightjar_unlisted", f"tar {shards}"] == 1
    page = (out / "runs/1.html").read_text()
    assert "1 part of the source could not be listed; all " in page
    assert "Every picture that could be listed is accounted for" in page

    args = ("--model", tiny_model, "--max-quarantined")
    again = index(shards, out, *args, 1, source="tar")
    assert (again.code, again.report["unlisted"]) == (0, told), "not new, but not listed in this run either"
    assert index(shards, out, *args, 0, source="tar").code == 3
    newest = json.loads(run_module("pipeline.status", "--out", out, "--json").stdout)["runs"][0]
    assert newest["unlisted"] == told
    assert "could not be listed, such as b.tar/: " in run_module("pipeline.status", "--out", out).stdout
    (shards / "b.tar").write_bytes(whole)
    mended = index(shards, out, *args, 0, source="tar")
    assert (mended.code, mended.report["unlisted"]["count"]) == (0, 0), mended.stderr
    assert "Every picture is accounted for" in write_report(out, 4).read_text()


def test_damage_is_never_published(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "a", 8)
    configure(tmp_path, tiny_model, ["a"], '[verify]\nlevel = "quick"\n')
    assert night(tmp_path).code == 0
    (shard,) = (tmp_path / "index/shards").glob("*.h5")
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 4
    shard.write_bytes(damaged)
    (tmp_path / "a/new.jpg").write_bytes(noisy_jpeg(1000))
    ran = night(tmp_path)
    assert (ran.code, ran.report["generation"], ran.report["embedded"]) == (7, None, 1), ran.stderr
    assert os.readlink(tmp_path / "index/current") == "generations/1"
    repair = f"python -m pipeline.verify --repair --out {tmp_path / 'index'}"
    assert ran.report["words"].endswith(f"last generation: {repair}")
    assert json.loads((tmp_path / "index/runs/2.json").read_text())["exit"] == 7


@pytest.mark.parametrize("nights", [0, 1])
def test_nobody_sees_a_vector_of_tonight_that_is_not_its_pictures(
    nights: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first night, and later where few are new and another source is away. Every digest is right."""
    write_folder(tmp_path / "a", 8)
    write_folder(tmp_path / "b/b", 8, first_seed=50)
    configure(tmp_path, tiny_model, ["a", "b"], '[verify]\nlevel = "sample"\nrows = 6\n')
    if nights:
        assert night(tmp_path).code == 0
        write_folder(tmp_path / "a/more", 3, first_seed=100)
        shutil.move(tmp_path / "b", tmp_path / "away")
    out, wait = tmp_path / "index", nightly._wait

    def shift(file: h5py.File) -> None:
        file["embeddings"][:] = np.roll(file["embeddings"][:], 1, axis=0)

    def tampered(*args: Any) -> Any:
        edit(shards(out)[-1], shift)
        sign(out, shards(out)[-1])
        return wait(*args)

    monkeypatch.setattr(nightly, "_wait", tampered)
    assert nightly.main(["--config", str(tmp_path / "nightly.toml")]) == 7
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (report["generation"], report["verify"]["sample"]["rows"]) == (None, 6)
    assert (out / "current").is_symlink() == bool(nights)
    if nights:
        assert report["verify"]["sample"]["off"] == 3, "half of the sample are new"
        assert os.readlink(out / "current") == "generations/1"
        shutil.move(tmp_path / "away", tmp_path / "b")
    assert run_module("pipeline.verify", "full", "--repair", "--out", out).code == 0
    monkeypatch.undo()
    assert nightly.main(["--config", str(tmp_path / "nightly.toml")]) == 0
    assert len(vectors_by_key(out)) == 16 + 3 * nights


def test_one_night_at_a_time(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "a", 1)
    configure(tmp_path, tiny_model, ["a"])
    (tmp_path / "index").mkdir()
    lock = take_lock(tmp_path / "index/lock")
    ran = night(tmp_path)
    os.close(lock)
    assert ran.code == 4
    assert metrics(tmp_path / "night.prom")["nightjar_exit_code",] == 4
    assert ran.stderr.count("another run writes to") == 1
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert (json.loads(line)["level"], json.loads(line)["night"]["exit"]) == ("error", 4)


def test_check_says_what_would_run_and_writes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "a", 1)
    configure(tmp_path, tiny_model, ["a", "missing"], '[webhook]\nurl = "https://hooks.example.org/secret-path"\n')
    before = sorted(tmp_path.rglob("*"))
    ran = run_module("pipeline.nightly", "--config", tmp_path / "nightly.toml", "--check")
    assert ran.code == 2
    assert re.search(r"CANNOT RUN: .*missing", ran.stdout)
    assert "hooks.example.org" in ran.stdout
    assert "secret-path" not in ran.stdout
    commands = [line.strip() for line in ran.stdout.splitlines() if "pipeline.index" in line]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "pipeline.index"]
        assert index_parser().parse_args(words[3:]).out == tmp_path / "index"
    assert sorted(tmp_path.rglob("*")) == before


def test_check_finds_what_would_fail_at_night(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "a", 2)
    configure(tmp_path, tiny_model, ["a", "a/even"])
    toml = tmp_path / "nightly.toml"
    right = run_module("pipeline.nightly", "--config", toml, "--check")
    assert (right.code, right.stdout.startswith(f"{toml} is right.")) == (0, True), right.stdout
    assert f"WARNING: it lies in folder {tmp_path}/a, so" in right.stdout
    (tmp_path / "log.jsonl").mkdir()
    toml.write_text(toml.read_text().replace(str(tmp_path / "night.prom"), "gone/night.prom").replace("a/even", "c"))
    wrong = run_module("pipeline.nightly", "--config", toml, "--check")
    assert (wrong.code, "is right" in wrong.stdout, "WARNING" in wrong.stdout) == (2, False, False)
    assert "CANNOT RUN" in wrong.stdout
    assert f"log {tmp_path / 'log.jsonl'}\n    CANNOT BE WRITTEN: {tmp_path / 'log.jsonl'} is a folder" in wrong.stdout
    assert f"metrics {Path('gone/night.prom').absolute()}\n    CANNOT BE WRITTEN: no file can be made" in wrong.stdout


def test_a_fault_of_ours_is_told_too(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> None:
        raise KeyError("a bug")

    with hook() as told:
        configure(tmp_path, tiny_model, ["a"], f'[webhook]\nurl = "{told.url}"\n')
        monkeypatch.setattr(nightly, "run_night", fault)
        assert nightly.main(["--config", str(tmp_path / "nightly.toml")]) == 1
    assert "a bug" in told.posts[0][2]["text"]
    assert "Traceback" in (tmp_path / "log.jsonl").read_text()


def test_a_webhook_that_fails_is_logged_without_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    facts = {"index": "i", "exit": 1, "words": "w"}
    with hook() as told:
        table = WebhookTable(url=told.url, timeout_s=5)
        assert post(table, facts)
        for told.status in (302, 500):
            told.posts.clear()
            assert not post(table, facts)
            assert [path for path, _, _ in told.posts] == ["/secret-path"], "the header goes nowhere else"
    assert not post(table, facts), "nobody listens any more"
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert "could not be reached: Connection refused" in caplog.text
    assert "secret-path" not in caplog.text
    assert "secret-path" not in repr(table)


def test_metrics_are_replaced_in_one_step(tmp_path: Path) -> None:
    facts = {"index": "i", "exit": 0, "seconds": 1.0, "phases_s": {}, "generation": None, "sources": []}
    path = tmp_path / "night.prom"
    write_metrics(path, facts)
    with path.open() as old:
        write_metrics(path, facts | {"exit": 1})
        assert "exit_code" in old.read(), "who has the old file open reads all of it"
    assert metrics(path)["nightjar_exit_code",] == 1
    assert list(tmp_path.iterdir()) == [path]


# ---- budgets ---------------------------------------------------------------------------------------------------------


class SpentAfterAShard(Stop):
    """Time is up once the first vectors of this run are on disk: what a clock does, without a clock."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.shards, self.before = out / "shards", len(list((out / "shards").glob("*.h5")))

    def __call__(self) -> bool:
        return len(list(self.shards.glob("*.h5"))) > self.before


def config(root: Path, out: Path, model: Path) -> Config:
    return parse_index(["--source", "folder", "--root", str(root), "--out", str(out), "--model", str(model), "--json"])


def test_a_spent_budget_publishes_what_is_done_but_never_half_a_model(tmp_path: Path, tiny_model: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    write_folder(photos, 200)
    report = run(config(photos, out, tiny_model), SpentAfterAShard(out))
    assert (report.exit, report.generation) == (BUDGET_SPENT, 1)
    assert report.pending > 0
    assert report.embedded + report.pending == 200
    early = vectors_by_key(out)
    assert len(early) == report.embedded > 0, "tonight's new pictures are visible"
    ran = index(photos, out, "--model", tiny_model, "--budget", "1h")
    assert (ran.code, ran.report["pending"], ran.report["embedded"]) == (0, 0, report.pending), ran.stderr
    whole = vectors_by_key(out)
    assert len(whole) == 200
    assert early.items() <= whole.items()

    second = make_tiny_model(tmp_path / "second", artifacts_root(), seed=9)
    half = run(config(photos, out, second), SpentAfterAShard(out))
    assert (half.exit, half.generation) == (BUDGET_SPENT, None)
    assert half.pending > 0
    assert vectors_by_key(out) == whole, "readers see all of the old model"
    rest = run(config(photos, out, second), Stop())
    assert (rest.exit, rest.generation, rest.embedded) == (0, 3, half.pending)
    assert vectors_by_key(out).keys() == whole.keys()


def test_time_for_publishing_is_kept_back(tmp_path: Path, tiny_model: Path) -> None:
    """A budget that publishing alone would take gets nowhere, night after night: it is refused."""
    write_folder(tmp_path / "photos", 1)
    (tmp_path / "index/runs").mkdir(parents=True)
    (tmp_path / "index/runs/7.json").write_text('{"phases_s": {"publishing": 100.0, "verifying": 20}}')
    args = ("--model", tiny_model, "--budget")
    ran = index(tmp_path / "photos", tmp_path / "index", *args, "2m")
    assert ran.code == 2
    assert "publishing is expected to take 2m30s" in ran.report["error"]
    assert "at least 5m" in ran.report["error"]


def test_a_deadline_stops_and_none_does_not() -> None:
    stop = Stop()
    assert not stop()
    stop.deadline_s = time.monotonic() + 3600
    assert not stop()
    stop.deadline_s = time.monotonic()
    assert stop()
    assert not stop.requested, "what is done is published all the same"


def test_sources_share_a_budget_and_the_one_that_lags_behind_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(name: str) -> Any:
        cfg = SimpleNamespace(out=tmp_path, source=SimpleNamespace(kind="folder", root=name, options={}))
        return Tonight(SimpleNamespace(kind="folder", root=name, split=None), cfg)  # type: ignore[arg-type]

    shares: dict[str, float] = {}
    stop, seconds = Stop(), 900.0

    def index_source(cfg: Any, store: object, stop: Stop, indexed: Indexed) -> None:
        shares[cfg.source.root] = stop.deadline_s - time.monotonic()
        if cfg.source.root == "broken":
            raise LaneFailed("no lane is left")

    monkeypatch.setattr(nightly, "index_source", index_source)
    monkeypatch.setattr(nightly, "begin", lambda cfg, store: Indexed(1))
    monkeypatch.setattr(nightly, "pending_of", lambda index: {("folder", "behind"): 10_000})
    sources = [source(name) for name in ("behind", "broken", "small")]
    nightly.index_in_turn(sources, None, stop, time.monotonic() + seconds)  # type: ignore[arg-type]
    assert list(shares) == ["broken", "small", "behind"]
    assert shares == pytest.approx({"broken": 300, "small": 450, "behind": 900}, abs=5), "what is not used is passed on"
    assert [one.error for one in sources] == ["", "no lane is left", ""]
    nightly.index_in_turn(sources, None, stop, math.inf)  # type: ignore[arg-type]
    assert shares["behind"] == math.inf


def test_a_look_at_the_index_that_takes_long_is_no_silence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(nightly, "VERIFY_LINE_S", 1.0)
    command = [sys.executable, "-c", "import time; time.sleep(2.2); print('{}')"]
    assert nightly._wait(command, Stop()) == (0, "{}\n")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "verifying: 0:00:01 so far"
    assert len(lines) < 3, "and the time between them grows"


def test_what_is_left_for_the_next_night_is_said() -> None:
    done = dict.fromkeys(COUNTED, 0) | {"inputs": 3000, "embedded": 1200}
    assert work_words(done).endswith("deleted of 3,000 pictures")
    assert work_words(done | {"pending": 1800}).endswith("of 3,000 pictures; 1,800 are left for the next run")
