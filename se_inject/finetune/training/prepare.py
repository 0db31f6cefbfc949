"""What one arm with one seed begins with: its network and its data."""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import nn

from se_inject.api import remove_se
from se_inject.errors import ArgumentError
from se_inject.finetune.data.loading import Data, data_of
from se_inject.finetune.data.parts import Split
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.network import base_of, blocks_of, head_of, with_head
from se_inject.plan.planner import make_plan


@dataclass(frozen=True)
class Prepared:
    network: nn.Module
    data: Data
    blocks: list[str]  # the names of the blocks that have SE in the arm with SE
    example: torch.Tensor  # [2, 3, H, W]


def prepare(settings: Settings, split: Split, arm: str, seed: int) -> Prepared:
    """Make the network and the data of an arm. Both arms of a seed begin with the same weights.

    Raises:
        ArgumentError: ``--train se`` would leave a new head untrained.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    network, config = base_of(settings)
    data = data_of(split, settings, config, seed)
    old = head_of(network)
    network = with_head(network, len(data.classes))
    if settings.train == "se" and head_of(network) is not old:
        raise ArgumentError(
            f"--train se keeps the head of {settings.model}, but that is for other classes than"
            f" the {len(data.classes)} of the data. Use --train se+head."
        )
    size = settings.img_size or config["input_size"][-1]
    example = torch.empty(2, 3, size, size)
    if not blocks_of(network):
        make_plan(network, settings, example).apply()
    blocks = blocks_of(network)
    if arm == "control":
        remove_se(network)
    return Prepared(network, data, blocks, example)
