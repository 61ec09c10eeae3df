"""The container files, without a container: what `docker compose` makes of them, least privilege, lint, schemas."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from prefect.automations import Automation

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def environment_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stack") / ".env"
    subprocess.run([sys.executable, ROOT / "infra" / "make_env.py", path], check=True)
    return path


def compose(environment_file, *files):
    command = [BIN / "docker-compose", "--env-file", environment_file]
    command += [part for file in files for part in ("-f", ROOT / file)]
    result = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_service_is_confined(environment_file):
    services = compose(environment_file, "docker-compose.yml")["services"]
    assert set(services) == {"postgres", "s3", "prefect", "mlflow", "ray-head", "ray-worker", "worker"}
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert int(service["mem_limit"]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        if name not in ("postgres", "s3"):
            assert service["read_only"], name
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    assert services["prefect"]["environment"]["REPAE_PREFECT_HOSTS"].split(",")[0] == "prefect"


def test_without_secrets_it_does_not_start(tmp_path):
    (tmp_path / ".env").write_text("")
    command = [BIN / "docker-compose", "--env-file", tmp_path / ".env", "-f", ROOT / "docker-compose.yml", "config"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "run make stack" in result.stderr


def test_gpu_override(environment_file):
    services = compose(environment_file, "docker-compose.yml", "docker-compose.gpu.yml")["services"]
    (device,) = services["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_secrets_are_made_once_and_are_the_owners(environment_file):
    before = environment_file.read_text()
    values = dict(line.split("=", 1) for line in before.splitlines())
    assert len(set(values.values())) == len(values) == 6
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in values.values())
    assert stat.S_IMODE(environment_file.stat().st_mode) == 0o600
    environment_file.write_text("RAY_AUTH_TOKEN=mine\n")
    subprocess.run([sys.executable, ROOT / "infra" / "make_env.py", environment_file], check=True)
    again = dict(line.split("=", 1) for line in environment_file.read_text().splitlines())
    assert again["RAY_AUTH_TOKEN"] == "mine"
    assert set(again) == set(values)
    for path in ("known", "new"):
        file = environment_file.with_name(path)
        file.write_text(before if path == "known" else "PREFECT_PORT=4201\n")
        file.chmod(0o644)
        subprocess.run([sys.executable, ROOT / "infra" / "make_env.py", file], check=True)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, "one that was readable by all is so no more"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")


def test_dockerfile_lint():
    dockerfile = ROOT / "infra" / "Dockerfile"
    result = subprocess.run([BIN / "hadolint", dockerfile], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    text = dockerfile.read_text()
    for target in ("control", "worker"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert stage.rstrip().splitlines()[-1].startswith(("USER 10001", "CMD")), target
        assert "USER 10001" in stage
    assert not re.search(r"(?i)(password|secret|token)=", text)


def validate_ray_cluster(document):
    """Of KubeRay: its own fields, and each group's pod as Kubernetes checks it."""
    jsonschema.validate(document, yaml.safe_load((ROOT / "tests" / "infra" / "raycluster.schema.yaml").read_text()))
    for group in [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]:
        template = {"metadata": {"name": "x"}} | group["template"]
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod"} | template, "1.33", strict=True)


@pytest.mark.parametrize("file", sorted((ROOT / "infra" / "kubernetes").glob("*.yaml")), ids=lambda p: p.name)
def test_manifests_fit_the_schemas(file):
    for document in yaml.safe_load_all(file.read_text()):
        if document["apiVersion"] == "ray.io/v1":
            validate_ray_cluster(document)
        else:
            kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 8),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "container"), []),
    ],
)
def test_a_wrong_ray_cluster_is_seen(where, value):
    document = yaml.safe_load((ROOT / "infra" / "kubernetes" / "ray-cluster.yaml").read_text())
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate_ray_cluster(document)


def test_ray_launcher_file():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "infra" / "ray-cluster.yaml").read_text()), schema)


def test_the_notification_is_an_automation():
    automation = Automation.model_validate(yaml.safe_load((ROOT / "infra" / "notify-on-failure.yaml").read_text()))
    assert automation.trigger.expect == {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}
    assert automation.actions[0].type == "send-notification"
