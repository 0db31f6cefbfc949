"""What PyTorch and timm offer on the base works on the injected model."""

import copy
import io
import operator
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import small_net
import timm
import torch
import torchvision
from helpers import open_gates, randomize
from processes import ended
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from se_inject import SqueezeExcite, inject_se, load_se, remove_se, save_se, se_parameters

X = torch.randn(2, 3, 64, 64)


@pytest.fixture
def model() -> nn.Module:
    """A narrow one with two blocks in its first stage: what is asked here asks for no more."""
    narrow = {"layers": (2, 1, 1, 1), "channels": (64, 32, 64, 128)}
    base = timm.create_model("resnet18", num_classes=7, **narrow)
    model = inject_se(randomize(base), example_input=X)
    open_gates(model)
    return model.eval()


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_of_the_user_is_not_the_models(default: str, tmp_path: Path) -> None:
    """The meta device stands for a GPU: a generator of the CPU does not fit either."""
    base, other = (small_net.build().eval() for _ in range(2))
    x = torch.randn(2, 3, 8, 8)
    y = base(x)
    with torch.device(default):
        inject_se(base, 4, example_input=x)
        save_se(base, tmp_path / "se.safetensors")
        load_se(other, tmp_path / "se.safetensors")
        assert {p.device.type for p in (*base.parameters(), *other.parameters())} == {"cpu"}
    assert torch.equal(base(x), y)
    assert torch.equal(other(x), y)
    remove_se(base)
    assert torch.equal(base(x), y)


# --- copies --------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": pickled,
    "ModelEmaV3": lambda model: ModelEmaV3(model).module,
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_whole_and_their_own(model: nn.Module, kind: str) -> None:
    expected = model(X)
    again = COPIES[kind](model)
    assert torch.equal(again(X), expected)
    assert type(again.layer1[0]).__name__ == "SEBasicBlock"
    with torch.no_grad():
        for p in se_parameters(again):
            p.add_(1)
    assert torch.equal(model(X), expected)
    remove_se(again)
    assert type(again.layer1[0]) is timm.models.resnet.BasicBlock
    assert torch.equal(model(X), expected)


def test_an_average_follows_the_se_blocks(model: nn.Module) -> None:
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in se_parameters(model):
            p.add_(1)
    ema.update(model)
    for a, b in zip(se_parameters(ema.module), se_parameters(model), strict=True):
        torch.testing.assert_close(a, b - 0.5)


def test_a_pickle_loads_in_a_new_process(model: nn.Module, tmp_path: Path) -> None:
    """A block with something before the addition, too."""
    model.layer1[0].drop_path = nn.Dropout(0.5).eval()
    inject_se(remove_se(model), example_input=X)
    torch.save({"model": model, "x": X, "y": model(X)}, tmp_path / "model.pt")
    program = f"""
import torch
from se_inject import remove_se, se_parameters
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model = saved["model"]
assert torch.equal(model(saved["x"]), saved["y"])
model.train()(saved["x"]).sum().backward()
assert all(p.grad is not None for p in se_parameters(model))
remove_se(model)
assert type(model.layer1[0]).__name__ == "BasicBlock"
assert not any(".se." in key for key in model.state_dict())
"""
    assert ended(program).stderr == ""


class ReadsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            y = y * 0.5
        return x + y


def test_both_graphs_of_a_block_are_in_the_pickle() -> None:
    block = inject_se(ReadsMode(), 1, divisor=1, example_input=X)
    open_gates(block)
    again = pickled(block)
    for training in (False, True):
        assert torch.equal(again.train(training)(X), block.train(training)(X))
    assert not torch.equal(again.eval()(X), again.train()(X))


def test_copies_share_the_class_and_pickles_of_equal_blocks_too(model: nn.Module) -> None:
    assert type(copy.deepcopy(model).layer1[0]) is type(model.layer1[0])
    again = pickled(model)
    assert type(again.layer1[0]) is type(again.layer1[1])


class InfiniteDefault(ReadsMode):
    def forward(self, x: Tensor, top: float = float("inf")) -> Tensor:
        return x + self.conv(x).clamp(max=top)


class ReducesItself(ReadsMode):
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (), self.__dict__


@pytest.mark.parametrize("kind", [InfiniteDefault, ReducesItself])
def test_defaults_and_own_reductions_travel(kind: type[nn.Module]) -> None:
    model = inject_se(nn.Sequential(kind()), 1, divisor=1, example_input=X).eval()
    open_gates(model)
    again = pickled(model)
    assert torch.equal(again(X), model(X))
    assert type(remove_se(again)[0]) is kind


# --- compilers -----------------------------------------------------------------------------------


