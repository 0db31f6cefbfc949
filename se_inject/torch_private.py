"""All private names of torch that the package uses, each with the reason for it.

If a new version of torch moves one of these names, only this file has to change.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx
import torch.utils._device
from torch import Tensor, nn
from torch.autograd import forward_ad

# Many places take the nested containers of a call apart and rebuild them. The public
# torch.utils.pytree is newer than the oldest torch that this package supports.
from torch.utils import _pytree as pytree

# This kind of mode sees the operations themselves, not the functions that people call. Its base
# class has no public name.
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "pytree"]


def transforms_active() -> bool:
    """Whether vmap or another transform of torch.func runs. No public function says so."""
    return torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Whether TorchScript's tracer runs. Torch has the function but does not declare it."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def forward_derivatives_active() -> bool:
    """Whether forward AD runs (``torch.autograd.forward_ad``). Only a private counter tells."""
    return forward_ad._current_level >= 0


def dispatch_modes_active() -> bool:
    """Whether a mode sees the operations that run (a FLOP counter, say). No public name tells."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_batched_by_old_vmap(tensor: Tensor) -> bool:
    """Whether autograd has batched the tensor by its older vmap (``is_grads_batched``).

    ``out=`` has no rule for such tensors, and only this private function recognises them.
    """
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def version_of(tensor: Tensor) -> int:
    """How often the tensor has been changed in place. Autograd's counter has no public name."""
    return tensor._version


def storage_id(tensor: Tensor) -> int:
    """A number that is equal for tensors that share memory.

    The data pointers do not tell, because all of them are 0 on the meta device.
    """
    return int(tensor.untyped_storage()._cdata)


def training_property(read: Callable[[nn.Module], Any]) -> property:
    """A property that takes the place of ``training`` on all modules, so that reads are noticed.

    ``training`` is a plain attribute of each instance. A data descriptor on ``nn.Module`` takes
    precedence over it. The value itself stays in the instance.
    """

    def write(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    def delete(module: nn.Module) -> None:
        del vars(module)["training"]

    return property(read, write, delete)


def wrapped_functions() -> list[tuple[str, dict[str, Any]]]:
    """The functions that were registered with ``torch.fx.wrap``, as pairs of name and namespace.

    A library registers a function that should stay one step of a graph, as torchvision does with
    stochastic depth. The table has no public name.
    """
    table = torch.fx._symbolic_trace._wrapped_fns_to_patch
    return [(name, space) for (_, name), space in table.items() if name in space]


def makes_tensors(function: Callable[..., Any]) -> bool:
    """Whether a function makes tensors on the device that ``with torch.device(...)`` names.

    The list of these functions has no public name.
    """
    return function in torch.utils._device._device_constructors()


def without_torch_functions() -> AbstractContextManager[None]:
    """A context in which no mode sees the functions that run, as in TorchScript's own code."""
    return torch._C.DisableTorchFunction()


def knows_eval_norms_in_onnx() -> bool:
    """Whether torch's exporter to ONNX knows that a batch norm in eval mode has one output.

    Torch 2.6 does not, and no public name tells.
    """
    from torch.onnx._internal.exporter import _building

    return hasattr(_building, "_determine_output_number")


# Torch has these two functions but does not declare their types.
def torch_function_state() -> Any:
    """Whether modes and tensor classes see the functions that this thread calls."""
    return torch._C._get_torch_function_state()  # type: ignore[attr-defined]


def set_torch_function_state(state: Any) -> None:
    """Put this state back. A ``with`` is not enough: an interruption can stop it at its end."""
    torch._C._set_torch_function_state(state)  # type: ignore[attr-defined]


def function_modes() -> list[Any]:
    """The modes that see the functions that this thread calls, the innermost last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]


def set_function_modes(modes: list[Any]) -> None:
    """Make these the modes of this thread. The public way, ``with``, can be interrupted halfway."""
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
