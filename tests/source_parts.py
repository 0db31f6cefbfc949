"""Pieces of networks as people write them: the header of a file, branches, tails and additions.

An expression between ``«`` and ``»`` is the map that an SE block has to scale. It is written twice:
as it is, and times zero, which is what a shut gate has to leave of the network.
"""

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Class:
    """A class being written. ``init`` follows ``super().__init__()``; ``body`` is of the class."""

    name: str
    base: str = "nn.Module"
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    signature: str = "self, x"
    before: list[str] = field(default_factory=list)  # other classes and functions that it needs
    decorator: str = ""

    def child(self, stem: str, made: str) -> str:
        name = f"self.{stem}{len(self.init)}"
        self.init.append(f"{name} = {made}")
        return name

    def method(self, head: str, lines: list[str]) -> None:
        self.body += [head, *(f"    {line}" for line in lines), ""]

    def text(self) -> str:
        made = "\n".join(
            ["def __init__(self):", *_indented(["super().__init__()", *self.init]), ""]
        )
        forward = [f"def forward({self.signature}):", *_indented(self.forward)]
        if self.decorator:
            forward.insert(0, self.decorator)
        body = "\n".join([made, *self.body, *(forward if self.forward else [])])
        own = f"class {self.name}({self.base}):\n{textwrap.indent(body, '    ')}\n"
        return "\n\n".join([*self.before, own])


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


R = random.Random


# --- layers and branches -------------------------------------------------------------------------


def norm(r: R, c: int) -> str | None:
    return r.choice([f"nn.BatchNorm2d({c})", f"nn.GroupNorm(2, {c})", None])


