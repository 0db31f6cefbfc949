"""The model stays the object it was: types, keys, tensors, flags, hooks, and timm's interface."""

import copy
import inspect
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from helpers import open_gates, randomize
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from se_inject import SEInjectError, SqueezeExcite, inject_se, plan_se, remove_se, se_parameters


@pytest.fixture
def model() -> nn.Module:
    return randomize(timm.create_model("resnet18")).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


@torch.no_grad()
def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


# --- what stays --------------------------------------------------------------------------------


def test_the_root_keeps_its_type_and_blocks_are_instances_of_their_class(model: nn.Module) -> None:
    root = type(model)
    inject_se(model)
    assert type(model) is root
    block = model.layer1[0]
    assert isinstance(block, BasicBlock)
    assert type(block).__name__ == "SEBasicBlock"
    assert isinstance(block.se, SqueezeExcite)


def test_equal_blocks_share_one_class() -> None:
    model = inject_se(timm.create_model("resnet50"))
    assert type(model.layer1[1]) is type(model.layer1[2])
    assert issubclass(type(model.layer1[0]), Bottleneck)


def test_old_keys_keep_their_tensors_and_only_se_keys_are_added(model: nn.Module) -> None:
    before = dict(model.state_dict(keep_vars=True))
    inject_se(model)
    after = dict(model.state_dict(keep_vars=True))
    assert all(after[key] is tensor for key, tensor in before.items())
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    names = [f"se.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert set(after) - set(before) == {f"{block}.{name}" for block in blocks for name in names}


def test_frozen_stays_frozen_and_the_new_weights_learn(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    inject_se(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".se." in name or name.startswith("fc.") for name in learning)
    assert {id(p) for p in se_parameters(model)} < {
        id(p) for name, p in model.named_parameters() if name in learning
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_new_weights_take_device_dtype_and_mode(
    model: nn.Module, dtype: torch.dtype, device: str
) -> None:
    model.to(device, dtype)
    model.layer1.train()
    inject_se(model)
    assert {p.dtype for p in se_parameters(model)} == {dtype}
    assert {p.device.type for p in se_parameters(model)} == {device}
    assert model.layer1[0].se.training
    assert not model.layer2[0].se.training
    assert not model.training


def test_blocks_on_different_devices_get_their_own_se_device(model: nn.Module) -> None:
    model.layer4.to("meta")
    inject_se(model)
    assert model.layer3[0].se.fc1.weight.device.type == "cpu"
    assert model.layer4[0].se.fc1.weight.device.type == "meta"


def test_hooks_stay_and_do_not_run_during_injection(model: nn.Module, x: torch.Tensor) -> None:
    seen = []
    model.layer1[0].register_forward_hook(lambda *_: seen.append("block"))
    model.layer1[0].conv1.register_forward_pre_hook(lambda *_: seen.append("conv"))
    inject_se(model)
    assert seen == []
    run(model, x)
    assert seen == ["conv", "block"]


def test_buffers_and_mode_are_untouched_by_planning(model: nn.Module) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    plan_se(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_optimizer_made_before_keeps_working(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inject_se(model)
    before = model.layer1[0].conv1.weight.clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.layer1[0].conv1.weight)


def test_weight_norm_and_other_library_hooks_survive() -> None:
    model = timm.create_model("resnet18")
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    nn.utils.spectral_norm(model.layer1[0].conv2)
    x = torch.randn(1, 3, 64, 64)
    model.eval()
    before = run(model, x)
    assert torch.equal(before, run(inject_se(model), x))


# --- timm's interface --------------------------------------------------------------------------


def test_reset_classifier(model: nn.Module, x: torch.Tensor) -> None:
    inject_se(model).reset_classifier(7)
    assert run(model, x).shape == (2, 7)


def test_forward_features_and_pretrained_cfg(model: nn.Module, x: torch.Tensor) -> None:
    config = model.pretrained_cfg
    with torch.no_grad():
        before = model.forward_features(x)
        inject_se(model)
        assert torch.equal(before, model.forward_features(x))
        open_gates(model)
        assert not torch.equal(before, model.forward_features(x))
    assert model.pretrained_cfg is config


def test_features_only(x: torch.Tensor) -> None:
    model = randomize(timm.create_model("resnet18", features_only=True)).eval()
    with torch.no_grad():
        before = model(x)
        after = inject_se(model)(x)
    assert len(after) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(1 for m in model.modules() if isinstance(m, SqueezeExcite)) == 8


def test_gradient_checkpointing_gives_the_same_gradients(model: nn.Module, x: torch.Tensor) -> None:
    inject_se(model).train()
    open_gates(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).sum().backward()
        return [p.grad.clone() for p in se_parameters(model)]

    plain = gradients()
    model.set_grad_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_group_matcher_puts_each_se_block_into_its_blocks_layer(model: nn.Module) -> None:
    from timm.optim import param_groups_layer_decay

    inject_se(model)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    for i in (1, 2, 3, 4):
        block = getattr(model, f"layer{i}")[1]
        assert scale[id(block.se.fc1.weight)] == scale[id(block.conv1.weight)]


# --- copies, tools -----------------------------------------------------------------------------


def test_deepcopy_is_independent(model: nn.Module, x: torch.Tensor) -> None:
    inject_se(model)
    open_gates(model)
    twin = copy.deepcopy(model)
    expected = run(model, x)
    assert torch.equal(expected, run(twin, x))
    open_gates(twin)
    assert torch.equal(expected, run(model, x))
    assert torch.equal(run(remove_se(twin), x), run(remove_se(model), x))


def test_the_source_of_an_edited_forward_can_be_read(model: nn.Module) -> None:
    inject_se(model)
    assert "self.se(" in inspect.getsource(type(model.layer1[0]).forward)
    assert list(inspect.signature(model.layer1[0].forward).parameters) == ["x"]


def test_a_model_on_meta_gets_se_on_meta_and_can_be_materialised() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    inject_se(model)
    assert {p.device.type for p in se_parameters(model)} == {"meta"}
    model.to_empty(device="cpu")
    se = model.layer1[0].se
    se.fc1.weight.data.fill_(float("nan"))
    se.fc2.weight.data.fill_(float("nan"))
    se.reset_parameters()
    assert se.fc1.weight.std() > 0
    assert se.fc2.weight.eq(0).all()
    assert se.fc2.bias.eq(0).all()


def test_compile_has_no_graph_break(model: nn.Module, x: torch.Tensor) -> None:
    inject_se(model)
    open_gates(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, x), run(model, x))


def test_export(model: nn.Module, x: torch.Tensor) -> None:
    inject_se(model)
    open_gates(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(run(program.module(), x), run(model, x))


# --- se_parameters, plan -----------------------------------------------------------------------


def test_se_parameters_are_the_added_ones(model: nn.Module) -> None:
    before = {id(p) for p in model.parameters()}
    plan = plan_se(model)
    plan.apply()
    added = list(se_parameters(model))
    assert {id(p) for p in added} == {id(p) for p in model.parameters()} - before
    assert sum(p.numel() for p in added) == plan.added.params


# --- other attention ---------------------------------------------------------------------------


def test_a_users_layer_takes_the_place_of_se(model: nn.Module, x: torch.Tensor) -> None:
    before, keys = run(model, x), set(model.state_dict())
    plan = plan_se(model, se_layer=lambda channels: timm.layers.create_attn("eca", channels))
    plan.apply()
    block = model.layer1[0]
    assert type(block.se).__name__ == "EcaModule"
    added = list(se_parameters(model))
    assert sum(p.numel() for p in added) == plan.added.params > 0
    # By hand: the layer on the branch, then the addition and the activation of the block.
    h = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    out = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(h)))))
    with torch.no_grad():
        torch.testing.assert_close(block(h), torch.relu(block.se(out) + h))
    assert not torch.equal(before, run(model, x))
    assert set(remove_se(model).state_dict()) == keys
    assert torch.equal(before, run(model, x))


