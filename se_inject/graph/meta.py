"""Runs forwards on meta tensors, which have no values and need no memory and no arithmetic."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from se_inject.graph.operations.shortcuts import run_on_meta
from se_inject.graph.thread import THREAD
from se_inject.graph.thread_state import Modes
from se_inject.torch_private import makes_tensors


class on_meta:  # noqa: N801 - it is called as the contexts of torch are
    """Run forwards on meta tensors, without gradients and with every new tensor on meta.

    If a forward asks for the device of a tensor, it gets the answer of a model on ``device``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def __enter__(self) -> None:
        self.before = Modes.now()
        try:
            torch.set_grad_enabled(False)
            # Torch declares no types for it. There is no `with`, because put_back() ends the mode.
            TorchFunctionMode.__enter__(_Answers(self.device))  # type: ignore[no-untyped-call]
        except BaseException:  # it may be a Ctrl-C
            self.before.put_back()
            raise

    def __exit__(self, *_: object) -> None:
        self.before.put_back()


def device_of(model: nn.Module) -> torch.device:
    """The device that a model is on. A model on meta has none yet and is planned as on the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


class _Answers(TorchFunctionMode):
    """Gives the answers of the real model, where a copy on meta would give its own.

    Every tensor that the forward makes is made on meta. ``torch.device("meta")`` would do that too,
    but it is one more mode, which would see everything that this mode asks a tensor. Where torch is
    slow on meta, this mode takes a shortcut.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.index = -1 if device.type == "cpu" else device.index or 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = func.__self__.__name__  # type: ignore[attr-defined]
            if attribute == "device":
                return self.device
            if attribute in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_xla"):
                return attribute == f"is_{self.device.type}"
        elif name == "get_device":
            return self.index
        elif name in ("cpu", "cuda") and func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        elif func is Tensor.type:
            if len(args) < 2 and not kwargs:
                kind = _KINDS.get(args[0].dtype, "Float")
                place = "torch" if self.device.type == "cpu" else f"torch.{self.device.type}"
                return f"{place}.{kind}Tensor"
            if isinstance(args[1], str):
                names = {f"{kind}Tensor": dtype for dtype, kind in _KINDS.items()}
                return args[0].to(names[args[1].rsplit(".", 1)[-1]])
        elif func is Tensor.to:
            args = tuple("meta" if _names_device(a) else a for a in args)
        if kwargs.get("device") is not None or makes_tensors(func):
            kwargs = {**kwargs, "device": "meta"}
        args, kwargs = _of_the_copy(args), _of_the_copy(kwargs)
        return run_on_meta(func, args, kwargs)


_KINDS = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half"}
_KINDS |= {torch.bfloat16: "BFloat16", torch.int64: "Long", torch.int32: "Int"}
_KINDS |= {torch.uint8: "Byte", torch.bool: "Bool", torch.int16: "Short", torch.int8: "Char"}


def _names_device(value: Any) -> bool:
    return isinstance(value, str | torch.device)


def _of_the_copy(value: Any) -> Any:
    """The arguments of a function with every real tensor moved to meta.

    If a forward holds on to the user's own model, the tensor of the copy takes the place of its
    tensor.
    """
    if isinstance(value, Tensor):
        twin = THREAD.twin_of(value)
        if twin.is_meta or twin.dim() == 0 or twin.is_quantized:
            return twin  # torch combines numbers on the CPU with tensors on any device
        return twin.to("meta")
    kind = type(value)
    if kind is tuple:
        return tuple([_of_the_copy(v) for v in value])
    if kind is list:
        return [_of_the_copy(v) for v in value]
    if kind is dict:
        return {k: _of_the_copy(v) for k, v in value.items()}
    return value


def needs_values(error: Exception) -> bool:
    """Whether a forward stopped because meta tensors hold no data (``nonzero`` in a detector)."""
    return isinstance(error, NotImplementedError | RuntimeError | TypeError) and bool(
        re.search(r"(?<![a-z])meta(?![a-z])", str(error).lower())
    )
