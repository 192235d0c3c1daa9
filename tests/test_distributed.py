"""Two processes: DDP and FSDP2 train as one process does with both halves of the batch; the noise of each."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastvae

WORLD, BATCH = 2, 6

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and sys.platform.startswith("linux")), reason="no gloo"
)


class Network(nn.Module):
    """A VAE whose noise is given, so that one process can draw what two did."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)

    def forward(self, x: Tensor, seed: int) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.sample_with_kl(mu, logvar, seed=seed)
        return fastvae.bce_with_logits(self.decoder(z), x) + kl


def half(rank: int) -> Tensor:
    return torch.rand(BATCH, 8, generator=torch.Generator().manual_seed(rank))


def with_ddp(network: Network) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network)


def with_fsdp2(network: Network) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (network.encoder, network.decoder):
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train(rank: int, wrap: Callable[[Network], nn.Module], folder: str) -> None:
    """Two steps of one of the processes; rank 0 leaves the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    module = wrap(Network())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        module(half(rank), seed=10 * step + rank).backward()
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    if rank == 0:
        torch.save([w.detach() for w in weights], Path(folder, "weights.pt"))
    dist.destroy_process_group()
    # Not Python's own end: gloo's threads outlive their group, and one that is then still to drop its last tensor
    # aborts the process when it asks for the interpreter's lock.
    os._exit(0)


def draw(rank: int, folder: str) -> None:
    """Rank r leaves what it drew after the seeds of a user: by torch, and by us."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mu, logvar, drawn = torch.zeros(64, 64), torch.zeros(64, 64), {}
    torch.manual_seed(0)
    drawn["torch, one seed"] = torch.randn(64, 64)
    torch.manual_seed(0)
    drawn["one seed"] = fastvae.reparameterize(mu, logvar)
    compiled = torch.compile(fastvae.reparameterize, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    drawn["one seed, compiled"] = compiled(mu, logvar)
    torch.manual_seed(0 + rank)
    drawn["a seed a rank"] = fastvae.reparameterize(mu, logvar)
    drawn["a generator a rank"] = fastvae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(0 + rank))
    drawn["seed="] = fastvae.reparameterize(mu, logvar, seed=3)
    torch.save(drawn, Path(folder, f"drawn{rank}.pt"))
    dist.barrier()
    os._exit(0)  # as in train


def test_ranks_draw_the_same_where_torch_does(tmp_path: Path) -> None:
    """After one ``manual_seed`` on every rank, the same noise; after a seed a rank, independent noise."""
    torch.multiprocessing.spawn(draw, (str(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"drawn{rank}.pt") for rank in range(WORLD))
    for name in ("torch, one seed", "one seed", "one seed, compiled", "seed="):
        assert torch.equal(first[name], second[name]), name
    for name in ("a seed a rank", "a generator a rank"):
        assert (first[name] * second[name]).mean().abs() < 5 / 64, f"{name}: five standard errors"


@pytest.mark.parametrize("wrap", [with_ddp, with_fsdp2])
def test_two_processes_train_as_one(wrap: Callable[[Network], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = Network()
    before = copy.deepcopy(list(one.parameters()))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (sum(one(half(rank), seed=10 * step + rank) for rank in range(WORLD)) / WORLD).backward()
        optimizer.step()
    torch.multiprocessing.spawn(train, (wrap, str(tmp_path)), nprocs=WORLD)
    for first, want, got in zip(before, one.parameters(), torch.load(tmp_path / "weights.pt"), strict=True):
        assert not torch.equal(first, want)
        torch.testing.assert_close(got, want.detach())
