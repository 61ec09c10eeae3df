from pathlib import Path

import jsonschema
import pytest
from prefect import State
from prefect.states import Failed
from prefect.utilities.callables import parameter_schema

from flows.deployments import FLOWS, TARGETS, deployments, prefect_yaml
from flows.parameters import Overrides, flow_config
from repae_core.config import STAGES, preset_names
from tasks.ray_launch import FinalError, FinalInputError, FinalStoreError, WorkersFailedError
from tasks.stage import may_pass

ROOT = Path(__file__).resolve().parents[2]


def test_prefect_yaml_is_what_the_table_makes():
    assert (ROOT / "prefect.yaml").read_text() == prefect_yaml(), "run `make deployments`"


def test_every_flow_is_deployed_and_can_be_imported():
    assert set(FLOWS) == {"full-pipeline", *STAGES}
    assert len(deployments()) == len(FLOWS) * len(TARGETS)
    assert {target.preset for target in TARGETS} <= set(preset_names())
    for name, entrypoint in FLOWS.items():
        file, _, variable = entrypoint.partition(":")
        module = __import__(file.removesuffix(".py").replace("/", "."), fromlist=[variable])
        assert getattr(module, variable).name == name


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (ValueError("bad input"), False),
        (FinalInputError("bad input in a worker"), False),
        (WorkersFailedError("three times"), False),
        (ConnectionError("MLflow away"), True),
        (OSError("store away"), True),
        (FinalStoreError("store away for a worker"), True),
        (FinalError("a loss is not finite"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, retried):
    state: State = Failed(data=error, message="failed")
    assert may_pass(None, None, state) is retried


def test_deploy_without_a_server_names_the_remedy(call, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, _, err = call("deploy")
    assert code == 2
    assert "make serve" in err


@pytest.mark.parametrize("name", list(FLOWS))
def test_a_form_that_nobody_filled_is_accepted(name):
    """Prefect's UI sends the schema's defaults back, and its server checks them against the schema."""
    file, _, variable = FLOWS[name].partition(":")
    module = __import__(file.removesuffix(".py").replace("/", "."), fromlist=[variable])
    schema = parameter_schema(getattr(module, variable).fn).model_dump()

    def filled(part: dict) -> dict:
        """What the form starts with: every property that has a default, objects all the way down."""
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        values = {}
        for field, described in part.get("properties", {}).items():
            if "$ref" in described:
                values[field] = filled(described)
            elif "default" in described:
                values[field] = described["default"]
            elif described.get("type") == "boolean":
                values[field] = False  # a switch has no third position
        return values

    values = filled(schema)
    assert values.pop("preset") == "quickstart"
    sections = values.pop("overrides")
    assert set(values) <= {"inputs", "force"}
    assert not any(sections[name] for name in sections if name != "train_repae")
    assert sections["train_repae"] == {"vae": {}}, "what nobody touched stays as in the preset"
    values |= {"preset": "quickstart", "overrides": sections}
    jsonschema.validate(values, schema)
    jsonschema.validate({field: p["default"] for field, p in schema["properties"].items()}, schema)


@pytest.mark.parametrize("name", list(FLOWS))
def test_the_form_offers_no_path(name):
    """Deployments refuse what is not in the list of presets."""
    file, _, variable = FLOWS[name].partition(":")
    module = __import__(file.removesuffix(".py").replace("/", "."), fromlist=[variable])
    flow = getattr(module, variable)
    preset = parameter_schema(flow).model_dump()["properties"]["preset"]
    assert preset["enum"] == list(preset_names())
    assert "path" not in preset["description"]


def test_a_null_is_a_value():
    assert flow_config("quickstart", Overrides()).generate.steps is not None
    assert flow_config("quickstart", Overrides.model_validate({"generate": {"steps": None}})).generate.steps is None
    with pytest.raises(ValueError, match=r"generate\.num_images"):
        flow_config("quickstart", Overrides.model_validate({"generate": {"num_images": None}}))
