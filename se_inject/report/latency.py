"""Latency of a network before and after the injection, measured side by side.

Parameters and MACs say little about speed: an SE block adds hardly any arithmetic, but it reads
every branch map once more, and its small layers wait on one another.
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

# Both networks take turns until the first two are reached, or the last two: a slow network has to
# run seven times all the same.
_MIN_ROUNDS = 9
_MIN_SECONDS = 4.0
_FEWEST_ROUNDS = 3
_MAX_SECONDS = 60.0
_MAX_ROUNDS = 200
_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Of one forward in inference, without and with the SE blocks.

    ``overhead`` has the quartiles, over the rounds, of after / before - 1 within one round.
    """

    device: str
    threads: int | None  # None: not on the CPU
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
        torch.empty(1, device=device).item()  # meta has no values, and nothing to measure
    except Exception as error:  # each backend has its own kind
        raise ArgumentError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]})."
        ) from error
    return device


def measure_latency(
    plan: Plan, *, batch_size: int = 1, device: torch.device | str = "cpu"
) -> Latency:
    """Run a planned model without and with its SE blocks in turns, in eval mode, and time both.

    Args:
        plan: of a model with weights on a real device. That model stays as it is: what runs are
            copies. The input is random numbers in the shapes that the plan was made with.
        batch_size: images in the input; tensors without a batch dim keep their shape.
        device: where to run.

    Raises:
        BenchmarkError: one of the two cannot run there, or not on that input.
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
        before, after: they are moved to ``device`` and stay there, in eval mode.
        arguments: of the forward, on meta; what runs are random numbers in these shapes.
        batch_size, device: as of :func:`measure_latency`.

    Raises:
        BenchmarkError: one of the two cannot run there, or not on that input.
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
        except Exception as error:  # whatever a foreign forward may raise
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
            if len(pairs) % 2:  # neither always comes first
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
    """Random numbers in the shape of ``tensor``, with another batch size where it has a batch."""
    shape = list(tensor.shape)
    if shape and shape[0] == planned:
        shape[0] = batch_size
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype, device=device)
    return torch.zeros(shape, dtype=tensor.dtype, device=device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
