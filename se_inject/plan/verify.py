"""A check on real tensors before a model is edited: each kind of block computes what it did.

Plans are made on meta tensors, which have no values, so a forward that asks for something that only
a real tensor has would go unnoticed. Here a copy of the block runs before and after the edit.
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

# A block with more numbers than this is not copied, and a larger map is made smaller first.
_MOST_WEIGHTS = 20_000_000
_LARGEST_MAP = 200_000
_SMALL_SIDE = 8


def verify(
    sites: Iterable[Site],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, TracedBlock],
    variant: Variant,
) -> None:
    """Compare each kind of block before and after its edit, on copies and to the bit.

    Blocks are of one kind if they have the same class, graphs that say the same and children of
    the same classes. The smallest block of a kind is tried, since its trial is the cheapest. The SE
    blocks of the trial begin at a factor of 1, whatever is going to be inserted.

    Raises:
        UnsupportedModelError: a block would compute something else.
    """
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    said: dict[int, Hashable] = {}  # by the id of a graph, which many blocks share
    smallest: dict[Hashable, tuple[int, str]] = {}
    for name, own in by_block.items():
        # An activation alone has no tensors; its SE block is made where the model is.
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
    """How many numbers a block holds; None where it has no values at all (on meta)."""
    tensors = [*module.parameters(), *module.buffers()]
    return None if any(t.is_meta for t in tensors) else sum(t.numel() for t in tensors)


def _kind_of(module: nn.Module, block: TracedBlock, said: dict[int, Hashable]) -> Hashable:
    """Equal for blocks of which one trial says what it says of the others."""
    for graph in (block.eval.graph, block.train.graph):
        if id(graph) not in said:
            said[id(graph)] = tuple(
                (node.op, str(node.target), str(node.args), str(node.kwargs))
                for node in graph.nodes
            )
    graphs = said[id(block.eval.graph)], said[id(block.train.graph)]
    return graphs, tuple(type(part) for part in module.modules())


def _is_kept(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> bool:
    """Whether the outputs stay equal; also where this cannot be tried."""
    device = sites[0].device
    own = [] if device.type == "cpu" else [device]
    numbers = torch.get_rng_state()
    try:
        with torch.random.fork_rng(own, device_type="cuda" if not own else device.type):
            return _stays_equal(module, sites, block, variant, device)
    except BaseException:  # it may have come before fork_rng put them back
        torch.set_rng_state(numbers)
        raise


def _seed(device: torch.device) -> None:
    """Seed the random numbers of the CPU and of one device, and no others.

    ``torch.manual_seed`` would seed CUDA as soon as somebody begins to use it, long after the user
    has chosen a seed.
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
                continue  # it rejects maps of this size
            # In train mode the first forward has moved the statistics of that copy.
            edited = copy_without_hooks(module) if training else copied
            if edited is None or not _inject(edited, sites, block, variant):
                break
            after = _outputs(edited, inputs, training, device)
            if after is not None and not _equal(before, after):
                return False
            break
    return True


def _inject(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> bool:
    """Edit a copy of a block; False where that fails, as the edit itself will say."""
    try:
        _insert(module, sites, block, variant)
    except SEInjectError:
        return False
    return True


def _insert(module: nn.Module, sites: list[Site], block: TracedBlock, variant: Variant) -> None:
    insert(
        module,
        # A user's layer has no bottleneck; an SE block stands for it in the check.
        [dataclasses.replace(site, block="", bottleneck=site.bottleneck or 8) for site in sites],
        {"": module},
        {"": block},
        where="residual",  # no matter which: nothing is saved of this copy
        variant=dataclasses.replace(variant, init="identity"),
        se_layer=None,
        example=block.example,
    )


def _examples(example: Arguments) -> Iterator[Arguments]:
    """The recorded call with small maps, and as it was if that is small itself."""
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
    # Not on the default device of the user, which a generator of the CPU does not fit.
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
    """What a copy of a block returns; None where it fails, as it does on too small maps."""
    if module is None:
        return None
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    _seed(device)
    with torch.no_grad():
        try:
            module.train(training)
            output = module(*args, **kwargs)
        except Exception:  # a foreign forward, on maps that it was not made for
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
