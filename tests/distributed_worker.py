"""What one of two processes does: ``torchrun --nproc-per-node 2 THIS JOBS FOLDER``.

Each process of torchrun imports torch, timm and Lightning once and forks a process of its own for
each job: the imports take longer than the jobs. JOBS is a JSON object of names and arguments. The
job ``train MODE`` trains an injected network for a few steps, every other one is a command of
se-inject. What a job prints and its exit status go to FOLDER.
"""

import json
import os
import sys
import traceback
from importlib import import_module
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


def train(mode: str, folder: Path) -> list[float]:
    """The losses of a few steps; ``mode`` is "single", "ddp" or "fsdp".

    The BatchNorms stay in eval mode: their statistics are of each process's own batch.
    """
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
        with pytest.raises(UnsupportedModelError, match="sharding"):
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
    return losses


def job(name: str, arguments: list[str], folder: Path) -> None:
    if arguments[0] != "train":
        import se_inject.cli.app as cli

        sys.argv = ["se-inject", *arguments]
        cli.main()
        return
    dist.init_process_group("gloo")
    try:
        losses = train(arguments[1], folder)
    finally:
        dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        folder.joinpath(f"{name}.json").write_text(json.dumps(losses))


def forked(name: str, port: int | None, arguments: list[str], folder: Path) -> None:
    """Run the job in a process of its own, which has what this one imported."""
    own = folder / f"{name}-{os.environ['RANK']}"
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        own.with_suffix(".status").write_text(str(status))
        return
    status = 1
    try:
        with own.with_suffix(".txt").open("w") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        if port is not None:  # the place where torchrun lets its processes meet serves one meeting
            os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        job(name, arguments, folder)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is tidied up here


if __name__ == "__main__":
    for module in ("lightning.pytorch", "se_inject.cli.app", "se_inject.finetune.runs.trainer"):
        import_module(module)  # so that the forks have what the commands import late
    torch.set_num_threads(1)
    for name, (port, arguments) in json.loads(sys.argv[1]).items():
        forked(name, port, arguments, Path(sys.argv[2]))
