"""record_gates and gate_statistics: gates are those of the formula, and nothing else changes."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from blocks import Plain, Root
from helpers import open_gates, randomize
from test_variants import GATE_FORMULAS, VARIANTS, text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from se_inject import ArgumentError, DataError, NoSiteError, SqueezeExcite, inject_se
from se_inject.errors import UnsupportedModelError
from se_inject.gates import gate_statistics, record_gates
from se_inject.layers.layout import Layout

X = torch.randn(3, 3, 64, 64)


def by_hand(layer: SqueezeExcite, layout: Layout, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The gate [N, C] from eq. 2 to 4 of the paper; without a squeeze, its mean over positions."""
    x = x.movedim(layout.channel_dim, 1).flatten(2)
    if options["squeeze"] == "avg":
        x = x.sum(2, keepdim=True) / x.shape[2]
    elif options["squeeze"] == "max":
        x = x.max(2, keepdim=True).values
    w1, w2 = layer.fc1.weight.flatten(1), layer.fc2.weight.flatten(1)
    b1, b2 = (0 if fc.bias is None else fc.bias[:, None] for fc in (layer.fc1, layer.fc2))
    h = torch.einsum("oc,ncp->nop", w1, x) + b1
    h = torch.einsum("oc,ncp->nop", w2, h * (h > 0)) + b2
    gate = GATE_FORMULAS[options["gate"], options["init"]](h)
    return gate.sum(2) / gate.shape[2]


LAYOUTS = {
    "NCHW": (Layout(4, 1), (2, 24, 7, 5)),
    "NHWC": (Layout(4, 3), (2, 7, 5, 24)),
    "NCTHW": (Layout(5, 1), (2, 24, 3, 7, 5)),
    "NCL": (Layout(3, 1), (2, 24, 9)),
}


@pytest.mark.parametrize("options", VARIANTS, ids=text)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "sum"])
def test_gates_are_those_of_the_formula(added: bool, layout: str, options: dict[str, Any]) -> None:
    where, shape = LAYOUTS[layout]
    se = SqueezeExcite(24, 8, layout=where, **options, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    x = torch.randn(shape, dtype=torch.float64)
    with record_gates(nn.ModuleDict({"se": se})) as gates:
        se(x, x) if added else se(x)
    expected = by_hand(se, where, x, options)
    torch.testing.assert_close(gates["se"], expected, rtol=1e-12, atol=1e-12)
    assert not gates["se"].requires_grad


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", Layout(4, 1)),
        ("test_mambaout", Layout(4, 3)),
        ("mobilenetv2_035", Layout(4, 1)),
    ],
)
@pytest.mark.parametrize("placement", ["standard", "pre"])
@pytest.mark.parametrize("squeeze", ["avg", "none"])
def test_gates_of_injected_networks(
    name: str, layout: Layout, placement: Any, squeeze: Any
) -> None:
    model = inject_se(timm.create_model(name), placement=placement, squeeze=squeeze).eval()
    open_gates(model)
    seen: dict[SqueezeExcite, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeExcite)}
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].clone()))
    with record_gates(model) as gates:
        model(X)
    assert len(gates) == len(layers) > 3
    options = {"squeeze": squeeze, "gate": "sigmoid", "init": "identity"}
    for name, layer in layers.items():
        block = name.rpartition(".")[0]
        torch.testing.assert_close(gates[block], by_hand(layer, layout, seen[layer], options))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("squeeze", ["avg", "none"])
def test_gates_of_units(squeeze: Any, compiled: bool) -> None:
    """On the activations of a chain, on a concatenation, under autocast, and when compiled."""

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    chain = [nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU()]
    for layers, names, channels in (
        ([*chain, nn.Conv2d(16, 2, 1)], ["1", "3"], 16),
        ([nn.Conv2d(3, 16, 1), Join(), nn.Conv2d(32, 2, 1)], ["1"], 32),
    ):
        model = inject_se(nn.Sequential(*layers), squeeze=squeeze, example_input=X).eval()
        open_gates(model)
        seen: dict[str, Tensor] = {}
        for name in names:
            model[int(name)].se.register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.__setitem__(name, args[0].clone())
            )
        with torch.no_grad():
            before = model(X)
        run: Any = model
        if compiled:
            torch._dynamo.reset()
            run = torch.compile(model, backend="eager")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", ".*runs uncompiled")
            with record_gates(run) as gates:
                assert torch.equal(run(X), before)
        assert list(gates) == names
        assert {gate.shape for gate in gates.values()} == {(3, channels)}
        options = {"squeeze": squeeze, "gate": "sigmoid", "init": "identity"}
        for name in names:
            expected = by_hand(model[int(name)].se, Layout(4, 1), seen[name], options)
            torch.testing.assert_close(gates[name], expected)
        with torch.autocast("cpu", torch.bfloat16), record_gates(model) as gates:
            model(X)
        assert {gate.dtype for gate in gates.values()} == {torch.bfloat16}


