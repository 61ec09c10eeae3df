"""Presets, overrides and the one-line errors that name the field."""

import re
from pathlib import Path

import pytest
import yaml

from repae_core.config import PipelineConfig, load_config, preset_names

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves(name):
    assert isinstance(load_config(name), PipelineConfig)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith(("imagenet", "ldm"))])
def test_presets_of_published_numbers_sample_and_score_on_gpus(name):
    """Not on one CPU thread; and the weights file has the name that the documented command gives it."""
    config = load_config(name)
    for section in (config.generate, config.evaluate):
        assert (section.workers, section.gpus_per_worker) == (8, 1)
    fetched = re.search(r"curl -L --create-dirs -o (\S+)", (ROOT / "docs/evaluation.md").read_text())
    assert config.evaluate.extractor_weights == fetched[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_repae.lerning_rate=1", "did you mean 'train_repae.learning_rate'"),
        ("num_classes=3", "did you mean 'train_repae.num_classes' or 'train_ldm.num_classes'"),
        ("train_repae.learning_rate=-1", "train_repae.learning_rate: Input should be greater than 0"),
        ("train_repae.batch_size=big", "train_repae.batch_size"),
        ("train_repae.vae=f9", "unknown VAE 'f9'; known: f8d4, f16d32"),
        ("train_repae.vae.norm_groups=3", "norm_groups=3 does not divide the width 16"),
        ("train_repae.encoder_depth=9", "encoder_depth=9 is beyond the 4 blocks of SiT-Tiny/2"),
        ("preprocess.resolution=33", "not divisible by 4"),
        ("preprocess.resolution=36", "patch 2 does not divide the latent side 9"),
        ("generate.guidance_interval=[0.9,0.1]", "generate.guidance_interval: must be two times"),
        ("generate.guidance=inf", "generate.guidance: Input should be a finite number"),
        ("generate.labels=cat", "generate.labels: must be `equal`, `random`, or a list"),
        ("preprocess.resolution=16", "preprocess.resolution=16: the discriminator of train_repae needs at least 24"),
        ("train_repae.workers=5", "batch_size=48 is not divisible by workers=5"),
        ("compat=all", "must be `published`"),
        ("generate", "expected stage.field=value"),
    ],
)
def test_bad_override_names_the_field(override, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[").replace("(", r"\(")) as error:
        load_config("quickstart", [override])
    assert "\n" not in str(error.value)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"no preset or file 'nope'; presets: .*quickstart"):
        load_config("nope")


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("train_repae: [unclosed")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        load_config(str(path))


def test_a_file_extends_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: quickstart\ntrain_repae: {vae: {base_channels: 32}, max_steps: 7}")
    mine, base = load_config(str(path)), load_config("quickstart")
    assert mine.train_repae.vae == base.train_repae.vae.model_copy(update={"base_channels": 32})
    assert mine.train_repae.max_steps == 7
    assert mine.train_ldm == base.train_ldm
    path.write_text(f"extends: {path}")
    with pytest.raises(ValueError, match=r"mine\.yaml: extends: must name another preset or file"):
        load_config(str(path))


def test_arms_of_the_ablation_differ_in_one_number_each():
    arms = {(v, t): load_config(f"ablation-{v}-{t}") for v in ("joint", "frozen") for t in ("aligned", "plain")}
    reference = arms["joint", "aligned"]
    for (vae, training), arm in arms.items():
        assert arm.train_repae.vae_align_proj_coeff == (1.5 if vae == "joint" else 0)
        assert arm.train_ldm.proj_coeff == (0.5 if training == "aligned" else 0)
        same = load_config(
            f"ablation-{vae}-{training}", ["train_repae.vae_align_proj_coeff=1.5", "train_ldm.proj_coeff=0.5"]
        )
        assert same == reference


def test_overrides_reach_the_field_with_dashes_or_underscores():
    config = load_config("quickstart", ["train-ldm.max_steps=7", "generate.guidance_interval=[0, 0.5]"])
    assert config.train_ldm.max_steps == 7
    assert config.generate.guidance_interval == (0.0, 0.5)


def test_named_vae_then_one_of_its_numbers_is_refused():
    with pytest.raises(ValueError, match="vae is 'f16d32' as a whole"):
        load_config("quickstart", ["train_repae.vae=f16d32", "train_repae.vae.norm_groups=16"])


def test_yaml_no_is_a_precision_not_a_boolean(tmp_path):
    values = yaml.safe_load("train_repae: {mixed_precision: no}")
    assert values["train_repae"]["mixed_precision"] is False
    path = tmp_path / "c.yaml"
    path.write_text("train_repae: {mixed_precision: no}")
    assert load_config(str(path)).train_repae.mixed_precision == "no"


def test_a_saved_config_is_a_preset(tmp_path):
    config = load_config("quickstart", ["train_repae.vae=f8d4", "compat=published"])
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(path)) == config


@pytest.mark.parametrize("labels", ["equal", "random", "[0, 1, 2]", "7"])
def test_labels_are_canonical_text(labels):
    assert load_config("quickstart", [f"generate.labels={labels}"]).generate.labels in ("equal", "random", "0,1,2", "7")


def test_no_perceptual_network_can_be_said_on_the_command_line():
    assert load_config("quickstart", ["train_repae.perceptual_loss=none"]).train_repae.perceptual_loss == "none"


def test_lists_and_sections_without_quotes(tmp_path):
    """As docs write them: JSON's quotes are not needed in brackets."""
    config = load_config("quickstart", ["train_repae.encoder=[digits-vit, dinov2-vit-b]", "train_ldm.encoder=[]"])
    assert config.train_repae.encoder == ("digits-vit", "dinov2-vit-b")
    assert config.train_ldm.encoder == ()
    vae = load_config("quickstart", ["train_repae.vae={base_channels: 64, norm_groups: 8}"]).train_repae.vae
    assert (vae.base_channels, vae.norm_groups, vae.weights) == (64, 8, "")


@pytest.mark.parametrize("section", ["train_repae", "train_ldm"])
def test_fp16_without_a_gpu_is_refused(section):
    """Here, and not at the first joint step."""
    fp16 = f"{section}.mixed_precision=fp16"
    with pytest.raises(
        ValueError, match=f"{section}: mixed_precision=fp16 needs a GPU: set gpus_per_worker"
    ) as refused:
        load_config("quickstart", [fp16])
    assert "\n" not in str(refused.value)
    assert getattr(load_config("quickstart", [fp16, f"{section}.gpus_per_worker=1"]), section).mixed_precision == "fp16"


def test_checkpoints_are_kept_only_where_they_are_written():
    every = "train_ldm.checkpoint_every=200"
    with pytest.raises(ValueError, match="keep_checkpoints_every=300 is no multiple of checkpoint_every=200"):
        load_config("quickstart", [every, "train_ldm.keep_checkpoints_every=300"])
    assert load_config("quickstart", [every, "train_ldm.keep_checkpoints_every=600"])
