"""Measures the latency of a network before and after the injection, side by side.

Parameters and MACs say little about speed. An SE block adds hardly any arithmetic, but it reads
every branch map once more, and its small layers wait for one another.
"""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ArgumentError, BenchmarkError, first_line
from se_inject.graph import example
from se_inject.graph.recording.call import Arguments
from se_inject.plan.plan import Plan
from se_inject.torch_private import pytree

# Both networks take turns until the first two numbers are both reached, or the next two. A slow
# network still runs one round to warm up and three rounds that are timed.
_MIN_ROUNDS = 9
_MIN_SECONDS = 4.0
_FEWEST_ROUNDS = 3
_MAX_SECONDS = 60.0
_MAX_ROUNDS = 200
_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """The latency of one forward in inference, without and with the SE blocks.

    Each round gives a ratio, after / before - 1. ``overhead`` has the quartiles of these ratios.
    """

    device: str
    threads: int | None  # None on devices other than the CPU
    batch_size: int
    before_ms: float
    after_ms: float
    overhead: tuple[float, float, float]
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "overhead": list(self.overhead)}


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ArgumentError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails on meta, where there is nothing to measure
    except Exception as error:  # each backend has its own kind of error
        raise ArgumentError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]})."
        ) from error
    return device


def measure_latency(
    plan: Plan, *, batch_size: int = 1, device: torch.device | str = "cpu"
) -> Latency:
    """Run a planned model without and with its SE blocks in turns, in eval mode, and time both.

    Args:
        plan: the plan of a model with weights on a real device. The model stays as it is, because
            copies run. The input is random, in the shapes that the plan was made with.
        batch_size: the number of images in the input. Tensors without a batch dim keep their shape.
        device: the device to run on.

    Raises:
        BenchmarkError: one of the two cannot run on this device or on this input.
    """
    before = copy.deepcopy(plan.model)
    plan.apply()
    try:
        after = copy.deepcopy(plan.model)
    finally:
        plan.withdraw()
    return compare_latency(before, after, plan.example, batch_size=batch_size, device=device)


def compare_latency(
    before: nn.Module,
    after: nn.Module,
    arguments: Arguments,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> Latency:
    """Run two networks in turns, in eval mode, and time both.

    Args:
        before, after: the networks. They are moved to ``device`` and stay there, in eval mode.
        arguments: the arguments of the forward, on meta. The input is random in these shapes.
        batch_size, device: the same as for :func:`measure_latency`.

    Raises:
        BenchmarkError: one of the two cannot run on this device or on this input.
    """
    device = torch.device(device)

    def seconds(network: nn.Module) -> float:
        _synchronize(device)
        start = time.perf_counter()
        network(*args, **kwargs)
        _synchronize(device)
        return time.perf_counter() - start

    planned = example.batch_size(arguments) if example.is_batched(arguments) else None
    pairs: list[tuple[float, float]] = []
    with torch.inference_mode():
        start = time.perf_counter()
        try:
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda t: _random_like(t, planned, batch_size, device), arguments
            )
            for network in (before, after):
                network.to(device).eval()
            for _ in range(_WARM_UP):
                seconds(before), seconds(after)
                if time.perf_counter() - start > _MIN_SECONDS:
                    break
        except Exception as error:  # a foreign forward may raise anything
            raise BenchmarkError(
                f"a forward at batch size {batch_size} on {device} failed"
                f" ({type(error).__name__}: {first_line(error)}).\n"
                "If memory ran out, take a smaller batch size or image."
            ) from error
        start = time.perf_counter()
        while len(pairs) < _MAX_ROUNDS:
            spent = time.perf_counter() - start
            if len(pairs) >= _MIN_ROUNDS and spent > _MIN_SECONDS:
                break
            if len(pairs) >= _FEWEST_ROUNDS and spent > _MAX_SECONDS:
                break
            if len(pairs) % 2:  # the order alternates, so that neither always comes first
                second, first = seconds(after), seconds(before)
            else:
                first, second = seconds(before), seconds(after)
            pairs.append((first, second))
    low, middle, high = statistics.quantiles([b / a - 1 for a, b in pairs], n=4)
    return Latency(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        batch_size=batch_size,
        before_ms=1e3 * statistics.median(a for a, _ in pairs),
        after_ms=1e3 * statistics.median(b for _, b in pairs),
        overhead=(low, middle, high),
        rounds=len(pairs),
    )


def _random_like(
    tensor: Tensor, planned: int | None, batch_size: int, device: torch.device
) -> Tensor:
    """Random numbers in the shape of ``tensor``, with a new batch size if it has a batch dim."""
    shape = list(tensor.shape)
    if shape and shape[0] == planned:
        shape[0] = batch_size
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype, device=device)
    return torch.zeros(shape, dtype=tensor.dtype, device=device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
