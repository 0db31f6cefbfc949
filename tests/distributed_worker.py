"""What one of two processes does: ``torchrun --nproc-per-node 2 THIS MODE FOLDER``.

Trains an injected network for a few steps and writes its losses; MODE is "single", "ddp" or
"fsdp". The BatchNorms stay in eval mode: their statistics are of each process's own batch.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from se_inject import UnsupportedModelError, inject_se, remove_se

STEPS, BATCH = 4, 8
BLOCKS = ("SEBasicBlock", "SEBottleneck")  # what a wrapping policy would name


def injected() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    return inject_se(model, example_input=torch.randn(2, 3, 64, 64)).eval()


def main(mode: str, folder: Path) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = injected()
    if mode == "ddp":
        model = DistributedDataParallel(model)  # unused parameters would be an error
    elif mode == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for module in list(model.modules()):
            if type(module).__name__ in BLOCKS:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 5
        with pytest.raises(UnsupportedModelError, match="sharded"):
            remove_se(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(STEPS, BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (STEPS, BATCH), generator=torch.Generator().manual_seed(2))
    losses = []
    for x, y in zip(images, labels, strict=True):
        own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[own]), y[own])
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)

    if mode == "fsdp":
        state = get_model_state_dict(model)
        dcp.save(state, checkpoint_id=folder / "dcp")
        again = injected()
        for module in list(again.modules()):
            if type(module).__name__ in BLOCKS:
                fully_shard(module, mesh=mesh)
        fully_shard(again, mesh=mesh)
        target = get_model_state_dict(again)
        dcp.load(target, checkpoint_id=folder / "dcp")
        set_model_state_dict(again, target)
        with torch.no_grad():
            assert torch.equal(model(images[0]), again(images[0]))
    if rank == 0:
        folder.joinpath(f"{mode}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if mode != "single":
        dist.init_process_group("gloo")
    try:
        main(mode, folder)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
