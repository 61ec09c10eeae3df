"""Two and three processes over gloo equal one process with the whole batch, and wait together."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distributed.ranks import run_ranks

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.training.distributed import open_group

SCRIPT = """
import json, sys
import torch
from repae_core.models.latent_norm import LatentNorm
from repae_core.losses import LeCamEMA
from repae_core.training.distributed import open_group
torch.set_num_threads(1)
torch.manual_seed(0)
group = open_group()
x = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1
part = x.chunk(group.world_size)[group.rank]
norm = LatentNorm(3).train()
out = norm(part)
ema = LeCamEMA(0.9)
ema.update(part.mean((1, 2, 3)), -part.mean((1, 2, 3)))
layer = torch.nn.Linear(12, 1)
torch.nn.init.ones_(layer.weight)
wrapped = group.wrap(layer)
wrapped(part.flatten(1)).square().mean().backward()
flags = group.all_true(torch.tensor([True, group.rank == 0]))
result = {
    "rank": group.rank, "world": group.world_size, "out": out.tolist(),
    "mean": norm.running_mean.tolist(), "var": norm.running_var.tolist(), "ema": ema.state_dict(),
    "grad": layer.weight.grad.flatten().tolist(), "reduced": group.mean(torch.tensor([float(group.rank)])).tolist(),
    "flags": flags.tolist(),
}
open(f"{sys.argv[1]}/{group.rank}.json", "w").write(json.dumps(result))
group.barrier()
group.accelerator.end_training()
"""

SAVING = """
import json, sys, time
import torch
from repae_core.artifacts import Artifact, Store
from repae_core.training import checkpoint_writer
from repae_core.training.distributed import open_group
from repae_core.training.optim import Network
from repae_core.training.state import LDMState
checkpoint_writer._PULSE_SECONDS = 0.05
group = open_group()
layer = torch.nn.Linear(2, 2)
state = LDMState(group, Network(layer, layer, learning_rate=0.1), torch.nn.Linear(2, 2))
folder = Artifact(Store(sys.argv[1]), "train-ldm", "f" * 16)
waits = []

def slow_store():
    until = len(waits) + 3
    while len(waits) < until:
        time.sleep(0.01)

count = lambda: waits.append(group.rank)
with checkpoint_writer.CheckpointWriter(folder, state, guard=slow_store, waits=count, keep=9, waiting=1) as writer:
    for images_seen in (10, 20, 30):
        writer.save({"images_seen": images_seen, "history": []})
    in_save = len(waits)
    writer.flush()
    in_all = len(waits)
open(f"{sys.argv[1]}/{group.rank}.json", "w").write(json.dumps([in_save, in_all]))
group.barrier()
group.accelerator.end_training()
"""

COMPILING = """
import json, sys
import tiny, torch
from repae_core.training.assembly import new_joint_state
from repae_core.training.compiled import is_compiled
from repae_core.training.distributed import open_group

def backend(graph, inputs):
    if group.rank == 1:
        raise RuntimeError("no such operator")
    return graph.forward

compile_by = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **settings: compile_by(self, backend=backend, **settings)
torch.set_num_threads(1)
config = tiny.config("digits", "unused", "train_repae.compile=true", "train_repae.batch_size=4")
group = open_group()
state = new_joint_state(config.train_repae, config.compat, group, seed=0, latent_size=8, num_classes=10)
seen = {name: is_compiled(network.module) for name, network in state.networks().items()}
open(f"{sys.argv[1]}/{group.rank}.json", "w").write(json.dumps(seen))
group.barrier()
group.accelerator.end_training()
"""


def results(folder: Path, world: int) -> list[dict]:
    folder.mkdir()
    run_ranks(SCRIPT, world, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(tmp_path, world):
    (one,), many = results(tmp_path / "one", 1), results(tmp_path / "many", world)
    assert [r["world"] for r in many] == [world] * world
    out = torch.cat([torch.tensor(r["out"]) for r in many])
    torch.testing.assert_close(out, torch.tensor(one["out"]))
    for r in many:
        for name in ("mean", "var", "grad"):
            torch.testing.assert_close(torch.tensor(r[name]), torch.tensor(one[name]))
        assert r["ema"] == pytest.approx(one["ema"])
        assert r["reduced"] == pytest.approx([(world - 1) / 2])
        assert r["flags"] == [True, False]


def test_ranks_wait_for_a_slow_store_together(tmp_path):
    """Else those that write nothing would wait in their next collective, and their watchdogs end them."""
    run_ranks(SAVING, 2, str(tmp_path))
    counts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert counts[0] == counts[1]
    in_save, in_all = counts[0]
    assert 6 <= in_save < in_all
    assert committed_checkpoints(Artifact(Store(str(tmp_path)), "train-ldm", "f" * 16)) == [10, 20, 30]


def test_a_compiler_that_fails_on_one_rank_is_used_on_none(tmp_path):
    run_ranks(COMPILING, 2, str(tmp_path))
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert seen == [dict.fromkeys(("sit", "vae", "discriminator"), False)] * 2


def test_a_group_alone_is_its_own():
    """accelerate keeps the first settings for a whole process: a second training here would get the first's device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    assert open_group().accelerator.mixed_precision == "no"
