"""What the planning thread is doing, and the two ways in which planning stops a foreign forward."""

import threading
from typing import Any

from torch import Tensor, nn


class OtherNetworkError(Exception):
    """The graph would not do what the forward does.

    The message says what the forward does, where it does so, and what the user can do about it.
    """

    def __init__(self, what: str, instead: str = "") -> None:
        super().__init__(f"{what}; {instead or 'exclude= leaves the block out'}")


class _Thread(threading.local):
    """What the planning thread is doing. In every other thread this is empty."""

    tracer: Any = None  # the BlockTracer that runs
    replay: Any = None  # the Replay that answers for the children of a block
    modules: dict[int, nn.Module] = {}  # noqa: RUF012 - replaced, never changed
    tensors: dict[int, Tensor] = {}  # noqa: RUF012 - so are these

    def twin_of(self, tensor: Tensor) -> Tensor:
        """The copy of one of the user's tensors. Any other tensor is returned as it is."""
        return self.tensors.get(id(tensor), tensor)

    def running(self) -> Any:
        """The tracer, if the code that runs now belongs to the forward that it traces."""
        return self.tracer if self.tracer is not None and not self.tracer.quiet else None


THREAD = _Thread()


def raise_interruption(error: BaseException | None) -> None:
    """Raise a Ctrl-C that foreign code has turned into another error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
