"""A grammar of small residual networks, written as Python source, with the right answer beside.

Each network is source text, as a person would write it: a failure prints a file to run, and goes
into ``test_tricky_blocks.py`` as it is. The answer is built along with the text, from the words of
the rule and not from a graph.
"""

from grammar_kinds import KINDS
from grammar_source import HEADER, Draw, Network, Source, chance
from hypothesis import strategies as st

from se_inject.reasons import Reason

# --- additions that are no residual site ---------------------------------------------------------


def _decoy(draw: Draw, s: Source, v: str, c: int) -> None:
    """An addition on the variable ``v`` of ``c`` channels that no SE block belongs to."""
    kind = draw(st.sampled_from(["bias", "no layer", "fusion", "alpha", "pooled", "tokens"]))
    if kind == "bias":  # a parameter is no map: not even listed
        s.init.append(f"self.bias{len(s.init)} = nn.Parameter(torch.full(({c}, 1, 1), 0.3))")
        s.forward.append(f"{v} = {v} + {s.init[-1].split(' = ')[0]}")
    elif kind == "no layer":
        s.forward.append(f"{v} = {v} + F.relu({v})")
        s.skipped["", Reason.NO_CONVOLUTION] += 1
    elif kind == "fusion":
        a, b = (s.child("mix", f"nn.Conv2d({c}, {c}, 1)") for _ in range(2))
        s.forward.append(f"{v} = {a}({v}) + {b}({v})")
        s.skipped["", Reason.FUSION] += 1
        s.depth += 1
    elif kind == "alpha":
        a = s.child("mix", f"nn.Conv2d({c}, {c}, 1)")
        s.forward.append(f"{v} = torch.add({v}, {a}({v}), alpha=0.5)")
        s.skipped["", Reason.SCALED] += 1
        s.depth += 1
    elif kind == "pooled":
        s.forward.append(f"{v} = {v} + {v}.mean((2, 3), keepdim=True).expand_as({v})")
        s.skipped["", Reason.NO_CONVOLUTION] += 1
    else:
        fc = s.child("fc", f"nn.Linear({c}, {c})")
        s.forward += [
            f"t = {v}.flatten(2).transpose(1, 2)",
            f"t = t + {fc}(t)",
            f"{v} = t.transpose(1, 2).reshape({v}.shape)",
        ]
        s.skipped["", Reason.TOKENS] += 1
        s.depth += 1


# --- the parts of a block ------------------------------------------------------------------------


def _norm(draw: Draw, c: int) -> str | None:
    return draw(st.sampled_from([f"nn.BatchNorm2d({c})", f"nn.GroupNorm(2, {c})", None]))


