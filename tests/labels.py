"""Hand-made labels: which additions of which block class must, may or must never get an SE block.

Read from the source of each class, family by family. ``must``: a residual branch with a
convolution in it; a block of the class that has a gate already gets none. ``never``: attention,
token and re-parameterisable sums, fusion. ``arguable``: neither a convolutional residual block nor
clearly something else; what we do is written down, and tested all the same.
"""

from dataclasses import dataclass

from unit_labels import UNIT_LABELS


@dataclass(frozen=True)
class Label:
    verdict: str  # "must", "never", "arguable"
    sites: tuple[int, ...]  # how many SE blocks a block of the class may get
    note: str = ""
    gate_is_elsewhere: bool = False  # a per-channel scale that runs in it does not gate the branch
    channels_last: bool = False  # it adds maps [N, H, W, C]


MUST = Label("must", (1,))
MUST_LAST = Label("must", (1,), channels_last=True)
NEVER = Label("never", (0,))


def arguable(*sites: int, note: str, last: bool = False) -> Label:
    return Label("arguable", sites, note, channels_last=last)


def beside_gate(note: str) -> Label:
    return Label("must", (1,), note, gate_is_elsewhere=True)


POSITION = (
    "It is a depthwise convolution that encodes the position. Its one residual branch gets an SE"
    " block."
)
UNITS = (
    "It has attention and a feed-forward part of 1x1 convolutions. Each part with a convolution"
    " gets an SE block."
)
WRAPPER = (
    "It wraps convolution blocks as well as attention, and gets an SE block if there is a"
    " convolution in it."
)

VALUES = "Its value branch adds a depthwise convolution. The class cannot be traced."

