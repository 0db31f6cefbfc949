"""The SE block against the formula of the paper and against ``timm.layers.SEModule``."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import SEModule
from torch.autograd import forward_ad

from se_inject import SqueezeExcite
from se_inject.layers.gates import Init
from se_inject.layers.layout import Layout


def formula(se: SqueezeExcite, x: torch.Tensor) -> torch.Tensor:
    """Eq. 2 to 4 of the paper, one line each."""
    z = x.flatten(2).mean(2)
    h = torch.relu(z @ se.fc1.weight.flatten(1).T + se.fc1.bias)
    s = torch.sigmoid(h @ se.fc2.weight.flatten(1).T + se.fc2.bias) * se.gate_scale
    return x * s[:, :, *[None] * (x.dim() - 2)]


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("shape", [(2, 24, 7, 5), (1, 16, 1, 1), (3, 20, 8, 8)])
def test_outputs_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], init: Init, device: str
) -> None:
    se = SqueezeExcite(shape[1], 8, init=init, device=device, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, *shape, device=device, dtype=torch.float64).requires_grad_()
    expected, actual = residual + formula(se, x), se(x, residual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(se(x), formula(se, x), rtol=1e-12, atol=1e-12)
    inputs = (x, residual, *se.parameters())
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_paper_init_equals_timms_module(device: str) -> None:
    ours, timms = SqueezeExcite(64, 8, init="paper"), SEModule(64)
    timms.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 64, 9, 9, device=device)
    if device == "cuda":  # The kernels round otherwise than convolutions.
        ours.set_plain(True)
    assert torch.equal(ours.to(device)(x), timms.to(device)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_identity_init_returns_its_input_to_the_bit(
    dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    se = SqueezeExcite(32, 8, device=device, dtype=dtype)
    x = torch.randn(2, 32, 7, 7, device=device).to(dtype).to(memory_format=memory_format)
    residual = torch.randn_like(x)
    assert torch.equal(se(x), x)
    assert torch.equal(se(x, residual), residual + x)
    assert se(x, residual).is_contiguous(memory_format=memory_format)


def test_a_residual_of_another_dtype_is_promoted_as_by_an_addition(device: str) -> None:
    se = SqueezeExcite(32, 8, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 32, 4, 4, device=device).to(torch.bfloat16)
    residual = torch.randn(2, 32, 4, 4, device=device)
    assert torch.equal(se(x, residual), residual + x)


def test_the_repr_says_which_gate() -> None:
    assert "gate=2 * sigmoid" in repr(SqueezeExcite(16, 8))
    assert "gate=sigmoid" in repr(SqueezeExcite(16, 8, init="paper"))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(4, 3), (2, 5, 6, 16)),
        (Layout(5, 1), (2, 16, 3, 5, 4)),
        (Layout(5, 4), (2, 3, 5, 4, 16)),
    ],
    ids=["channels last", "video", "video, channels last"],
)
def test_other_layouts_are_the_formula_on_a_permuted_map(
    layout: Layout, shape: tuple[int, ...]
) -> None:
    se = SqueezeExcite(16, 8, layout=layout, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(se(x), x)
    torch.nn.init.normal_(se.fc2.weight)
    dims = (0, layout.channel_dim, *(d % len(shape) for d in layout.space))
    expected = formula(se, x.permute(dims))
    torch.testing.assert_close(se(x).permute(dims), expected, rtol=1e-12, atol=1e-12)


# --- fast paths: in place without autograd, the squeeze as a sum --------------------------------

SHAPES = [(2, 24, 7, 5), (1, 16, 1, 1), (3, 20, 8, 8), (1, 13, 9, 1), (5, 3, 4, 11)]


def make(shape: tuple[int, ...], dtype: torch.dtype, memory: str) -> tuple[torch.Tensor, ...]:
    """A branch map and a residual: dense, channels last, or every second pixel of a larger map."""
    x, residual = torch.randn(2, *shape[:2], 2 * shape[2], shape[3], dtype=torch.float64).to(dtype)
    if memory == "strided":
        return x[:, :, ::2], residual[:, :, ::2]
    formats = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
    first = x[:, :, : shape[2]], residual[:, :, : shape[2]]
    return tuple(t.contiguous(memory_format=formats[memory]) for t in first)


@pytest.mark.parametrize("memory", ["nchw", "channels-last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_every_path_is_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, memory: str, device: str
) -> None:
    se = SqueezeExcite(shape[1], 8, device=device, dtype=dtype)
    torch.nn.init.normal_(se.fc2.weight)
    x, residual = (t.to(device) for t in make(shape, dtype, memory))
    reference = copy.deepcopy(se).double()
    expected = residual.double() + formula(reference, x.double())
    paths = [se(x, residual, in_place=True)]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            paths += [se(x, residual), residual + se(x)]
            # The map that a norm wrote in this mode, which the sum may overwrite.
            paths.append(se(x.clone(), residual, in_place=True))
    for actual in paths:
        error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() < tolerance


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch's own vmap
@pytest.mark.filterwarnings("ignore:Please use .torch.vmap:FutureWarning")  # torch 2.6 to itself
@pytest.mark.parametrize("memory", ["nchw", "channels-last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_and_second_derivatives(shape: tuple[int, ...], memory: str) -> None:
    # Numeric derivatives cost the square of the size.
    x, residual = (t[:1, :3, :5, :5] for t in make(shape, torch.float64, memory))
    se = SqueezeExcite(3, 2, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    torch.nn.init.constant_(se.fc1.bias, 3.0)  # away from the kink of the ReLU
    inputs = (x.detach().requires_grad_(), residual.detach().requires_grad_())
    assert torch.autograd.gradcheck(
        se, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        se, inputs, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("memory", ["nchw", "channels-last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, memory: str, device: str
) -> None:
    se = SqueezeExcite(shape[1], 8, device=device, dtype=dtype)
    torch.nn.init.normal_(se.fc2.weight, std=0.3)
    reference = copy.deepcopy(se).double()
    maps = [t.to(device).requires_grad_() for t in make(shape, dtype, memory)]
    exact = [t.detach().double().requires_grad_() for t in maps]
    seed = torch.randn(shape, device=device, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(se(*maps), [*maps, *se.parameters()], seed)
    expected = torch.autograd.grad(
        exact[1] + formula(reference, exact[0]), [*exact, *reference.parameters()], seed.double()
    )
    for actual, true in zip(gradients, expected, strict=True):
        assert (actual.double() - true).abs().max() <= tolerance * true.abs().max().clamp(min=1)


@pytest.mark.parametrize("trained", [["x"], ["residual"], ["fc1"], ["fc2"], ["x", "fc2"]], ids=str)
def test_gradients_where_only_some_are_wanted(trained: list[str]) -> None:
    se = SqueezeExcite(16, 8, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, 2, 16, 5, 5, dtype=torch.float64).unbind()
    leaves = {"x": x, "residual": residual, "fc1": se.fc1.weight, "fc2": se.fc2.weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    se.fc1.bias.requires_grad_(False)
    se.fc2.bias.requires_grad_(False)
    wanted = [leaves[name] for name in trained]
    actual = torch.autograd.grad(se(x, residual).square().sum(), wanted)
    expected = torch.autograd.grad((residual + formula(se, x)).square().sum(), wanted)
    torch.testing.assert_close(actual, expected)


def test_a_residual_that_is_broadcast_over_the_batch() -> None:
    se = SqueezeExcite(16, 8, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(1, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    actual = torch.autograd.grad(se(x, residual).square().sum(), (x, residual))
    expected = torch.autograd.grad((residual + formula(se, x)).square().sum(), (x, residual))
    torch.testing.assert_close(actual, expected)
    actual = torch.autograd.grad(se(residual, x).square().sum(), (x, residual))
    expected = torch.autograd.grad((x + formula(se, residual)).square().sum(), (x, residual))
    torch.testing.assert_close(actual, expected)


def test_outputs_are_the_same_bits_with_gradients_and_without() -> None:
    se = SqueezeExcite(16, 8)
    torch.nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, 3, 16, 5, 5).unbind()
    with torch.no_grad():
        expected = se(x.clone(), residual, in_place=True)
    assert torch.equal(se(x, residual), expected)
    with torch.inference_mode():
        assert torch.equal(se(x.clone(), residual, in_place=True), expected)


def test_training_keeps_the_map_the_gate_and_no_more() -> None:
    """What the block saves for the backward pass is what timm's saves."""

    def saved(run: Callable[[], torch.Tensor]) -> int:
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            run()
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    ours, theirs = SqueezeExcite(64, 8), SEModule(64, rd_channels=8)
    x, residual = torch.randn(2, 4, 64, 7, 7).unbind()
    x.requires_grad_()
    assert saved(lambda: ours(x, residual)) <= saved(lambda: theirs(x).add_(residual))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_autocast_keeps_the_dtype_of_the_squeeze() -> None:
    se = SqueezeExcite(8, 8, device="cuda")
    x = torch.randn(2, 8, 6, 6, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert se._squeeze(x, se.space).dtype == x.dtype


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_sum_in_place_takes_no_new_map_without_autograd(mode: Any, device: str) -> None:
    se = SqueezeExcite(16, 8, device=device)
    with mode():
        x, residual = torch.randn(2, 3, 16, 5, 5, device=device).unbind()
        expected = residual + x
        assert se(x, residual, in_place=True).data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


def test_a_map_that_autograd_may_read_is_not_overwritten(device: str) -> None:
    se = SqueezeExcite(16, 8, device=device)
    x, residual = torch.randn(2, 3, 16, 5, 5, device=device).unbind()
    before = x.clone()
    se(x, residual, in_place=True)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch's own rules
@pytest.mark.parametrize("dual", ["x", "residual"])
def test_forward_derivatives_without_autograd(dual: str) -> None:
    se = SqueezeExcite(16, 8)
    x, residual = torch.randn(2, 3, 16, 5, 5).unbind()
    tangent = torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        maps = {"x": x, "residual": residual}
        maps[dual] = forward_ad.make_dual(maps[dual], tangent)
        out = se(**maps, in_place=True)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent)


