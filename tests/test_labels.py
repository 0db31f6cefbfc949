"""The site lists are right: against the aten operations that ran and labels made by hand.

``SE_INJECT_ZOO=all pytest tests/test_labels.py -n 2`` asks it of every model of timm and
torchvision; by default of the fewest models that have all block classes of both.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from additions import Frame, additions
from labels import label_of, page

from se_inject import NoSiteError, plan_se
from se_inject.graph.copies import meta_copy
from se_inject.graph.example import example_inputs
from se_inject.models.names import load_model
from se_inject.report.zoo import model_names

NAMES = """
bat_resnext26ts coat_lite_mini convformer_s18 convmixer_1024_20_ks9_p14 convnext_zepto_rms
convnextv2_pico cpubone_nano cs3edgenet_x cs3se_edgenet_x cs3sedarknet_xdw csatv2 cspnext_tiny
cspresnext50 darknet17 davit_tiny dla102 dla34 dla60_res2net dpn48b eca_resnet33ts eca_vovnet39b
ecaresnext26t_32x4d edgenext_small_rw efficientformer_l1 efficientformerv2_s0
efficientnet_cc_b0_4e efficientnet_x_b3 efficientvim_m1 efficientvit_l1 efficientvit_m2
ese_vovnet57b eva02_tiny_patch14_224 fasternet_t2 fastvit_mci0 focalnet_large_fl4
focalnet_tiny_lrf focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc gernet_s ghostnetv2_130
ghostnetv3_130 hgnet_tiny hgnetv2_b1 hieradet_small hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 lambda_resnet26rpt_256 lamhalobotnet50ts_256 lcnetv2_small legacy_senet154
legacy_seresnet34 legacy_seresnet50 legacy_seresnext26_32x4d legacy_xception levit_conv_512_s8
lowformer_e1 maxvit_tiny_pm_256 maxxvitv2_nano_rw_256 mnasnet_small mobilenetv5_base mobileone_s0
mobileone_s4 mobilevitv2_075 mvitv2_tiny nasnetalarge nest_tiny nextvit_small nf_ecaresnet26
nf_resnet26 pnasnet5large poolformer_s12 regnetv_040 regnetx_002 regnety_002 repghostnet_130
repvgg_a0 repvgg_d2se repvit_m1_1 res2net50_14w_8s res2net50_26w_6s res2next50 resnest14d
resnest50d_1s4x24d resnet61q resnetv2_18d resnetv2_50 rexnet_200 samvit_base_patch16_224
sedarknet21 sequencer2d_s seresnet18 seresnext26t_32x4d shvit_s2 skresnet18 skresnext50_32x4d
starnet_s050 swiftformer_s swin_s3_tiny_224 swinv2_cr_tiny_384 swinv2_tiny_window8_256
test_byobnet test_coatnet test_mambaout test_nfnet tf_efficientnetv2_b2 tiny_vit_5m_224
torchvision/convnext_tiny torchvision/efficientnet_v2_s
torchvision/fasterrcnn_mobilenet_v3_large_320_fpn torchvision/fasterrcnn_resnet50_fpn
torchvision/fcos_resnet50_fpn torchvision/lraspp_mobilenet_v3_large torchvision/maxvit_t
torchvision/mc3_18 torchvision/mnasnet1_3 torchvision/mobilenet_v2 torchvision/mvit_v2_s
torchvision/quantized_mobilenet_v2 torchvision/quantized_mobilenet_v3_large
torchvision/quantized_resnet18 torchvision/quantized_resnet50 torchvision/raft_large
torchvision/raft_small torchvision/regnet_x_1_6gf torchvision/regnet_y_800mf torchvision/resnet18
torchvision/swin3d_t torchvision/swin_t torchvision/swin_v2_t tresnet_m twins_pcpvt_small
visformer_small vit_pe_spatial_small_patch16_512 vit_small_r26_s32_384 vitamin_base_224
volo_d1_224 xception41 xception41p
"""
MODELS = model_names() if os.environ.get("SE_INJECT_ZOO") == "all" else NAMES.split()

# Adds inside what torch makes of scaled_dot_product_attention, not in the forward.
HIDDEN = {"timm.models.vision_transformer_sam.Attention"}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")  # of the libraries, about their models
@pytest.mark.parametrize("name", MODELS)
def test_planned_are_the_blocks_that_the_labels_say(name: str) -> None:
    model = load_model(name, meta=True)
    try:
        plan = plan_se(model, where="residual")  # units have their own labels: unit_labels.py
        sites, skipped, examples = plan.sites, plan.skipped, [plan.example]
    except NoSiteError as error:
        sites, skipped, examples = (), error.skipped, list(example_inputs(model, None))
    left_alone = Counter(entry.block for entry in skipped)
    frames: dict[str, list[Frame]] = {}
    for frame in ran(model, examples):
        frames.setdefault(frame.block, []).append(frame)

    assert {site.block for site in sites} <= set(frames)
    for block, calls in frames.items():
        kind = calls[0].kind
        label = label_of(kind)
        assert label is not None, f"nobody has labelled {kind} yet"
        here = [site for site in sites if site.block == block]
        gated = any(call.gated for call in calls) and not label.gate_is_elsewhere
        expected = (0,) if label.verdict != "never" and gated else label.sites
        assert len(here) in expected, f"{block} ({kind}): {len(here)} SE blocks, {label}"
        added = max((call.added for call in calls), key=len)
        channels = {shape[-1 if label.channels_last else 1] for shape in added}
        if label.verdict == "must":
            assert {site.channels for site in here} <= channels
        if kind not in HIDDEN:  # no silent skip
            assert len(here) + left_alone[block] >= len(added), f"{block} ({kind})"


def ran(model: torch.nn.Module, examples: list) -> list[Frame]:
    """What ran on the first example that the forward takes."""
    errors = []
    for args, kwargs in examples:
        try:
            return additions(meta_copy(model), args, kwargs)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            errors.append(error)
    raise errors[0]


def test_the_page_of_arguable_blocks_is_that_of_the_labels() -> None:
    """Otherwise: ``python tests/labels.py``."""
    assert Path(__file__).parents[1].joinpath("docs", "arguable.md").read_text() == page()