def test_planning_does_not_touch_a_users_layer(model: nn.Module) -> None:
    shared = timm.layers.create_attn("eca", 64)
    plan_se(model, include="layer1.*", se_layer=lambda channels: shared)
    assert {p.device.type for p in shared.parameters()} == {"cpu"}


def test_a_block_by_hand(model: nn.Module, x: torch.Tensor) -> None:
    """shortcut + gate * branch, with gates that are not 1."""
    inject_se(model)
    open_gates(model)
    block = model.layer1[0]
    h = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    out = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(h)))))
    z = torch.relu(block.se.fc1(out.mean((2, 3), keepdim=True)))
    gate = 2 * torch.sigmoid(block.se.fc2(z))
    with torch.no_grad():
        torch.testing.assert_close(block(h), torch.relu(h + gate * out))


def test_a_plan_is_frozen(model: nn.Module) -> None:
    plan = plan_se(model)
    with pytest.raises(AttributeError):
        plan.r = 8


# --- undo --------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, tuple[type, list[str], list[str]]]:
    return {
        name: (type(m), sorted(k for k in vars(m)), sorted(m._modules))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("resnet18", drop_path_rate=0.2),
        lambda: timm.create_model("mobilenetv2_100"),  # its `se` is taken by an nn.Identity
        lambda: timm.create_model("convnext_atto"),
        lambda: torchvision.models.regnet_x_400mf(),
    ],
    ids=["resnet18", "mobilenetv2_100", "convnext_atto", "torchvision regnet_x_400mf"],
)
def test_remove_se_restores_everything(
    build: Callable[[], nn.Module], x: torch.Tensor, device: str
) -> None:
    model = randomize(build()).to(device).eval()
    x = x.to(device)
    shape, state, before = snapshot(model), model.state_dict(keep_vars=True), run(model, x)
    assert remove_se(inject_se(model)) is model
    assert snapshot(model) == shape
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is tensor for key, tensor in state.items())
    assert torch.equal(before, run(model, x))


