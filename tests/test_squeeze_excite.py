"""The SE block against the formula of the paper and against ``timm.layers.SEModule``."""

import pytest
import torch
from timm.layers import SEModule

from se_inject import SqueezeExcite
from se_inject.squeeze_excite import Init, Layout


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
