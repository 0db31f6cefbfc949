"""Follows through the functions of a forward which dim of a tensor holds the channels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from se_inject.graph.operations.ops import (
    CHANNELS_FIRST_NORM,
    CHANNELS_LAST_LAYER,
    CONVOLUTION,
    MATRIX_PRODUCT,
    PERMUTE,
    REARRANGE,
    RESHAPE,
)
from se_inject.graph.operations.value import Known
from se_inject.torch_private import pytree


def channel_dim_after(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sources: Sequence[Known],
    out: Tensor,
) -> int | None:
    """Which dim of the output of a function holds the channels, or None if that is not known."""
    if name in CONVOLUTION or name in CHANNELS_FIRST_NORM:
        return 1
    known = [s for s in sources if s.channel_dim is not None]
    if not known:
        return out.dim() - 1 if name in CHANNELS_LAST_LAYER and out.dim() >= 3 else None
    if name in RESHAPE:
        return _kept(known[0].tensor, known[0].channel_dim, out)
    source = next((s for s in known if s.tensor.dim() == out.dim()), None)
    if source is None or name in MATRIX_PRODUCT:
        return None
    dim = source.channel_dim
    assert dim is not None
    if name in PERMUTE:
        return _moved(func, args, kwargs, source.tensor, dim)
    if name in REARRANGE:
        return dim if out.shape == source.tensor.shape else None
    return dim


def _moved(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    source: Tensor,
    dim: int,
) -> int:
    """Where a permutation moves ``dim``, found with a tensor whose sizes are all different."""
    probe = torch.empty(tuple(range(1, source.dim() + 1)), device="meta")
    args, kwargs = pytree.tree_map(lambda v: probe if v is source else v, (args, dict(kwargs)))
    return tuple(func(*args, **kwargs).shape).index(dim + 1)


def _kept(source: Tensor, dim: int | None, out: Tensor) -> int | None:
    """Where ``dim`` is after a reshape, if nothing was merged with it or split from it.

    The elements keep their order. A dim is therefore kept if all sizes up to it stay the same, or
    all sizes from it on.
    """
    assert dim is not None
    if source.shape[: dim + 1] == out.shape[: dim + 1]:
        return dim
    after = source.dim() - dim
    return out.dim() - after if source.shape[dim:] == out.shape[-after:] else None
