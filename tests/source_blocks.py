"""Blocks as people write them, each with what a plan must say of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from source_parts import ADDITIONS, PREAMBLES, Class, R, branch, layers, shortcut, tail

from se_inject.reasons import Reason


@dataclass
class Block:
    """A block of a network, and what a plan must say of it (names relative to the block)."""

    kind: str
    text: str
    make: str  # the expression that builds it
    out: int
    sites: Counter[tuple[str, int]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    call: str = "y = {f}(y)"
    gated: bool = False
    keeps_shape: bool = True


Kind = Callable[[R, str, int, int, int], Block]


# --- residual blocks -----------------------------------------------------------------------------


def _sum_of(r: R, s: str, h: str = "h") -> list[str]:
    """Lines that make ``out``."""
    if r.random() < 0.2:
        return [f"out = {h}", f"out += {s}"]
    return [f"out = {r.choice(ADDITIONS).format(h=h, s=s)}"]


def _end(r: R) -> list[str]:
    return r.choice([["return out"], ["return F.relu(out)"], ["out = F.silu(out)", "return out"]])


def _body(r: R, k: Class, c: int, out: int, stride: int) -> list[str]:
    """Lines from ``x`` to ``out`` with one residual addition."""
    projected = c != out or stride != 1
    lines = r.choice(PREAMBLES) if r.random() < 0.4 else []
    s = shortcut(r, k, c, out, stride)
    start = ["h = x"]
    if s == "x" and r.random() < 0.4:
        start, s = r.choice(
            [(["shortcut, h = x, x"], "shortcut"), (["h = identity = x"], "identity")]
        )
    made = branch(r, k, c, out, stride, least=2 if projected else 1)
    return [*lines, *start, *made, "h = «h»", *tail(r, k, out), *_sum_of(r, s)]


def plain(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name)
    k.forward = [*_body(r, k, c, out, stride), *_end(r)]
    if r.random() < 0.3:
        k.signature = r.choice(["self, x: Tensor", "self, x, /", "self, x, *args, **kwargs"])
    return Block("plain", k.text(), f"{name}()", out, Counter({("", out): 1}))


def _inner(r: R, name: str, c: int) -> Class:
    """A module that computes the branch alone."""
    k = Class(name)
    k.forward = ["h = x", *branch(r, k, c, c, 1), "return h"]
    return k


def wrapper(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = _inner(r, f"{name}Body", c)
    outer = r.choice(["Residual", "SequentialResidual"])
    return Block("wrapper", k.text(), f"{outer}({name}Body())", c, Counter({("", c): 1}))


def decorated(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = _inner(r, name, c)
    k.decorator = "@with_shortcut"
    return Block("decorated", k.text(), f"{name}()", c, Counter({("", c): 1}))


def super_chain(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """A base class that computes the branch, or the sum, and classes on top of it."""
    base = Class(f"{name}Base")
    if r.random() < 0.5:
        base.forward = ["h = x", *branch(r, base, c, c, 1), "return h"]
        top = Class(name, f"{name}Base", forward=["return x + «super().forward(x)»"])
    else:
        base.forward = [*_body(r, base, c, c, 1), "return out"]
        top = Class(
            name,
            f"{name}Base",
            signature="self, x, *args",
            forward=["x = super().forward(x, *args)", "return F.relu(x)"],
        )
    top.before = [base.text()]
    if r.random() < 0.4:
        top.before.append(f"class {name}Mid({name}Base):\n    pass\n")
        top.base = f"{name}Mid"
    return Block("super", top.text(), f"{name}()", c, Counter({("", c): 1}))


def mixin(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name, "AddMixin, nn.Module")
    k.forward = [
        "h = x",
        *branch(r, k, c, c, 1),
        "h = «h»",
        *tail(r, k, c),
        "return self.merge(x, h)",
    ]
    return Block("mixin", k.text(), f"{name}()", c, Counter({("", c): 1}))


def template(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name, "Template")
    lines = ["h = x", *branch(r, k, c, c, 1), "return h"]
    k.method("def residual(self, x):", lines)
    return Block("template", k.text(), f"{name}()", c, Counter({("", c): 1}))


def add_module(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """The sum is a child's, which does nothing else: the site is its caller's."""
    k = Class(name)
    add = k.child("add", r.choice(["Add()", "torch.ao.nn.quantized.FloatFunctional()"]))
    call = f"{add}.add" if "Float" in k.init[0] else add
    k.forward = ["h = x", *branch(r, k, c, c, 1), "h = «h»", f"out = {call}(x, h)", *_end(r)]
    return Block("add module", k.text(), f"{name}()", c, Counter({("", c): 1}))


def optional_argument(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(
        name,
        signature=r.choice(["self, x, skip=None", "self, x, *, skip: Optional[Tensor] = None"]),
    )
    call = r.choice(["y = {f}(y)", "y = {f}(y, skip=None)", "y = {f}(y, skip=y)"])
    asks = r.random() < 0.5
    served = not (asks and "skip=y" in call)  # whether two arguments are one tensor: no graph says
    k.forward = ["if skip is None:", "    skip = x", "h = x", *branch(r, k, c, c, 1)]
    k.forward.append("h = «h»" if served else "h = h")
    k.forward += (
        ["out = skip + h"]
        if not asks
        else ["if skip is x:", "    out = h + skip", "else:", "    out = h"]
    )
    k.forward += _end(r)
    if served:
        return Block("optional", k.text(), f"{name}()", c, Counter({("", c): 1}), call=call)
    skipped = Counter({("", Reason.UNTRACED): 1})
    return Block("optional", k.text(), f"{name}()", c, skipped=skipped, call=call)


def early_return(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """A flag decides whether the branch comes back alone, without any addition."""
    k = Class(name)
    alone = r.random() < 0.4
    k.init.append(f"self.use_shortcut = {not alone}")
    made = branch(r, k, c, c, 1)
    point = "h" if alone else "«h»"
    k.forward = ["h = x", *made, f"h = {point}"]
    k.forward += r.choice(
        [
            ["if not self.use_shortcut:", "    return h", "return x + h"],
            ["if self.use_shortcut:", "    h = h + x", "return h"],
            ["return x + h if self.use_shortcut else h"],
        ]
    )
    sites = Counter({("", c): 1}) if not alone else Counter()
    return Block("early return", k.text(), f"{name}()", c, sites)


def dictionary(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name, signature="self, batch")
    k.forward = ["x = batch['x']", *_body(r, k, c, c, 1)]
    k.forward += r.choice(
        [
            ["return {**batch, 'x': out}"],
            ["return {'x': out, 'scale': batch['scale']}"],
            ["return {'x': out}"],
        ]
    )
    call = r.choice(["y = {f}({'x': y, 'scale': 2.0})['x']", "y = {f}(dict(x=y, scale=1.0))['x']"])
    return Block("dict", k.text(), f"{name}()", c, Counter({("", c): 1}), call=call)


def mutated_dictionary(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """What a block writes into its caller's dict, a graph would lose."""
    k = Class(name, signature="self, batch")
    made = branch(r, k, c, c, 1)
    k.forward = r.choice(
        [
            ["h = batch['x']", *made, "batch['x'] = h + batch['x']", "return batch"],
            ["x = h = batch.pop('x')", *made, "return {**batch, 'x': x + h}"],
        ]
    )
    skipped = Counter({("", Reason.UNTRACED): 1})
    call = "y = {f}({'x': y, 'scale': 2.0})['x']"
    return Block("mutated dict", k.text(), f"{name}()", c, skipped=skipped, call=call)


