"""Puts back what a traced forward has changed on its module, and refuses such a forward."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from se_inject.graph.recording.state import changed, state_of
from se_inject.graph.thread import OtherNetworkError


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward set on its module (proxies), and refuse such a forward."""
    inner: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    attributes, contents = dict(vars(module)), [dict(d) for d in inner]
    before = state_of(module)
    try:
        yield
        module.eval()
        if sets := changed(before, state_of(module)):
            raise OtherNetworkError(
                f"its forward sets self.{sets[0]}",
                "keep it in a local variable, or return it",
            )
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        for own, content in zip(inner, contents, strict=True):
            own.clear()
            own.update(content)
        module.eval()