LABELS: dict[str, dict[str, Label]] = {
    "timm.layers": {
        "attention.AttentionRope": NEVER,
        "bottleneck_attn.PosEmbedRel": NEVER,
        "grn.GlobalResponseNorm": NEVER,
        "halo_attn.HaloAttn": NEVER,
        "halo_attn.PosEmbedRel": NEVER,
        "lambda_layer.LambdaLayer": NEVER,
        "non_local_attn.BatNonLocalAttn": arguable(
            1, note="It has a residual addition with a convolution inside an attention module."
        ),
    },
    "timm.models": {
        "_efficientnet_blocks.CondConvResidual": MUST,
        "_efficientnet_blocks.ConvBnAct": MUST,
        "_efficientnet_blocks.DepthwiseSeparableConv": MUST,
        "_efficientnet_blocks.EdgeResidual": MUST,
        "_efficientnet_blocks.InvertedResidual": MUST,
        "_efficientnet_blocks.MobileAttention": arguable(
            1, note="It has attention between convolutions, in place of an inverted residual."
        ),
        "_efficientnet_blocks.UniversalInvertedResidual": MUST,
        "byobnet.BasicBlock": MUST,
        "byobnet.BottleneckBlock": MUST,
        "byobnet.DarkBlock": MUST,
        "byobnet.EdgeBlock": MUST,
        "byobnet.MobileOneBlock": NEVER,
        "byobnet.RepVggBlock": NEVER,
        "byobnet.SelfAttnBlock": MUST,
        "coat.ConvPosEnc": arguable(1, note=POSITION),
        "coat.FactorAttnConvRelPosEnc": NEVER,
        "convmixer.Residual": MUST,
        "convnext.ConvNeXtBlock": beside_gate("GRN is a norm, not a gate"),
        "cpubone.ResidualBlock": MUST,
        "csatv2.Block": beside_gate("GRN is a norm, not a gate"),
        "csatv2.PosConv": arguable(1, note=POSITION),
        "csatv2.SpatialTransformerBlock": arguable(1, note=UNITS),
        "csatv2.TransformerBlock": arguable(1, note=UNITS),
        "cspnet.BottleneckBlock": MUST,
        "cspnet.DarkBlock": MUST,
        "cspnet.EdgeBlock": MUST,
        "cspnext.CspNextBlock": MUST,
        "davit.ConvPosEnc": arguable(1, note=POSITION),
        "dla.DlaBasic": MUST,
        "dla.DlaBottle2neck": MUST,
        "dla.DlaBottleneck": MUST,
        "dla.DlaRoot": arguable(
            1, note="It aggregates maps, and has a residual addition only if residual_root is set."
        ),
        "dpn.DualPathBlock": arguable(
            1, note="Of its two paths, the one that is added gets the SE block."
        ),
        "edgenext.ConvBlock": arguable(
            0,
            1,
            note="It gets none if the shortcut starts after the convolution (shortcut_after_dw).",
        ),
        "edgenext.SplitTransposeBlock": arguable(
            1,
            note="It has split convolutions and then attention. The whole branch gets one SE block.",
        ),
        "efficientformer.MetaBlock2d": arguable(1, note=UNITS),
        "efficientformer_v2.Attention2d": arguable(0, note=VALUES),
        "efficientformer_v2.Attention2dDownsample": arguable(0, note=VALUES),
        "efficientformer_v2.Downsample": arguable(
            1,
            note="It adds a convolution and an attention. The deeper of the two gets the SE block.",
        ),
        "efficientformer_v2.EfficientFormerV2Block": arguable(1, 2, note=UNITS),
        "efficientformer_v2.LocalGlobalQuery": arguable(
            1, note="It adds a pooled query and a convolved one."
        ),
        "efficientvim.EfficientViMBlock": arguable(
            0, note="It computes x + a (f(x) - x), where an SE block would scale the identity."
        ),
        "efficientvim.PatchMerging": NEVER,
        "efficientvit_mit.ResidualBlock": MUST,
        "efficientvit_msra.CascadedGroupAttention": NEVER,
        "efficientvit_msra.ResidualDrop": arguable(1, note=WRAPPER),
        "eva.EvaAttention": NEVER,
        "fasternet.MLPBlock": MUST,
        "fastvit.AttentionBlock": arguable(1, note=UNITS),
        "fastvit.MobileOneBlock": NEVER,
        "fastvit.RepConditionalPosEnc": NEVER,
        "fastvit.RepMixer": NEVER,
        "fastvit.RepMixerBlock": MUST,
        "fastvit.ReparamLargeKernelConv": NEVER,
        "focalnet.FocalModulation": NEVER,
        "focalnet.FocalNetBlock": arguable(
            2, note="Its focal modulation is made of convolutions, and so is its feed-forward part."
        ),
        "gcvit.GlobalContextVitBlock": NEVER,
        "gcvit.MbConvBlock": MUST,
        "gemma4_vit.Gemma4Attention": NEVER,
        "ghostnet.GhostBottleneck": MUST,
        "ghostnet.GhostBottleneckV3": MUST,
        "ghostnet.GhostModuleV3": NEVER,
        "hgnet.HighPerfGpuBlock": arguable(
            1,
            note="It aggregates all its layers before the shortcut is added, so it gets one SE block.",
        ),
        "hieradet_sam2.MultiScaleBlock": NEVER,
        "hrnet.HighResolutionModule": NEVER,
        "hrnet.HighResolutionNet": NEVER,
        "iformer.Residual": arguable(1, note=WRAPPER),
        "inception_next.MetaNeXtBlock": MUST,
        "inception_resnet_v2.Block17": MUST,
        "inception_resnet_v2.Block35": MUST,
        "inception_resnet_v2.Block8": MUST,
        "lcnetv2.RepDepthwiseSeparable": arguable(
            0,
            1,
            note="Its re-parameterisable sums get none. It gets one where it adds its input.",
        ),
        "levit.LevitBlock": arguable(2, note=UNITS),
        "levit.LevitDownsample": arguable(1, note=UNITS),
        "lowformer.ResidualBlock": MUST,
        "mambaout.GatedConvBlock": MUST_LAST,
        "maxxvit.ConvNeXtBlock": MUST,
        "maxxvit.MbConvBlock": MUST,
        "maxxvit.ParallelPartitionAttention": NEVER,
        "maxxvit.PartitionAttentionCl": NEVER,
        "maxxvit.TransformerBlock2d": arguable(2, note=UNITS),
        "metaformer.MetaFormerBlock": arguable(
            1,
            2,
            note="A pooling mixer gets none. A convolutional mixer and the feed-forward part get"
            " one each.",
        ),
        "mobilevit.LinearTransformerBlock": arguable(2, note=UNITS),
        "mvitv2.MultiScaleAttention": NEVER,
        "nasnet.CellStem0": NEVER,
        "nasnet.CellStem1": NEVER,
        "nasnet.FirstCell": NEVER,
        "nasnet.NormalCell": NEVER,
        "nasnet.ReductionCell0": NEVER,
        "nasnet.ReductionCell1": NEVER,
        "nest.TransformerLayer": NEVER,
        "nextvit.NextConvBlock": arguable(2, note=UNITS),
        "nextvit.NextTransformerBlock": arguable(2, note=UNITS),
        "nfnet.NormFreeBlock": MUST,
        "pnasnet.Cell": NEVER,
        "pnasnet.CellStem0": NEVER,
        "regnet.Bottleneck": MUST,
        "regnet.PreBottleneck": MUST,
        "repghost.RepGhostBottleneck": MUST,
        "repghost.RepGhostModule": NEVER,
        "repvit.RepVggDw": NEVER,
        "repvit.RepViTBlock": beside_gate("the SE of the token mixer comes before the fork"),
        "repvit.RepVitDownsample": MUST,
        "res2net.Bottle2neck": MUST,
        "resnest.ResNestBottleneck": MUST,
        "resnet.BasicBlock": MUST,
        "resnet.Bottleneck": MUST,
        "resnetv2.Bottleneck": MUST,
        "resnetv2.PreActBasic": MUST,
        "resnetv2.PreActBottleneck": MUST,
        "rexnet.LinearBottleneck": MUST,
        "senet.SEBottleneck": MUST,
        "senet.SEResNeXtBottleneck": MUST,
        "senet.SEResNetBlock": MUST,
        "senet.SEResNetBottleneck": MUST,
        "sequencer.Sequencer2dBlock": NEVER,
        "shvit.Residual": arguable(
            0, 1, note="It gets none if the wrapper folds into the single convolution in it."
        ),
        "sknet.SelectiveKernelBasic": MUST,
        "sknet.SelectiveKernelBottleneck": MUST,
        "starnet.Block": MUST,
        "swiftformer.Block": arguable(1, note=UNITS),
        "swiftformer.ConvEncoder": MUST,
        "swiftformer.LocalRepresentation": MUST,
        "swin_transformer.SwinTransformerBlock": NEVER,
        "swin_transformer_v2.SwinTransformerV2Block": NEVER,
        "swin_transformer_v2_cr.SwinTransformerV2CrBlock": NEVER,
        "tiny_vit.MBConv": MUST,
        "tiny_vit.TinyVitBlock": NEVER,
        "tresnet.BasicBlock": MUST,
        "tresnet.Bottleneck": MUST,
        "twins.PosConv": arguable(1, note=POSITION),
        "visformer.Block": arguable(1, 2, note=UNITS),
        "vision_transformer_sam.Attention": NEVER,
        "vision_transformer_sam.Block": NEVER,
        "vitamin.MbConvLNBlock": MUST,
        "volo.Outlooker": NEVER,
        "volo.Transformer": NEVER,
        "vovnet.OsaBlock": MUST,
        "xception.Block": MUST,
        "xception_aligned.PreXceptionModule": MUST,
        "xception_aligned.XceptionModule": MUST,
    },
    "torchvision": {
        "models.convnext.CNBlock": MUST,
        "models.efficientnet.FusedMBConv": MUST,
        "models.efficientnet.MBConv": MUST,
        "models.maxvit.MBConv": MUST,
        "models.maxvit.PartitionAttentionLayer": NEVER,
        "models.mnasnet._InvertedResidual": MUST,
        "models.mobilenetv2.InvertedResidual": MUST,
        "models.mobilenetv3.InvertedResidual": MUST,
        "models.optical_flow.raft.BottleneckBlock": MUST,
        "models.optical_flow.raft.ConvGRU": NEVER,
        "models.optical_flow.raft.RAFT": NEVER,
        "models.optical_flow.raft.ResidualBlock": MUST,
        "models.quantization.mobilenetv2.QuantizableInvertedResidual": MUST,
        "models.quantization.mobilenetv3.QuantizableInvertedResidual": MUST,
        "models.quantization.resnet.QuantizableBasicBlock": MUST,
        "models.quantization.resnet.QuantizableBottleneck": MUST,
        "models.regnet.ResBottleneckBlock": MUST,
        "models.resnet.BasicBlock": MUST,
        "models.resnet.Bottleneck": MUST,
        "models.segmentation.lraspp.LRASPPHead": NEVER,
        "models.swin_transformer.SwinTransformerBlock": NEVER,
        "models.swin_transformer.SwinTransformerBlockV2": NEVER,
        "models.video.mvit.MultiscaleAttention": NEVER,
        "models.video.resnet.BasicBlock": MUST,
        "ops.feature_pyramid_network.FeaturePyramidNetwork": NEVER,
    },
}


