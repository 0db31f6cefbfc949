"""``torch.compile`` and ``torch.export`` take an injected model wherever they take its base."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import open_gates, randomize
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject import inject_se
from se_inject.models.names import load_model

# Thirty families: what is special in each is its blocks, not its size.
SIZES = {
    64: """
        cs3darknet_focus_s convmixer_768_32 cspnext_tiny dla46x_c dpn48b edgenext_xx_small
        efficientvit_b0 efficientvit_m0 ese_vovnet57b fasternet_t0 fastvit_t8 focalnet_tiny_srf
        gernet_s ghostnet_050 hrnet_w18_small inception_next_atto mobilenetv2_035 mobilevit_xxs
        nf_resnet26 poolformerv2_s12 regnetx_002 repvit_m1 starnet_s050 test_convnext
        test_mambaout test_resnet torchvision/fcn_resnet50 torchvision/mnasnet0_5
        torchvision/resnet18
    """,
    224: "efficientformer_l1",
}
MODELS = [(name, size) for size, names in SIZES.items() for name in names.split()]


def outcome(run: Callable[[], Any]) -> Any:
    """What it returns, or the error: foreign models may raise anything here."""
    try:
        return run()
    except Exception as error:
        return error


def compiled(model: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    # The front end is what blocks matter to; inductor runs in test_living_with_pytorch.py.
    return torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).module()(x)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")  # of the libraries, about their models
@pytest.mark.parametrize(("name", "size"), MODELS)
def test_compiles_and_exports_if_the_base_does(name: str, size: int) -> None:
    model = randomize(load_model(name)).eval()
    x = torch.randn(2, 3, size, size)
    inject_se(model, example_input=x)
    open_gates(model)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(x))
        for through in (compiled, exported):
            result = outcome(lambda through=through: through(model, x))
            if isinstance(result, Exception):
                base = outcome(lambda through=through: through(load_model(name).eval(), x))
                assert isinstance(base, Exception), f"only the injected model: {result}"
                continue
            for a, b in zip(pytree.tree_leaves(result), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
