"""timm's other attention by name: each kind is injected, learns, and is taken out again."""

import inspect
import re

import pytest
import timm
import torch
from timm.layers import EcaModule
from timm.layers.create_attn import get_attn

from se_inject import ArgumentError, inject_se, plan_se, remove_se, se_parameters
from se_inject.layers.attention import ATTENTIONS, Attention
from se_inject.models.names import load_model

# What a layer needs that a number of channels does not tell, on maps of 224-pixel images.
NEEDS_MORE = {
    "bottleneck": r"^create_attn\('bottleneck', 64\) fails .*concrete feature size",
    "halo": r"^create_attn\('halo', 128\) on a map \[1, 128, 28, 28\] fails",
}
# Cut maps into windows of 7 and of 8 pixels.
SIDES = {"bat": 224, "halo": 256}


def test_the_names_are_those_that_timm_knows() -> None:
    known = re.findall(r"attn_type == '(\w+)'", inspect.getsource(get_attn))
    assert sorted(ATTENTIONS) == sorted(known)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "bottleneck"])
def test_a_kind_learns_on_resnet18_and_is_removed(name: str) -> None:
    """One block in each stage: a second one would be given the same layer once more."""
    options = {"layers": (1, 1, 1, 1), "num_classes": 4, "zero_init_last": False}
    model = timm.create_model("resnet18", **options)
    keys = list(model.state_dict())
    x = torch.randn(2, 3, *[SIDES.get(name, 64)] * 2)
    inject_se(model, example_input=x, se_layer=Attention(name))
    learning = {n: p for n, p in model.named_parameters() if ".se." in n}
    assert {id(p) for p in se_parameters(model)} == {id(p) for p in learning.values()}
    before = {n: p.detach().clone() for n, p in learning.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model.train()(x).logsumexp(1).square().mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert any(not torch.equal(p, before[n]) for n, p in learning.items())
    assert list(remove_se(model).state_dict()) == keys
    assert model(x).isfinite().all()


@pytest.mark.parametrize("name", NEEDS_MORE)
def test_a_kind_that_needs_more_is_a_clear_error(name: str) -> None:
    model = load_model("resnet18", meta=True)
    with pytest.raises(ArgumentError, match=NEEDS_MORE[name]) as caught:
        plan_se(model, se_layer=Attention(name))
    assert len(str(caught.value).splitlines()) <= 2


def test_an_unknown_name_gets_near_names() -> None:
    with pytest.raises(ArgumentError, match=r"no attention 'ecca' in timm; use .*eca"):
        Attention("ecca")


def test_other_attention_takes_every_placement() -> None:
    model = load_model("resnet18", meta=True)
    plan = plan_se(model, placement="pre", se_layer=Attention("eca"))
    assert len(plan.sites) == 8
    assert plan.to_dict()["variant"] == {"placement": "pre", "attention": "eca"}


def test_a_layer_of_the_user_gets_the_dtype_of_its_block() -> None:
    model = inject_se(timm.create_model("test_resnet").double(), se_layer=EcaModule)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