def data_class(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """Arguments or results in a dataclass or named tuple."""
    k = Class(name)
    how = r.choice(["result", "pair", "unpacked", "named tuple", "argument"])
    sites, skipped = Counter({("", c): 1}), Counter[tuple[str, Reason]]()
    if how == "result":
        k.forward = [*_body(r, k, c, c, 1), "return State(x=out)"]
        call = "y = {f}(y).x"
    elif how == "pair":
        k.forward = [*_body(r, k, c, c, 1), "return Pair(out, x)"]
        call = r.choice(["y, _ = {f}(y)", "y = {f}(y).x", "y = {f}(y)[0]"])
    elif how == "unpacked":
        k.signature = "self, pair"
        k.forward = ["x, aux = pair", *_body(r, k, c, c, 1), "return out, aux"]
        call = r.choice(
            ["y, _ = {f}((y, y.mean()))", "y, _ = {f}(Pair(y, y))", "y = {f}([y, y])[0]"]
        )
    elif how == "named tuple":
        k.signature = "self, pair"
        k.forward = ["x = pair.x", *_body(r, k, c, c, 1), "return pair._replace(x=out)"]
        call = "y = {f}(Pair(y, y)).x"
    else:  # whose other fields may decide the way
        k.signature = r.choice(["self, state", "self, state: State"])
        made = branch(r, k, c, c, 1)
        k.forward = ["h = x = state.x", *made, "return replace(state, x=x + h)"]
        call = r.choice(["y = {f}(State(y)).x", "y = {f}(State(y, scale=2.0)).x"])
        sites, skipped = Counter(), Counter({("", Reason.UNTRACED): 1})
    return Block("dataclass", k.text(), f"{name}()", c, sites, skipped, call=call)


def star_arguments(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name, signature="self, *args, **kwargs")
    k.forward = [
        r.choice(["x = args[0]", "x, *rest = args", "(x,) = args"]),
        *_body(r, k, c, c, 1),
        *_end(r),
    ]
    return Block("star", k.text(), f"{name}()", c, Counter({("", c): 1}))


def half_of_the_channels(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name)
    half = c // 2
    made = branch(r, k, half, half, 1)
    split = r.choice(
        [
            f"a, b = x.split({half}, dim=1)",
            "a, b = x.chunk(2, dim=1)",
            f"a, b = x[:, :{half}], x[:, {half}:]",
        ]
    )
    joined = r.choice(
        ["torch.cat([a, b], 1)", "torch.cat((a, b), dim=1)", "torch.concat([b, a], 1)"]
    )
    k.forward = [split, "h = b", *made, "h = «h»", "b = b + h", f"return {joined}"]
    return Block("half", k.text(), f"{name}()", c, Counter({("", half): 1}))


def hooked(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """Hooks that a block gives itself, or its children."""
    k = Class(name)
    lines = _body(r, k, c, c, 1)
    k.forward = [*lines, *_end(r)]
    k.init += ["self.ran = [0]", "self.register_forward_hook(self._count)"]
    k.method("def _count(self, module, args, output):", ["self.ran[0] += 1"])
    if r.random() < 0.5:
        k.init.append("self.register_forward_pre_hook(self._count_before)")
        k.method("def _count_before(self, module, args):", ["self.ran[0] += 1"])
    return Block("hooks", k.text(), f"{name}()", c, Counter({("", c): 1}))


def several(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """Several residual additions in one forward."""
    k = Class(name)
    count = r.randint(2, 3)
    if r.random() < 0.5:
        convs = k.child("convs", f"nn.ModuleList([conv3x3({c}, {c}) for _ in range({count})])")
        k.forward = [
            f"for conv in {convs}:",
            "    h = «conv(F.relu(x))»",
            "    x = x + h",
            "return x",
        ]
    else:
        for _ in range(count):
            made = branch(r, k, c, c, 1)
            k.forward += ["h = x", *made, "h = «h»", *_sum_of(r, "x"), "x = out"]
        k.forward.append("return x")
    return Block("several", k.text(), f"{name}()", c, Counter({("", c): count}))


def nested(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """A residual block whose branch has a residual block among its children."""
    inner = plain(r, f"{name}Inner", c, c, 1)
    k = Class(name, before=[inner.text])
    first, last = k.child("first", f"conv3x3({c}, {c})"), k.child("last", f"conv1x1({c}, {c})")
    part = k.child("inner", inner.make)
    k.forward = ["h = x", f"h = «{last}({part}({first}(h)))»", "return h + x"]
    sites = Counter({("", c): 1, (part.removeprefix("self."), c): 1})
    return Block("nested", k.text(), f"{name}()", c, sites)


def _site(kind: str, lines: Callable[[R, Class, int], list[str]], n: int = 1) -> Kind:
    """A block of the same channels whose forward is these lines, with ``n`` sites."""

    def write(r: R, name: str, c: int, out: int, stride: int) -> Block:
        k = Class(name)
        k.forward = lines(r, k, c)
        return Block(kind, k.text(), f"{name}()", c, Counter({("", c): n}))

    return write


def _list_of_maps(r: R, k: Class, c: int) -> list[str]:
    convs = k.child("convs", f"nn.ModuleList([conv3x3({c}, {c}), conv1x1({c}, {c})])")
    add = r.choice(["outs[-1] + «conv(outs[-1])»", "«conv(outs[-1])» + outs[-1]"])
    return ["outs = [x]", f"for conv in {convs}:", f"    outs.append({add})", "return outs[-1]"]


def _sliced(r: R, k: Class, c: int) -> list[str]:
    """Slices of containers, and containers made in the forward."""
    made = layers(r, c, c, 1, least=2)
    body = k.child("body", f"nn.Sequential({', '.join(made)})")
    how = r.choice(
        [
            [f"h = {body}[1:]({body}[:1](x))"],
            [f"h = {body}[-1]({body}[:-1](x))"],
            ["h = x", f"for layer in reversed(list({body})[::-1]):", "    h = layer(h)"],
            [f"h = nn.Sequential(*{body}.children())(x)"],
            [f"h = nn.Sequential(*[m for m in {body}])(x)"],
        ]
    )
    return [*how, "h = «h»", *tail(r, k, c), "return x + h"]


def _forward_of_a_child(r: R, k: Class, c: int) -> list[str]:
    conv, last = k.child("conv", f"conv3x3({c}, {c})"), k.child("bn", f"nn.BatchNorm2d({c})")
    return [f"h = {last}({conv}.forward(x))", "h = «h»", "return h + x"]


def _by_table(r: R, k: Class, c: int) -> list[str]:
    """Functions looked up by name, and other ways to say what runs next."""
    a, b = k.child("a", f"conv3x3({c}, {c})"), k.child("b", f"conv1x1({c}, {c})")
    k.init.append("self.kind = 'relu'")
    lines = r.choice(
        [
            [f"h = {b}(getattr(F, self.kind)({a}(x)))"],
            ["table = {'relu': F.relu, 'gelu': F.gelu}", f"h = {b}(table[self.kind]({a}(x)))"],
            [
                "match self.kind:",
                "    case 'relu':",
                f"        h = {b}(F.relu({a}(x)))",
                "    case _:",
                "        h = x",
            ],
            [f"if (h := {a}(x)) is not None:", f"    h = {b}(F.relu(h))"],
            ["def inner(t):", f"    return {b}(F.relu(t))", "", f"h = inner({a}(x))"],
            [f"*_, h = [f(x) for f in (lambda t: {b}(F.relu({a}(t))),)]"],
            ["try:", f"    h = {b}({a}(x).relu())", "except ValueError:", "    h = None"],
            ["i, h = 0, x", "while i < 2:", f"    h = ({a}, {b})[i](h)", "    i += 1"],
            [f"run = functools.partial({b}.__call__)", f"h = run(F.relu({a}(x)))"],
            [f"h = functools.reduce(lambda t, f: f(t), [{a}, F.relu, {b}], x)"],
            [f"h = {b}(torch.relu_({a}(x)))"],
            [f"h = {b}(F.relu({a}(x), inplace=True))"],
            [f"h, i = {a}(x), 3", f"h = {b}(h.clamp_(min=0, max=i))"],
        ]
    )
    return [*lines, "h = «h»", *tail(r, k, c), *_sum_of(r, "x"), *_end(r)]


def _by_mode(r: R, k: Class, c: int) -> list[str]:
    """An addition for each mode, which are one site."""
    made = branch(r, k, c, c, 1)
    return [
        "h = x",
        *made,
        "h = «h»",
        *r.choice(
            [
                ["if self.training:", "    return x + F.dropout(h, 0.3, True)", "return x + h"],
                ["out = x + h if not self.training else torch.add(F.dropout(h), x)", "return out"],
            ]
        ),
    ]


def _counting_buffer(r: R, k: Class, c: int) -> list[str]:
    k.init.append("self.register_buffer('calls', torch.zeros(()))")
    return ["self.calls.add_(1)", "h = x", *branch(r, k, c, c, 1), "h = «h»", "return x + h"]


def maps_in_a_list(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """One branch for each map of a list: an addition each."""
    k = Class(name, signature="self, maps")
    conv = k.child("conv", f"conv3x3({c}, {c})")
    k.forward = r.choice(
        [
            [f"return [x + «{conv}(x)» for x in maps]"],
            [
                "outs = []",
                "for x in maps:",
                f"    outs.append(x + «{conv}(x)»)",
                "return tuple(outs)",
            ],
            [f"return list(map(lambda x: x + «{conv}(x)», maps))"],
        ]
    )
    call = r.choice(["y, _ = {f}([y, F.relu(y)])", "y = {f}((y, -y))[0]"])
    return Block("maps", k.text(), f"{name}()", c, Counter({("", c): 2}), call=call)


def two_branches(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """The sum of two branches is a part of the branch that the shortcut is added to."""
    k = Class(name)
    a = k.child("a", f"nn.Sequential(conv3x3({c}, {c}), nn.ReLU(), conv3x3({c}, {c}))")
    b = k.child("b", f"conv3x3({c}, {c})")
    k.forward = [f"h = «{a}(x) + {b}(x)»", "return h + x"]
    skipped = Counter({("", Reason.INNER): 1})
    return Block("two branches", k.text(), f"{name}()", c, Counter({("", c): 1}), skipped)


def delegate(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """A wrapper that looks like what it wraps."""
    inner = plain(r, f"{name}Inner", c, c, 1)
    k = Class(name, before=[inner.text], init=[f"self.module = {inner.make}"])
    k.method(
        "def __getattr__(self, name):",
        [
            "try:",
            "    return super().__getattr__(name)",
            "except AttributeError:",
            "    return getattr(super().__getattr__('module'), name)",
        ],
    )
    k.signature, k.forward = "self, *args", ["return self.module(*args)"]
    return Block("delegate", k.text(), f"{name}()", c, Counter({("module", c): 1}))


def normalised_weights(r: R, name: str, c: int, out: int, stride: int) -> Block:
    """Convolutions whose weights are computed: by themselves, or by torch's parametrisations."""
    k = Class(name)
    if r.random() < 0.5:
        conv = Class(f"{name}Conv", "nn.Conv2d", init=[])
        text = (
            f"class {name}Conv(nn.Conv2d):\n    def forward(self, x):\n        w = self.weight\n"
            "        w = w - w.mean((1, 2, 3), keepdim=True)\n"
            "        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)\n"
            "        return F.conv2d(x, w, self.bias, self.stride, self.padding)\n"
        )
        k.before, conv_made = [text], f"{conv.name}({c}, {c}, 3, padding=1)"
    else:
        how = r.choice(["weight_norm", "spectral_norm"])
        conv_made = f"torch.nn.utils.parametrizations.{how}(conv3x3({c}, {c}))"
    made = k.child("conv", conv_made)
    k.forward = [f"h = «{made}(F.relu(x))»", "return x + h"]
    return Block("weights", k.text(), f"{name}()", c, Counter({("", c): 1}))


RESIDUAL: list[Kind] = [
    plain,
    plain,
    plain,
    wrapper,
    decorated,
    super_chain,
    mixin,
    template,
    add_module,
]
RESIDUAL += [optional_argument, early_return, dictionary, data_class, star_arguments]
RESIDUAL += [half_of_the_channels, hooked, several, nested, maps_in_a_list, two_branches]
RESIDUAL += [delegate, normalised_weights, mutated_dictionary]
RESIDUAL += [
    _site("list", _list_of_maps, 2),
    _site("sliced", _sliced),
    _site("forward of a child", _forward_of_a_child),
    _site("table", _by_table),
    _site("table", _by_table),
    _site("mode", _by_mode),
    _site("buffer", _counting_buffer),
]
