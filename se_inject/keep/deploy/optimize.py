"""``optimize_for_inference`` makes a copy that computes the same in fewer operations."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.insert import injected
from se_inject.errors import ForwardError, UnsupportedModelError, first_line
from se_inject.graph.example import example_inputs
from se_inject.graph.meta import device_of
from se_inject.graph.recording.call import Arguments
from se_inject.keep.deploy.constant import fold_constant_gates, fold_factors
from se_inject.keep.deploy.norms import Pair, fold_norms, run_once
from se_inject.keep.deploy.squeeze import deploy_se
from se_inject.layers.deployed import DeployedSE
from se_inject.names import plural
from se_inject.plan.checks import check_model
from se_inject.torch_private import pytree

_TOLERANCE = 1e-5  # as a share of the largest number in each output


@dataclass(frozen=True)
class Optimization:
    """What :func:`optimize_for_inference` did, as names of modules."""

    norms: tuple[str, ...]  # norms that were folded into the convolutions before them
    constant: tuple[str, ...]  # blocks whose gate is a constant, which was folded
    factors: tuple[str, ...]  # SE blocks whose factor 2 was folded
    products: tuple[str, ...]  # SE blocks whose layers are matrix products now
    early: tuple[str, ...]  # those of them that squeeze before the last 1x1 convolution
    kept: tuple[str, ...]  # SE blocks that stayed as they were, except for their factor
    change: float  # the change of the outputs on the example, as a share of the largest output

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dict(vars(self))

    def __str__(self) -> str:
        done = [
            (self.norms, "folded {} into convolutions", "norm"),
            (self.constant, "folded the constant gates of {}", "block"),
            (self.factors, "folded the factor of {}", "gate"),
            (self.products, "made the layers of {} matrix products", "SE block"),
            (self.early, "put the squeeze of {} before a 1x1 convolution", "SE block"),
            (self.kept, "left {} as before", "SE block"),
        ]
        said = [text.format(plural(len(names), what)) for names, text, what in done if names]
        text = "; ".join(said) or "found nothing to change"
        change = f"change by {self.change:.1g} of the largest" if self.change else "do not change"
        return f"{text[0].upper()}{text[1:]}. Outputs {change}."


def optimize_for_inference(model: nn.Module, *, example_input: Any = None) -> nn.Module:
    """Make a copy of ``model`` in eval mode that computes the same outputs in fewer operations.

    The model itself stays as it is. In the copy

    - batch norms are folded into the convolutions before them,
    - SE blocks whose gate is the same for every image (all weights of ``fc2`` are 0) are folded
      into the layers before them, and so is the factor of the other gates,
    - the layers of SE blocks are matrix products, and the squeeze comes before the branch's last
      1x1 convolution if the map has fewer channels there.

    A change is made only if one forward shows that it is safe. Layers with hooks, layers that are
    used twice, maps that others read too, and norms that run after the forward has looked at values
    therefore stay as they are. If the forward takes another path for another image size, the model
    has to be optimised for the size that it will get. A base without SE blocks is optimised too.

    The copy is for inference only. Its outputs in train mode are different, and ``save_se`` and
    ``remove_se`` work with the model itself, not with the copy.

    >>> import timm, torch
    >>> from se_inject import inject_se, optimize_for_inference
    >>> model = inject_se(timm.create_model("resnet18")).eval()
    >>> fast = optimize_for_inference(model)
    >>> fast.layer1[0].bn1
    Identity()

    Args:
        model: a network with or without SE blocks. If gates are constant on your images only, call
            ``se_inject.gates.fold_se`` first.
        example_input: the input on which the model and the copy are compared. It is a tensor, a
            tuple of positional arguments or a dict of keyword arguments. By default it is random
            and has the shapes with which the model was injected.

    Raises:
        ForwardError: the model fails on the example.
        UnsupportedModelError: the model cannot be edited as it is (compiled, scripted, sharded), it
            returns no tensor, or the outputs of the copy differ by more than 1e-5 of the largest
            output and by more than rounding.
    """
    return optimized_copy(model, example_input=example_input)[0]


def optimized_copy(
    model: nn.Module, *, example_input: Any = None
) -> tuple[nn.Module, Optimization]:
    """Do the same as :func:`optimize_for_inference`, and also return what was done."""
    check_model(model)
    with torch.inference_mode(False), torch.no_grad():
        given, twin, output, pairs = _first_run(model, example_input)
        expected = _leaves(output)
        if not expected:
            raise UnsupportedModelError(
                f"{type(model).__name__} puts out no tensor in which a difference could be seen."
            )
        constant = fold_constant_gates(twin)
        factors = fold_factors(twin)
        norms = fold_norms(twin, pairs)
        products, early = deploy_se(twin)
        twin.eval()  # the new modules need this too
        kept = [
            f"{name}.{child}".lstrip(".")
            for name, block, edit in injected(twin)
            for child in edit.children
            if not isinstance(block.get_submodule(child), DeployedSE)
        ]
        change = _checked_change(model, twin, given, expected)
        done = Optimization(
            tuple(norms),
            tuple(constant),
            tuple(factors),
            tuple(products),
            tuple(early),
            tuple(kept),
            change,
        )
    return twin, done


def _first_run(
    model: nn.Module, example_input: Any
) -> tuple[Arguments, nn.Module, Any, list[Pair]]:
    """The first example that the model takes, a copy of the model, and what its forward showed."""
    failure: Exception | None = None
    for given in _examples(model, example_input):
        twin = copy.deepcopy(model)
        twin.eval()
        try:
            return given, twin, *run_once(twin, _again(given))
        except Exception as error:  # a foreign forward may raise anything
            failure = failure or error
    assert failure is not None
    raise ForwardError(
        f"the forward of {type(model).__name__} fails on the example"
        f" ({type(failure).__name__}: {first_line(failure)}): pass another example_input."
    ) from failure


def _examples(model: nn.Module, example_input: Any) -> Iterator[Arguments]:
    """The user's example, or random numbers in the shapes with which the model was injected."""
    recorded = [edit.settings.example for _, _, edit in injected(model)][:1]
    generator = torch.Generator().manual_seed(0)
    device = device_of(model)

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_meta:
            return value.detach().to(device)
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        numbers = torch.randn(value.shape, generator=generator, device="cpu")
        return numbers.to(device=device, dtype=value.dtype)

    if example_input is not None:
        # The example is read as inject_se reads it, but its values are kept.
        values = iter(t for t in pytree.tree_leaves(example_input) if isinstance(t, Tensor))
        for example in example_inputs(model, example_input):
            yield pytree.tree_map_only(Tensor, lambda _: real(next(values)), example)
    else:
        for example in recorded or example_inputs(model):
            yield pytree.tree_map(real, example)


