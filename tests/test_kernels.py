"""The kernels of SE blocks: on CUDA under the marker ``gpu``, and interpreted on the CPU.

Each is compared with the block's plain operations in float64 or with the same operations to the
last bit, for both layouts in memory, and for sizes that do not divide by those of the kernels.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from se_inject import SqueezeExcite, inject_se, optimize_for_inference, set_plain_ops
from se_inject.layers import fused
from se_inject.layers.deployed import DeployedSE
from se_inject.layers.layout import Layout
from se_inject.torch_private import DispatchMode, version_of

pytest.importorskip(
    "se_inject.layers.triton_kernels", reason="Triton comes with PyTorch for CUDA only"
)
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((1, 8, 1, 1), (2, 24, 5, 3), (3, 40, 9, 9), (2, 300, 4, 7))
# These have several tiles in each loop: over the inputs and channels of the layers, and over the
# positions. The last has parts of the positions that are empty.
LONG = ((1, 600, 2, 2), (1, 5, 61, 67), (1, 130, 17, 19), (1, 1030, 3, 3))


INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[gpu, needs_cuda])])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """CUDA, or the CPU in the process where Triton interprets its kernels."""
    # Convolutions and products with whole float32 numbers, and the same algorithm twice.
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield request.param


def test_all_of_it_interpreted() -> None:
    """Triton decides when it is imported whether its kernels are compiled or interpreted."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "cpu",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    for name in list(environment):
        if name.startswith("PYTEST_"):
            del environment[name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def block(channels: int, width: int = 8, *, bias: bool = True) -> SqueezeExcite:
    se = SqueezeExcite(channels, width, bias=bias, init="paper")
    se.gate.init = "identity"  # the factor 2, but gates that are not 1
    se.gate._choose()
    return se


def inputs_of(se: SqueezeExcite, x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    layers = se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias
    return x, residual, *layers, se.gate.factor


def maps(shape: tuple[int, ...], memory_format: torch.memory_format, device: str) -> list[Tensor]:
    return [torch.randn(shape).to(device).contiguous(memory_format=memory_format) for _ in range(3)]


def reference(se: SqueezeExcite, x: Tensor, residual: Tensor | None) -> Tensor:
    """The formula of the paper in float64."""
    z = x.double().mean((2, 3))
    b1, b2 = (0 if fc.bias is None else fc.bias.double() for fc in (se.fc1, se.fc2))
    h = torch.relu(z @ se.fc1.weight.double().flatten(1).T + b1)
    gate = 2 * torch.sigmoid(h @ se.fc2.weight.double().flatten(1).T + b2)
    y = x.double() * gate[:, :, None, None]
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("shape", SHAPES + LONG)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    anywhere: str,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    with_residual: bool,
    many: bool,
) -> None:
    if many:
        monkeypatch.setattr(fused, "MANY_PRODUCTS", 0)
    # A width that is no power of two, where the layers have no biases.
    se = block(shape[1], 8 if with_residual else 12, bias=with_residual).to(anywhere)
    x, residual, grad = maps(shape, memory_format, anywhere)
    second = residual if with_residual else None
    leaves = [t.requires_grad_() for t in (x, second) if t is not None] + list(se.parameters())
    total = fused.squeeze_excite(*inputs_of(se, x, second))
    expected = reference(se, x, second)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert total.stride() == x.stride()
    found = torch.autograd.grad(total, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("without", ["fc1", "fc2"])
def test_a_bias_on_one_layer_only(anywhere: str, without: str) -> None:
    """As optimize_for_inference makes it: the bias of the convolution before goes into fc1."""
    se = block(24).to(anywhere)
    getattr(se, without).bias = None
    x, residual, grad = maps((2, 24, 5, 3), FORMATS[0], anywhere)
    leaves = list(se.parameters())
    total = fused.squeeze_excite(*inputs_of(se, x, residual))
    expected = reference(se, x, residual)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(total, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_in_half_precision(anywhere: str) -> None:
    se = block(24, 12).to(anywhere)
    x, residual, grad = (
        t.half().requires_grad_() for t in maps((2, 24, 5, 3), FORMATS[1], anywhere)
    )
    leaves = [x, residual, *se.parameters()]
    found = torch.autograd.grad(fused.squeeze_excite(*inputs_of(se, x, residual)), leaves, grad)
    wanted = torch.autograd.grad(reference(se, x, residual), leaves, grad.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gates_that_are_one_change_no_bit(
    anywhere: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    se = SqueezeExcite(24, 8, device=anywhere)
    x, residual, _ = (t.to(dtype) for t in maps((2, 24, 5, 3), memory_format, anywhere))
    total = fused.squeeze_excite(*inputs_of(se, x, residual))
    # The interpreter rounds to bfloat16 towards zero, so there the last bit may differ.
    last_bit = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(total, x + residual, rtol=last_bit, atol=0)
    assert torch.equal(fused.squeeze_excite(*inputs_of(se, x, None)), x)


def test_a_gradient_in_another_layout(anywhere: str) -> None:
    """As ``sum().backward()`` makes one, with strides of 0."""
    se = block(24).to(anywhere)
    x, residual, _ = maps((2, 24, 5, 3), torch.channels_last, anywhere)
    x.requires_grad_()
    fused.squeeze_excite(*inputs_of(se, x, residual)).sum().backward()
    found, x.grad = x.grad, None
    reference(se, x, residual).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-4)


def test_second_derivatives(anywhere: str) -> None:
    se = block(24).to(anywhere)
    x, residual, grad = (t.requires_grad_() for t in maps((2, 24, 3, 3), FORMATS[0], anywhere))

    def second(of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        total = of()
        (first,) = torch.autograd.grad(total, x, grad.to(total.dtype), create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, se.fc1.weight, grad])

    found = second(lambda: fused.squeeze_excite(*inputs_of(se, x, residual)))
    for a, b in zip(found, second(lambda: reference(se, x, residual)), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-3, atol=1e-3)


def test_second_derivatives_run_hooks_once(anywhere: str) -> None:
    se = block(24).to(anywhere)
    leaf = torch.randn(2, 24, 3, 3).to(anywhere).requires_grad_()
    grads = []
    for of in (
        lambda x: fused.squeeze_excite(*inputs_of(se, x, None)),
        lambda x: reference(se, x, None),
    ):
        x = leaf * 1
        calls: list[Tensor] = []
        x.register_hook(lambda g, calls=calls: calls.append(g) or 3 * g)
        grads += torch.autograd.grad(of(x).float().sum(), leaf, create_graph=True)
        assert len(calls) == 1
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_gradients_in_a_batch(anywhere: str) -> None:
    """As jacobian(vectorize=True) and vmap over torch.autograd.grad compute them."""
    se = block(24).to(anywhere)
    x, residual, _ = (t.requires_grad_() for t in maps((2, 24, 3, 3), FORMATS[0], anywhere))
    total = fused.squeeze_excite(*inputs_of(se, x, residual))
    directions = torch.randn(3, *x.shape).to(anywhere)
    leaves = [x, residual, *se.parameters()]

    def along(direction: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, leaves, direction, retain_graph=True, **options)

    each = [torch.stack(g) for g in zip(*map(along, directions), strict=True)]
    for found in (along(directions, is_grads_batched=True), torch.func.vmap(along)(directions)):
        for a, b in zip(found, each, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "block", "residual", "fc1", "x and block"])
def test_only_the_gradients_that_are_needed(anywhere: str, frozen: str) -> None:
    se = block(24).to(anywhere)
    x, residual, grad = (t.requires_grad_() for t in maps((2, 24, 5, 3), FORMATS[0], anywhere))
    named: dict[str, Any] = {"x": x, "residual": residual, "block": se, "fc1": se.fc1}
    for name in frozen.split(" and "):
        named[name].requires_grad_(False)
    leaves = [t for t in (x, residual, *se.parameters()) if t.requires_grad]
    found = torch.autograd.grad(fused.squeeze_excite(*inputs_of(se, x, residual)), leaves, grad)
    wanted = torch.autograd.grad(reference(se, x, residual), leaves, grad.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_in_place_only_without_autograd(anywhere: str) -> None:
    se = block(24).to(anywhere)
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], anywhere)
    before = x.clone()
    fused.squeeze_excite(*inputs_of(se, x, residual), True)
    assert torch.equal(x, before)
    version = version_of(x)
    with torch.no_grad():
        expected = fused.squeeze_excite(*inputs_of(se, x, residual))
        total = fused.squeeze_excite(*inputs_of(se, x, residual), True)
    assert total.data_ptr() == x.data_ptr()
    assert torch.equal(total, expected)
    assert version_of(x) == version + 1


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
def test_a_graph_that_keeps_the_map_notices_that_it_is_overwritten(as_cuda: str, gate: Any) -> None:
    se = SqueezeExcite(24, 8, gate=gate).to(as_cuda)
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], as_cuda)
    y = x.requires_grad_() * 1
    square = y.square().sum()
    with torch.no_grad():
        assert se(y, residual, in_place=True).data_ptr() == y.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_not_a_number_stays_one(anywhere: str) -> None:
    se = block(24).to(anywhere)
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], anywhere)
    x[0, 3, 1, 1] = torch.nan
    with torch.no_grad():
        total = fused.squeeze_excite(*inputs_of(se, x, residual))
    assert total[0].isnan().all()
    assert not total[1].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_an_infinite_mean(anywhere: str) -> None:
    """It makes gates of 0 and 1 or NaN, as with PyTorch's operations. R is no power of two here."""
    se = block(24, 12).to(anywhere)
    x, _, _ = maps((2, 24, 5, 3), FORMATS[0], anywhere)
    x[0, 3, 1, 1] = torch.inf
    nn.init.constant_(se.fc2.weight, 1.0)
    with torch.no_grad():
        total = fused.squeeze_excite(*inputs_of(se, x, None))
        expected = reference(se, x, None).float()
    assert not expected[0, 0].isnan().any()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