def act(r: R) -> str:
    return r.choice(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()", "nn.SiLU()"])


def layers(r: R, c: int, out: int, stride: int, least: int = 1) -> list[str]:
    """Layers with ``least`` to three convolutions."""
    made: list[str] = []
    count = r.randint(least, 3)
    width = c
    for i in range(count):
        new = out if i == count - 1 else r.choice([c, out])
        s = stride if i == 0 else 1
        k = r.choice([1, 3])
        groups = width if k == 3 and width == new and r.random() < 0.3 else 1
        made.append(
            r.choice(
                [
                    f"nn.Conv2d({width}, {new}, {k}, {s}, {k // 2}, groups={groups})",
                    f"conv1x1({width}, {new}, stride={s})",
                    f"conv3x3({width}, {new}, {s})",
                    f"ConvNormAct({width}, {new}, {k}, {s}, act={i < count - 1})",
                    f"nn.Conv2d({width}, {new}, 3, stride={s}, padding=2, dilation=2)",
                    f"ConvBNReLU({width}, {new}, {k}, {s})",
                ]
            )
        )
        width = new
        if (n := norm(r, width)) and made[-1].startswith(("nn.", "conv")):
            made.append(n)
        if i < count - 1:
            made.append(act(r))
    return made


def _one_by_one(r: R, k: Class, made: list[str]) -> list[str]:
    return [f"h = {k.child('layer', layer)}(h)" for layer in made]


def _sequential(r: R, k: Class, made: list[str]) -> list[str]:
    if r.random() < 0.5:
        body = k.child("body", f"nn.Sequential({', '.join(made)})")
        return [f"h = {body}(h)"]
    pairs = ", ".join(f"('part{i}', {layer})" for i, layer in enumerate(made))
    body = k.child("body", f"nn.Sequential(OrderedDict([{pairs}]))")
    return [f"h = {body}(h)"]


def _module_list(r: R, k: Class, made: list[str]) -> list[str]:
    name = k.child("layers", f"nn.ModuleList([{', '.join(made)}])")
    return r.choice(
        [
            [f"for layer in {name}:", "    h = layer(h)"],
            [f"for i, layer in enumerate({name}):", "    h = layer(h) if i >= 0 else h"],
            [f"for i in range(len({name})):", f"    h = {name}[i](h)"],
            [f"h = functools.reduce(lambda a, f: f(a), {name}, h)"],
            [f"first, *rest = {name}", "h = first(h)", "for layer in rest:", "    h = layer(h)"],
        ]
    )


def _module_dict(r: R, k: Class, made: list[str]) -> list[str]:
    keys = r.sample(["if", "a", "conv", "0", "class", "norm_1", "B", "x", "pass"], len(made))
    pairs = ", ".join(f"'{key}': {layer}" for key, layer in zip(keys, made, strict=True))
    name = k.child("parts", f"nn.ModuleDict({{{pairs}}})")
    return r.choice(
        [
            [f"h = {name}['{key}'](h)" for key in keys],
            [f"for part in {name}.values():", "    h = part(h)"],
            [f"for name, part in {name}.items():", "    h = part(h)"],
        ]
    )


def _by_name(r: R, k: Class, made: list[str]) -> list[str]:
    stem = f"step{len(k.init)}_"
    k.init += [f"self.add_module('{stem}{i}', {layer})" for i, layer in enumerate(made)]
    return [f"for i in range({len(made)}):", f"    h = getattr(self, f'{stem}{{i}}')(h)"]


def _property(r: R, k: Class, made: list[str]) -> list[str]:
    names = [k.child("layer", layer) for layer in made]
    k.body.append("@property")
    k.method("def parts(self):", [f"return [{', '.join(names)}]"])
    return ["for part in self.parts:", "    h = part(h)"]


def _method(r: R, k: Class, made: list[str]) -> list[str]:
    lines = _one_by_one(r, k, made)
    k.method("def branch(self, h):", [*lines, "return h"])
    return ["h = self.branch(h)"]


def _static(r: R, k: Class, made: list[str]) -> list[str]:
    name = k.child("layers", f"nn.ModuleList([{', '.join(made)}])")
    k.body.append("@staticmethod")
    k.method("def run_all(layers, h):", ["for layer in layers:", "    h = layer(h)", "return h"])
    return [f"h = self.run_all({name}, h)"]


def _keyword_only(r: R, k: Class, made: list[str]) -> list[str]:
    lines = _one_by_one(r, k, made)
    k.method(
        "def run(self, h, *, times=1, **_):",
        ["for _ in range(times):", *_indented(lines), "return h"],
    )
    return ["h = self.run(h, times=1, unused=None)"]


STYLES: list[Callable[[R, Class, list[str]], list[str]]] = [
    _one_by_one,
    _sequential,
    _module_list,
    _module_dict,
    _by_name,
    _property,
    _method,
    _static,
    _keyword_only,
]


def _functional(r: R, k: Class, c: int, out: int, stride: int) -> list[str]:
    """Convolutions and a batch norm whose tensors are the block's own."""
    i = len(k.init)
    k.init += [
        f"self.weight{i} = nn.Parameter(torch.randn({out}, {c}, 3, 3) * 0.1)",
        f"self.bias{i} = nn.Parameter(torch.zeros({out}))",
        f"self.register_buffer('mean{i}', torch.zeros({out}))",
        f"self.register_buffer('var{i}', torch.ones({out}))",
    ]
    lines = [f"h = F.conv2d(h, self.weight{i}, self.bias{i}, stride={stride}, padding=1)"]
    if r.random() < 0.5:
        lines.append(f"h = F.batch_norm(h, self.mean{i}, self.var{i}, training=self.training)")
    return lines


def _shared(r: R, k: Class, c: int, out: int, stride: int) -> list[str]:
    """One convolution twice, or two with one weight."""
    a = k.child("conv", f"nn.Conv2d({c}, {c}, 3, padding=1)")
    if r.random() < 0.5:
        return [f"h = {a}(F.relu({a}(h)))"]
    b = k.child("conv", f"nn.Conv2d({c}, {c}, 3, padding=1)")
    k.init.append(f"{b}.weight = {a}.weight")
    return [f"h = {b}(F.relu({a}(h)))"]


def _split(r: R, k: Class, c: int, out: int, stride: int) -> list[str]:
    """Two halves with layers of their own, joined and shuffled."""
    half = c // 2
    a, b = (k.child("half", f"nn.Conv2d({half}, {half}, {n}, padding={n // 2})") for n in (1, 3))
    last = k.child("fuse", f"nn.Conv2d({c}, {out}, 1, {stride})")
    halves = r.choice(
        [
            "left, right = h.chunk(2, 1)",
            f"left, right = torch.split(h, {half}, dim=1)",
            f"left, right = torch.split(h, [{half}, {half}], 1)",
            "left, right = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]",
            "left, right = torch.tensor_split(h, 2, dim=1)",
        ]
    )
    lines = [halves, f"h = torch.cat([{a}(left), {b}(right)], dim=1)"]
    if r.random() < 0.5:
        lines.append("h = channel_shuffle(h, 2)")
    return [*lines, f"h = {last}(h)"]


def branch(r: R, k: Class, c: int, out: int, stride: int, least: int = 1) -> list[str]:
    """Lines that make ``h`` of ``h``: at least one convolution, in one of many ways."""
    special = r.random()
    if special < 0.1 and least == 1:
        return _functional(r, k, c, out, stride)
    if special < 0.2 and c == out and stride == 1:
        return _shared(r, k, c, out, stride)
    if special < 0.3 and least == 1:
        return _split(r, k, c, out, stride)
    return r.choice(STYLES)(r, k, layers(r, c, out, stride, least))


# --- around the branch ---------------------------------------------------------------------------

PREAMBLES = [
    [
        "n, c, height, width = x.shape",
        "x = x.reshape(n, c, height * width).view(n, c, height, width)",
    ],
    ["if x.dim() != 4:", "    raise ValueError(f'expected [N, C, H, W], got {tuple(x.shape)}')"],
    ["assert x.shape[-1] % 2 == 0 and x.size(-2) % 2 == 0, 'odd size'"],
    ["pad = -x.shape[-1] % 2", "if pad:", "    x = F.pad(x, (0, pad, 0, pad))"],
    ["size = x.shape[2:]", "x = x.view(*x.shape[:2], *size)"],
    ["if not isinstance(x, torch.Tensor):", "    x = torch.cat(x, 1)"],
    ["if not torch.is_tensor(x):", "    raise TypeError(type(x))"],
    ["x = x.contiguous() if len(x.shape) == 4 else x[None]"],
    ["height, width = x.shape[2], x.shape[3]", "x = x[..., :height, :width]"],
    ["x = x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)"],
    ["x = x.float() if not x.is_floating_point() else x"],
    ["area = math.prod(x.shape[-2:])", "x = x.flatten(2).reshape(*x.shape[:2], *x.shape[2:])"],
]


def tail(r: R, k: Class, out: int) -> list[str]:
    """Lines on ``h`` that may stand between the SE block and the addition."""
    lines: list[str] = []
    for kind in r.sample(
        ["module", "text", "gamma", "dropout", "gain", "if"], r.choice([0, 0, 1, 2])
    ):
        if kind == "module":
            lines.append(f"h = {k.child('drop_path', 'DropPath(0.3)')}(h)")
        elif kind == "text":
            k.init.append("self.drop_prob = 0.2")
            lines.append("h = drop_path(h, self.drop_prob, self.training)")
        elif kind == "gamma":
            name = k.child("gamma", f"nn.Parameter(0.5 * torch.ones({out}, 1, 1))")
            lines.append(r.choice([f"h = {name} * h", f"h = h.mul({name})", f"h = h * {name}"]))
        elif kind == "dropout":
            lines.append("h = F.dropout(h, p=0.25, training=self.training)")
        elif kind == "gain":
            k.init.append("self.gain = 0.5")
            lines.append("h = self.gain * h")
        else:
            lines += ["if self.training:", "    h = F.dropout2d(h, 0.2)"]
    return lines


def shortcut(r: R, k: Class, c: int, out: int, stride: int) -> str:
    """An expression of ``x`` for the shortcut."""
    if c == out and stride == 1:
        identity = k.child("skip", "nn.Identity()") if r.random() < 0.2 else ""
        return f"{identity}(x)" if identity else "x"
    project = f"nn.Conv2d({c}, {out}, 1, {stride}, bias=False)"
    how = r.choice(["plain", "norm", "optional"])
    if how == "norm":
        project = f"nn.Sequential({project}, nn.BatchNorm2d({out}))"
    name = k.child("downsample", project)
    return f"({name}(x) if {name} is not None else x)" if how == "optional" else f"{name}(x)"


ADDITIONS = [
    "{s} + {h}",
    "{h} + {s}",
    "torch.add({s}, {h})",
    "torch.add({h}, {s}, alpha=1)",
    "{h}.add({s})",
    "{s}.add({h}, alpha=1)",
    "operator.add({s}, {h})",
    "sum([{h}, {s}])",
    "sum(({s}, {h}))",
    "functools.reduce(operator.add, [{s}, {h}])",
    "torch.stack([{s}, {h}]).sum(0)",
    "torch.sub({s}, {h}, alpha=-1)",
    "{s} - (-{h})",
    "torch.ops.aten.add.Tensor({s}, {h})",
    "{h}.add_({s})",
]
