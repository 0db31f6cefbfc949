"""Callbacks of the Lightning Trainer that keep, average or end what a run learns."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from se_inject.finetune.figures.results import write_rows
from se_inject.finetune.options.config import to_dict
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.network import blocks_of
from se_inject.finetune.training.recipe import Recipe
from se_inject.keep.atomic import atomic_write
from se_inject.keep.save import save_se


class RunFolder(Callback):
    """Keeps the metrics of each epoch and the best weights.

    Its state is a part of every checkpoint, so that a resumed run goes on with the same figures.
    """

    def __init__(
        self,
        folder: Path,
        arm: str,
        seed: int,
        settings: Settings,
        plain: nn.Module | None = None,
    ) -> None:
        self.folder, self.arm, self.seed = folder, arm, seed
        self.settings = settings
        self.plain = plain  # an unsharded copy of the network, if the one that learns is sharded
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_loss, self.best_epoch = -1.0, float("inf"), 0
        self.seconds = 0.0
        self.unreadable: dict[str, None] = {}  # messages, in the order of the images
        self.began = False  # whether training began, so that all of a checkpoint could be read
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "unreadable": list(self.unreadable),
            "settings": to_dict(self.settings),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = list(state_dict["rows"]), state_dict["best"]
        # Older versions compared only the accuracy, and of equal epochs they kept the first.
        self.best_loss = state_dict.get("best_loss", float("-inf"))
        first = next((r["epoch"] for r in self.rows if r["val_acc"] == self.best), 0)
        self.best_epoch = state_dict.get("best_epoch", first)
        self.seconds = state_dict["seconds"]
        self.unreadable = dict.fromkeys(state_dict["unreadable"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Recipe)
        accuracy, loss = float(pl_module.top1.compute()), float(pl_module.val_loss.compute())
        better = (accuracy, -loss) > (self.best, -self.best_loss)
        if not better and self.settings.select == "best":
            return
        self.best, self.best_loss = accuracy, loss
        self.best_epoch = trainer.current_epoch + 1
        network = pl_module.network
        if self.plain is not None:  # all processes must take part in gathering the shards
            state = trainer.strategy.lightning_module_state_dict()
            network = self.plain
            if trainer.is_global_zero:
                network.load_state_dict(
                    {
                        k.removeprefix("network."): v
                        for k, v in state.items()
                        if k.startswith("network.")
                    },
                    strict=True,
                )
        if trainer.is_global_zero:
            path = self.folder / "best.safetensors"
            save_network(network, path, base_is_known=self.settings.base_is_pretrained)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Recipe)
        met: list[str] = list(pl_module.unreadable)
        if trainer.world_size > 1:
            everyones: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyones, met)
            met = [name for names in everyones for name in names]
        self.unreadable.update(dict.fromkeys(met))
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        names = (
            *("train_loss_epoch", "train_acc", "val_loss", "val_acc", "val_top5"),
            *("val_balanced", "val_macro_f1", "val_majority", "images_per_s"),
        )
        row = {"arm": self.arm, "seed": self.seed, "epoch": trainer.current_epoch + 1}
        self.rows.append(
            row | {n.removesuffix("_epoch"): metrics[n] for n in names if n in metrics}
        )
        if trainer.is_global_zero:
            write_rows(self.folder / "metrics.csv", self.rows)


def save_network(network: nn.Module, path: Path, *, base_is_known: bool) -> None:
    """Write the SE blocks and all else that was trained.

    The whole network is written if its base cannot be loaded again or if it has no SE blocks.
    """
    if blocks_of(network):
        save_se(network, path, extra="trained" if base_is_known else "*")
        return
    from safetensors.torch import save_file

    # On a GPU the network is channels-last, but safetensors takes only contiguous tensors.
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    with atomic_write(path) as part:
        save_file(state, part)


class EarlyStop(EarlyStopping):
    """Stops an arm whose validation accuracy no longer gets better, also after a resume."""

    def __init__(self, epochs: int) -> None:
        super().__init__("val_acc", patience=epochs, mode="max", verbose=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if the run was killed after its last epoch, but before its summary."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and then replaces it.

    Lightning's own class goes through the system's folder for temporary files, which may be on
    another disk. A process that is killed in the middle would then leave only half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as part:
            torch.save(checkpoint, part)


def average_of(decay: float) -> WeightAveraging:
    """The callback that averages the weights. The averaged weights are validated and kept."""
    device = "cuda" if torch.cuda.is_available() else None
    return WeightAveraging(device=device, avg_fn=_average(decay))


def _average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]:
    """The exponential moving average. A weight that does not change keeps its value to the bit."""

    def average(mean: torch.Tensor, current: torch.Tensor, _: Any) -> torch.Tensor:
        current = current.to(mean.device)
        return mean.lerp(current, 1 - decay) if mean.is_floating_point() else current

    return average
