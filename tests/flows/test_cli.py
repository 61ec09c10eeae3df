"""The command line: one clear line and exit code 2 for bad input, before any service starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from flows import cli, gc_command
from repae_core.artifacts import remove
from repae_core.config import STAGES

COMMANDS = ["run", "stage", "plan", "runs", "report", "verify", "ablation", "import", "export", "doctor"]


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    for part in parts:
        assert part in lines[0], err


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("generate.guidence=3", ["generate.guidence", "did you mean", "guidance"]),
        ("generat.guidance=3", ["generat", "did you mean", "generate"]),
        ("train_ldm.batch_size=0", ["train_ldm.batch_size", "greater than or equal to 1"]),
        ("train_ldm.batch_size=many", ["train_ldm.batch_size"]),
        ("generate.guidance_interval=[0.5,0.2]", ["generate.guidance_interval", "low <= high"]),
        ("train_ldm.encoder_depth=9", ["train_ldm", "encoder_depth=9", "4 blocks"]),
        ("train_ldm.model=SiT-Huge/2", ["train_ldm.model", "SiT-Huge/2"]),
        ("generate.guidance", ["generate.guidance", "="]),
        ("train_repae.encoder=dinov2-vitb", ["train_repae.encoder", "dinov2-vitb", "did you mean 'dinov2-vit-b'"]),
        ("train_ldm.encoder=[digits-vit, clip]", ["train_ldm.encoder", "unknown encoder 'clip'", "clip-vit-L"]),
        ("cache_latents.encoder=nothing", ["cache_latents.encoder", "unknown encoder 'nothing'"]),
        ("train_repae.encoder=timm/vit_nothing", ["train_repae.encoder", "has no model 'vit_nothing'"]),
    ],
)
def test_bad_settings(call, command, value, parts):
    refused(call(command, "--set", value), *parts)


def test_bad_config_files(call, tmp_path):
    refused(call("run", "--config", "quikstart"), "quikstart", "quickstart")
    (tmp_path / "broken.yaml").write_text("train_ldm: [")
    refused(call("run", "--config", str(tmp_path / "broken.yaml")), "broken.yaml")
    (tmp_path / "unknown.yaml").write_text("train_ldm:\n  max_stepz: 3\n")
    refused(call("run", "--config", str(tmp_path / "unknown.yaml")), "train_ldm.max_stepz", "max_steps")


def test_bad_sources(call, tmp_path):
    def run(source: Path | str):
        return call("run", "--set", f"preprocess.source={source}")

    refused(run(tmp_path / "nowhere"), "preprocess.source", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty"), "no images found in", "empty", "one folder per class")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    refused(run(tmp_path / "flat"), "images outside class folders", "a.png", "dataset.json")
    (tmp_path / "text" / "class").mkdir(parents=True)
    (tmp_path / "text" / "class" / "notes.txt").write_text("x")
    refused(run(tmp_path / "text"), "no images found")
    refused(run(tmp_path / "flat" / "a.png"), "is a file, and no archive or table")


def test_unusable_stores(call, tmp_path):
    (tmp_path / "file").write_text("")
    for store in (str(tmp_path / "file"), "/proc/nothing/here", "nonsense://bucket"):
        refused(call("run", "--store", store), store.partition("/here")[0])
        refused(call("runs", "--store", store), store.partition("/here")[0])


def test_missing_inputs(call, tmp_path):
    store = str(tmp_path / "store")
    refused(call("stage", "generate", "--store", store), "generate needs model train-ldm/", "repae stage train-ldm")
    refused(
        call("stage", "generate", "--store", store, "--inputs", "latest"),
        "no finished train-ldm",
        "repae stage train-ldm",
    )
    refused(call("stage", "generate", "--store", store, "--inputs", "modle=latest"), "inputs", "model")
    refused(call("stage", "generrate", "--store", store), "generrate", "generate")
    refused(call("run", "--force", "trane", "--store", store), "trane")
    refused(call("report", "--store", store), "no runs in", "repae run")
    refused(call("run", "--set", "evaluate.reference=none.npz", "--store", store), "evaluate.reference", "none.npz")


def test_missing_weights_file(call, tmp_path):
    refused(
        call("run", "--set", "train_repae.vae.weights=none.safetensors"), "train_repae.vae.weights", "none.safetensors"
    )


def test_nothing_is_started_by_bad_input(call, tmp_path, home):
    call("run", "--set", "train_ldm.batch_size=0", "--store", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    assert not (home / "prefect").exists()
    assert not (home / "mlflow.db").exists()


def test_debug_shows_the_traceback(monkeypatch, home):
    monkeypatch.setattr(sys, "argv", ["repae", "plan", "--debug", "--set", "train_ldm.batch_size=0"])
    with pytest.raises(ValueError, match="batch_size"):
        cli.main()


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ("", "repae: Prefect's temporary server does not know this run (on a busy machine it may have been ended, or "
             "another have taken its port): run again to continue\n"),
        ("http://prefect:4200/api", "repae: ObjectNotFound: None\n"),
    ],
)  # fmt: skip
def test_a_run_that_the_temporary_server_has_lost(call, monkeypatch, server, line):
    from prefect.exceptions import ObjectNotFound

    def lose(*_):
        raise ObjectNotFound(Exception("404"))

    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setattr("flows.run_command.run_pipeline", lose)
    assert call("run") == (1, "", line)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"repae {command}" in out
    assert "xample" in out


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['repae', '--help']\n"
        "from flows.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'prefect', 'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_plan_says_why_and_starts_nothing(call, original, home):
    arguments = tiny.arguments(tiny.overrides(original.images))
    code, out, _ = call("plan", *arguments, "--store", original.store.url, "--set", "generate.guidance=3.0")
    assert code == 0
    assert "guidance: 2.0 -> 3.0" in out
    assert out.count("skip") == 5
    assert not (home / "prefect").exists()
    assert not (home / "mlflow.db").exists()


def test_plan_without_torch(original):
    arguments = ["repae", "plan", *tiny.arguments(tiny.overrides(original.images)), "--store", original.store.url]
    script = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from flows.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_runs_report_verify(call, finished):
    store = finished.store.url
    code, out, _ = call("runs", "--store", store)
    assert code == 0
    assert finished.record.run_id in out
    code, out, _ = call("report", "--store", store, "-o", "copy.html")
    assert code == 0
    assert "report.html" in out
    assert Path("copy.html").read_text().startswith("<!doctype html>")
    assert call("verify", "--store", store)[0] == 0
    finished.artifact("generate").write_bytes("grid.png", b"x" * finished.artifact("generate").files()["grid.png"])
    code, out, err = call("verify", "generate", "--store", store)
    assert code == 1
    assert "grid.png" in out + err


def test_doctor(call, tmp_path):
    code, out, _ = call("doctor", "--store", str(tmp_path / "store"))
    assert code == 0, out
    for line in ("torch", "digits", "fastapi", "store", "GPU"):
        assert line in out
    (tmp_path / "file").write_text("")
    code, out, _ = call("doctor", "--store", str(tmp_path / "file"))
    assert code == 1
    assert "REPAE_STORE" in out


@pytest.fixture
def no_models(monkeypatch, tmp_path):
    """An MLflow without registered models; the runs' own knows those of `original`, which name a copy's, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    return "--other-mlflow"


