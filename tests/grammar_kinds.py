"""More kinds of blocks for the grammar, as they are found in other people's networks.

Each function writes the class of one block and says what a plan must find in it, how the block is
called, and how many channels come out.
"""

from collections.abc import Callable

from grammar_source import Draw, Source, chance
from hypothesis import strategies as st

from se_inject.reasons import Reason

Written = tuple[Source, str, int]
CALL = "y = {call}(y)"


def _body(draw: Draw, s: Source, c: int, out: int, stride: int = 1, source: str = "x") -> None:
    """``h``: two convolutions."""
    a = s.child("a", f"nn.Conv2d({c}, {out}, 3, {stride}, 1)")
    b = s.child("b", f"nn.Sequential(nn.Conv2d({out}, {out}, 3, padding=1), nn.BatchNorm2d({out}))")
    act = draw(st.sampled_from(["F.relu({})", "nn.ReLU()({})", "nn.SiLU(inplace=True)({})"]))
    s.forward.append(f"h = {b}({act.format(f'{a}({source})')})")
    s.depth += 2


def _projection(s: Source, c: int, out: int, source: str = "x") -> str:
    return source if c == out else f"{s.child('skip', f'nn.Conv2d({c}, {out}, 1)')}({source})"


def _added(draw: Draw, h: str, s: str) -> str:
    return draw(st.sampled_from([f"{h} + {s}", f"{s} + {h}", f"torch.add({s}, {h})"]))


def _finish(s: Source, name: str, how: str, out: int) -> Written:
    s.classes.append(s.write(name))
    return s, how, out


def conditioned(draw: Draw, c: int, name: str) -> Written:
    """A second input shifts (and scales) the branch: a time, a style."""
    out = draw(st.sampled_from([c, 8]))
    s = Source(arguments="x, t")
    a = s.child("a", f"nn.Conv2d({c}, {out}, 3, padding=1)")
    b = s.child("b", f"nn.Conv2d({out}, {out}, 3, padding=1)")
    time = f"{s.child('time', f'nn.Linear(4, {out})')}(t)[:, :, None, None]"
    how = draw(st.sampled_from(["{a} + {t}", "{a} * (1 + {t})", "{a} * torch.sigmoid({t})"]))
    s.forward += [
        f"h = {b}(F.silu({how.format(a=f'{a}(x)', t=time)}))",
        f"return {_added(draw, 'h', _projection(s, c, out))}",
    ]
    s.sites["", out] += 1
    given = draw(st.sampled_from(["{call}(y, t)", "{call}(y, t=t)", "{call}(t=t, x=y)"]))
    return _finish(s, name, f"t = y.new_ones(y.size(0), 4)\ny = {given}", out)


ADD = """\
class {name}Add(nn.Module):
    def forward(self, {arguments}):
        return {value}
"""


def added_by_a_child(draw: Draw, c: int, name: str) -> Written:
    """The addition is a module of its own."""
    s = Source()
    _body(draw, s, c, c)
    arguments, value, given = draw(
        st.sampled_from(
            [
                ("a, b", "a + b", "h, x"),
                ("a, b", "torch.add(a, b)", "x, h"),
                ("maps", "maps[0] + maps[1]", "[h, x]"),
                ("*maps", "maps[1] + maps[0]", "h, x"),
                ("a, b=None", "a if b is None else a + b", "h, b=x"),
            ]
        )
    )
    s.classes.append(ADD.format(name=name, arguments=arguments, value=value))
    s.forward.append(f"return F.relu({s.child('add', f'{name}Add()')}({given}))")
    s.sites["", c] += 1
    return _finish(s, name, CALL, c)


def padded_shortcut(draw: Draw, c: int, name: str) -> Written:
    """The shortcut gets its new channels as zeros (option A of the first ResNets)."""
    s = Source()
    out = 2 * c
    _body(draw, s, c, out, 2)
    s.forward.append(draw(st.sampled_from(["i = x[:, :, ::2, ::2]", "i = F.avg_pool2d(x, 2)"])))
    padded = draw(
        st.sampled_from(
            [
                "torch.cat((i, torch.zeros_like(i)), 1)",
                "torch.cat([torch.zeros_like(i), i], dim=1)",
                "torch.cat([i, i.new_zeros(i.shape)], 1)",
                "torch.cat([i, i * 0], 1)",
                f"torch.cat([i, torch.zeros(i.size(0), {c}, *i.shape[2:])], 1)",
                f"torch.cat([i, torch.Tensor(i.size(0), {c}, i.size(2), i.size(3)).zero_()], 1)",
                f"F.pad(i, (0, 0, 0, 0, 0, {c}))",
            ]
        )
    )
    s.forward.append(f"return {_added(draw, 'h', padded)}")
    s.sites["", out] += 1
    s.stride = 2
    return _finish(s, name, CALL, out)


def decoder(draw: Draw, c: int, name: str) -> Written:
    """A map from lower down is enlarged and added to a lateral one: fusion."""
    s = Source()
    down = s.child("down", f"nn.Conv2d({c}, {c}, 3, 2, 1)")
    _body(draw, s, c, c, source="d")
    s.forward.insert(0, f"d = {down}(x)")
    grown = draw(
        st.sampled_from(
            [
                "F.interpolate(h, scale_factor=2)",
                "F.interpolate(h, size=x.shape[-2:], mode='nearest')",
                "{up}(h)",
                "F.pixel_shuffle({shuffle}(h), 2)",
            ]
        )
    )
    if "{up}" in grown:
        grown = grown.format(up=s.child("up", f"nn.ConvTranspose2d({c}, {c}, 2, 2)"))
    if "{shuffle}" in grown:
        grown = grown.format(shuffle=s.child("wide", f"nn.Conv2d({c}, {4 * c}, 1)"))
    lateral = "x" if chance(draw) else f"{s.child('lateral', f'nn.Conv2d({c}, {c}, 1)')}(x)"
    s.forward.append(f"return {_added(draw, grown, lateral)}")
    s.skipped["", Reason.FUSION] += 1
    return _finish(s, name, CALL, c)


