"""``optimize_for_inference``: a copy of a network that computes the same in fewer operations."""

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

_TOLERANCE = 1e-5  # of the largest number of each output


@dataclass(frozen=True)
class Optimization:
    """What :func:`optimize_for_inference` did, by the names of modules."""

    norms: tuple[str, ...]  # folded into the convolutions before them
    constant: tuple[str, ...]  # blocks whose gate is a constant, which is folded
    factors: tuple[str, ...]  # SE blocks whose factor 2 is folded
    products: tuple[str, ...]  # SE blocks whose layers are matrix products now
    early: tuple[str, ...]  # those of them that squeeze before the last 1x1 convolution
    kept: tuple[str, ...]  # SE blocks that are as they were, but for their factor
    change: float  # of the outputs on the example, of the largest output

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
    """A copy of ``model`` in eval mode that computes the same outputs in fewer operations.

    The model itself stays as it is. In the copy

    - batch norms are folded into the convolutions before them,
    - SE blocks whose gate is the same for every image (``fc2`` has only zeros as weights) are
      folded into the layers before them, and so is the factor of the other gates,
    - the layers of SE blocks are matrix products, and their squeeze comes before the branch's last
      1x1 convolution where the map has fewer channels there.

    What one forward does not show to be safe stays as it is: layers with hooks, layers that are
    used twice, maps that others read too, and norms that run after the forward has looked at
    values. A forward that takes another way for another image size has to be optimised for the
    size that it is going to get. A base without SE blocks is optimised too. The copy is for
    inference alone: its outputs in train mode are others, and ``save_se`` and ``remove_se`` are
    for the model itself.

    >>> import timm, torch
    >>> from se_inject import inject_se, optimize_for_inference
    >>> model = inject_se(timm.create_model("resnet18")).eval()
    >>> fast = optimize_for_inference(model)
    >>> fast.layer1[0].bn1
    Identity()

    Args:
        model: with SE blocks or without; for gates that are constant on your images only, call
            ``se_inject.gates.fold_se`` before.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, on which the
            two are compared. By default random images like those that the model was injected with.

    Raises:
        ForwardError: the model fails on the example.
        UnsupportedModelError: the model cannot be edited as it is (compiled, scripted, sharded), or
            the copy's outputs differ by more than 1e-5 of the largest and by more than rounding.
    """
    return optimized_copy(model, example_input=example_input)[0]


def optimized_copy(
    model: nn.Module, *, example_input: Any = None
) -> tuple[nn.Module, Optimization]:
    """As :func:`optimize_for_inference`; also says what was done."""
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
        twin.eval()  # new modules too
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
        except Exception as error:  # whatever a foreign forward raises
            failure = failure or error
    assert failure is not None
    raise ForwardError(
        f"the forward of {type(model).__name__} fails on the example"
        f" ({type(failure).__name__}: {first_line(failure)}): pass another example_input."
    ) from failure


def _examples(model: nn.Module, example_input: Any) -> Iterator[Arguments]:
    """The user's example, or random numbers in the shapes that the model was injected with."""
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
        # Its shapes are read as inject_se reads them, and its values are kept.
        values = iter(t for t in pytree.tree_leaves(example_input) if isinstance(t, Tensor))
        for example in example_inputs(model, example_input):
            yield pytree.tree_map_only(Tensor, lambda _: real(next(values)), example)
    else:
        for example in recorded or example_inputs(model):
            yield pytree.tree_map(real, example)


def _again(given: Arguments) -> Arguments:
    """Copies, because a forward may write into what it is given."""
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
    """The largest change of an output, as a part of the largest number in it.

    Where a deep network or a short dtype makes roundings larger than the tolerance, both are
    compared with the model in float64: the copy has to be about as near to it as the model itself.
    """
    try:
        got = _outputs(twin, given)
    except Exception as error:  # of a forward that asks for what is not there any more
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
    except RuntimeError:  # a forward that insists on another dtype
        near = False
    if not near:
        raise UnsupportedModelError(
            f"the optimised copy of {type(model).__name__} differs from it by {change:.2g} of the"
            " largest output, which is more than rounding: use the model as it is, and report it."
        )
    return change


def _change(got: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest difference; infinite where shapes, whole numbers or places of NaN differ."""
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
