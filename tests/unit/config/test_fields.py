"""Every field is marked; only output fields are hashed."""

import subprocess
import sys

import pytest
from pydantic import BaseModel

from repae_core.config import PipelineConfig, content_paths, field_extra, load_config, output_fields


def all_fields(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize(("name", "field"), list(all_fields(PipelineConfig)))
def test_every_field_is_marked_and_described(name, field):
    assert field_extra(field).get("role") in ("output", "execution"), f"{name} is neither output nor execution"
    assert field.description, f"{name} has no description"


def test_execution_fields_are_not_hashed():
    a = load_config("quickstart")
    b = load_config(
        "quickstart", ["train_repae.workers=0", "train_repae.log_every=3", "generate.batch_size=7", "store=elsewhere"]
    )
    for stage in ("train-repae", "generate"):
        assert output_fields(a.section(stage)) == output_fields(b.section(stage))


def test_output_fields_are_hashed_at_any_depth():
    a = output_fields(load_config("quickstart").train_repae)
    b = output_fields(load_config("quickstart", ["train_repae.vae.norm_groups=8"]).train_repae)
    assert a["vae"]["norm_groups"] == 16
    assert b["vae"]["norm_groups"] == 8


def test_content_paths_finds_nested_files():
    config = load_config("quickstart", ["train_repae.vae.weights=w.safetensors", "train_repae.encoder_weights=e.pth"])
    assert dict(content_paths(config.train_repae)) == {"vae.weights": "w.safetensors", "encoder_weights": "e.pth"}


def test_compat_switches_belong_to_stages():
    config = load_config("quickstart", ["compat=published"])
    assert config.compat.of_stage("train-repae") == {"lpips_double_scale": True, "trainable_pos_embed": True}
    assert config.compat.of_stage("generate") == {"bn_inverse_without_eps": True, "random_labels": True}
    assert load_config("quickstart").compat.of_stage("generate") == {}


@pytest.mark.parametrize("module", ["repae_core", "repae_core.config", "repae_core.artifacts", "flows.cli"])
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