def test_a_block_with_several_se_blocks_names_each() -> None:
    model = inject_se(timm.create_model("levit_conv_128s"), include="stages.0.blocks.0").eval()
    with record_gates(model) as gates:
        model(torch.randn(1, 3, 224, 224))
    assert list(gates) == ["stages.0.blocks.0.se", "stages.0.blocks.0.se2"]


def test_only_the_last_call_is_kept() -> None:
    model = inject_se(Root(Plain()), example_input=torch.randn(2, 16, 8, 8))
    open_gates(model)
    a, b = torch.randn(2, 4, 16, 8, 8)
    with record_gates(model) as gates:
        model(a)
        first = gates["block"]
        model(b)
        assert not torch.equal(gates["block"], first)
        last = gates["block"]
        gates.clear()
        model(b)
        assert torch.equal(gates["block"], last)
    model(a)
    assert torch.equal(gates["block"], last)


# --- nothing changes, nothing stays ------------------------------------------------------------


def hooks(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    names += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


def network(**options: Any) -> nn.Module:
    model = inject_se(randomize(timm.create_model("test_resnet")), **options)
    open_gates(model)
    return model


@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("squeeze", ["avg", "none"])
def test_recording_changes_no_bit(squeeze: Any, training: bool, amp: bool, device: str) -> None:
    model = network(squeeze=squeeze).train(training).to(device)
    x = X.to(device)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            out = model(x)
        grads = torch.autograd.grad(out.square().mean(), list(model.parameters()))
        return [out, *grads, torch.rand(1)]

    run()  # the running statistics take no part in train mode, but in eval mode they do
    before, count = run(), hooks(model)
    with record_gates(model) as gates:
        during = run()
    assert all(map(torch.equal, during, before))
    assert hooks(model) == count
    assert all(map(torch.equal, run(), before))
    assert {gate.dtype for gate in gates.values()} == {torch.bfloat16 if amp else torch.float32}
    assert {len(gate) for gate in gates.values()} == {3}


class OopsError(Exception):
    pass


@pytest.mark.parametrize("where", ["body", "forward", "observer"])
def test_no_hook_stays_after_an_error(where: str) -> None:
    model = network().eval()
    before, count = model(X), hooks(model)
    modes = [module.training for module in model.modules()]
    if where == "body":
        with pytest.raises(OopsError), record_gates(model):
            raise OopsError
    elif where == "forward":
        with pytest.raises(RuntimeError), record_gates(model):
            model(X[:, :1])
    else:
        with pytest.raises(ArgumentError, match="from 0 to 1"):
            gate_statistics(model, [(X, torch.tensor([0, 1, 2]))], 2)
    assert hooks(model) == count
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model(X), before)


def test_recordings_can_be_nested_and_the_users_hooks_stay() -> None:
    model = network().eval()
    layer = next(m for m in model.modules() if isinstance(m, SqueezeExcite))
    layer.fc2.register_forward_hook(lambda module, args, output: output + 1)
    count = hooks(model)
    with record_gates(model) as outer, record_gates(model) as inner:
        model(X)
    assert all(map(torch.equal, outer.values(), inner.values()))
    assert hooks(model) == count


# --- wrapped models ----------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_has_the_names_of_the_model_inside() -> None:
    model = network()
    wrapped = DistributedDataParallel(model)
    with record_gates(wrapped) as gates:
        wrapped(X).sum().backward()
    with record_gates(model) as expected:
        model(X)
    assert list(gates) == list(expected)
    assert all(map(torch.equal, gates.values(), expected.values()))


@pytest.mark.parametrize("how", ["wrapper", "method", "around"])
def test_a_compiled_model_runs_uncompiled_with_a_word(how: str) -> None:
    torch._dynamo.reset()
    model = network().eval()
    expected = model(X)
    with record_gates(model) as plain:
        model(X)
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    target: Any = model
    if how == "method":
        model.compile(backend=backend)
    elif how == "wrapper":
        target = torch.compile(model, backend=backend)
    else:  # nothing of this is to be seen in the model, so that no word is said
        target = torch.compile(lambda x: model(x), backend=backend)
    target(X)
    assert calls.pop()
    if how == "around":
        with record_gates(model) as gates:
            out = target(X)
    else:
        with (
            pytest.warns(UserWarning, match="runs uncompiled") as said,
            record_gates(target) as gates,
        ):
            out = target(X)
        assert said[0].filename == __file__
    assert not calls
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gates.values(), plain.values()))
    target(X)
    assert calls
    assert not any(hooks(model))


