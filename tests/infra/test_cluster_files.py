"""What the cluster's files must say beyond their schemas: who gets which secret, and where `ray` is found."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
DEBIAN_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"  # as /etc/profile sets it


def containers():
    """Name and content of every container, KubeRay's autoscaler among them."""
    for file in ("ray-cluster.yaml", "services.yaml"):
        for document in yaml.safe_load_all((INFRA / "kubernetes" / file).read_text()):
            spec = document["spec"]
            if document["kind"] == "RayCluster":
                yield "autoscaler", spec["autoscalerOptions"]
                groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            else:
                groups = [spec] if "template" in spec else []
            for group in groups:
                for container in group["template"]["spec"]["containers"]:
                    yield f"{document['metadata']['name']}/{container['name']}", container


CONTAINERS = dict(containers())


def secret_keys(container):
    """Variables that a container takes from one key of a secret, with that key."""
    references = {v["name"]: v.get("valueFrom", {}).get("secretKeyRef") for v in container.get("env", [])}
    return {name: (ref["name"], ref["key"]) for name, ref in references.items() if ref}


def whole_secrets(container):
    return {source["secretRef"]["name"] for source in container.get("envFrom", [])}


def test_every_container_is_looked_at():
    assert set(CONTAINERS) == {
        "autoscaler",
        "repae/ray-head",
        "repae/ray-worker",
        "prefect/server",
        "mlflow/server",
        "prefect-worker/worker",
    }


@pytest.mark.parametrize("name", ["autoscaler", "repae/ray-head", "repae/ray-worker", "prefect-worker/worker"])
def test_the_token_is_where_its_mode_is(name):
    """KubeRay's init container has a worker's env, and no envFrom: with the mode alone Ray ends at once."""
    container = CONTAINERS[name]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    assert secret_keys(container)["RAY_AUTH_TOKEN"] == ("repae-ray", "RAY_AUTH_TOKEN")
    assert "repae-ray" not in whole_secrets(container)


def test_nobody_holds_the_database_password_of_another():
    connections = {
        "prefect/server": "PREFECT_API_DATABASE_CONNECTION_URL",
        "mlflow/server": "MLFLOW_BACKEND_STORE_URI",
    }
    for name, container in CONTAINERS.items():
        assert "repae-databases" not in whole_secrets(container), name
        taken = {
            variable: key for variable, (secret, key) in secret_keys(container).items() if secret == "repae-databases"
        }
        wanted = connections.get(name)
        assert taken == ({wanted: wanted} if wanted else {}), name


def test_every_key_is_in_the_example():
    documents = yaml.safe_load_all((INFRA / "kubernetes" / "secrets.example.yaml").read_text())
    shape = {document["metadata"]["name"]: set(document["stringData"]) for document in documents}
    for name, container in CONTAINERS.items():
        assert whole_secrets(container) <= set(shape), name
        for secret, key in secret_keys(container).values():
            assert key in shape[secret], name


def test_a_login_shell_finds_ray(tmp_path):
    """KubeRay before 1.4 and Ray's launcher start `ray` in one, where /etc/profile has reset PATH."""
    text = (INFRA / "Dockerfile").read_text()
    worker = text.split(" AS worker\n")[1]
    (line,) = re.findall(r"^RUN (echo .*) > /etc/profile\.d/\w+\.sh$", worker, re.M)
    (folder,) = re.findall(r"^ENV PATH=([^:]+):\$PATH", text, re.M)
    (tmp_path / "repae.sh").write_text(subprocess.run(["sh", "-c", line], capture_output=True, text=True).stdout)
    for shell in ("sh", "bash"):
        script = f'PATH={DEBIAN_PATH}; export PATH; . {tmp_path}/repae.sh; printf %s "$PATH"'
        done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == f"{folder}:{DEBIAN_PATH}", shell
