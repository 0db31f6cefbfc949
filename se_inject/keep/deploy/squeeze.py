"""Replaces SE blocks by :class:`DeployedSE`, and moves the squeeze before a 1x1 convolution.

A block may end in ``conv3 = self.conv3(act2)`` and ``se = self.se(conv3, shortcut)``. If ``conv3``
has kernels of one position and more channels in its output than in its input, the block changes as
follows::

    se_gate = self.se.excite(act2)
    conv3 = self.conv3(act2)
    se = self.se(conv3, shortcut, gate=se_gate)

The mean of the convolution's output is the convolution of the mean of its input, which has fewer
channels.
"""

import ast
import dataclasses
import keyword
from typing import Any

from torch import nn

from se_inject.edit.block_class import Edit
from se_inject.edit.insert import injected
from se_inject.graph.source import ForwardSource
from se_inject.keep.deploy.constant import plain_se
from se_inject.keep.deploy.norms import is_touched
from se_inject.layers.deployed import DeployedSE
from se_inject.layers.layout import CONVOLUTIONS

# A child of a block by its path, such as "body.2".
Step = tuple[str, nn.Module]


def deploy_se(model: nn.Module) -> tuple[list[str], list[str]]:
    """Replace the SE blocks, in place.

    SE blocks with another squeeze, with channels last or with hooks stay, and so do the layers of
    an ``se_layer``.

    Returns:
        the names of the SE blocks that were replaced, and of those among them that squeeze early.
    """
    edits: dict[tuple[int, str], Edit] = {}
    deployed, early = [], []
    for name, block, edit in injected(model):
        if type(block) is not edit.block_class:
            continue
        tree = ast.parse(edit.eval.text)
        for child in edit.children:
            layer = plain_se(block, child)
            if layer is None or layer.squeeze != "avg" or not isinstance(layer.fc1, CONVOLUTIONS):
                continue
            feed = None
            if edit.settings.variant.placement == "standard":
                feed = _squeeze_early(tree, block, child)
            block._modules[child] = DeployedSE(layer, feed)
            own = f"{name}.{child}".lstrip(".")
            deployed.append(own)
            early += [own] * (feed is not None)
            if feed is not None:
                text = ast.unparse(tree)
                source = ForwardSource(text, edit.eval.names, edit.eval.label)
                key = (id(edit), text)
                if key not in edits:
                    edits[key] = dataclasses.replace(edit, eval=source, train=None)
                block.__class__ = edits[key].block_class
    return deployed, early


def _squeeze_early(tree: ast.Module, block: nn.Module, child: str) -> Any | None:
    """Change the text of a forward so that the gate comes early, if it can.

    Returns:
        the convolution that the squeeze now comes before, or None if nothing was changed.
    """
    function = tree.body[-1]
    assert isinstance(function, ast.FunctionDef)
    modules = dict(block.named_modules(remove_duplicate=False))
    found = [s for s in function.body if _called(s) == child]
    if len(found) != 1:
        return None
    scaling = _call(found[0])
    assert scaling is not None
    value = scaling.args[0] if scaling.args else None
    while isinstance(value, ast.Name):
        made = _made(function, value.id)
        path = None if made is None else _called(made)
        if made is None or path is None:
            return None
        call = _call(made)
        assert call is not None
        if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Name):
            return None
        if path not in modules:
            return None
        steps = _steps(path, modules[path])
        while steps and type(steps[-1][1]) is nn.Identity and not is_touched(steps[-1][1]):
            steps.pop()
        if steps:
            feed = steps[-1][1]
            if not _can_follow(feed, block.get_submodule(child)):
                return None
            _rewrite(function, made, steps, child, scaling)
            return feed
        value = call.args[0]
    return None


def _rewrite(
    function: ast.FunctionDef, made: ast.stmt, steps: list[Step], child: str, scaling: ast.Call
) -> None:
    """Replace ``made`` by the steps one by one, with the gate before the last of them."""
    call = _call(made)
    assert call is not None
    assert isinstance(call.args[0], ast.Name)
    taken = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    gate, inner = _free(f"{child}_gate", taken), _free(f"{child}_input", taken)
    source = call.args[0].id
    lines = []
    for path, _ in steps[:-1]:
        lines.append(f"{inner} = {_expression(path)}({source})")
        source = inner
    lines.append(f"{gate} = {_expression(child)}.excite({source})")
    at = function.body.index(made)
    function.body[at:at] = ast.parse("\n".join(lines)).body
    call.func = ast.parse(_expression(steps[-1][0]), mode="eval").body
    call.args = [ast.Name(source, ast.Load())]
    if source == inner:  # the memory is freed after the convolution, as before
        after = function.body.index(made) + 1
        function.body[after:after] = ast.parse(f"{inner} = None").body
    scaling.keywords.append(ast.keyword("gate", ast.Name(gate, ast.Load())))
    ast.fix_missing_locations(function)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _steps(path: str, module: nn.Module) -> list[Step]:
    """The modules that run one after the other in a child, as far as its class is known."""
    from timm.layers import ConvNormAct

    forward = type(module).forward
    if is_touched(module):
        return [(path, module)]
    if forward is nn.Sequential.forward:
        children = list(module._modules)
    elif forward is ConvNormAct.forward and getattr(module, "aa", None) is None:
        children = ["conv", "bn"]
    else:
        return [(path, module)]
    return [
        step for name in children for step in _steps(f"{path}.{name}", module.get_submodule(name))
    ]


def _can_follow(feed: Any, layer: Any) -> bool:
    """Whether the mean over positions commutes with a layer and is cheaper before it."""
    return (
        type(feed) in CONVOLUTIONS
        and not is_touched(feed)
        and set(feed.kernel_size) == set(feed.stride) == {1}
        and (isinstance(feed.padding, str) or set(feed.padding) == {0})
        and feed.groups == 1
        and feed.in_channels < feed.out_channels == layer.channels
        and -feed.weight.dim() + 2 == min(layer.space)
    )


def _made(function: ast.FunctionDef, name: str) -> ast.stmt | None:
    """The statement that makes a value that is read once, or None if others read or change it."""
    made, seen = [], 0
    for statement in function.body:
        if isinstance(statement, ast.Assign) and _is_none(statement.value):
            continue  # ``conv3 = None``, by which fx frees memory
        seen += sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(statement))
        if isinstance(statement, ast.Assign) and _targets(statement) == [name]:
            made.append(statement)
    return made[0] if len(made) == 1 and seen == 2 else None


def _targets(statement: ast.Assign) -> list[str | None]:
    return [target.id if isinstance(target, ast.Name) else None for target in statement.targets]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _call(statement: ast.stmt) -> ast.Call | None:
    value = getattr(statement, "value", None)
    return value if isinstance(value, ast.Call) else None


def _called(statement: ast.stmt) -> str | None:
    """The path of the child that a statement calls, such as "conv3", or None if it calls none."""
    call = _call(statement)
    return None if call is None else _path(call.func)


def _path(expression: ast.expr) -> str | None:
    """``self.body`` or ``getattr(self.body, "2")`` as "body" or "body.2"."""
    match expression:
        case ast.Attribute(value=inner, attr=name):
            pass
        case ast.Call(func=ast.Name("getattr"), args=[inner, ast.Constant(str(name))]):
            pass
        case _:
            return None
    if isinstance(inner, ast.Name):
        return name if inner.id == "self" else None
    before = _path(inner)
    return None if before is None else f"{before}.{name}"


def _expression(path: str) -> str:
    text = "self"
    for part in path.split("."):
        dotted = part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if dotted else f"getattr({text}, {part!r})"
    return text
