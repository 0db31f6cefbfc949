"""One arm of a run with one seed: its network, its data, its training, its figures."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from se_inject.api import se_parameters
from se_inject.errors import SEInjectError
from se_inject.finetune.data.loading import Data, Images, balanced_weights, loader
from se_inject.finetune.data.parts import Split
from se_inject.finetune.figures.measure import measure
from se_inject.finetune.options.config import to_dict
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.callbacks import RunFolder
from se_inject.finetune.training.machine import (
    check_space,
    damaged,
    epochs_done,
    ranks_of,
    stoppable,
    trainer_of,
)
from se_inject.finetune.training.network import size_of, zero_branches
from se_inject.finetune.training.prepare import prepare
from se_inject.finetune.training.recipe import Recipe
from se_inject.names import few, plural


class Arm:
    def __init__(
        self,
        settings: Settings,
        split: Split,
        arm: str,
        seed: int,
        folder: Path,
        console: Console,
        arms_after: int = 0,
    ) -> None:
        self.settings, self.split, self.arm, self.seed = settings, split, arm, seed
        self.folder, self.console, self.arms_after = folder, console, arms_after

    def train(self, run: Path) -> dict[str, Any]:
        settings = self.settings
        prepared = prepare(settings, self.split, self.arm, self.seed)
        network, data, example = prepared.network, prepared.data, prepared.example
        if self.arm == "se" and (dead := self._dead_blocks(network, example)):
            warnings.warn(
                f"{plural(len(dead), 'block')} ({few(dead)}): the branch is multiplied by 0, so its"
                " SE block learns nothing while the base is frozen. --freeze-epochs 0 trains the"
                " base from the first epoch on.",
                stacklevel=2,
            )
        params, macs = size_of(network, example)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        classes = len(data.classes)
        balanced = settings.class_weights == "balanced"
        weights = balanced_weights(data.train, classes) if balanced else None
        recipe = Recipe(network, settings, classes, self.seed, prepared.blocks, weights)
        # The recipe is still in its last phase here, in which the most parameters learn.
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        sharded = settings.strategy == "fsdp"
        plain = copy.deepcopy(network) if sharded else None
        history = RunFolder(self.folder, self.arm, self.seed, settings, plain)
        trainer = trainer_of(settings, self.folder, history, self.console, self.arms_after)
        if trainer.is_global_zero:
            check_space(self.folder, params, settings)
            self._say(data, recipe, trainer)
        last = self.folder / "last.ckpt"
        done = epochs_done(last)
        if not last.exists() and (self.folder / "metrics.csv").exists():
            warnings.warn(
                f"{last} is missing, so this arm begins again at its first epoch.", stacklevel=2
            )
        resumes = last.exists()
        try:
            with stoppable(run, settings):
                trainer.fit(
                    recipe,
                    loader(data.train, settings, training=True, epoch=done, **ranks_of(trainer)),
                    loader(data.val, settings, training=False, epoch=done, **ranks_of(trainer)),
                    ckpt_path=str(last) if resumes else None,
                    weights_only=True,
                )
        except (SEInjectError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if resumes and not history.began:  # it failed while the checkpoint was read
                raise damaged(last, error) from error
            raise
        if not history.rows:
            raise damaged(last, ValueError("it has no epochs"))
        if history.unreadable and trainer.is_global_zero:
            first = next(iter(history.unreadable))
            warnings.warn(
                f"{len(history.unreadable)} images could not be read and were left out. The first"
                f" is {first}.",
                stacklevel=2,
            )
        rows = history.rows
        test = None
        if data.test is not None and trainer.is_global_zero:
            test = self._test(plain or network, data.test, classes)
        return {
            "arm": self.arm,
            "seed": self.seed,
            "val_acc": history.best,
            "best_epoch": history.best_epoch,
            "select": settings.select,
            "test": test,
            "last_val_acc": rows[-1]["val_acc"],
            "params": params,
            "trainable": trainable,
            "macs": macs,
            "seconds": history.seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "unreadable": list(history.unreadable),
            "classes": list(data.classes),
            "input_size": list(example.shape[1:]),
            "history": rows,
            "settings": to_dict(settings),
        }

    def _dead_blocks(self, network: nn.Module, example: torch.Tensor) -> list[str]:
        """The blocks that learn nothing while the base is frozen.

        There can be some only if the base is frozen and has no pretrained weights.
        """
        settings = self.settings
        frozen = settings.train != "all" or settings.frozen_epochs > 0
        if not frozen or settings.base_is_pretrained:
            return []
        return zero_branches(network, example)

    def _test(self, network: nn.Module, images: Images, classes: int) -> dict[str, Any]:
        """Measure the chosen weights on the test images, which had no part in the choice."""
        chosen = load_file(self.folder / "best.safetensors")
        network.load_state_dict(chosen, strict=False)  # the file leaves out a frozen base
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network.eval().to(device)
        found = measure(
            lambda x: network(x.to(device)).float().cpu(), images, self.settings, classes
        )
        return found.to_dict()

    def _say(self, data: Data, recipe: Recipe, trainer: pl.Trainer) -> None:
        settings = self.settings

        def say(line: str) -> None:
            # Rich would colour "3,410,538" as three numbers.
            self.console.print(line, highlight=False, markup=False)

        sizes = {name: p.numel() for name, p in recipe.network.named_parameters()}
        total, new = sum(sizes.values()), sum(sizes[name] for name in recipe.new)
        added = sum(p.numel() for p in se_parameters(recipe.network))
        say(f"\n{settings.model}, arm {self.arm}, seed {self.seed}")
        say(
            f"  {len(data.train):,} images to train, {len(data.val):,} to validate,"
            f" {len(data.classes)} classes"
        )
        more = {"norm": ["the scales and shifts of the norms"], "bias": ["the biases"]}
        parts = [
            *(["the SE blocks"] if added else []),
            *more.get(settings.train, []),
            *(["the head"] if settings.train != "se" else []),
        ]
        phases = [(settings.epochs, " and ".join(parts), new)]
        if settings.train == "all":
            first = settings.frozen_epochs
            phases = [
                (first, " and ".join(parts), new),
                (settings.epochs - first, "everything", total),
            ]
        begin = 1
        for epochs, what, count in phases:
            if epochs:
                last = begin + epochs - 1
                when = f"epoch {begin} trains" if epochs == 1 else f"epochs {begin} to {last} train"
                say(f"  {when} {what}: {count:,} parameters ({100 * count / total:.2f} %)")
            begin += epochs
        say(f"  the network has {total:,} parameters, {added:,} of them in SE blocks")
        kind = trainer.accelerator.__class__.__name__.removesuffix("Accelerator")
        say(f"  machine: {trainer.world_size} × {kind}, precision {trainer.precision}")
        say(
            f"  {settings.opt}, {settings.batch_size * settings.accumulate} images a step, learning"
            f" rate {settings.lr:g} (base {settings.lr * settings.base_lr_scale:g})"
        )
