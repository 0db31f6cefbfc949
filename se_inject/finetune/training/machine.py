"""The machine of a run: its processes, the Lightning Trainer, and how a run is stopped."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from se_inject.errors import ArgumentError, CheckpointError, TrainingError, first_line
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.callbacks import EarlyStop, RunFolder, WholeFiles, average_of
from se_inject.finetune.training.loggers import loggers_of
from se_inject.finetune.training.progress import EpochBar, EpochLines
from se_inject.finetune.training.recipe import Recipe


def rank() -> int:
    """The number of this process. Lightning reads it from the variables of torchrun or SLURM."""
    return int(getattr(rank_zero_only, "rank", 0))


def processes(settings: Settings) -> int:
    """The number of processes that train together.

    Raises:
        ArgumentError: torchrun or SLURM started another number of processes, or a batch cannot be
            divided equally among them.
    """
    devices = settings.devices
    if devices in ("auto", "-1"):
        of_node = max(1, torch.cuda.device_count())
    elif devices.isdigit():
        of_node = int(devices)
    else:  # a list of GPUs: "0,2"
        of_node = len([index for index in devices.split(",") if index.strip()])
    world = of_node * settings.nodes
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched not in (1, world):
        raise ArgumentError(
            f"{launched} processes were started, but --devices {devices} --nodes {settings.nodes}"
            f" ask for {world}. Give --devices the number of processes on each machine."
        )
    if settings.batch_size % world:
        raise ArgumentError(
            f"--batch-size {settings.batch_size} is shared by all {world} processes, so it must be"
            f" a multiple of {world}."
        )
    return world


def trainer_of(
    settings: Settings, folder: Path, history: RunFolder, console: Console, arms_after: int = 0
) -> pl.Trainer:
    """Make the Lightning Trainer of one arm.

    Args:
        arms_after: the number of arms that are still to be trained after this one.

    Raises:
        ArgumentError: Lightning cannot train with the precision, the devices or a logger.
    """
    callbacks: list[Callback] = [history]
    if settings.ema:
        callbacks.append(average_of(settings.ema))
    if settings.early_stop is not None:
        callbacks.append(EarlyStop(settings.early_stop))
    loggers = loggers_of(settings, folder)
    if loggers:
        callbacks.append(LearningRateMonitor(logging_interval="epoch"))
    callbacks.append(
        ModelCheckpoint(
            dirpath=folder,
            filename="last",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
    )
    callbacks.append(EpochLines(console, arms_after))
    if console.is_terminal:
        callbacks.append(EpochBar(console))
    gpu = torch.cuda.is_available()
    world = processes(settings)
    two_phases = settings.train == "all" and settings.frozen_epochs > 0
    strategy: Any = settings.strategy
    if strategy == "fsdp":
        strategy = Sharded(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    elif two_phases and (world > 1 or strategy == "ddp"):
        # In phase 1 the base has no gradients, and DDP would wait for them.
        strategy = "ddp_find_unused_parameters_true"
    devices: Any = settings.devices
    if devices == "auto":
        devices = "auto" if gpu else 1
    try:
        return pl.Trainer(
            max_epochs=settings.epochs,
            accelerator="gpu" if gpu else "cpu",
            devices=int(devices) if str(devices).isdigit() else devices,
            num_nodes=settings.nodes,
            strategy=strategy,
            precision=precision_of(settings),
            gradient_clip_val=settings.clip,
            callbacks=callbacks,
            logger=loggers or False,
            log_every_n_steps=10,
            accumulate_grad_batches=settings.accumulate,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            deterministic=not gpu,
            default_root_dir=folder,
            plugins=[WholeFiles()],
        )
    except (MisconfigurationException, ValueError) as error:
        raise ArgumentError(
            f"Lightning cannot train with --precision {settings.precision} and --devices"
            f" {settings.devices} ({first_line(error)})."
        ) from error


def precision_of(settings: Settings) -> Any:
    """The precision by Lightning's name for it. Lightning checks the name itself."""
    return settings.precision or ("bf16-mixed" if torch.cuda.is_available() else "32-true")


class Sharded(ModelParallelStrategy):
    """The strategy for FSDP2. Lightning's older one needs CUDA and cannot clip by the norm."""

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint while the recipe is in the phase in which it was written.

        Lightning wants an optimizer state for every parameter that requires a gradient, but a
        parameter that had not learnt by then has none.
        """
        recipe = self.lightning_module
        assert isinstance(recipe, Recipe)
        recipe.set_phase(epochs_done(Path(checkpoint_path)) - 1)
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        recipe.set_phase(recipe.settings.epochs)
        return checkpoint


def epochs_done(last: Path) -> int:
    """The number of whole epochs that a checkpoint holds, or 0 if there is no checkpoint.

    The workers that load images need it, and Lightning starts them before it tells the number.
    """
    if not last.exists():
        return 0
    try:
        checkpoint = read_last(last)
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(last, error) from error


def read_last(last: Path) -> dict[str, Any]:
    """Read what Lightning and the callbacks kept after the last whole epoch.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        found = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict):
            raise TypeError("it is not the checkpoint of a run")
    except Exception as error:  # a damaged file fails in many ways
        raise damaged(last, error) from error
    return found


def damaged(last: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint from which a run cannot go on. It says what to do."""
    return CheckpointError(
        f"{last} is damaged ({type(error).__name__}: {first_line(error)}). Remove it to train this"
        " arm from its first epoch on."
    )


def ranks_of(trainer: pl.Trainer) -> dict[str, int]:
    return {"rank": trainer.global_rank, "world": trainer.world_size}


def check_space(folder: Path, params: int, settings: Settings) -> None:
    """Raise an :class:`ArgumentError` where the files of an arm do not fit on the disk.

    An arm keeps the weights, two moments of each, the best weights and, with --ema, the averaged
    weights. Each number takes four bytes. While a file is replaced, the old and the new file exist
    together. Files that are already there take no further space.
    """
    kept = (folder / "last.ckpt", folder / "best.safetensors")
    there = sum(path.stat().st_size for path in kept if path.exists())
    wanted = 2 * 4 * params * (5 if settings.ema else 4) - there
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ArgumentError(
            f"{folder}: {free / 1e6:.0f} MB are free, but the run needs about"
            f" {wanted / 1e6:.0f} MB."
        )


@contextmanager
def stoppable(run: Path, settings: Settings) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a lack of memory into one line that says what to do next.

    Raises:
        TrainingError: the run was stopped, or the memory was not enough.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise TrainingError(
            f"the run was stopped. Go on with: se-inject finetune --resume {run}"
        ) from None
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator" in str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
            raise
        raise TrainingError(
            f"out of memory at --batch-size {settings.batch_size}. Begin again with"
            f" --batch-size {max(1, settings.batch_size // 2)}, or with a smaller --img-size."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
