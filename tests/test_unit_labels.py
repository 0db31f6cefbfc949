"""Planned are the units that the hand-made labels name, by the operations that really ran."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from unit_labels import UNIT_LABELS

from se_inject import plan_se
from se_inject.models.names import load_model
from se_inject.reasons import UNIT_REASONS

MODELS = [
    "torchvision/vgg11_bn",
    "torchvision/alexnet",
    "mobilenetv1_100",
    "lcnet_050",
    "repvgg_a0",
    "mobileone_s1",
    "torchvision/squeezenet1_1",
    "torchvision/googlenet",
    "torchvision/inception_v3",
    "inception_v3",
    "inception_v4",
    "densenet121",
    "torchvision/densenet121",
    "rdnet_tiny",
    "torchvision/shufflenet_v2_x0_5",
    "selecsls42",
    "vovnet39a",
]


class _Ends(TorchDispatchMode):
    """What each module ran, and the channels that it gave: seen by aten, without se_inject."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ran: dict[str, list[tuple[str, int]]] = {}
        self.running: list[str] = []
        self.hooks = []
        for name, module in model.named_modules():
            self.hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)),
                module.register_forward_hook(lambda *_: self.running.pop() and None),
            ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 4:
            for name in self.running:
                op = func.overloadpacket.__name__
                self.ran.setdefault(name, []).append((op, out.shape[1]))
        return out


@pytest.mark.filterwarnings("ignore")  # of the libraries, about their models
@pytest.mark.parametrize("name", MODELS)
def test_planned_are_the_units_that_the_labels_name(name: str) -> None:
    model = load_model(name, meta=True).eval()
    plan = plan_se(model)
    ends = _Ends(model)
    with torch.no_grad(), torch.device("meta"), ends:
        model(torch.empty(2, *plan.input_size, device="meta"))
    for hook in ends.hooks:
        hook.remove()

    sites = {site.block: site for site in plan.sites}
    skipped = {entry.block for entry in plan.skipped if entry.reason in UNIT_REASONS}
    assert max(Counter(site.block for site in plan.sites).values()) == 1
    for block, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        label = UNIT_LABELS.get(kind)
        site = sites.get(block)
        if site is None:
            missing = label is not None and label.always and block in ends.ran
            assert not missing or block in skipped, f"{block} ({kind})"
            continue
        assert label is not None, f"nobody has labelled {kind} yet"
        last = [channels for op, channels in ends.ran[block] if op in label.end]
        assert last, f"{block} ({kind}) ran no {label.end}"
        assert site.channels == last[-1], f"{block} ({kind})"