FAMILIES = """
## Whole families of networks

These rules hold for every network, whatever its classes are called.

| family | what is done |
|---|---|
| feature pyramid, hourglass, U-Net that adds its skips | If only one operand comes from a smaller map (it is interpolated, upsampled, pixel-shuffled, unpooled or a transposed convolution), the sum is a fusion, however deep that operand is. Residual blocks in the stages keep their SE blocks. A branch that also has a path of full resolution is not a decoder (U²-Net's blocks). Neither is attention that one child computes on a smaller map and brings back (LowFormer, CPUBone, EfficientFormerV2). |
| up- and downsampling residual blocks | Both operands are resampled, and the block gets one SE block (BigGAN, diffusers). |
| CSP stages that add two paths | The sum is a fusion if the second path has an activation after its last convolution, or if the first path is a 1x1 convolution and then two residual units or more. One unit beside a plain projection is a residual block. |
| global residual of super-resolution and denoising | If the sum has at most three channels and comes from a wider map, it is an image and gets no SE block. EDSR's global residual on features gets one. |
| one convolution beside a 1x1 projection | This is a residual block, like its siblings with an identity, and the spatial convolution gets one SE block. If the maps get smaller and the branch has an activation, the projection may be spatial (MONAI's strided units). Two 1x1 or two 3x3 convolutions are a fusion. In timm and torchvision, only re-parameterisable blocks look like this. |
| re-parameterisable sums | There are two cases. In the first, all paths are linear, and the class has a method that folds them (its name or its text says so: it reads running variances, or makes a kernel and replaces layers). The second is RepVGG's sum of three terms, of which one is a bare norm. `fuse_model` of quantizable networks folds no branch. |
| conditioned blocks (time, mask, style) | The split point is the step that both operands come from, and second inputs count as parameters. A scale that is computed from the condition alone is not channel attention. |
| gates, depth and shortcuts in the caller | The operations that made the arguments of a block before the call count too. A gate that is given as an argument (`x + conv(x) * g`) is a gate, but a style or a time is not. |
| an addition in a module of its own | The branch gets one SE block. It is in the caller, or in the adding module if the caller is an `nn.Sequential` or the module does more than add. |
| zero-padded shortcuts | A concatenation counts as padding if no convolution or Linear is on the way to it. |
| additions in other words | `addcmul` with a layer scale, `stack([x, h]).sum(0)`, `sub(alpha=-1)`, `h - (-x)` and `torch.ops.aten.add` are served. A weighted mean (`lerp`, `stack(...).mean(0)`), sums of more than two stacked maps, `einsum` over a stack, `index_add`, `_foreach_add`, `addcmul` of two maps and `torch.add(out=)` are listed with a reason: the SE block would scale more than the branch, or there is no place for it. |

None of these rules changes a site of timm or torchvision. One reason changes: the head of
`torchvision/lraspp_mobilenet_v3_large` is a fusion, because only one of its maps is upsampled.
"""


