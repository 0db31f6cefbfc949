"""Loads the chosen network of a run, ready to be measured and to predict."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from se_inject.api import remove_se
from se_inject.errors import ArgumentError, CheckpointError, first_line
from se_inject.finetune.options.choices import WITHOUT_SE
from se_inject.finetune.options.config import read_config
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.options.trust import check_code
from se_inject.finetune.runs.records import ARM, read_arm, read_classes
from se_inject.finetune.training.network import base_of, blocks_of, with_head
from se_inject.keep.load import load_se
from se_inject.keep.read import read_header

ArmName = Literal["se", "control"]
BEST = "best.safetensors"


@dataclass(frozen=True)
class Trained:
    """The best network of a run, in eval mode, and what it was trained for."""

    network: nn.Module
    settings: Settings
    classes: tuple[str, ...]
    data_config: dict[str, Any]  # how timm prepares images for it
    arm: ArmName = "se"
    mirrored: bool = False  # --tta: whether to average over each image and its mirror image

    def scores(self, images: Tensor) -> Tensor:
        """The scores [N, classes] of images [N, C, H, W], in float32 on the CPU."""
        if not self.mirrored:
            return self._scores(images)
        both = [self._scores(x).softmax(1) for x in (images, images.flip(-1))]
        return ((both[0] + both[1]) / 2).log()

    def _scores(self, images: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        scores: Tensor = self.network(images.to(device))
        return scores.float().cpu()


def load_run(folder: Path, *, trust_code: bool = False, arm: ArmName = "se") -> Trained:
    """Load the best network of a finished run.

    Args:
        trust_code: whether to import the ``module:callable`` that the configuration names.
        arm: the network with SE blocks, or the control. Of several seeds, the one with the best
            validation accuracy is taken. A run with --train head, norm or bias has only a network
            without SE blocks, which is then loaded in any case.

    Raises:
        ArgumentError: the folder has no finished run or no such arm, or it names code and is not
            trusted.
        CheckpointError: the files of the run are damaged.
    """
    settings = read_config(folder)
    check_code(settings.model, folder, trusted=trust_code)
    classes = read_classes(folder)
    if settings.train in WITHOUT_SE:
        arm = "control"
        network, config = _without_se(settings, folder / BEST, len(classes))
    elif arm == "control":
        network, config = _without_se(settings, _best_control(folder), len(classes))
    else:
        network, config = _with_se(settings, folder / BEST, len(classes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(network.eval().to(device), settings, classes, config, arm)


def _with_se(settings: Settings, best: Path, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    # The file holds all that was trained. Only a base that stayed frozen must be loaded again.
    network, config = base_of(replace(settings, pretrained=False, checkpoint=None))
    network = with_head(network, classes)
    if read_header(best).differing(network):
        network, config = base_of(settings)
        if blocks_of(network):  # save_se wrote the file of --checkpoint
            remove_se(network)
        network = with_head(network, classes)
    load_se(network, best, se_layer=settings.se_layer)
    return network, config


def _best_control(folder: Path) -> Path:
    """The weights of the control arm. Of several seeds, the best validation accuracy decides."""
    arms = [path.parent for path in sorted(folder.glob(f"control-*/{ARM}"))]
    if not arms:
        raise ArgumentError(f"{folder} has no control arm: it was trained without --control.")
    return max(arms, key=lambda own: float(read_arm(own / ARM)["val_acc"])) / BEST


def _without_se(settings: Settings, best: Path, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network without SE blocks. Its file is a whole state dict."""
    network, config = base_of(replace(settings, pretrained=False, checkpoint=None))
    network = with_head(network, classes)
    try:
        network.load_state_dict(load_file(best))
    except Exception as error:  # a damaged file, or one of another network
        raise CheckpointError(f"{best} is damaged ({first_line(error)}).") from error
    return network, config