def test_what_is_compiled_meanwhile_has_no_hook_in_it() -> None:
    torch._dynamo.reset()
    model = network().eval()
    with record_gates(model) as gates:
        program = torch.export.export(model, (X,), strict=False)
    assert not gates
    assert torch.equal(program.module()(X), model(X))


def test_what_has_no_gates_is_refused() -> None:
    with (
        pytest.raises(NoSiteError, match="ResNet has no SE block"),
        record_gates(timm.create_model("test_resnet")),
    ):
        pass
    other = inject_se(timm.create_model("test_resnet"), se_layer=lambda c: nn.Identity())
    with pytest.raises(NoSiteError, match="another se_layer"), record_gates(other):
        pass
    with (
        pytest.raises(UnsupportedModelError, match=r"model\.module"),
        record_gates(nn.DataParallel(network())),
    ):
        pass


# --- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("squeeze", ["avg", "none"])
@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 1, 4, 2)])
def test_statistics_are_those_of_all_gates_at_once(sizes: tuple[int, ...], squeeze: Any) -> None:
    model = network(squeeze=squeeze).eval()
    x, y = torch.randn(12, 3, 64, 64), torch.tensor([0, 2, 2, 0, 4, 4, 4, 0, 2, 0, 0, 4])
    with record_gates(model) as gates:
        model(x)
    loader = zip(x.split(sizes), y.split(sizes), strict=True)
    found = gate_statistics(model, loader, ["a", "b", "c", "d", "e"])
    assert found.images == 12
    assert [block.block for block in found.blocks] == list(gates)
    for block in found.blocks:
        gate = gates[block.block].double()
        near = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(block.channel_mean, gate.mean(0), **near)
        torch.testing.assert_close(block.channel_variance, gate.var(0), rtol=1e-3, atol=1e-9)
        residual = torch.cat([gate[y == k] - gate[y == k].mean(0) for k in (0, 2, 4)])
        within = residual.square().sum(0) / (12 - 3)
        torch.testing.assert_close(block.channel_within, within, rtol=1e-3, atol=1e-9)
        means = [gate[y == k].mean(0) if k % 2 == 0 else 0 * gate[0] for k in range(5)]
        torch.testing.assert_close(block.class_means.double(), torch.stack(means), **near)
        assert block.class_images.tolist() == [5, 0, 3, 0, 4]
        total, inside = gate.var(0).mean(), within.mean()
        assert block.spread == pytest.approx(total.sqrt().item(), rel=1e-3)
        assert block.within == pytest.approx(inside.sqrt().item(), rel=1e-3)
        share = max(0.0, 1 - (inside / total).item())
        assert block.class_share == pytest.approx(share, abs=1e-3)
        if squeeze == "avg":
            torch.testing.assert_close(block.channel_low, gate.min(0).values, **near)
            torch.testing.assert_close(block.channel_high, gate.max(0).values, **near)
        else:
            assert (block.channel_low < gate.min(0).values).all()
            assert (block.channel_high > gate.max(0).values).all()


def test_a_block_that_runs_twice_counts_twice() -> None:
    model = inject_se(
        Root(Plain(), lambda block, x: block(block(x))), example_input=torch.randn(2, 16, 8, 8)
    ).eval()
    found = gate_statistics(model, [torch.randn(4, 16, 8, 8)])
    assert (found["block"].images, found["plain"].images, found.images) == (8, 4, 4)


def test_modes_are_as_before() -> None:
    model = network().train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gate_statistics(model, [X])
    assert model.training
    assert not frozen.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("loader", "classes", "error", "match"),
    [
        ([], None, DataError, "no image"),
        ([{"image": X}], None, ArgumentError, "gives dict"),
        ([X], 3, ArgumentError, "tuples"),
        ([(X, torch.tensor([0, 1]))], 3, ArgumentError, "tuples"),
        ([(X, torch.tensor([0, 1, 3]))], 3, ArgumentError, "from 0 to 2"),
        ([(X, torch.tensor([0, -1, 1]))], 3, ArgumentError, "from 0 to 2"),
        ([(X, torch.rand(3))], 3, ArgumentError, "whole numbers"),
        ([X * torch.nan], None, DataError, "not finite"),
    ],
)
def test_loaders_that_cannot_work(
    loader: Any, classes: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        gate_statistics(network(), loader, classes)


def test_a_block_that_sees_another_batch_than_the_images() -> None:
    def windows(block: nn.Module, x: Tensor) -> Tensor:
        return block(torch.cat(x.chunk(2, 2)))

    model = inject_se(Root(Plain(), windows), example_input=torch.randn(2, 16, 8, 8))
    batch = (torch.randn(2, 16, 8, 8), torch.tensor([0, 1]))
    assert gate_statistics(model, [batch])["block"].images == 4
    with pytest.raises(ArgumentError, match="'block' sees a batch of 4 where the images are 2"):
        gate_statistics(model, [batch], 2)