def test_compile_has_no_graph_break_and_does_not_recompile(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in (X, torch.randn_like(X)):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_compiled_model_learns_as_the_eager_one(model: nn.Module) -> None:
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    torch.compile(other, fullgraph=True, backend="aot_eager")(X).square().mean().backward()
    model(X).square().mean().backward()
    for a, b in zip(se_parameters(other), se_parameters(model), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_export_and_jit(model: nn.Module) -> None:
    exported = torch.export.export(model, (X,)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates both, and people use both
        traced, scripted = torch.jit.trace(model, X), torch.jit.script(model)
    for other in (exported, traced, scripted):
        torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# make_graphed_callables keeps the outputs of its warm-up, which ran on another stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_cuda_graph_replays_forward_and_backward(model: nn.Module) -> None:
    """Nothing in an SE block waits for the device or asks it for a value."""
    model.cuda()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (torch.randn_like(X).cuda(),))
    x = X.cuda()
    torch.testing.assert_close(graphed(x), model(x), rtol=1e-4, atol=1e-4)
    for net in (graphed, model):
        net(x).square().mean().backward()
    for a, b in zip(se_parameters(graphed), se_parameters(model), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


FX_TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "symbolic_trace": fx.symbolic_trace,
    "create_feature_extractor": lambda model: create_feature_extractor(model, {"fc": "fc"}),
    "fuse": fuse,
}


@pytest.mark.parametrize("kind", FX_TOOLS)
def test_tools_that_trace_with_fx(kind: str) -> None:
    model = inject_se(randomize(torchvision.models.resnet18()).eval(), example_input=X)
    open_gates(model)
    traced = FX_TOOLS[kind](model)
    # Each SE block ends in branch x gate, as timm's does; the sum with the shortcut comes after it.
    scaled = [
        n
        for n in traced.graph.nodes
        if n.target is operator.mul and all(isinstance(arg, fx.Node) for arg in n.args)
    ]
    assert len(scaled) == 8
    assert all(user.target is operator.add for n in scaled for user in n.users if user.args[0] is n)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            result = traced(X)
            result = result["fc"] if isinstance(result, dict) else result
            torch.testing.assert_close(result, model(X), rtol=1e-4, atol=1e-5)


class Meta(Tensor):
    """As MONAI's images: a subclass with the default ``__torch_function__``."""


def test_a_subclass_of_tensor_goes_through(model: nn.Module) -> None:
    x = X.as_subclass(Meta)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            out = model(x)
            assert type(out) is Meta
            assert torch.equal(out.as_subclass(Tensor), model(X))
    grads = [torch.autograd.grad(model(t).square().sum(), [*se_parameters(model)]) for t in (x, X)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_compiled_autograd_takes_the_backward_of_its_own() -> None:
    """Two blocks: it is the second that hands its gradient on to another SE block."""
    torch._dynamo.reset()
    model = inject_se(randomize(small_net.build()), 4, divisor=1, example_input=X).eval()
    open_gates(model)
    other = copy.deepcopy(model)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        other(X).square().mean().backward()
    model(X).square().mean().backward()
    for a, b in zip(se_parameters(other), se_parameters(model), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_compiled_se_blocks_are_their_own(model: nn.Module, kind: str) -> None:
    for block in model.modules():
        if isinstance(block, SqueezeExcite):
            block.compile(backend="eager")
    torch._dynamo.reset()
    test_copies_are_whole_and_their_own(model, kind)


def test_functional_call_takes_other_se_weights(model: nn.Module) -> None:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {k: torch.zeros_like(v) if ".se.fc2" in k else v for k, v in state.items()}
    changed = torch.func.functional_call(model, state, (X,))
    assert not torch.equal(changed, model(X))
    assert torch.equal(changed, remove_se(model)(X))  # fc2 = 0: every gate is 1


def test_per_sample_gradients(model: nn.Module) -> None:
    params = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (params, buffers), (x[None],)).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, X)
    single = torch.func.grad(loss)(params, X[1])
    key = "layer1.0.se.fc1.weight"
    torch.testing.assert_close(per_sample[key][1], single[key], rtol=1e-3, atol=1e-5)


# --- precision, memory ---------------------------------------------------------------------------


def test_autocast_gives_what_the_base_gives_and_learns() -> None:
    base = randomize(timm.create_model("resnet18")).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = base(X)
        model = inject_se(base, example_input=X)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(model(X), expected)
        model(X).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in se_parameters(model))


class SumInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return torch.relu(out)


def test_a_sum_in_place_keeps_its_dtype() -> None:
    """Under autocast the branch is bfloat16 and the first shortcut float32."""
    model = randomize(nn.Sequential(SumInPlace(), SumInPlace())).eval()
    x = torch.randn(2, 8, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        inject_se(model, 1, example_input=x)
        after = model(x)
    assert before.dtype == after.dtype == torch.bfloat16
    assert torch.equal(after, before)


def test_channels_last_is_kept_through_every_block(model: nn.Module) -> None:
    model = model.to(memory_format=torch.channels_last)
    formats = []
    for module in model.modules():
        if type(module).__name__ in ("SEBasicBlock", "SqueezeExcite"):
            module.register_forward_hook(
                lambda _, __, y: formats.append(
                    y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
                )
            )
    model(X.to(memory_format=torch.channels_last))
    assert formats == [True] * 10


def test_gradient_checkpointing_by_the_switch_of_timm(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    runs = []
    for module in (model, other):
        count = FlopCounterMode(display=False)
        with count:
            module(X).square().mean().backward()
        runs.append(count.get_total_flops())
    assert runs[1] > runs[0]  # blocks ran twice
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- optimizers ----------------------------------------------------------------------------------


def test_layer_decay_puts_each_se_block_in_the_layer_of_its_block() -> None:
    model = inject_se(timm.create_model("resnet50"))
    names = {id(p): name for name, p in model.named_parameters()}
    scales: dict[str, set[float]] = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for p in group["params"]:
            block = ".".join(names[id(p)].split(".")[:2])
            scales.setdefault(block, set()).add(group["lr_scale"])
    blocks = [f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    assert all(len(scales[block]) == 1 for block in blocks)
    assert len({next(iter(scales[block])) for block in blocks}) > 1


def test_biases_of_se_blocks_do_not_decay(model: nn.Module) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, weight_decay=0.1)
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    se = {name: value for name, value in decay.items() if ".se." in name}
    assert {value for name, value in se.items() if name.endswith("bias")} == {0.0}
    assert {value for name, value in se.items() if name.endswith("weight")} == {0.1}
