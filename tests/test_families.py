"""The smallest model of each family that has sites, run for real: same function, trained, undone.

On meta tensors nothing is computed; here everything is, with statistics and scales that would
show a norm or a branch that got lost.
"""

import copy
import re
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject import inject_se, remove_se, se_parameters
from se_inject.models.names import load_model

# The smallest images (at least 64 pixels) at which all sites of the model are found.
SIZES = {
    64: """
        gernet_s convmixer_768_32 test_convnext cpubone_nano csatv2 cs3darknet_focus_s
        cspnext_tiny davit_tiny dla46x_c dpn48b edgenext_xx_small mobilenetv2_035
        efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050
        hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto lcnetv2_small
        lowformer_b0 test_mambaout poolformerv2_s12 mobilenetv3_small_050 mobilenetv5_base
        mobilevit_xxs nextvit_small nf_resnet26 regnetx_002 repghostnet_050 repvit_m1 res2next50
        test_resnet resnetv2_18 rexnet_100 shvit_s1 starnet_s050 swiftformer_xs tiny_vit_5m_224
        tresnet_m ese_vovnet57b legacy_xception xception41p torchvision/convnext_tiny
        torchvision/efficientnet_v2_s torchvision/mnasnet0_5 torchvision/mobilenet_v2
        torchvision/mobilenet_v3_small torchvision/quantized_mobilenet_v2
        torchvision/quantized_mobilenet_v3_large torchvision/quantized_resnet18
        torchvision/regnet_x_400mf torchvision/resnet18 torchvision/deeplabv3_mobilenet_v3_large
        torchvision/fcn_resnet50 torchvision/lraspp_mobilenet_v3_large torchvision/mc3_18
    """,
    96: """
        inception_resnet_v2
    """,
    160: """
        test_coatnet
    """,
    224: """
        coat_tiny efficientformer_l1 efficientformerv2_s0 levit_conv_128s visformer_tiny
        vit_small_r26_s32_224 vitamin_small_224
    """,
    256: """
        halonet_h1
    """,
}
FAMILIES = [(name, size) for size, names in SIZES.items() for name in names.split()]

DETECTORS = [
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/fcos_resnet50_fpn",
    "torchvision/keypointrcnn_resnet50_fpn",
    "torchvision/maskrcnn_resnet50_fpn",
    "torchvision/retinanet_resnet50_fpn",
    "torchvision/ssdlite320_mobilenet_v3_large",
]

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),  # of the libraries, about their models
]


def run(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    """All tensors of the output, with the same random numbers every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model.train(training)(*inputs))


def tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def check(name: str, inputs: tuple[Any, ...], example: Any, targets: Any = None) -> None:
    torch.manual_seed(0)
    model = randomize(load_model(name))
    if targets is not None:  # a detector resizes what it gets, to 800 pixels
        model.transform.min_size, model.transform.max_size = (96,), 128
        if hasattr(model, "roi_heads"):
            model.roi_heads.detections_per_img = 4
            model.roi_heads.batch_size_per_image = 16  # of 512 boxes: heads cost the most
            model.rpn._post_nms_top_n = {"training": 32, "testing": 32}
    state = copy.deepcopy(model.state_dict())  # with the metadata that MNASNet asks for
    for_training = inputs if targets is None else (*inputs, targets)

    def outputs() -> list[Tensor]:
        model.load_state_dict(state, strict=False)  # train mode moves the statistics
        return run(model, inputs, False) + run(model, for_training, True)

    before = outputs()
    assert any(t.isfinite().all() and t.any() for t in before)
    inject_se(model, example_input=example)
    assert equal(outputs(), before)

    # fc1 has a gradient of zero until fc2, which starts at zero, has made its first step.
    # A rate that keeps small batches from blowing up; training in earnest is not the question.
    model.load_state_dict(state, strict=False)
    optimizer = torch.optim.SGD(se_parameters(model), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        output = tensors(model.train()(*for_training))
        loss = sum((t.float() ** 2).mean() for t in output if t.requires_grad)
        loss.backward()
        assert all(p.grad is not None for p in se_parameters(model))
        optimizer.step()
    silent = [
        key
        for key, p in model.named_parameters()
        if re.search(r"\bse\d?\.|\bse_inject", key) and p.grad is not None and not p.grad.any()
    ]
    # A bottleneck whose ReLU is dead for both images has none, which is three parameters of four;
    # most have one. Of five blocks or more, one may be dead.
    number = len(list(se_parameters(model)))
    assert len(silent) <= max(number // 10, 3 if number >= 20 else 0), silent
    remove_se(model)
    assert list(model.state_dict()) == list(state)
    assert equal(outputs(), before)


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_same_function_a_step_and_back(name: str, size: int) -> None:
    shape = (2, 3, 4, size, size) if name == "torchvision/mc3_18" else (2, 3, size, size)
    x = torch.randn(shape)
    check(name, (x,), x)


def test_optical_flow() -> None:
    images = (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
    check("torchvision/raft_small", images, images)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    """They are planned on images of the default size and serve any other."""
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 96)]
    targets = [
        {
            "boxes": torch.tensor([[10.0, 20.0, 80.0, 90.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
            "keypoints": torch.full((1, 17, 3), 40.0),
        }
        for image in images
    ]
    check(name, (images,), None, targets)
