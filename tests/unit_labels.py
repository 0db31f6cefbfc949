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


INCEPTION = UnitLabel(("cat",), why="The paper has the SE block after the concatenation.")
BESIDE_POOLED = UnitLabel(
    RELU, why="The one convolution beside the pooled input gets the SE block, as in ShuffleNet."
)
ACTIVATION = UnitLabel(
    RELU, False, "The paper has the SE block after the non-linearity of each convolution of VGG."
)

DENSE = UnitLabel(("convolution",), why="The new maps get the SE block.")

UNIT_LABELS: dict[str, UnitLabel] = {
    "torch.nn.modules.activation.ReLU": ACTIVATION,
    "timm.layers.norm_act.BatchNormAct2d": ACTIVATION,
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": UnitLabel(
        RELU,
        False,
        "The SE block comes after the pointwise convolution. LCNet's last two blocks have a gate"
        " already.",
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
    "timm.models.densenet.DenseLayer": DENSE,
    "torchvision.models.densenet._DenseLayer": DENSE,
    "timm.models.rdnet.DenseBlock": UnitLabel(
        ("convolution",),
        False,
        "The SE block comes after the last convolution, where BlockESE has its gate. BlockESE gets"
        " no second one.",
    ),
    "torchvision.models.shufflenetv2.InvertedResidual": UnitLabel(
        ("relu", "relu_"), why="The right branch gets the SE block, before the concatenation."
    ),
    "timm.models.selecsls.SelecSlsBlock": UnitLabel(
        ("relu", "relu_"),
        why="The output of the convolution after the concatenation gets the SE block.",
    ),
    "timm.models.vovnet.OsaBlock": UnitLabel(
        ("relu", "relu_"),
        why="As in ese_vovnet, the convolution after the concatenation gets the SE block.",
    ),
}
