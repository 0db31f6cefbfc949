"""Blocks that get no SE block, as people write them, each with the reason that a plan must give."""

from collections import Counter
from collections.abc import Callable

from source_blocks import Block, Kind
from source_parts import Class, R, branch

from se_inject.reasons import Reason


def gated(r: R, name: str, c: int, out: int, stride: int) -> Block:
    k = Class(name)
    made = branch(r, k, c, c, 1)
    if r.random() < 0.5:
        fc = k.child("fc", f"nn.Linear({c}, {c})")
        lines = [f"g = torch.sigmoid({fc}(h.mean((2, 3))))", "h = h * g[:, :, None, None]"]
    else:
        body = f"nn.AdaptiveAvgPool2d(1), conv1x1({c}, 2), nn.ReLU(), conv1x1(2, {c}), nn.Sigmoid()"
        gate = k.child("attention", f"nn.Sequential({body})")
        lines = [
            r.choice(
                [
                    f"h = h * {gate}(h)",
                    f"h = torch.mul(h, {gate}(h))",
                    f"h = {gate}(h).expand_as(h) * h",
                ]
            )
        ]
    k.forward = ["h = x", *made, *lines, "return x + h"]
    return Block(
        "gated", k.text(), f"{name}()", c, skipped=Counter({("", Reason.GATED): 1}), gated=True
    )


def _none(kind: str, reason: Reason | None, lines: Callable[[R, Class, int], list[str]]) -> Kind:
    def write(r: R, name: str, c: int, out: int, stride: int) -> Block:
        k = Class(name)
        k.forward = lines(r, k, c)
        skipped = Counter({("", reason): 1}) if reason else Counter()
        return Block(kind, k.text(), f"{name}()", c, skipped=skipped)

    return write


def _fusion(r: R, k: Class, c: int) -> list[str]:
    a, b = (k.child("mix", f"conv1x1({c}, {c})") for _ in range(2))
    return [f"return {a}(x) + {b}(x)"]


def _scaled(r: R, k: Class, c: int) -> list[str]:
    conv = k.child("conv", f"conv3x3({c}, {c})")
    return [f"return torch.add(x, {conv}(x), alpha=0.5)"]


def _blended(r: R, k: Class, c: int) -> list[str]:
    conv = k.child("conv", f"conv3x3({c}, {c})")
    return [
        r.choice(
            [f"return torch.lerp(x, {conv}(x), 0.5)", f"return torch.stack([x, {conv}(x)]).mean(0)"]
        )
    ]


def _no_layer(r: R, k: Class, c: int) -> list[str]:
    return [
        r.choice(
            ["return x + F.relu(x)", "return x + F.avg_pool2d(x, 3, 1, 1)", "return F.gelu(x) + x"]
        )
    ]


def _tokens(r: R, k: Class, c: int) -> list[str]:
    fc = k.child("fc", f"nn.Linear({c}, {c})")
    return [
        "t = x.flatten(2).transpose(1, 2)",
        f"t = t + {fc}(t)",
        "return t.transpose(1, 2).reshape(x.shape)",
    ]


def _position(r: R, k: Class, c: int) -> list[str]:
    where = k.child("position", f"nn.Parameter(torch.zeros(1, {c}, 8, 8))")
    return [f"return x + {where}[..., : x.shape[2], : x.shape[3]]"]


def _concatenation(r: R, k: Class, c: int) -> list[str]:
    conv, fuse = k.child("conv", f"conv3x3({c}, {c})"), k.child("fuse", f"conv1x1({2 * c}, {c})")
    return [f"return {fuse}(torch.cat([x, {conv}(x)], 1))"]


def _no_addition(r: R, k: Class, c: int) -> list[str]:
    return ["h = x", *branch(r, k, c, c, 1), "return h"]


def _no_graph(r: R, k: Class, c: int) -> list[str]:
    """What a graph cannot do."""
    conv = k.child("conv", f"conv3x3({c}, {c})")
    k.init += ["self.maps = {}", "self.shapes = []"]
    return r.choice(
        [
            ["self.size = tuple(x.shape[-2:])", f"return x + {conv}(x)"],
            [f"self.maps['h'] = {conv}(x)", "return x + self.maps['h']"],
            ["self.shapes.append(tuple(x.shape))", f"return x + {conv}(x)"],
            ["with torch.no_grad():", f"    h = {conv}(x)", "return x + h"],
            ["with torch.autocast('cpu', enabled=False):", f"    return x + {conv}(x)"],
            [f"return x + torch.utils.checkpoint.checkpoint({conv}, x, use_reentrant=False)"],
            ["if self.training and torch.rand(1) < 0.5:", "    return x", f"return x + {conv}(x)"],
            [f"h = {conv}(x)", "return x + h if torch.is_grad_enabled() else h + x"],
        ]
    )


OTHERS: list[Kind] = [
    gated,
    _none("fusion", Reason.FUSION, _fusion),
    _none("scaled", Reason.SCALED, _scaled),
    _none("blended", Reason.BLENDED, _blended),
    _none("no layer", Reason.NO_CONVOLUTION, _no_layer),
    _none("tokens", Reason.TOKENS, _tokens),
    _none("position", None, _position),
    _none("concatenation", None, _concatenation),
    _none("no addition", None, _no_addition),
    _none("no graph", Reason.UNTRACED, _no_graph),
]
