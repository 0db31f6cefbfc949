"""Counts the operations of an SE block with its addition, which make up its cost at batch 1.

    OMP_NUM_THREADS=1 python benchmarks/operations.py

The profiler counts torch's operations in one call of the block and its addition, also those that
other operations call (``aten::conv2d`` calls ``aten::convolution``, ...). ``leaf`` counts only the
operations that call no others. For training, it counts the forward and the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from se_inject import SqueezeExcite
from se_inject.layers.deployed import DeployedSE

CHANNELS, WIDTH, SIDE = 256, 16, 56
Block = Callable[[Tensor, Tensor], Tensor]


def blocks() -> dict[str, tuple[nn.Module, Block]]:
    """Each block, and a function that uses it as a residual block of ResNet does."""
    theirs = SEModule(CHANNELS, rd_channels=WIDTH)
    ours = SqueezeExcite(CHANNELS, WIDTH)
    early = DeployedSE(ours, nn.Conv2d(CHANNELS // 4, CHANNELS, 1))
    small = torch.randn(1, CHANNELS // 4, SIDE, SIDE)

    def timms(x: Tensor, residual: Tensor) -> Tensor:
        x = theirs(x)
        x += residual
        return x

    return {
        "timm": (theirs, timms),
        "se_inject": (ours, lambda x, residual: ours(x, residual, in_place=True)),
        "se_inject, optimized": (
            early,
            lambda x, residual: early(x, residual, in_place=True, gate=early.excite(small)),
        ),
    }


def count(run: Callable[[], Any]) -> dict[str, int]:
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        run()
    events = [e for e in found.events() if e.name.startswith("aten::")]
    return {
        "operations": len(events),
        "leaf": sum(not any(c.name.startswith("aten::") for c in e.cpu_children) for e in events),
    }


def main() -> None:
    torch.set_num_threads(1)
    for mode in ("inference", "training"):
        for name, (module, block) in blocks().items():
            if mode == "training" and isinstance(module, DeployedSE):
                continue  # it is only for inference
            maps = torch.randn(2, 1, CHANNELS, SIDE, SIDE).unbind()

            def infer(block: Block = block, maps: Any = maps) -> None:
                with torch.inference_mode():
                    block(*maps)

            def train(block: Block = block, maps: Any = maps, module: nn.Module = module) -> None:
                x, residual = (t.detach().requires_grad_() for t in maps)
                inputs = (x, residual, *module.parameters())
                torch.autograd.grad(block(x, residual), inputs, torch.ones_like(x))

            counts = count(infer if mode == "inference" else train)
            said = ", ".join(f"{n} {what}" for what, n in counts.items())
            print(f"{mode:10} {name:22} {said}")


if __name__ == "__main__":
    main()
