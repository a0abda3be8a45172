"""deploy/ and docs/deploy.md: what they say is what the server has."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshlm.serving.api import Service, create_app
from servers import new_engine

ROOT = Path(__file__).parents[2]
DEPLOY, DOCUMENT = ROOT / "deploy", (ROOT / "docs/deploy.md").read_text()
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
GOODBYE_S = 15  # between the end of --drain and SIGKILL


def drain_s(command: list[str]) -> int:
    return int(re.search(r"--drain[= ](\d+)", " ".join(command))[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def paths() -> set[str]:
    """That the application has."""
    with new_engine() as engine:
        return set(create_app(Service(engine, ("tiny",))).openapi()["paths"])


def resources(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text()))


def pod_of(manifest: Path) -> dict[str, Any]:
    (pod,) = [each["spec"]["template"]["spec"] for each in resources(manifest) if "template" in each["spec"]]
    return pod  # type: ignore[no-any-return]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest.stem)
def test_manifests(manifest: Path, paths: set[str]) -> None:
    pod = pod_of(manifest)
    (container,) = pod["containers"]
    command = [*container["command"], *container["args"]]
    (sleep, before_s) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep" and pod["terminationGracePeriodSeconds"] == int(before_s) + drain_s(command) + GOODBYE_S
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == int(re.search(r"--port[= ](\d+)", " ".join(command))[1])  # type: ignore[index]
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    assert "readinessProbe" in probes
    for probe in probes.values():
        told = probe["httpGet"]["path"] if "httpGet" in probe else " ".join(probe["exec"]["command"])
        (path,) = re.findall(r"/health[/a-z]*", told)
        assert path in paths and ("httpGet" not in probe or probe["httpGet"]["port"] == "http")
        assert "httpGet" in probe or f":{ports['http']}/" in told
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    safe = container["securityContext"]
    assert (
        safe["readOnlyRootFilesystem"]
        and not safe["allowPrivilegeEscalation"]
        and safe["capabilities"]["drop"] == ["ALL"]
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_hosts_find_each_other() -> None:
    """Names and sizes of the several hosts fit together."""
    manifest = DEPLOY / "kubernetes/several-hosts.yaml"
    by_kind = {(each["kind"], each["metadata"]["name"]): each["spec"] for each in resources(manifest)}
    hosts = by_kind["StatefulSet", "meshlm"]
    (container,) = pod_of(manifest)["containers"]
    words = " ".join([*container["command"], *container["args"]])
    value = lambda name: re.search(rf"--{name}[= ](\S+)", words)[1]  # type: ignore[index]  # noqa: E731
    assert int(value("nnodes")) == hosts["replicas"]
    assert int(value("nnodes")) * int(value("nproc-per-node")) == int(value("tp-size")) * int(value("pp-size"))
    assert value("nproc-per-node") == container["resources"]["limits"]["nvidia.com/gpu"]
    assert value("master-addr") == f"meshlm-0.{hosts['serviceName']}"
    assert by_kind["Service", hosts["serviceName"]]["clusterIP"] == "None"
    variables = {each["name"]: each.get("value") for each in container["env"]}
    patience_s = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert drain_s(words.split()) < patience_s < drain_s(words.split()) + GOODBYE_S


def test_the_unit() -> None:
    text = (DEPLOY / "meshlm.service").read_text()
    value = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    assert int(value["TimeoutStopSec"]) == drain_s(value["ExecStart"].split()) + GOODBYE_S
    assert value["KillMode"] == "mixed" and value["RestartPreventExitStatus"] == "2"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "meshlm.service"
    text = (DEPLOY / "meshlm.service").read_text()
    unit.write_text(text.replace("/opt/meshlm/bin/meshlm", "/bin/true"))  # which is there
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    about_it = [line for line in run.stderr.splitlines() if "meshlm" in line]
    assert not about_it, "\n".join(about_it)


def test_the_document_quotes_the_files() -> None:
    quotes = re.findall(r"^`(deploy/[^`]+)`:\n\n```\w+\n(.*?)```", DOCUMENT, re.MULTILINE | re.DOTALL)
    files = {str(file.relative_to(ROOT)) for file in DEPLOY.rglob("*.*") if file.is_file()}
    assert {name for name, _ in quotes} == files
    for name, quote in quotes:
        assert quote in (ROOT / name).read_text(), name


def test_the_document_names_what_there_is(paths: set[str]) -> None:
    named = set(re.findall(r"`(?:GET )?(/(?:health|metrics)[/a-z]*)", DOCUMENT))
    assert named >= {"/health/live", "/health/ready", "/metrics"} and named <= paths
