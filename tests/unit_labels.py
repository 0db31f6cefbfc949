"""Labels by hand: which classes of networks without residual additions are units.

Read from the source of each class. ``end``: the operations one of which makes the map that the SE
block scales, by their names in aten. A class that is not here must get no SE block.
"""

from dataclasses import dataclass

RELU = ("relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_")


@dataclass(frozen=True)
class UnitLabel:
    end: tuple[str, ...]
    always: bool = True  # every module of the class is the end of a unit
    why: str = ""


INCEPTION = UnitLabel(("cat",), why="the paper has the SE block after the concatenation")
BESIDE_POOLED = UnitLabel(
    RELU, why="one convolution beside the pooled input: on that branch, as in ShuffleNet"
)
ACTIVATION = UnitLabel(RELU, False, "the paper on VGG: after the non-linearity of each convolution")

UNIT_LABELS: dict[str, UnitLabel] = {
    "torch.nn.modules.activation.ReLU": ACTIVATION,
    "timm.layers.norm_act.BatchNormAct2d": ACTIVATION,
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": UnitLabel(
        RELU, False, "after the pointwise convolution; LCNet's last two are gated already"
    ),
    "torchvision.models.squeezenet.Fire": INCEPTION,
    "torchvision.models.googlenet.Inception": INCEPTION,
    **{f"torchvision.models.inception.Inception{letter}": INCEPTION for letter in "ABCDE"},
    **{f"timm.models.inception_v3.Inception{letter}": INCEPTION for letter in "ABCDE"},
    **{f"timm.models.inception_v4.Inception{letter}": INCEPTION for letter in "ABC"},
    "timm.models.inception_v4.Mixed3a": BESIDE_POOLED,
    "timm.models.inception_v4.Mixed4a": INCEPTION,
    "timm.models.inception_v4.Mixed5a": BESIDE_POOLED,
    **{f"timm.models.inception_v4.Reduction{letter}": INCEPTION for letter in "AB"},
    "timm.models.densenet.DenseLayer": UnitLabel(("convolution",), why="on the new maps"),
    "torchvision.models.densenet._DenseLayer": UnitLabel(("convolution",), why="on the new maps"),
    "timm.models.rdnet.DenseBlock": UnitLabel(
        ("convolution",), False, "as BlockESE has its gate: behind the last convolution, not twice"
    ),
    "torchvision.models.shufflenetv2.InvertedResidual": UnitLabel(
        ("relu", "relu_"), why="on the right branch, before the concatenation"
    ),
    "timm.models.selecsls.SelecSlsBlock": UnitLabel(
        ("relu", "relu_"), why="a convolution follows the concatenation: on its output"
    ),
    "timm.models.vovnet.OsaBlock": UnitLabel(
        ("relu", "relu_"), why="as ese_vovnet: on the convolution after the concatenation"
    ),
}
