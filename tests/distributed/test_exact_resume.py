"""30 steps at once = 12 + kill -9 + 18, to the last bit: both stages, one to three workers, two micro-batches."""

import json
import signal
from pathlib import Path

import pytest
import tiny
import torch
from distributed.ranks import run_ranks, start_ranks

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.data import ImageShards, open_source, preprocess_images
from repae_core.models import build_vae
from repae_core.stages.cache_latents import plan_latents, write_missing_latents

BATCH = 12
STEPS = [f"{stage}.{field}" for stage in ("train_repae", "train_ldm") for field in (
    f"batch_size={BATCH}", "checkpoint_every=12", "keep_checkpoints=9", "gradient_accumulation_steps=2",
)]  # fmt: skip
TOTAL = ["train_repae.vae_warmup_steps=2", "train_repae.max_steps=28", "train_ldm.max_steps=30"]
SCRIPT = """
import json, os, signal, sys, time
import tiny, torch
from repae_core.artifacts import Artifact, Store
from repae_core.config import section_name
from repae_core.data import ImageShards, LatentShards
from repae_core.models import build_vae
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun
from repae_core.training.ldm_run import LDMRun

url, world, *tasks = sys.argv[1:]
torch.set_num_threads(1)
store, group = Store(url), open_group()
config = tiny.config("digits", url, *json.loads(os.environ["SETS"]))
images = ImageShards(Artifact(store, "preprocess", "x"))
for task in tasks:
    stage, name, how = task.split("/")
    folder = Artifact(store, stage, f"{name}{world}")
    if stage == "train-repae":
        run = JointRun(config, images, folder, group)
    else:
        torch.manual_seed(0)
        vae = build_vae(config.train_repae.vae.architecture())
        run = LDMRun(config, LatentShards(Artifact(store, "cache-latents", "x")), images, vae, folder, group)
    step = run.step
    def killed(index, item):
        if index == 14:
            while not folder.exists("checkpoints/144/commit.json"):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(index, item)
    if how == "killed":
        run.step = killed
    history = run.run(report=lambda progress: None, guard=lambda: None, record={})
    if group.is_main:
        folder.write_json("history.json", history)
group.barrier()
group.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("resume")
    store = Store(str(root / "store"))
    source = open_source(str(tiny.write_images(root / "images")))
    preprocess_images(source, Artifact(store, "preprocess", "x"), resolution=32, images_per_shard=16, seed=0)
    torch.manual_seed(0)
    vae = build_vae(tiny.config("digits", root).train_repae.vae.architecture()).eval()
    images, out = ImageShards(Artifact(store, "preprocess", "x")), Artifact(store, "cache-latents", "x")
    work = plan_latents(vae, images, out, dtype="float32", flip=False, encoders=("digits-vit",), patch_size=2)
    write_missing_latents(work, batch_size=16, progress=lambda done, total: None)
    work.writer.finish()
    return store


def checkpoint(folder: Artifact, images_seen: int) -> dict[str, bytes]:
    name = f"checkpoints/{images_seen}"
    return {leaf: folder.read_bytes(f"{name}/{leaf}") for leaf in folder.files(name)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_and_continued_is_bit_exact(store: Store, monkeypatch, world: int, tmp_path: Path):

    monkeypatch.setenv("SETS", json.dumps([*STEPS, *TOTAL]))
    arguments = (store.url, str(world))
    for tasks in (
        ("train-repae/through/whole", "train-repae/killed/killed"),
        ("train-repae/killed/resumed", "train-ldm/through/whole", "train-ldm/killed/killed"),
    ):
        processes = start_ranks(SCRIPT, world, *arguments, *tasks, log=tmp_path / "log")
        assert -signal.SIGKILL in [p.wait(timeout=250) for p in processes], (tmp_path / "log").read_text()
    run_ranks(SCRIPT, world, *arguments, "train-ldm/killed/resumed")
    for stage in ("train-repae", "train-ldm"):
        through, killed = (Artifact(store, stage, f"{name}{world}") for name in ("through", "killed"))
        assert committed_checkpoints(killed) == [12 * BATCH, 24 * BATCH, 30 * BATCH]
        ours, expected = checkpoint(killed, 30 * BATCH), checkpoint(through, 30 * BATCH)
        assert {"ema.safetensors", "sit.safetensors", "sit.optimizer.pt", "state.json"} <= set(expected)
        assert ("rank1.safetensors" in expected) == (world > 1 and stage == "train-repae")
        assert ours == expected
        history = killed.read_json("history.json")
        assert history == through.read_json("history.json")
        assert [row["step"] for row in history] == list(range(1, 31))
