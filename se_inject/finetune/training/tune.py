"""``--lr auto`` and ``--batch-size auto``: Lightning's tuner finds them before the run begins."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner.tuning import Tuner
from rich.console import Console
from torch.utils.data import DataLoader

from se_inject.errors import ArgumentError, TrainingError
from se_inject.finetune.data.loading import Images, loader
from se_inject.finetune.data.parts import limited
from se_inject.finetune.data.split import open_split
from se_inject.finetune.options.choices import WITHOUT_SE, Train
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.machine import precision_of, processes
from se_inject.finetune.training.prepare import Prepared, prepare
from se_inject.finetune.training.recipe import Recipe

_RATES = (1e-5, 1.0)  # the lowest and the highest rate that are tried
_STEPS = 100


def find_settings(
    settings: Settings, find: frozenset[str], folder: Path, console: Console
) -> Settings:
    """Return the settings with the numbers that were found.

    Args:
        find: what is to be found: "lr", "batch_size" or both.

    Raises:
        ArgumentError: there is no rate at which the loss falls.
    """
    split = limited(open_split(settings), settings.limit)
    prepared = prepare(settings, split, settings.arms[0], settings.seed)
    if "batch_size" in find:
        settings = replace(settings, batch_size=_batch_size(settings, prepared, folder))
        console.print(f"--batch-size auto: {settings.batch_size}", highlight=False)
    if "lr" in find:
        settings = replace(settings, lr=_rate(settings, prepared, folder))
        console.print(f"--lr auto: {settings.lr:.3g}", highlight=False)
    return settings


def check_alone(settings: Settings) -> None:
    """Raise an :class:`ArgumentError` if several processes are to train."""
    if processes(settings) > 1:
        raise ArgumentError(
            "--lr auto and --batch-size auto need a single process. Find the numbers with"
            " --devices 1 --epochs 1, and give these to several processes."
        )


def _rate(settings: Settings, prepared: Prepared, folder: Path) -> float:
    """The rate at which the loss falls fastest, while the SE blocks and the head learn alone.

    With --train head, norm or bias, the rate is found for the parameters that learn then.
    """
    low, high = _RATES
    train: Train = settings.train if settings.train in WITHOUT_SE else "se+head"
    while high > low:
        recipe = _recipe(replace(settings, train=train, ema=None), prepared)
        batches = loader(prepared.data.train, settings, training=True, epoch=0, rank=0, world=1)
        try:
            found = Tuner(_trainer(settings, folder)).lr_find(
                recipe,
                train_dataloaders=batches,
                min_lr=low,
                max_lr=high,
                num_training=_STEPS,
                update_attr=False,
            )
        except TrainingError:  # the loss was not a finite number
            high /= 10
            continue
        rate = None if found is None else found.suggestion()
        if rate is not None:
            return float(f"{rate:.3g}")
        break
    raise ArgumentError("--lr auto finds no rate at which the loss falls. Give a number.")


def _batch_size(settings: Settings, prepared: Prepared, folder: Path) -> int:
    """The largest power of two whose step fits into the memory of the GPU.

    Without a GPU, the batch size of the settings is kept.
    """
    if not torch.cuda.is_available():
        return settings.batch_size
    return largest_batch(settings, prepared, folder)


def largest_batch(settings: Settings, prepared: Prepared, folder: Path) -> int:
    """The largest power of two whose step fits into the memory while the most parameters learn."""
    recipe = _recipe(replace(settings, freeze_epochs=0, ema=None), prepared)
    batches = _Batches(prepared.data.train, settings)
    Tuner(_trainer(settings, folder)).scale_batch_size(recipe, datamodule=batches, init_val=8)
    return batches.batch_size


class _Batches(pl.LightningDataModule):
    """The training images in batches of a size that Lightning's tuner sets."""

    def __init__(self, images: Images, settings: Settings) -> None:
        super().__init__()
        self.images, self.settings, self.batch_size = images, settings, settings.batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        settings = replace(self.settings, batch_size=self.batch_size)
        return loader(self.images, settings, training=True, epoch=0, rank=0, world=1)

    def val_dataloader(self) -> DataLoader[Any]:
        """The tuner asks for these batches, but never takes one."""
        return self.train_dataloader()


def _recipe(settings: Settings, prepared: Prepared) -> Recipe:
    network = copy.deepcopy(prepared.network)
    return Recipe(network, settings, len(prepared.data.classes), settings.seed, prepared.blocks)


def _trainer(settings: Settings, folder: Path) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=10_000,  # the tuner limits the steps instead
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=precision_of(settings),
        gradient_clip_val=settings.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
