"""What `talktime ops` prints: it is what lies in the package, and those for whom it is made take it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import yaml

from reconciler.__main__ import _parser as reconcile_parser
from talktime.cli import _parser
from talktime.ops.files import ABOUT, FILES, text_of
from tests.program import TALKTIME, run

PROGRAM = "/usr/local/bin/talktime"
UNITS = FILES["systemd"]
EXPOSURE_MAX = 15  # in tenths of the 10 that a service has which nothing is kept from; 15 are left to ours
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def understood(command: list[str]) -> bool:
    """Have the command's own parsers read what a file has it run; bad use ends the test."""
    if command[0] == "reconcile":
        return bool(reconcile_parser("talktime reconcile", 15).parse_args(command[1:]))
    return bool(_parser().parse_args(command))


# --- the command ------------------------------------------------------------------------------------------------------


def test_every_file_of_the_package_is_printed_by_a_name_and_every_name_is_told_about() -> None:
    there = {file.name for file in files("talktime.ops").iterdir() if not file.name.startswith("__")} - {"files.py"}
    assert there == {file for names in FILES.values() for file in names}
    assert ABOUT.keys() == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_name_prints_its_files_and_writes_the_same(name: str, tmp_path: Path) -> None:
    printed, written = run("ops", name), run("ops", name, "--to", tmp_path / "a" / "b")
    assert (0, "") == (printed.returncode, printed.stderr)
    assert (0, "") == (written.returncode, written.stderr)
    made = [Path(line) for line in written.stdout.splitlines()]
    assert [tmp_path / "a" / "b" / file for file in FILES[name]] == made
    for path in made:
        assert text_of(path.name) == path.read_text()
        assert path.read_text() in printed.stdout
        assert (len(made) > 1) == (f"# --- {path.name}\n" in printed.stdout)


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run("ops", "cron", "--to", tmp_path / "file")
    assert 1 == refused.returncode
    assert f"talktime: cannot write {tmp_path / 'file'}: File exists\n" == refused.stderr


# --- cron; `.ci/cron_smoke.py` has a real one run it ------------------------------------------------------------------


def test_the_crontab_has_a_minute_of_passes_each_minute_and_the_audit_each_day() -> None:
    lines = [line for line in text_of("talktime.crontab").splitlines() if re.match(r"[*\d]", line)]
    assert ["* * * * *", "17 4 * * *"] == [" ".join(line.split()[:5]) for line in lines]
    assert "%" not in "".join(lines)  # cron would take it for the end of the line
    commands = [re.findall(r"&& talktime (.*?) 2>&1", line) for line in lines]
    assert [["reconcile --every 15 --for 60"], ["reconcile --audit"]] == commands
    assert all(understood(shlex.split(command)) for [command] in commands)


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A folder with the units as they are, but with the program that is tested. In CI a skipped test is a failure."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    for file in UNITS:
        (tmp_path / file).write_text(text_of(file).replace(PROGRAM, TALKTIME))
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_units_as_they_are(units: Path) -> None:
    done = analyze("verify", "--man=no", *(units / file for file in UNITS))
    # It also tells what it finds in the units of the machine; of ours there is nothing to tell.
    assert (0, []) == (done.returncode, [line for line in done.stderr.splitlines() if "talktime" in line])


def test_systemd_would_tell_of_a_unit_that_is_wrong(units: Path) -> None:
    unit = units / "talktime-api.service"
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=for-ever") + "\nWantedby=x\n")
    told = analyze("verify", "--man=no", unit).stderr
    assert "for-ever" in told
    assert "Wantedby" in told


@pytest.mark.parametrize("file", [file for file in UNITS if file.endswith(".service")])
def test_a_service_is_exposed_no_more_than_it_has_to_be(units: Path, file: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", units / file)
    assert 0 == done.returncode, done.stdout


@pytest.mark.parametrize("file", [file for file in UNITS if file.endswith(".service")])
def test_a_service_runs_a_command_that_there_is(file: str) -> None:
    [command] = re.findall(rf"^ExecStart={PROGRAM} (.*)$", text_of(file), re.MULTILINE)
    assert understood(shlex.split(command))


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def manifest() -> list[dict[str, Any]]:
    return [cast("dict[str, Any]", document) for document in yaml.safe_load_all(text_of("talktime.yaml"))]


def pods() -> Iterator[dict[str, Any]]:
    """Yield what each Job, Deployment and CronJob has to say about its pods."""
    for document in manifest():
        spec = document["spec"]
        template = (spec["jobTemplate"]["spec"] if "jobTemplate" in spec else spec).get("template")
        if template is not None:
            assert document["metadata"]["labels"] == template["metadata"]["labels"]
            yield template["spec"]


def test_kubernetes_knows_every_field_of_the_manifest() -> None:
    kinds = [document["kind"] for document in manifest()]
    assert ["Job", "Deployment", "Service", "PodDisruptionBudget", "Deployment", "CronJob"] == kinds
    for document in manifest():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(("key", "value"), [("replica", 2), ("replicas", "two")])
def test_kubernetes_would_refuse_a_field_that_is_wrong(key: str, value: object) -> None:
    deployment = next(document for document in manifest() if document["kind"] == "Deployment")
    deployment["spec"][key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_pods_may_do_nothing_and_write_nowhere_but_in_tmp() -> None:
    [user] = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    for pod in pods():
        as_whom = pod["securityContext"]
        assert user == (str(as_whom["runAsUser"]), str(as_whom["runAsGroup"]))
        assert (True, "RuntimeDefault") == (as_whom["runAsNonRoot"], as_whom["seccompProfile"]["type"])
        assert (False, False) == (pod["automountServiceAccountToken"], pod["enableServiceLinks"])
        [container] = pod["containers"]
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert expected == container["securityContext"]
        assert ["/tmp"] == [mount["mountPath"] for mount in container["volumeMounts"]]  # noqa: S108 - the pod's


def test_pods_run_commands_that_there_are_of_this_version_with_settings_from_secrets() -> None:
    commands, secrets = [], []
    for pod in pods():
        [container] = pod["containers"]
        assert f"talktime:{version('talktime')}" == container["image"]
        assert understood(container["args"])
        commands.append(container["args"][0])
        secrets.append([source["secretRef"]["name"] for source in container["envFrom"]])
    assert ["migrate", "serve", "reconcile", "reconcile"] == commands
    assert [["talktime-migrate"], ["talktime"], ["talktime"], ["talktime"]] == secrets
    assert f"talktime-migrate-{version('talktime').replace('.', '-')}" == manifest()[0]["metadata"]["name"]


def test_service_and_budget_find_the_pods_of_the_api() -> None:
    _, api, service, budget, *_ = manifest()
    labels = api["spec"]["template"]["metadata"]["labels"]
    found = [
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
        api["spec"]["selector"]["matchLabels"],
    ]
    assert [labels] * 3 == found
    [container] = api["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert [port["name"]] == [port["targetPort"] for port in service["spec"]["ports"]]
    assert str(port["containerPort"]) == container["args"][-1]
    assert 2 == api["spec"]["replicas"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"} == probes
