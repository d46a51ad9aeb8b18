"""nightly.toml and the files that start a night: what is wrong is said, what ships works."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import run_module

from pipeline.config import UsageError
from pipeline.nightly.config import load
from pipeline.nightly.night import nightly_parser

DOCKER = Path(__file__).resolve().parents[1] / "docker"

# ---- the configuration -----------------------------------------------------------------------------------------------

INDEX = '[index]\nout = "i"\n'
SOURCE = '[[source]]\nkind = "folder"\nroot = "r"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (INDEX, "at least one [[source]]"),
        (SOURCE, "[index] needs out"),
        (f'{INDEX}budgte = "6h"\n{SOURCE}', "'budgte'; did you mean budget?"),
        (f"{INDEX}{SOURCE}[verfy]\n", "'verfy'; did you mean verify?"),
        (f"{INDEX}colour = 3\n{SOURCE}", "'colour'; there are out, model,"),
        (f"{INDEX}budget = 6\n{SOURCE}", '[index] budget is 6; expected a length of time in quotes, such as "90m"'),
        (f'{INDEX}budget = "6 hours"\n{SOURCE}', "[index] budget is '6 hours'"),
        (f"{INDEX}max_deleted = 120\n{SOURCE}", "max_deleted is 120; expected a number from 0 to 100"),
        (f"{INDEX}keep = 0\n{SOURCE}", "keep is 0; expected a whole number of at least 1"),
        (f"{INDEX}keep = true\n{SOURCE}", "keep is True"),
        (f'{INDEX}retry = "truncated"\n{SOURCE}', "retry is 'truncated'; expected a list"),
        (f'{INDEX}retry = ["truncatd"]\n{SOURCE}', "did you mean truncated?"),
        (f'{INDEX}precision = "fp8"\n{SOURCE}', 'expected one of "auto"'),
        (f'{INDEX}{SOURCE}[verify]\nlevel = "sampel"\n', "did you mean sample?"),
        (f"{INDEX}{SOURCE}split = 1\n", "[[source]] split is 1; expected text"),
        (f'{INDEX}{SOURCE}split = "val"\n', "split is for kind inat2021"),
        (f"{INDEX}{SOURCE}{SOURCE}", "is there twice"),
        (f'{INDEX}{SOURCE}[[source]]\nkind = "folder"\nroot = "./r/"\n', "folder ./r/ is there twice"),
        (f'{INDEX}{SOURCE}[webhook]\nurl = "ftp://x"\n', "[webhook] url expected an address"),
        (f'{INDEX}{SOURCE}[webhook]\nurl = "http://x"\nheader_env = "NOT_SET_HERE"\n', "NOT_SET_HERE"),
        ('index = 3\n[[source]]\nkind = "tar"\nroot = "r"\n', "index is 3; it is a table"),
        ('[source]\nkind = "folder"\n', "[source] is one table; write [[source]], in double brackets"),
        ("out = \n", "is no TOML"),
    ],
)
def test_what_is_wrong_in_the_configuration_is_said(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "nightly.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "nightly.toml")
    assert words in str(caught.value)
    assert str(tmp_path / "nightly.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_configuration_is_exit_2(tmp_path: Path) -> None:
    ran = run_module("pipeline.nightly", "--config", tmp_path / "nightly.toml")
    assert ran.code == 2
    assert "docker/nightly.toml" in ran.report["error"]


def test_the_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what says so left out, the example and the shortest configuration are the same."""
    monkeypatch.setenv("NIGHTJAR_MODEL", "/models/clip-vit-base-patch32")
    text = (DOCKER / "nightly.toml").read_text()
    shortest = '[index]\nout = "/index/pictures"\n[[source]]\nkind = "folder"\nroot = "/pictures"\n'
    without = re.sub(r"^.*(left out:|tried again every night).*$", "", text, flags=re.MULTILINE)
    for name, content in (("short", shortest), ("without", without)):
        (tmp_path / name).write_text(content)
    assert load(tmp_path / "without") == load(tmp_path / "short")
    whole = load(DOCKER / "nightly.toml")
    assert (whole.index.budget_s, whole.index.keep, whole.report.log) == (6 * 3600, 7, Path("/index/nightly.jsonl"))
    uncommented = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
    monkeypatch.setenv("NIGHTJAR_WEBHOOK_AUTHORIZATION", "x")
    (tmp_path / "all").write_text(uncommented)
    assert [source.kind for source in load(tmp_path / "all").sources] == ["folder", "inat2021", "tar"]
    assert load(tmp_path / "all").webhook is not None


# ---- what starts it --------------------------------------------------------------------------------------------------


def started_by() -> dict[str, list[str]]:
    """File -> the words that it starts, from `pipeline.nightly` on."""
    cron = (DOCKER / "nightly.cron").read_text().splitlines()[-1].partition(">")[0]
    service = (DOCKER / "nightjar-nightly.service").read_text()
    (exec_start,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    job = yaml.safe_load((DOCKER / "cronjob.yaml").read_text())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    services = yaml.safe_load((DOCKER / "compose.nightly.yml").read_text())["services"]
    found = {"cron": shlex.split(cron), "systemd": shlex.split(exec_start), "kubernetes": container["args"]}
    found |= {name: service["command"] for name, service in services.items() if name.startswith("nightly-")}
    return {name: words[words.index("pipeline.nightly") :] for name, words in found.items()}


def test_what_starts_it_starts_a_command_that_we_have() -> None:
    started = started_by()
    assert started.keys() == {"cron", "systemd", "kubernetes", "nightly-gpu", "nightly-cpu"}
    for name, words in started.items():
        args = nightly_parser().parse_args(words[1:])
        assert args.config == Path("/etc/nightjar/nightly.toml"), name


def test_cron_line_is_a_line_of_cron_d() -> None:
    line = (DOCKER / "nightly.cron").read_text().splitlines()[-1]
    assert re.match(r"\d+ \d+ \* \* \* nightjar cd \S+ && ", line)
    assert "%" not in line, "cron takes it for a line break"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    for name in ("nightjar-nightly.service", "nightjar-nightly.timer"):
        text = (DOCKER / name).read_text().replace("/opt/nightjar/.venv/bin/python", sys.executable)
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cronjob_is_one_at_a_time_unprivileged_and_never_restarted() -> None:
    job = yaml.safe_load((DOCKER / "cronjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["concurrencyPolicy"]) == ("batch/v1", "CronJob", "Forbid")
    template = job["spec"]["jobTemplate"]["spec"]
    pod = template["template"]["spec"]
    assert (template["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
