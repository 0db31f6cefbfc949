"""Checks on real tensors, before a model is edited, that each kind of block computes what it did.

Plans are made on meta tensors, which have no values. If a forward asks for something that only a
real tensor has, the plan does not notice. Here a copy of the block runs before and after the edit.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.insert import insert
from se_inject.edit.site import Site
from se_inject.errors import SEInjectError, UnsupportedModelError
from se_inject.graph.copies import copy_without_hooks
from se_inject.graph.recording.call import Arguments
from se_inject.graph.trace import TracedBlock
from se_inject.layers.variant import Variant
from se_inject.names import block_label
from se_inject.torch_private import pytree

_MOST_WEIGHTS = 20_000_000  # a block that holds more numbers than this is not copied
_LARGEST_MAP = 200_000  # inputs with more numbers than this are tried in a small size only
_SMALL_SIDE = 8  # the longest side of a map in the small size


def verify(
    sites: Iterable[Site],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, TracedBlock],
    variant: Variant,
) -> None:
    """Compare each kind of block before and after its edit, on copies and to the bit.

    Blocks are of one kind if they have the same class, equal graphs, and children of the same
    classes. The smallest block of a kind is tried, because its trial is the cheapest. In the trial
    every gate is 1, whatever will be inserted.

    Raises:
        UnsupportedModelError: a block would compute something else.
    """
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    said: dict[int, Hashable] = {}  # by the id of a graph, which many blocks share
    smallest: dict[Hashable, tuple[int, str]] = {}
    for name, own in by_block.items():
        # A block that is one activation has no tensors. Its SE block is made where the model is.
        size = None if own[0].device.type == "meta" else _weights_of(modules[name])
        if size is None or size > _MOST_WEIGHTS:
            continue
        kind = _kind_of(modules[name], blocks[name], said)
        if kind not in smallest or size < smallest[kind][0]:
            smallest[kind] = size, name
    for _, name in smallest.values():
        if not _is_kept(modules[name], by_block[name], blocks[name], variant):
            raise UnsupportedModelError(
                f"{block_label(name)} would compute something else after the injection: its forward"
                " asks for what a copy without values cannot know. Leave it out with"
                f" exclude={name!r}."
            )


def _weights_of(module: nn.Module) -> int | None:
    """How many numbers a block holds, or None if any of its tensors is on meta."""
    tensors = [*module.parameters(), *module.buffers()]
    return None if any(t.is_meta for t in tensors) else sum(t.numel() for t in tensors)


def _kind_of(module: nn.Module, block: TracedBlock, said: dict[int, Hashable]) -> Hashable:
    """A key that is equal for blocks of one kind, so that one trial is enough for all of them."""
    for graph in (block.eval.graph, block.train.graph):
        if id(graph) not in said:
            said[id(graph)] = tuple(
                (node.op, str(node.target), str(node.args), str(node.kwargs))
                for node in graph.nodes
            )
    graphs = said[id(block.eval.graph)], said[id(block.train.graph)]
    return graphs, tuple(type(part) for part in module.modules())


def _is_kept(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> bool:
    """Whether the outputs stay equal. This is also assumed where it cannot be tried."""
    device = sites[0].device
    own = [] if device.type == "cpu" else [device]
    numbers = torch.get_rng_state()
    try:
        with torch.random.fork_rng(own, device_type="cuda" if not own else device.type):
            return _stays_equal(module, sites, block, variant, device)
    except BaseException:  # it may have come before fork_rng put the random state back
        torch.set_rng_state(numbers)
        raise


def _seed(device: torch.device) -> None:
    """Seed the random numbers of the CPU and of one device, and no others.

    ``torch.manual_seed`` would also seed CUDA at its first use. That may be long after the user has
    chosen a seed.
    """
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(0)


def _stays_equal(
    module: nn.Module,
    sites: list[Site],
    block: TracedBlock,
    variant: Variant,
    device: torch.device,
) -> bool:
    modes = (False,) if block.train is block.eval else (False, True)
    for training in modes:
        for example in _examples(block.example):
            inputs = _real(example, device)
            copied = copy_without_hooks(module)
            before = _outputs(copied, inputs, training, device)
            if before is None:
                continue  # the block rejects maps of this size
            # In train mode the first forward has changed the running statistics of the copy.
            edited = copy_without_hooks(module) if training else copied
            if edited is None or not _inject(edited, sites, block, variant):
                break
            after = _outputs(edited, inputs, training, device)
            if after is not None and not _equal(before, after):
                return False
            break
    return True


def _inject(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> bool:
    """Edit a copy of a block. False means that this failed; the edit itself will say why."""
    try:
        _insert(module, sites, block, variant)
    except SEInjectError:
        return False
    return True


def _insert(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> None:
    insert(
        module,
        # A user's layer has no bottleneck. In this check an SE block stands in for it.
        [dataclasses.replace(site, block="", bottleneck=site.bottleneck or 8) for site in sites],
        {"": module},
        {"": block},
        where="residual",  # any value does, because this copy is never saved
        variant=dataclasses.replace(variant, init="identity"),
        se_layer=None,
        example=block.example,
    )


def _examples(example: Arguments) -> Iterator[Arguments]:
    """Yield the recorded call with small maps, and then as it was, unless it is too large."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    side = max((size for t in tensors if t.dim() >= 3 for size in t.shape[2:]), default=0)
    if side > _SMALL_SIDE:

        def smaller(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 3:
                return value
            space = [max(1, -(-size * _SMALL_SIDE // side)) for size in value.shape[2:]]
            return value.new_empty([*value.shape[:2], *space])

        yield pytree.tree_map(smaller, example)
    if sum(t.numel() for t in tensors) <= _LARGEST_MAP:
        yield example


def _real(example: Arguments, device: torch.device) -> Arguments:
    # The user's default device may be another one, and the generator fits the CPU only.
    generator = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        return torch.randn(value.shape, generator=generator, device="cpu").to(device, value.dtype)

    inputs: Arguments = pytree.tree_map(real, example)
    return inputs


def _outputs(
    module: nn.Module | None, inputs: Arguments, training: bool, device: torch.device
) -> list[Any] | None:
    """What a copy of a block returns, or None if it fails, as it may on maps that are too small."""
    if module is None:
        return None
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    _seed(device)
    with torch.no_grad():
        try:
            module.train(training)
            output = module(*args, **kwargs)
        except Exception:  # a foreign forward runs on maps that it was not made for
            return None
    return pytree.tree_leaves((output, args, kwargs))


def _equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return type(x) is type(y)
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            return False
        return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)

    return len(a) == len(b) and all(map(same, a, b))
