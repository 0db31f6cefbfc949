"""The data flow of a recorded forward: which events made a map, and from which other maps."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from se_inject.graph.recording.history import Event, History, is_container
from se_inject.layers.layout import Layout
from se_inject.sites.collapse import folds

NOTHING: frozenset[int] = frozenset()


class UnitFlow:
    """A history that answers the questions of the rules for units.

    ``start`` is always the first event of the call in question. Maps with lower numbers were given
    to that call, and maps in ``stop`` are treated as given too.
    """

    def __init__(self, history: History, modules: Mapping[str, nn.Module]) -> None:
        self.history = history
        self.events = history.events
        self.calls = history.calls
        self.modules = modules
        self.times = Counter(call.name for call in self.calls)
        self.readers: dict[int, list[int]] = {}
        for number, event in enumerate(self.events):
            for source in set(event.sources):
                self.readers.setdefault(source, []).append(number)

    def back(self, v: int, start: int, stop: Collection[int] = NOTHING) -> set[int]:
        """The events since ``start`` by which the map ``v`` was computed."""
        seen: set[int] = set()
        stack = [v]
        while stack:
            x = stack.pop()
            if x >= start and x not in seen and x not in stop:
                seen.add(x)
                stack += self.events[x].sources
        return seen

    def after(self, v: int, end: int) -> set[int]:
        """The events before ``end`` that use the map ``v``, directly or indirectly."""
        found = {v}
        for x in range(v + 1, end):
            if not found.isdisjoint(self.events[x].sources):
                found.add(x)
        return found - {v}

    def entries(self, v: int, start: int, stop: Collection[int] = NOTHING) -> set[int]:
        """The given maps that ``v`` was computed from."""
        if v < start or v in stop:
            return {v}
        path = self.back(v, start, stop)
        sources = {s for x in path for s in self.events[x].sources}
        return {s for s in sources if s < start or s in stop}

    def dominates(self, a: int, b: int, start: int) -> bool:
        """Whether everything that ``b`` was computed from came through ``a``."""
        return all(x == a for x in self.entries(b, start, {a}))

    def convolutions(self, events: Iterable[int]) -> list[int]:
        return [x for x in events if self.events[x].op.is_convolution]

    def depth(self, v: int, start: int, stop: Collection[int], *, mixing: bool = False) -> int:
        """The most convolutions on a path to ``v``; with ``mixing``, those that mix channels."""
        deepest: dict[int, int] = {}
        for x in sorted(self.back(v, start, stop)):
            op = self.events[x].op
            own = op.is_convolution and not (mixing and op.is_depthwise)
            before = max((deepest.get(s, 0) for s in self.events[x].sources), default=0)
            deepest[x] = own + before
        return deepest.get(v, 0)

    def before_tail(self, v: int, start: int) -> int:
        """The map ``v`` before dropout and scales, which belong after the SE block."""
        while v >= start:
            event = self.events[v]
            if not (event.op.is_dropout or event.op.scales) or len(event.sources) != 1:
                break
            (source,) = event.sources
            if source < start or self.events[source].op.shape != event.op.shape:
                break
            v = source
        return v

    def is_map(self, v: int) -> bool:
        """Whether ``v`` is a feature map with more than one position."""
        layout = layout_of(self.events[v])
        shape = self.events[v].op.shape
        return layout is not None and any(shape[d] > 1 for d in layout.space)

    def is_gated(self, first: int, last: int) -> bool:
        return any(self.events[x].op.gates for x in range(first, last + 1))

    def name(self, call: int) -> str:
        return self.calls[call].name

    def module(self, call: int) -> nn.Module:
        return self.modules[self.name(call)]

    def is_container(self, call: int) -> bool:
        return is_container(self.module(call))

    def is_foldable(self, call: int) -> bool:
        """Whether a module can fold itself into one convolution, as RepVGG's blocks do."""
        kind: Any = type(self.module(call))
        return folds(kind)

    def once(self, call: int) -> bool:
        """Whether the module of a call ran once in the forward."""
        return self.times[self.name(call)] == 1


def layout_of(event: Event) -> Layout | None:
    """The layout of the feature map that an event made, or None if it made none.

    If the channel dim is not known, 4-D and 5-D tensors are taken as channels first.
    """
    ndim = len(event.op.shape)
    dim = event.channel_dim
    if dim is None:
        dim = 1 if ndim >= 4 else 0
    layout = Layout(ndim, dim)
    return layout if layout.is_map else None