# --- which blocks take them: on CUDA only --------------------------------------------------------


@pytest.fixture
def as_cuda(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device. In the interpreter, maps on the CPU count as maps on CUDA."""
    if INTERPRETED:
        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setattr(fused, "_RUN_ON", {-1})
    return anywhere


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of :func:`fused.squeeze_excite`."""
    calls: list[str] = []
    whole = fused.squeeze_excite

    def counted(*args: Any) -> Tensor:
        calls.append("call")
        return whole(*args)

    monkeypatch.setattr(fused, "squeeze_excite", counted)
    return calls


@pytest.mark.parametrize("change", ["more channels", "3x3", "groups", "bias"])
def test_layers_that_do_not_fit_are_never_read_past_their_end(
    launched: list[str], as_cuda: str, change: str
) -> None:
    se = block(24).to(as_cuda)
    channels = 40 if change == "more channels" else 24
    if change == "3x3":
        se.fc1 = nn.Conv2d(24, 8, 3, padding=1).to(as_cuda)
    if change == "groups":
        se.fc1 = nn.Conv2d(24, 8, 1, groups=2).to(as_cuda)
    if change == "bias":
        se.fc1.bias = nn.Parameter(torch.zeros(3).to(as_cuda))
    with pytest.raises(RuntimeError):
        se(torch.randn(2, channels, 5, 3).to(as_cuda))
    assert not launched


def test_a_deployed_block_takes_the_channels_of_its_layers_only(as_cuda: str) -> None:
    deployed = DeployedSE(block(24).to(as_cuda))
    with torch.no_grad(), pytest.raises(RuntimeError):
        deployed.excite(torch.randn(2, 40, 5, 3).to(as_cuda))


def test_a_deployed_block_without_biases_of_its_own(as_cuda: str) -> None:
    se, feed = block(24, bias=False).to(as_cuda), nn.Conv2d(16, 24, 1).to(as_cuda)
    x = torch.randn(2, 16, 5, 3).to(as_cuda)
    with torch.no_grad():
        deployed = DeployedSE(se, feed)
        found = deployed(feed(x), gate=deployed.excite(x))
        torch.testing.assert_close(found, reference(se, feed(x), None).float())


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize("broadcast", ["x", "residual"])
def test_a_map_that_is_broadcast_over_the_batch(as_cuda: str, gate: Any, broadcast: str) -> None:
    """Its strides are those of the other map."""
    se = SqueezeExcite(24, 8, gate=gate, init="paper").to(as_cuda)
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], as_cuda)
    if broadcast == "x":
        x = x[:1]
    else:
        residual = residual[:1]
    with torch.no_grad():
        torch.testing.assert_close(se(x, residual), se(x) + residual)