def label_of(kind: str) -> Label | None:
    """The label of a class by its full name; None if nobody has looked at that class yet."""
    for package, labels in LABELS.items():
        if kind.startswith(f"{package}."):
            return labels.get(kind.removeprefix(f"{package}."))
    return None


def page() -> str:
    """``docs/arguable.md``: what we do where a residual site is a matter of opinion."""
    lines = [
        "# Arguable blocks",
        "",
        "For most additions the answer is plain: a residual branch with a convolution gets an SE",
        "block, and any other addition is listed with the reason. The blocks on this page are",
        "arguable. The table says how many SE blocks each of them gets, unless its branch has a gate",
        "already. `include=` and `exclude=` let you decide otherwise. `tests/labels.py` has all labels,",
        "and `python tests/labels.py` writes this page.",
        "",
        "| block class | SE blocks | remark |",
        "|---|---|---|",
    ]
    for package, labels in LABELS.items():
        lines += [
            f"| `{package}.{name}` | {' or '.join(map(str, label.sites))} | {label.note} |"
            for name, label in labels.items()
            if label.verdict == "arguable"
        ]
    lines += [
        "",
        "## Units",
        "",
        "Networks without residual additions get their SE blocks on modules of these classes",
        "(`where=`). The list is that of `tests/unit_labels.py`. *Not all* means that a module of the",
        "class gets an SE block only if it comes after a convolution and has no gate.",
        "",
        "| class | on the output of its last | remark |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {label.end[0]}{'' if label.always else ' (not all)'} | {label.why} |"
        for name, label in UNIT_LABELS.items()
    ]
    return "\n".join(lines) + "\n" + FAMILIES


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).parents[1].joinpath("docs", "arguable.md").write_text(page())