BODY = """\
class {name}Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.BatchNorm2d({c}), nn.Conv2d({c}, {out}, 3, padding=1)
        self.b = nn.Conv2d({out}, {out}, 3, padding=1)

    def forward(self, x):
        p = F.relu(self.norm(x))
        h = self.b(F.relu(self.a(p)))
        return {returned}
"""


def branch_and_input(draw: Draw, c: int, name: str) -> Written:
    """A child returns the branch and the activated input that the shortcut is projected from."""
    out = 8 if c != 8 else 4
    returned, taken = draw(
        st.sampled_from(
            [
                ("h, p", "h, p = {body}(x)"),
                ("p, h", "p, h = {body}(x)"),
                ("[h, p]", "maps = {body}(x)\nh, p = maps[0], maps[1]"),
                ("{'h': h, 'p': p}", "maps = {body}(x)\nh, p = maps['h'], maps['p']"),
            ]
        )
    )
    s = Source()
    s.classes.append(BODY.format(name=name, c=c, out=out, returned=returned))
    body = s.child("body", f"{name}Body()")
    s.forward += taken.replace("{body}", body).split("\n")
    s.forward.append(f"return {_added(draw, 'h', _projection(s, c, out, 'p'))}")
    s.sites["", out] += 1
    return _finish(s, name, CALL, out)


GIVEN = """\
class {name}Out(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Conv2d({c}, {c}, 1)

    def forward(self, {arguments}):
        return {value}
"""


def gated_elsewhere(draw: Draw, c: int, name: str) -> Written:
    """The gate is in the parent, the addition in a child; sometimes the gate is an argument."""
    s = Source()
    _body(draw, s, c, c)
    fc = s.child("fc", f"nn.Linear({c}, {c})")
    s.forward.append(f"g = torch.sigmoid({fc}(h.mean((2, 3))))[:, :, None, None]")
    arguments, value, given = draw(
        st.sampled_from(
            [
                ("h, shortcut", "self.out(h) + shortcut", "h * g, x"),
                ("h, shortcut", "shortcut + self.out(h)", "h=h * g, shortcut=x"),
                ("h, shortcut, g", "self.out(h) * g + shortcut", "h, x, g"),
                ("h, shortcut, g", "shortcut + self.out(h * g)", "h, x, g=g"),
                ("maps", "self.out(maps[0] * maps[1]) + maps[2]", "(h, g, x)"),
            ]
        )
    )
    s.classes.append(GIVEN.format(name=name, c=c, arguments=arguments, value=value))
    call = s.child("project", f"{name}Out()")
    s.forward.append(f"return {call}({given})")
    s.skipped[call.removeprefix("self."), Reason.GATED] += 1
    s.gated = True
    return _finish(s, name, CALL, c)


def foldable(draw: Draw, c: int, name: str) -> Written:
    """Parallel linear paths of one input, under a class that folds them into one convolution."""
    s = Source()
    layer = "nn.Sequential(nn.Conv2d({c}, {c}, {k}, padding={k} // 2), nn.BatchNorm2d({c}))"
    spatial = s.child("c3", layer.format(c=c, k=3))
    point = s.child("c1", layer.format(c=c, k=1))
    norm = s.child("norm", f"nn.BatchNorm2d({c})")
    terms = draw(st.permutations([f"{spatial}(x)", f"{point}(x)", f"{norm}(x)"]))
    terms = terms[: draw(st.integers(2, 3))]
    if not any("c3" in term or "c1" in term for term in terms):
        terms.append(f"{spatial}(x)")
    s.forward.append(f"return F.relu({' + '.join(terms)})")
    s.skipped["", Reason.REPARAMETERISABLE] += len(terms) - 1
    method = draw(st.sampled_from(["switch_to_deploy", "merge_kernel", "fuse_reparam", "fold"]))
    s.methods.append(f"def {method}(self):\n    raise NotImplementedError")
    return _finish(s, name, CALL, c)


def asks(draw: Draw, c: int, name: str) -> Written:
    """The forward asks about its sizes, types and arguments."""
    s = Source(arguments="x, rate=0.0")
    _body(draw, s, c, c)
    questions = [
        f"assert x.shape[1] == {c}, 'channels'",
        "if h.shape != x.shape:\n    raise ValueError('shapes')",
        "if not isinstance(h, torch.Tensor) or x.dim() != 4:\n    raise TypeError('kind')",
        "n, _, height, width = x.shape\nh = h.view(n, -1, height, width)",
        "h = h / float(x.shape[1])",
        "h = h / math.sqrt(x.shape[2])",
        "if x.shape[2] % 2 == 0:\n    h = h * 2",
        "if rate:\n    h = F.dropout(h, rate, self.training)",
        "h = torch.as_tensor(h)",
        "_ = x.data, len(x.shape), x.device",
        "h = Variable(h) if x.size(1) < 0 else h",
    ]
    for question in draw(st.lists(st.sampled_from(questions), min_size=1, max_size=3, unique=True)):
        s.forward += question.split("\n")
    s.forward.append(f"return {_added(draw, 'h', 'x')}")
    s.sites["", c] += 1
    return _finish(s, name, draw(st.sampled_from([CALL, "y = {call}(y, rate=0.1)"])), c)


KINDS: list[Callable[[Draw, int, str], Written]] = [
    conditioned,
    added_by_a_child,
    padded_shortcut,
    decoder,
    branch_and_input,
    gated_elsewhere,
    foldable,
    asks,
]
