"""A generator of networks as source code in people's idioms, each with the right answer beside.

``grammar.py`` varies what is added to what; this one varies how people write it: wrappers,
decorators, mixins, ``super()`` chains, containers, dicts and dataclasses as arguments, early
returns, arithmetic with shapes, hooks, shared weights. The answer is built along with the text,
from the words of the rule.
"""

import importlib.util
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from source_blocks import RESIDUAL, Block, plain
from source_header import HEADER
from source_others import OTHERS
from source_parts import Class, R
from torch import nn

from se_inject.reasons import Reason


@dataclass(frozen=True)
class Network:
    """A whole network as text, and the right answer."""

    seed: int
    kinds: tuple[str, ...]
    marked: str
    sites: Counter[tuple[str, int]]
    skipped: Counter[tuple[str, Reason]]

    @property
    def text(self) -> str:
        lines = self.marked.replace("«", "").replace("»", "").split("\n")
        return "\n".join(line for line in lines if line.strip() not in ("h = h", "y = y"))

    @property
    def shut(self) -> str:
        """The text of the network that shut gates have to leave."""
        return self.marked.replace("«", "(").replace("»", ") * 0.0")


def build(text: str, folder: Path, name: str) -> nn.Module:
    """Write the text into a module file and import it, so that pickle finds its classes."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    network: nn.Module = module.Net()
    return network


# --- the network ---------------------------------------------------------------------------------


def _held(r: R, net: Class, blocks: list[Block]) -> tuple[list[str], list[str]]:
    """The names of the blocks in the network, and the lines of its forward that call them."""
    made = [block.make for block in blocks]
    lines: list[str] = []
    is_plain = all(block.call == "y = {f}(y)" for block in blocks)
    how = r.choice(
        ["attributes", "list", "dict", "names", "sequential", "loop", "stages", "generator"]
    )
    if how == "attributes" or (
        not is_plain and how in ("sequential", "loop", "stages", "generator")
    ):
        calls = [net.child("block", one) for one in made]
        names = [call.removeprefix("self.") for call in calls]
    elif how == "list":
        name = net.child("blocks", f"nn.ModuleList([{', '.join(made)}])")
        calls = [f"{name}[{i}]" for i in range(len(made))]
        names = [f"{name.removeprefix('self.')}.{i}" for i in range(len(made))]
    elif how == "dict":
        keys = r.sample(["a", "if", "stage_1", "0", "Z"], len(made))
        pairs = ", ".join(f"'{k}': {one}" for k, one in zip(keys, made, strict=True))
        name = net.child("stages", f"nn.ModuleDict({{{pairs}}})")
        calls = [f"{name}['{k}']" for k in keys]
        names = [f"{name.removeprefix('self.')}.{k}" for k in keys]
    elif how == "names":
        net.init += [f"self.add_module('layer{i}', {one})" for i, one in enumerate(made)]
        calls = [f"getattr(self, 'layer{i}')" for i in range(len(made))]
        names = [f"layer{i}" for i in range(len(made))]
    else:
        inner = f"nn.Sequential({', '.join(made)})"
        name = net.child("blocks", f"nn.ModuleList([{inner}])" if how == "stages" else inner)
        names = [f"{name.removeprefix('self.')}.{i}" for i in range(len(made))]
        if how == "sequential":
            return names, [f"y = {name}(y)"]
        if how == "loop":
            return names, [f"for block in {name}:", "    y = block(y)"]
        if how == "generator":
            run = f"for block in (b for _, b in {name}.named_children()):"
            return names, [run, "    y = block(y)"]
        names = [f"{name.removeprefix('self.')}.0.{i}" for i in range(len(made))]
        return names, [f"for stage in {name}:", "    y = stage(y)"]
    for call, block in zip(calls, blocks, strict=True):
        lines += [block.call.replace("{f}", call)] * (
            2 if block.keeps_shape and r.random() < 0.15 else 1
        )
    return names, lines


def write_network(seed: int) -> Network:
    """A stem, one to three blocks in one of the ways that people hold blocks, and a head."""
    r = random.Random(seed)
    c = width = r.choice([4, 8])
    blocks: list[Block] = []
    for i in range(r.randint(1, 3)):
        kind = r.choice(RESIDUAL if i == 0 or r.random() < 0.7 else OTHERS)
        out, stride = r.choice([(c, 1), (c, 1), (8, 1), (8, 2)]) if kind is plain else (c, 1)
        blocks.append(kind(r, f"Block{i}", c, out, stride))
        blocks[-1].keeps_shape = out == c and stride == 1
        c = out
    net = Class("Net")
    stem = net.child("stem", f"nn.Sequential(conv3x3(3, {width}), nn.BatchNorm2d({width}))")
    names, lines = _held(r, net, blocks)
    sites: Counter[tuple[str, int]] = Counter()
    skipped: Counter[tuple[str, Reason]] = Counter()
    for name, block in zip(names, blocks, strict=True):
        for (inner, channels), n in block.sites.items():
            sites[f"{name}.{inner}".rstrip("."), channels] += n
        for (inner, reason), n in block.skipped.items():
            skipped[f"{name}.{inner}".rstrip("."), reason] += n
    lines.insert(0, f"y = {stem}(x)")
    if all(block.keeps_shape for block in blocks) and r.random() < 0.25:
        lines.insert(1, "start = y")
        if any(block.gated for block in blocks):
            skipped["", Reason.GATED] += 1
        elif any(block.sites or block.kind == "no addition" for block in blocks):
            lines.append("y = «y»")
            sites["", c] += 1
        else:
            lines.remove("start = y")
        if "start = y" in lines:
            lines.append(r.choice(["y = y + start", "y = torch.add(start, y)"]))
    head = net.child("head", f"nn.Linear({c}, 3)")
    pooled = r.choice(["y.mean((2, 3))", "F.adaptive_avg_pool2d(y, 1).flatten(1)"])
    net.forward = [*lines, f"return {head}({pooled})"]
    future = "from __future__ import annotations\n" if r.random() < 0.3 else ""
    text = "\n\n".join([future + HEADER, *(block.text for block in blocks), net.text()])
    return Network(seed, tuple(block.kind for block in blocks), text, sites, skipped)
