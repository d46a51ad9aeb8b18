"""The second half of `pipeline.verify --repair`: what was dropped, nothing else, is embedded again and published."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from engines.spec import Artifact, ArtifactMissing, artifacts_root, find_artifact
from pipeline import index
from pipeline.config import UsageError
from pipeline.exits import DONE, MANY_QUARANTINED
from pipeline.store import Store
from pipeline.store.check import Health, open_readonly
from pipeline.store.drop import drop_generations
from pipeline.store.files import take_lock
from pipeline.store.manifest import connect
from pipeline.store.publish import missing
from pipeline.verify.config import VerifyConfig

Dropped: TypeAlias = tuple[str, str, str, str]  # kind, root, options in JSON, name of the space


class RepairFailed(Exception):
    """The run that embeds again did not end well; `code` is its own."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"what is broken was dropped, but not embedded again: {words}. The same command goes on there")
        self.code = code


def embed_again(cfg: VerifyConfig, health: Health, dropped: list[Dropped]) -> int:
    """Run `pipeline.index` over every source that has dropped pictures, all others are known to it; publish.

    The model that readers see comes last, and with all sources where it lacks a vector: those may be on the way to
    another model by now, and a generation without their pictures would look sound.
    """
    embedded, shown = 0, _shown(cfg.out)
    work = [one for one in dropped if one[3] != shown.space]
    work += shown.sources if shown.lacking else [one for one in dropped if one[3] == shown.space]
    for kind, root, options, space in work:
        artifact = artifact_of(cfg, space)
        if find_artifact(artifact.spec.model).path != artifact.path:
            raise UsageError(
                f"a newer artifact than {artifact.path} has the name {artifact.spec.model}: another model would index "
                f"{root}; move it out of {artifacts_root()}"
            )
        args = ["--source", kind, f"--root={root}", "--model", artifact.spec.model, "--out", str(cfg.out), "--json"]
        args += ["--runtime", cfg.runtime, "--precision", cfg.precision, "--devices", cfg.devices]
        if split := json.loads(options).get("split"):
            args += ["--split", split]
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            code = index.main(args)
        last = json.loads(stdout.getvalue().strip().splitlines()[-1])
        if code not in (DONE, MANY_QUARANTINED):
            raise RepairFailed(code, last.get("error", "it was interrupted"))
        embedded += last["embedded"]
    if health.broken.republish and not any(space == shown.space for *_, space in work):
        publish_again(cfg)
    with locked(cfg.out), contextlib.closing(connect(cfg.out / "manifest.sqlite")) as db:
        drop_generations(cfg.out, db, health.broken)
    return embedded


class _Shown(NamedTuple):
    space: str | None  # of the newest generation; None where there is none
    lacking: int  # pictures without a vector of it
    sources: list[Dropped]  # all of them


def _shown(out: Path) -> _Shown:
    with contextlib.closing(open_readonly(out)) as db:
        sql = "SELECT id, name FROM space WHERE id = (SELECT space FROM generation ORDER BY number DESC LIMIT 1)"
        number, name = db.execute(sql).fetchone() or (None, None)
        sources = db.execute("SELECT kind, root, options FROM source ORDER BY id").fetchall()
        return _Shown(name, missing(db, number) if number else 0, [(*source, name) for source in sources])


def publish_again(cfg: VerifyConfig) -> None:
    """The manifest is right, what readers see is not."""
    with contextlib.closing(open_readonly(cfg.out)) as db:
        sql = "SELECT name FROM space WHERE id = (SELECT space FROM generation ORDER BY number DESC LIMIT 1)"
        artifact = artifact_of(cfg, db.execute(sql).fetchone()[0])
    spec = artifact.spec
    with Store.open(cfg.out, spec.space, spec.dim) as store:
        store.publish(json.loads(spec.to_json()), {"artifact": str(artifact.path)})


def artifact_of(cfg: VerifyConfig, space: str) -> Artifact:
    """The artifact whose vectors a space holds: that of --model, else any that is here."""
    if cfg.model:
        found = [find_artifact(cfg.model)]
    else:
        found = [Artifact.open(path.parent) for path in sorted(artifacts_root().glob("*/spec.json"))]
    for artifact in found:
        if artifact.spec.space == space:
            return artifact
    have = ", ".join(sorted(artifact.spec.model for artifact in found)) or "none"
    raise ArtifactMissing(
        f"no artifact in {artifacts_root()} gives vectors of space {space} (there: {have}). Run: make engines MODEL=..."
        " with the model of the index, or set NIGHTJAR_ARTIFACTS"
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    lock = take_lock(out / "lock")
    try:
        yield
    finally:
        os.close(lock)
