"""A grammar of small networks without residual additions, with the right answer beside.

As in :mod:`grammar`, each network is source text, and its answer is built along with the text.
"""

from collections import Counter

from grammar import _norm
from grammar_source import HEADER, Draw, Network, Source, chance
from hypothesis import strategies as st


def _transform(draw: Draw, s: Source, c: int, out: int) -> str:
    """An expression of ``x``: one or two convolutions, the last with ``out`` channels."""
    layers: list[str] = []
    width = c
    for _ in range(draw(st.integers(1, 2))):
        k = draw(st.sampled_from([1, 3]))
        layers.append(f"nn.Conv2d({width}, {out}, {k}, padding={k // 2})")
        width = out
        if norm := _norm(draw, out):
            layers.append(norm)
        if chance(draw):
            layers.append(draw(st.sampled_from(["nn.ReLU()", "nn.ReLU(inplace=True)"])))
    body = s.child("body", f"nn.Sequential({', '.join(layers)})")
    return f"{body}(x)"


def _inception(draw: Draw, c: int) -> tuple[Source, int]:
    """Three branches, or two and the pooled input: the SE block goes on the concatenation."""
    s = Source()
    terms = [_transform(draw, s, c, 4) for _ in range(2)]
    if chance(draw):
        terms.append("F.max_pool2d(x, 3, 1, 1)")
        out = 8 + c
    else:
        terms.append(_transform(draw, s, c, 2))
        out = 10
    s.forward.append(f"out = torch.cat([{', '.join(draw(st.permutations(terms)))}], 1)")
    s.sites["", out] += 1
    return s, out


def _dense(draw: Draw, c: int) -> tuple[Source, int]:
    """One or two new maps beside the input: an SE block for each new one."""
    s = Source()
    count = draw(st.integers(1, 2))
    terms = [_transform(draw, s, c, 4) for _ in range(count)]
    s.forward.append(f"out = torch.cat([{', '.join(draw(st.permutations(['x', *terms])))}], 1)")
    s.sites["", 4] += count
    return s, c + 4 * count


def _aggregation(draw: Draw, c: int) -> tuple[Source, int]:
    """A convolution after the concatenation, as in VoVNet: the SE block goes on its output."""
    s = Source()
    terms = ["x", _transform(draw, s, c, 4), _transform(draw, s, c, 4)]
    s.forward.append(f"out = torch.cat([{', '.join(terms)}], 1)")
    s.forward.append(f"out = {s.child('last', f'nn.Conv2d({c + 8}, 6, 1)')}(out)")
    if chance(draw):
        s.forward.append("out = F.dropout(out, 0.2, self.training)")
    s.sites["", 6] += 1
    return s, 6


def _decoy(draw: Draw, c: int) -> tuple[Source, int]:
    """A concatenation of what was given, or along the height: no join."""
    s = Source()
    if chance(draw):
        s.forward.append("out = torch.cat([x, F.relu(x)], 1)")
        return s, 2 * c
    s.forward.append(f"out = torch.cat([{_transform(draw, s, c, c)}, x], 2)")
    return s, c


@st.composite
def joined_networks(draw: Draw) -> Network:
    """One to three blocks that join maps, and perhaps a decoy between them."""
    root = Source()
    c = 4
    root.forward.append(f"x = {root.child('stem', f'nn.Conv2d(3, {c}, 3, padding=1)')}(x)")
    kinds = draw(
        st.lists(st.sampled_from([_inception, _dense, _aggregation]), min_size=1, max_size=3)
    )
    if chance(draw, 3):
        kinds.insert(draw(st.integers(0, len(kinds))), _decoy)
    for i, kind in enumerate(kinds):
        block, c = kind(draw, c)
        block.forward.append("return out")
        block.classes.append(block.write(f"Block{i}"))
        call = root.child("block", f"Block{i}()")
        root.forward.append(f"x = {call}(x)")
        root.nest(call.removeprefix("self."), block)
    root.forward.append(f"return {root.child('head', f'nn.Linear({c}, 3)')}(x.mean((2, 3)))")
    return Network(
        "\n\n".join([HEADER, *root.classes, root.write("Net")]), root.sites, root.skipped
    )


@st.composite
def chains(draw: Draw) -> Network:
    """Convolutions with norms and activations, in an ``nn.Sequential`` and its answer by index."""
    root = Source()
    layers: list[str] = []
    sites: Counter[tuple[str, int]] = Counter()
    c = 3
    for _ in range(draw(st.integers(1, 4))):
        out = draw(st.sampled_from([4, 6]))
        layers.append(f"nn.Conv2d({c}, {out}, 3, padding=1)")
        c = out
        if norm := _norm(draw, c):
            layers.append(norm)
        if chance(draw, 4):
            continue  # no activation, no unit
        layers.append(draw(st.sampled_from(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()"])))
        sites[f"features0.{len(layers) - 1}", c] += 1
        if chance(draw, 4):
            layers.append("nn.MaxPool2d(3, 1, 1)")
    features = root.child("features", f"nn.Sequential({', '.join(layers)})")
    root.forward.append(f"x = {features}(x)")
    root.forward.append(f"return {root.child('head', f'nn.Linear({c}, 3)')}(x.mean((2, 3)))")
    return Network("\n\n".join([HEADER, root.write("Net")]), sites, root.skipped)