def test_gc_shows_first_and_removes_when_told(call, finished, no_models):
    options = ("gc", "--store", finished.store.url, no_models, "--days", "0", "--keep-runs")
    code, out, _ = call(*options, "1")
    assert (code, "0 artifacts" in out) == (0, True)
    code, out, _ = call(*options, "0")
    assert "7 artifacts" in out
    assert all(finished.artifact(stage).is_whole() for stage in STAGES)
    assert call(*options, "0", "--delete")[0] == 0
    assert all(not finished.store.folders(stage) for stage in STAGES)
    assert call("gc", "--store", finished.store.url, "--days", "-1")[0] == 2


def test_gc_tells_what_it_really_freed(call, finished, monkeypatch, no_models):
    sizes = {stage: sum(finished.artifact(stage).files().values()) for stage in STAGES}
    kept = finished.artifact("preprocess")
    monkeypatch.setattr(
        gc_command, "remove", lambda store, entry: entry.name.stage != "preprocess" and remove(store, entry)
    )
    options = ("--store", finished.store.url, no_models, "--days", "0", "--keep-runs", "0", "--delete")
    code, out, _ = call("gc", *options)
    freed = (sum(sizes.values()) - sizes["preprocess"]) / 1e6
    assert (code, kept.is_whole()) == (0, True)
    assert f"6 artifacts, {freed:,.1f} MB freed" in out


def test_gc_refuses_an_mlflow_that_may_not_know_the_models(call, original, monkeypatch, tmp_path):
    options = ("gc", "--store", original.store.url, "--days", "0", "--keep-runs", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    code, _, err = call(*options)
    assert code == 2
    assert "MLFLOW_TRACKING_URI" in err
    code, out, _ = call(*options, "--other-mlflow")
    assert (code, "7 artifacts" in out) == (0, True)


def test_a_store_that_is_not_there_is_neither_made_nor_called_sound(call, tmp_path):
    for command in ("gc", "verify", "runs"):
        code, _, err = call(command, "--store", str(tmp_path / "mistyped"))
        assert code == 2
        assert "no store in" in err
    assert not (tmp_path / "mistyped").exists()


def test_gc_keeps_what_registered_models_were_made_from(call, original, monkeypatch, tmp_path):
    monkeypatch.setenv("REPAE_HOME", str(Path(original.store.url).parent / "home"))
    (tmp_path / "link").symlink_to(original.store.url)
    for store in (original.store.url, str(tmp_path / "link")):
        code, out, _ = call("gc", "--store", store, "--days", "0", "--keep-runs", "0")
        assert code == 0
        listed = {stage for stage in STAGES if f"{stage}/" in out}
        assert listed == {"generate", "evaluate"}


def test_inception_without_its_weights_is_refused_before_any_work(call, tmp_path):
    code, _, err = call("run", "--store", str(tmp_path), "--set", "evaluate.extractor=inception")
    assert code == 2
    assert err.startswith("repae: evaluate.extractor_weights: inception needs the file ")
    assert "curl -L" in err
    assert not (tmp_path / "preprocess").exists()
    code, _, err = call("run", "--store", str(tmp_path), "--set", "evaluate.extractor=inceptoin")
    assert code == 2
    assert "evaluate.extractor" in err
    assert "inceptoin" in err
