"""Block graph with sites -> edited block graph. This is the only file that changes a graph.

A block whose forward ends in ``x = self.bn2(x); x += shortcut`` changes as follows.

Before::

    bn2 = self.bn2(conv2)
    bn2 += shortcut;  iadd = bn2

After::

    bn2 = self.bn2(conv2)
    se = self.se(bn2, shortcut, in_place = True)

If stochastic depth or a layer scale is in between, ``drop_path = self.drop_path(bn2)`` becomes
``se = self.se(bn2); drop_path = self.drop_path(se)``. The other placements work in the same way:
the nodes that read a map now read ``self.se`` of that map.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from se_inject.sites.scaled import ResidualSite, ScaledMap


def edit_graph(
    graph: fx.Graph, sites: Sequence[ScaledMap], children: tuple[str, ...], fuse: bool = True
) -> fx.Graph:
    """A copy of a block graph with one ``call_module`` node for each SE block.

    The other nodes stay in their order. Even unused nodes stay, because a node that nobody reads
    may change a map in place.
    """
    edited = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    edited.output(edited.graph_copy(graph, copies))
    output = next(n for n in graph.nodes if n.op == "output")
    copies[output] = next(n for n in edited.nodes if n.op == "output")
    # If two sites share an edge, the second SE block reads the first one. The key of an entry is a
    # map and its reader; the value is the SE block that now stands between the two.
    stand_ins: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for site, child in zip(sites, children, strict=True):
        source = copies[site.source]
        if isinstance(site, ResidualSite) and site.fused and fuse:
            addition = copies[site.addition]
            kind = {"residual_first": site.shortcut_first, "in_place": site.in_place}
            flags: dict[str, Any] = {name: True for name, value in kind.items() if value}
            with edited.inserting_after(addition):
                se = edited.call_module(child, (source, copies[site.shortcut]), flags)
            addition.replace_all_uses_with(se)
            edited.erase_node(addition)
            copies[site.addition] = se
            continue
        edges = [(site.source, reader) for reader in site.readers]
        readers = [stand_ins.get(edge) or copies[edge[1]] for edge in edges]
        first = next(node for node in edited.nodes if node in readers)
        with edited.inserting_before(first):
            se = edited.call_module(child, (source,))
        for reader in readers:
            reader.replace_input_with(source, se)
        stand_ins |= dict.fromkeys(edges, se)
    edited.lint()
    return edited