def _convolutions(draw: Draw, s: Source, c: int, out: int, stride: int) -> None:
    """``h``: 1 to 3 convolutions of ``x``, one by one or as an ``nn.Sequential``."""
    layers: list[str] = []
    count = draw(st.integers(1, 3))
    width = c
    for i in range(count):
        k = draw(st.sampled_from([1, 3]))
        new = out if i == count - 1 else draw(st.sampled_from([c, out]))
        layers.append(f"nn.Conv2d({width}, {new}, {k}, {stride if i == 0 else 1}, {k // 2})")
        width = new
        if norm := _norm(draw, width):
            layers.append(norm)
        if i < count - 1 or chance(draw, 4):
            layers.append(
                draw(st.sampled_from(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()"]))
            )
    s.depth += count
    s.one_spatial = count == 1 and k == 3
    if chance(draw):
        body = s.child("body", f"nn.Sequential({', '.join(layers)})")
        s.forward.append(f"h = {body}(x)")
        return
    source = "x"
    for layer in layers:
        act = {"nn.ReLU()": "F.relu", "nn.GELU()": "F.gelu"}.get(layer)
        s.forward.append(f"h = {act or s.child('layer', layer)}({source})")
        source = "h"


def _gate(draw: Draw, s: Source, c: int) -> None:
    s.gated = True
    if chance(draw):
        s.forward.append(f"h = {s.child('gate', f'Gate({c})')}(h)")
        s.depth += 1  # its convolution is on the longest path
    else:
        fc = s.child("excite", f"nn.Linear({c}, {c})")
        s.forward.append(f"h = h * torch.sigmoid({fc}(h.mean((2, 3))))[:, :, None, None]")


def _tail(draw: Draw, s: Source, c: int) -> None:
    """What may stand between the SE block and the addition."""
    for kind in draw(
        st.lists(st.sampled_from(["path", "drop", "scale", "gamma", "gain"]), max_size=2)
    ):
        if kind == "path":
            s.forward.append(f"h = {s.child('drop_path', 'DropPath(0.3)')}(h)")
        elif kind == "drop":
            s.forward.append("h = F.dropout(h, 0.2, self.training)")
        elif kind == "scale":
            s.forward.append(f"h = {s.child('scale', f'Scale({c})')}(h)")
        elif kind == "gamma":
            s.init.append(f"self.gamma{len(s.init)} = nn.Parameter(torch.full(({c}, 1, 1), 0.7))")
            s.forward.append(f"h = {s.init[-1].split(' = ')[0]} * h")
        else:
            s.forward.append("h = h * 0.25")


def _shortcut(draw: Draw, s: Source, c: int, out: int, stride: int) -> tuple[str, int]:
    """The expression of the shortcut and its convolutions."""
    if c == out and stride == 1 and not chance(draw, 4):
        return draw(st.sampled_from([("x", 0), ("shortcut", 0)]))
    pooled = stride == 2 and chance(draw)
    layer = f"nn.Conv2d({c}, {out}, 1, {1 if pooled else stride})"
    if norm := _norm(draw, out):
        layer = f"nn.Sequential({layer}, {norm})"
    source = "F.avg_pool2d(x, 2)" if pooled else "x"
    return f"{s.child('project', layer)}({source})", 1


# Both operands in both orders; the last three change their first operand in place.
_ADDITIONS = [
    "out = {h} + {s}",
    "out = {s} + {h}",
    "out = torch.add({h}, {s})",
    "out = torch.add({s}, other={h})",
    "out = {h}.add({s})",
    "out = {h}; out += {s}",
    "out = {h}.add_({s})",
    "out = {s}; out += {h}",
]


def _block(draw: Draw, c: int, out: int, stride: int, nesting: int, name: str) -> Source:
    """One residual block."""
    s = Source()
    if chance(draw, 3):
        _decoy(draw, s, "x", c)
    before = s.depth
    s.forward.append("shortcut = x")
    _convolutions(draw, s, c, out, stride)
    if chance(draw, 4):
        _decoy(draw, s, "h", out)
    if nesting and chance(draw, 4):
        inner = _block(draw, out, out, 1, nesting - 1, f"{name}Inner")
        call = s.child("inner", f"{name}Inner()")
        s.forward.append(f"h = {call}(h)")
        s.nest(call.removeprefix("self."), inner)
        s.depth += inner.depth
    if chance(draw, 5):
        _gate(draw, s, out)
    _tail(draw, s, out)
    shortcut, convolutions = _shortcut(draw, s, c, out, stride)
    depth = s.depth - before
    # Else two equal paths are fused, but for a spatial convolution beside a 1x1 projection.
    residual = convolutions < depth or (convolutions == depth == 1 and s.one_spatial)
    verdict = Reason.GATED if s.gated else None
    # A lone 1x1 convolution beside ``second`` may be its projection; its tail decides that.
    clear = depth > 1 or s.one_spatial
    if not convolutions and clear and chance(draw, 5):
        second = s.child("second", f"nn.Conv2d({c}, {out}, 3, padding=1)")
        if chance(draw):
            s.forward.append(f"out = (h + {second}(x)) + {shortcut}")
            # The first sum is fusion, or inner where its second term is a short projection.
            s.skipped["", Reason.INNER if s.depth - before > 1 else Reason.FUSION] += 1
        else:  # a branch of which the identity is a term: an SE block would scale the identity
            s.forward.append(f"out = ({shortcut} + h) + {second}(x)")
            s.skipped["", Reason.FUSION] += 1
            verdict = Reason.FUSION
    else:
        s.forward.append(draw(st.sampled_from(_ADDITIONS)).format(h="h", s=shortcut))
        verdict = verdict if residual else Reason.FUSION
    if verdict is None:
        s.sites["", out] += 1
    else:
        s.skipped["", verdict] += 1
    if chance(draw):
        s.forward.append("out = F.relu(out)")
    if chance(draw, 5):
        _decoy(draw, s, "out", out)
    s.forward.append("return out")
    s.classes.append(s.write(name))
    return s


def _channels_last_block(draw: Draw, c: int, name: str) -> tuple[Source, str]:
    """A ConvNeXt-like block and how it is called: on [N, C, H, W] or on [N, H, W, C] maps."""
    s = Source(depth=3)
    last = chance(draw)
    depthwise = s.child("depthwise", f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})")
    norm = s.child("norm", f"nn.LayerNorm({c})")
    fc1, fc2 = s.child("fc", f"nn.Linear({c}, {2 * c})"), s.child("fc", f"nn.Linear({2 * c}, {c})")
    s.forward.append(f"h = {depthwise}({'x.permute(0, 3, 1, 2)' if last else 'x'})")
    s.forward.append(f"h = {fc2}(F.gelu({fc1}({norm}(h.permute(0, 2, 3, 1)))))")
    if chance(draw):
        s.init.append(f"self.gamma = nn.Parameter(torch.full(({c},), 0.5))")
        s.forward.append("h = h * self.gamma")
    if not last:
        s.forward.append("h = h.permute(0, 3, 1, 2)")
    if chance(draw):
        s.forward.append(f"h = {s.child('drop_path', 'DropPath(0.3)')}(h)")
    s.forward.append(f"return {draw(st.sampled_from(['x + h', 'h + x']))}")
    s.sites["", c] += 1
    s.classes.append(s.write(name))
    if last:
        return s, "y = {call}(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    return s, "y = {call}(y)"


@st.composite
def networks(draw: Draw) -> Network:
    """One to three blocks after a stem, with a skip over all of them, or not."""
    root = Source()
    c = draw(st.sampled_from([4, 6]))
    stem = root.child("stem", f"nn.Conv2d(3, {c}, 3, padding=1)")
    root.forward.append(f"x = {stem}(x)")
    if chance(draw, 4):
        _decoy(draw, root, "x", c)
    first, stride_of_all = c, 1
    root.forward.append("y = x")
    for i in range(draw(st.integers(1, 3))):
        name = f"Block{i}"
        if chance(draw, 3):
            block, how, out = draw(st.sampled_from(KINDS))(draw, c, name)
            stride_of_all *= block.stride
        elif chance(draw, 5):
            out = c
            block, how = _channels_last_block(draw, c, name)
        else:
            out, stride = draw(st.sampled_from([(c, 1), (c, 1), (8, 1), (8, 2)]))
            block, how = _block(draw, c, out, stride, 1, name), "y = {call}(y)"
            stride_of_all *= stride
            if out == c and stride == 1 and chance(draw, 4):
                how += f"\n{how}"  # one block, called twice
        call = root.child("block", f"{name}()")
        root.forward += how.format(call=call).split("\n")
        root.nest(call.removeprefix("self."), block)
        c = out
    if first == c and stride_of_all == 1 and chance(draw, 3):
        root.forward.append(draw(st.sampled_from(["y = x + y", "y = y + x", "y += x"])))
        if root.gated:
            root.skipped["", Reason.GATED] += 1
        else:
            root.sites["", c] += 1
    root.forward.append("return y.mean((2, 3))")
    return Network(
        "\n\n".join([HEADER, *root.classes, root.write("Net")]), root.sites, root.skipped
    )
