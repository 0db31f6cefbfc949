"""History -> the block graphs that units end in. Each is traced once, when it is asked for."""

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from se_inject.graph.facts import TracedForward
from se_inject.graph.recording.history import History
from se_inject.graph.same import configuration
from se_inject.graph.trace import TracedBlock
from se_inject.graph.tracing.block import trace_block


class HistoryBlocks:
    """The graphs of the modules of a recorded model."""

    def __init__(
        self, history: History, modules: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        self.history = history
        self.modules = modules
        self.device = device
        self.traced: dict[Hashable, tuple[TracedForward, TracedForward] | str] = {}
        self.blocks: dict[str, TracedBlock | str] = {}

    def of(self, name: str) -> TracedBlock | str:
        """The graphs of one module, or a text that says why there are none."""
        if name not in self.blocks:
            calls = self.history.calls_of(name)
            key = (configuration(self.modules[name]), tuple(call.signature for call in calls))
            if key not in self.traced:
                self.traced[key] = trace_block(name, self.modules[name], calls, self.device)
            result = self.traced[key]
            first = (calls[0].args, calls[0].kwargs)
            self.blocks[name] = (
                result if isinstance(result, str) else TracedBlock(name, *result, first)
            )
        return self.blocks[name]