@pytest.mark.filterwarnings("ignore:`?torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")
def test_what_must_see_operations_gets_them(launched: list[str], as_cuda: str) -> None:
    from torch.autograd import forward_ad

    se = block(24).to(as_cuda)
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], as_cuda)

    class Subclass(Tensor):
        pass

    class Watching(DispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    with Watching():
        se(x, residual)
    torch.func.vmap(lambda t: se(t[None], residual[:1]))(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(se(dual, residual)).tangent is not None
    torch.jit.trace(se, (x, residual), check_trace=False)
    if as_cuda == "cuda" or int(torch.__version__.split(".")[1]) >= 11:
        # The dynamo of torch 2.6 does not take a tensor whose is_cuda is replaced.
        torch.export.export(se, (x, residual))
    if as_cuda == "cuda":  # With is_cuda replaced, its guards would ask for a GPU.
        torch.compile(se, backend="eager")(x, residual)
    se(x.as_subclass(Subclass), residual)
    for handle in (
        se.fc1.register_forward_hook(lambda *_: None),
        se.gate.register_forward_hook(lambda *_: None),
        nn.modules.module.register_module_forward_hook(lambda *_: None),
    ):
        se(x, residual)
        handle.remove()
    se(x.double().float().mT, residual.mT)  # neither contiguous nor channels last
    assert not launched
    se(x, residual)
    assert launched


@gpu
@needs_cuda
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_block_on_cuda_takes_the_kernels(
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    autocast: bool,
    memory_format: torch.memory_format,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    se = block(24).cuda()
    x, residual, _ = maps((2, 24, 5, 3), memory_format, "cuda")
    if autocast:
        x, residual = x.bfloat16(), residual.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = se(x, residual)
        assert launched
        assert found.dtype == x.dtype
        set_plain_ops(se)
        expected = se(x, residual)
        assert len(launched) == 1
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@gpu
@needs_cuda
@pytest.mark.parametrize(
    "change",
    [
        lambda se: se.fc1.register_forward_hook(lambda *_: None),
        lambda se: se.gate.register_forward_hook(lambda *_: None),
        lambda se: se.double(),
        lambda se: setattr(se, "fc1", nn.Sequential(se.fc1)),
        lambda se: set_plain_ops(se),
    ],
    ids=["hook", "hook on the gate", "double", "replaced", "plain"],
)
def test_a_changed_block_does_not(launched: list[str], change: Callable[[Any], Any]) -> None:
    se = block(24).cuda()
    change(se)
    dtype = se.fc2.weight.dtype
    x, residual, _ = (t.to(dtype) for t in maps((2, 24, 5, 3), FORMATS[0], "cuda"))
    expected = reference(se if hasattr(se.fc1, "bias") else block(24).cuda(), x, residual)
    found = se(x, residual)
    assert not launched
    if hasattr(se.fc1, "bias"):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@gpu
@needs_cuda
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_other_gates_end_in_a_kernel(memory_format: torch.memory_format) -> None:
    se = SqueezeExcite(24, 8, gate="tanh", init="paper").cuda()
    x, residual, _ = maps((2, 24, 5, 3), memory_format, "cuda")
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        total = se(x, residual)
        torch.cuda.synchronize()
    assert [e.name for e in found.events() if e.name == "scale"]
    torch.testing.assert_close(total, se(x) + residual)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimized_network_takes_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    import timm

    model = inject_se(timm.create_model("resnet50", zero_init_last=False)).eval()
    for se in (m for m in model.modules() if isinstance(m, SqueezeExcite)):
        nn.init.normal_(se.fc2.weight, 0, 0.1)
    example = torch.randn(2, 3, 64, 64)
    optimized = optimize_for_inference(copy.deepcopy(model), example_input=example)
    x = example.cuda().to(dtype)
    excited = []
    whole = fused.excite
    monkeypatch.setattr(fused, "excite", lambda *a: excited.append(a) or whole(*a))
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        found = optimized.cuda().to(dtype)(x)
        expected = model(example)
    assert len(excited) == 16
    error = (found.float().cpu() - expected).norm() / expected.norm()
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)


@gpu
@needs_cuda
def test_a_machine_without_a_compiler_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from se_inject.layers import kernels

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "scale", broken)
    monkeypatch.setattr(fused, "_RUN_ON", set())
    monkeypatch.setattr(fused, "_NOT_ON", set())
    se = block(24).cuda()
    x, residual, _ = maps((2, 24, 5, 3), FORMATS[0], "cuda")
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        found = se(x, residual)
    se(x, residual)  # says no more
    torch.testing.assert_close(found.double(), reference(se, x, residual), rtol=1e-4, atol=1e-4)


@gpu
@needs_cuda
@pytest.mark.parametrize("training", [True, False])
def test_a_network_on_cuda_computes_what_it_did(launched: list[str], training: bool) -> None:
    import timm

    base = timm.create_model("resnet18", zero_init_last=False).cuda().train(training)
    model = inject_se(copy.deepcopy(base))
    x = torch.randn(2, 3, 64, 64, device="cuda")
    launched.clear()  # inject_se ran the network too
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        assert torch.equal(model(x), base(x))
    assert len(launched) == 8


def test_layouts_of_other_ranks(anywhere: str) -> None:
    """Video maps [N, C, T, H, W] and sequences [N, C, L]."""
    for layout, shape in (
        (Layout(5, 1), (2, 24, 2, 3, 4)),
        (Layout(3, 1), (2, 24, 7)),
    ):
        se = SqueezeExcite(24, 8, layout=layout, init="paper").to(anywhere)
        x = torch.randn(shape).to(anywhere)
        expected = set_plain_ops(copy.deepcopy(se))(x)
        total = fused.squeeze_excite(*inputs_of(se, x, None))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