def _again(given: Arguments) -> Arguments:
    """A copy of the arguments, because a forward may write into them."""
    again: Arguments = pytree.tree_map_only(Tensor, torch.clone, given)
    return again


def _leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _outputs(model: nn.Module, given: Arguments) -> list[Tensor]:
    args, kwargs = _again(given)
    return _leaves(model(*args, **kwargs))


def _checked_change(
    model: nn.Module, twin: nn.Module, given: Arguments, expected: list[Tensor]
) -> float:
    """The largest change of an output, as a share of the largest number in it.

    In a deep network or a short dtype, rounding can exceed the tolerance. Both are then compared
    with the model in float64: the copy has to be about as near to it as the model itself is.
    """
    try:
        got = _outputs(twin, given)
    except Exception as error:  # the forward may ask for what is not there any more
        raise UnsupportedModelError(
            f"{type(model).__name__} reads attributes of layers that are folded"
            f" ({first_line(error)}): it cannot be optimised."
        ) from error
    change = _change(got, expected)
    if change <= _TOLERANCE:
        return change
    exact_model = copy.deepcopy(model).double()
    exact_model.eval()
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
    try:
        exact = _outputs(exact_model, wide)
        near = _change(got, exact) <= 4 * _change(expected, exact)
    except RuntimeError:  # the forward insists on another dtype
        near = False
    if not near:
        raise UnsupportedModelError(
            f"the optimised copy of {type(model).__name__} differs from it by {change:.2g} of the"
            " largest output, which is more than rounding: use the model as it is, and report it."
        )
    return change


def _change(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference. It is infinite if shapes, whole numbers or places of NaN differ."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if not b.numel() or torch.equal(a, b):
            continue
        if not b.is_floating_point():
            return float("inf")
        difference = (a.double() - b.double()).abs().max().item()
        scale = b.double().abs().max().item()
        relative = difference / scale if scale else float("inf")
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst
