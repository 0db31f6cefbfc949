"""History -> the block graphs that units end in, each traced once and when it is asked for."""

import contextlib
from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import nn

from se_inject.graph.facts import TracedForward
from se_inject.graph.history import History
from se_inject.graph.meta import LOCK
from se_inject.graph.same import configuration
from se_inject.graph.trace import TracedBlock, _foreign_random_numbers, _trace_block


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Record and trace without a trace: one thread at a time, and no random number is drawn."""
    # Tensors of inference mode do not say when they are changed in place.
    with LOCK, _foreign_random_numbers(), torch.inference_mode(False):
        yield


class HistoryBlocks:
    """The graphs of the modules of a recorded model."""

    def __init__(self, history: History, modules: Mapping[str, nn.Module]) -> None:
        self.history = history
        self.modules = modules
        self.traced: dict[Hashable, tuple[TracedForward, TracedForward] | str] = {}
        self.blocks: dict[str, TracedBlock | str] = {}

    def of(self, name: str) -> TracedBlock | str:
        """The graphs of one module, or in words why there are none."""
        if name not in self.blocks:
            calls = self.history.calls_of(name)
            key = (configuration(self.modules[name]), tuple(call.signature for call in calls))
            if key not in self.traced:
                self.traced[key] = _trace_block(name, self.modules[name], calls)
            result = self.traced[key]
            self.blocks[name] = result if isinstance(result, str) else TracedBlock(name, *result)
        return self.blocks[name]