def test_a_sum_that_was_not_in_place_leaves_its_operands() -> None:
    se = SqueezeExcite(16, 8)
    with torch.inference_mode():
        x, residual = torch.randn(2, 3, 16, 5, 5).unbind()
        before = x.clone(), residual.clone()
        se(x, residual)
        assert torch.equal(x, before[0])
        assert torch.equal(residual, before[1])


def test_vmap_in_inference_mode(device: str) -> None:
    se = SqueezeExcite(16, 8, device=device)
    with torch.inference_mode():
        x, residual = torch.randn(2, 4, 3, 16, 5, 5, device=device).unbind()
        run = torch.func.vmap(lambda x, residual: se(x, residual, in_place=True))
        assert torch.equal(run(x.clone(), residual), residual + x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_squeeze_fills_no_map(memory_format: torch.memory_format) -> None:
    se = SqueezeExcite(8, 8)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
    (gradient,) = torch.autograd.grad(se._squeeze(x, se.space).sum(), x)
    assert gradient.untyped_storage().nbytes() < gradient.numel() * gradient.element_size()
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 36))


def test_a_float16_sum_that_would_overflow(device: str) -> None:
    se = SqueezeExcite(8, 8, device=device, dtype=torch.float16)
    x = torch.full((1, 8, 128, 128), 100.0, device=device, dtype=torch.float16)
    assert torch.equal(se(x), x)


def test_an_empty_batch_stays_empty(device: str) -> None:
    se = SqueezeExcite(8, 8, device=device)
    x = torch.randn(0, 8, 4, 4, device=device)
    assert se(x, x).shape == x.shape