def test_remove_se_after_training_keeps_what_the_base_learnt(model: nn.Module) -> None:
    shape = snapshot(model)
    inject_se(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        optimizer.step()
    trained = {k: v.clone() for k, v in model.state_dict().items() if ".se." not in k}
    remove_se(model)
    assert snapshot(model) == shape
    fresh = timm.create_model("resnet18")
    fresh.load_state_dict(trained, strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(run(model.eval(), x), run(fresh.eval(), x))
    inject_se(model)  # and it can be injected anew


# --- all or nothing ----------------------------------------------------------------------------


class FaultError(Exception):
    pass


def fail_at(n: int, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    original, calls = getattr(owner, name), []

    def method(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == n:
            raise FaultError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(SqueezeExcite, "__init__", 8, id="making the last SE block"),
        # Each of the eight blocks gets its child, then its class.
        pytest.param(BasicBlock, "__setattr__", 15, id="attaching the last SE block"),
        pytest.param(BasicBlock, "__setattr__", 16, id="changing the last class"),
    ],
)
def test_a_fault_at_the_last_site_leaves_the_model_as_it_was(
    model: nn.Module,
    x: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
) -> None:
    shape, keys, before = snapshot(model), list(model.state_dict()), run(model, x)
    plan = plan_se(model)
    with monkeypatch.context() as patch:
        # The trial on copies, which comes first, would be what fails.
        patch.setattr("se_inject.plan.plan.verify", lambda *_: None)
        fail_at(call, patch, owner, name)
        with pytest.raises(FaultError):
            plan.apply()
    assert snapshot(model) == shape
    assert list(model.state_dict()) == keys
    assert torch.equal(before, run(model, x))
    plan.apply()  # the plan is still good


def test_a_second_injection_does_not_stack(model: nn.Module) -> None:
    inject_se(model)
    keys = list(model.state_dict())
    with pytest.raises(SEInjectError, match=r"SE blocks already \(8.*remove_se"):
        inject_se(model)
    assert list(model.state_dict()) == keys


def test_a_second_injection_fills_what_the_first_left_out(model: nn.Module) -> None:
    inject_se(model, include="layer4.*")
    four = model.layer4[0].se
    inject_se(model, r=8)
    assert model.layer4[0].se is four
    assert model.layer1[0].se.fc1.out_channels == 8
    assert sum(isinstance(m, SqueezeExcite) for m in model.modules()) == 8


def test_a_plan_made_before_another_injection_is_refused(model: nn.Module) -> None:
    plan = plan_se(model)
    inject_se(model)
    with pytest.raises(SEInjectError, match=r"since the plan was made\. Make a new plan"):
        plan.apply()
