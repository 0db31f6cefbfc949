"""``load_se`` injects into a base network what a file of ``save_se`` describes.

The file has a fingerprint of each tensor of its base, so that it is never loaded silently onto
another base. The sites are planned again on the base, and they must be those of the file.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.insert import is_injected
from se_inject.edit.whole import ModuleState, run_or_undo
from se_inject.errors import CheckpointError, warn
from se_inject.graph.thread_state import modes_kept
from se_inject.keep.fingerprint import dtype_name, module_hashes, se_keys, tensors_of
from se_inject.keep.header import Header
from se_inject.keep.hub.folder import weights_file
from se_inject.keep.read import printable, read_file
from se_inject.keep.replan import like, plan_again
from se_inject.layers.attention import SELayer
from se_inject.names import block_label, few
from se_inject.plan.checks import check_model
from se_inject.plan.plan import Plan


@modes_kept
def load_se(
    base: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any = None,
    se_layer: SELayer | None = None,
) -> nn.Module:
    """Inject into ``base`` what a file of :func:`save_se` describes, in place, and return it.

    The outputs are then equal to those of the saved model, unless a warning says that a module of
    the base has another class or another setting, such as eps. If anything fails, ``base`` stays as
    it was.

    Args:
        base: the network from which the saved model was made, with its own weights and without SE
            blocks.
        path: the file, a folder that :func:`save_se` wrote, or ``"hf-hub:user/repo"``, to which
            ``@revision`` can be added.
        example_input: the same as for :func:`plan_se`. It is needed only if the file could not hold
            the arguments of the forward.
        se_layer: the ``se_layer`` of the saved model, if it had one. The file holds no code.

    Raises:
        CheckpointError: the file is damaged, another program or version wrote it, or it was made
            for another network than ``base``. The message names the first differences.
        UnsupportedModelError: ``base`` cannot be edited as it is.
    """
    file = weights_file(path)
    header, tensors = read_file(file)
    path = printable(file)
    _check_base(base, header, path)
    if None in header.examples and example_input is None:
        raise CheckpointError(
            f"{path}: the file cannot say what the forward takes. Pass example_input= as you did"
            " to inject_se."
        )
    examples = [
        like(base, example) if example_input is None else example_input
        for example in header.examples
    ]
    own = {key: tensor for key, tensor in tensors_of(base).items() if key in tensors}
    before = {key: tensor.clone() for key, tensor in own.items()}
    states = [ModuleState.of(module) for module in base.modules()]

    def load() -> None:
        for settings, sites in header.groups().items():
            plan = plan_again(base, settings, sites, examples[settings.example], se_layer, path)
            if not settings.custom:
                _check_there(plan, tensors, path)
            plan.apply()
        _fill(base, tensors, path)

    def undo() -> None:
        for state in states:
            state.put_back()
        with torch.no_grad():
            for key, tensor in before.items():
                if not _same(own[key], tensor):  # An unchanged tensor keeps autograd's version.
                    own[key].copy_(tensor)

    run_or_undo(load, undo)
    return base


def _check_base(base: nn.Module, header: Header, path: Any) -> None:
    """Raise unless ``base`` is the network that the file was made for, to the last bit."""
    check_model(base)
    if is_injected(base):
        raise CheckpointError(
            f"{type(base).__name__} has SE blocks already. load_se puts its own into a plain base:"
            " remove_se(model) first."
        )
    state = tensors_of(base)
    made_for = f"{path} was made for another base ({header.model})"
    absent = [key for key in header.base if key not in state]
    unknown = [key for key in state if key not in header.base]
    if absent or unknown:
        kind, keys = ("has no", absent) if absent else ("also has", unknown)
        raise CheckpointError(f"{made_for}: this {type(base).__name__} {kind} {_few(keys)}.")
    for key, (dtype, shape, _) in header.base.items():
        own = state[key]
        if list(own.shape) != list(shape):
            raise CheckpointError(
                f"{made_for}: {key} is {printable(list(shape))} there and {list(own.shape)} here."
                " Build the base with the same arguments (num_classes, ...)."
            )
        if dtype_name(own) != dtype:
            raise CheckpointError(
                f"{made_for}: {key} is {printable(dtype)} there and {dtype_name(own)} here."
                " Convert the base."
            )
        if own.is_meta:
            raise CheckpointError(
                f"{key} of the base is on the meta device and has no values. Load the base first."
            )
    differing = header.differing(base)
    if differing:
        raise CheckpointError(
            f"{path}: {len(differing)} of {len(state)} tensors of the base have other values:"
            f" {_few(differing)}. Load the base's own weights first; what was trained beside the"
            ' SE blocks must be in the file: save_se(..., extra="trained").'
        )
    modules = module_hashes(base)
    if changed := [name for name, said in header.modules.items() if modules.get(name) != said]:
        label = printable(block_label(changed[0]))
        warn(
            f"{path}: the weights fit, but {label} of this base has another class"
            f" or setting, such as eps ({len(changed)} modules have). Outputs may differ."
        )


def _check_there(plan: Plan, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Raise unless the file has tensors of each SE block, before anything is built for them."""
    missing = [key for s in plan.sites if (key := f"{s.name}.fc1.weight") not in tensors]
    if missing:
        raise CheckpointError(f"{path}: the file lacks {_few(missing)}.")


def _few(names: Sequence[str]) -> str:
    """A few names, which may come from a hostile file."""
    return printable(few(names))


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Copy the tensors of the file into the injected model, if all of them fit."""
    state = tensors_of(model)
    missing = [key for key in se_keys(model, state) if key not in tensors]
    foreign = [key for key in tensors if key not in state]
    if missing or foreign:
        raise CheckpointError(
            f"{path}: the file lacks {_few(missing)}."
            if missing
            else f"{path}: the file has {_few(foreign)}, which the model has not."
        )
    for key, tensor in tensors.items():
        there, here = ((list(t.shape), dtype_name(t)) for t in (tensor, state[key]))
        if there != here:
            raise CheckpointError(
                f"{path}: {key} is {there[0]} {there[1]} in the file and {here[0]} {here[1]} in the"
                " model."
            )
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)
    after = tensors_of(model)
    if unset := [key for key, tensor in tensors.items() if not _same(after[key], tensor)]:
        raise CheckpointError(
            f"{path}: {_few(unset)} cannot be set: the model's state_dict() gives copies of it."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes. NaN is then equal to NaN."""
    mine, others = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(mine, others)
