"""What a run prints while it trains: a line for each epoch and, on a terminal, a bar."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class EpochLines(Callback):
    """Prints a line after each epoch. The line fits into a terminal of 80 columns."""

    def __init__(self, console: Console, arms_after: int) -> None:
        """``arms_after`` is the number of arms that are still to be trained after this one."""
        self.console, self.arms_after = console, arms_after
        self.epochs = 0  # in this process; epochs before a stop may have had another speed
        self.began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs += 1
        if not trainer.is_global_zero:
            return
        total, done = int(trainer.max_epochs or 0), trainer.current_epoch + 1
        left = total - done + self.arms_after * total
        seconds = (time.perf_counter() - self.began) / self.epochs * left
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.console.print(
            f"epoch {done}/{total}: loss {found['train_loss_epoch']:.3f};"
            f" val loss {found['val_loss']:.3f}, acc {100 * found['val_acc']:.2f} %;"
            f" {found['images_per_s']:.0f} img/s; {duration(seconds)} left",
            highlight=False,
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    """Write a duration in a unit that gives it about two digits: 45 s, 12 min, 3.5 h.

    >>> [duration(s) for s in (0.2, 59, 90, 5400, 200000)]
    ['0 s', '59 s', '2 min', '90 min', '56 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{seconds / 3600:.0f} h"


class EpochBar(Callback):
    """Shows a bar for the batches of the current epoch, and removes it at the end.

    Lightning's own bar is not used, because it counts the epochs from 0.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, console=console, transient=True)

    def _begin(self, text: str, batches: float) -> None:
        for task in list(self.progress.task_ids):
            self.progress.remove_task(task)
        self.task = self.progress.add_task(text, total=int(batches))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.progress.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._begin(f"{epoch} training", trainer.num_training_batches)

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._begin(f"{epoch} validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.progress.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.progress.stop()
