"""Two and three processes over gloo equal one process with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks

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
