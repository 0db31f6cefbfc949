"""One command: the arms and seeds of a run, its folder, and how it goes on after a stop."""

import copy
import csv
import dataclasses
import json
import os
import shutil
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from se_inject.api import inject_se, remove_se, se_parameters
from se_inject.edit.block_class import edit_of
from se_inject.errors import (
    ArgumentError,
    CheckpointError,
    TrainingError,
    UnknownModelError,
)
from se_inject.finetune.data import Data, loader, open_data
from se_inject.finetune.recipe import Recipe, head_of
from se_inject.finetune.settings import Settings
from se_inject.keep.atomic import atomic_write
from se_inject.keep.read import read_header
from se_inject.keep.restore import restore_model
from se_inject.keep.save import save_se
from se_inject.models.files import load_weights
from se_inject.models.names import load_model
from se_inject.report.count import count_model

CONFIG = "config.json"


def start(settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    """Begin a run in a new folder, or one that holds nothing of a run.

    Raises:
        ArgumentError: the settings cannot work, or the folder cannot be written or has a run.
        DataError, UnknownModelError, CheckpointError, TrainingError: as the parts raise them.
    """
    settings.check()
    if rank() != 0:  # torchrun's others: the first process writes
        return _run(settings, folder, console)
    if any(folder.glob("**/last.ckpt")) or any(folder.glob("**/arm.json")):
        raise ArgumentError(
            f"{folder} holds a run already: --resume {folder} goes on with it, --output another"
            " folder begins anew."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write(folder / CONFIG)
    except OSError as error:
        raise ArgumentError(f"--output {folder} cannot be written ({error}).") from error
    return _run(settings, folder, console)


def resume(folder: Path, console: Console, **machine: Any) -> dict[str, Any]:
    """Go on with a run from the last whole epoch of each of its arms.

    Args:
        machine: settings that may differ from those of the run: devices, nodes, strategy, workers.

    Raises:
        ArgumentError: the folder has no run.
    """
    settings = dataclasses.replace(Settings.read(folder / CONFIG), **machine)
    settings.check()
    return _run(settings, folder, console)


def _run(settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    first = rank() == 0
    arms = [
        (arm, settings.seed + i)
        for i in range(settings.seeds)
        for arm in (("se", "control") if settings.control else ("se",))
    ]
    results = []
    for arm, seed in arms:
        own = folder if len(arms) == 1 else folder / f"{arm}-{seed}"
        done = own / "arm.json"
        if done.exists():
            results.append(json.loads(done.read_text()))
            continue
        own.mkdir(parents=True, exist_ok=True)
        results.append(_Arm(settings, arm, seed, own, console).train(folder))
        if first:
            with atomic_write(done) as part:
                part.write_text(json.dumps(results[-1], indent=2) + "\n")
    summary = summarize(results)
    if not first:
        return summary
    with atomic_write(folder / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    if len(arms) > 1:
        best = max((r for r in results if r["arm"] == "se"), key=lambda r: r["val_acc"])
        own = folder / f"se-{best['seed']}"
        shutil.copyfile(own / "best.safetensors", folder / "best.safetensors")
        _write_rows(folder / "metrics.csv", [row for r in results for row in r["history"]])
    curves([row for r in results for row in r["history"]], folder / "curves.png")
    return summary


def _processes(settings: Settings) -> int:
    """How many processes train together.

    Raises:
        ArgumentError: torchrun or SLURM started another number, or they cannot share a batch.
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
            f"{launched} processes were started, and --devices {devices} --nodes {settings.nodes}"
            f" say {world}. Say how many there are of each node."
        )
    if settings.batch_size % world:
        raise ArgumentError(
            f"--batch-size {settings.batch_size} is of all {world} processes together: give a"
            f" multiple of {world}."
        )
    return world


def rank() -> int:
    """Which of the processes this is; Lightning reads it from what torchrun or SLURM set."""
    return int(getattr(rank_zero_only, "rank", 0))


# --- one arm, one seed ---------------------------------------------------------------------------


class _Arm:
    def __init__(
        self, settings: Settings, arm: str, seed: int, folder: Path, console: Console
    ) -> None:
        self.settings, self.arm, self.seed = settings, arm, seed
        self.folder, self.console = folder, console

    def train(self, run: Path) -> dict[str, Any]:
        settings = self.settings
        pl.seed_everything(self.seed, workers=True, verbose=False)
        network, config = base_of(settings)
        data = open_data(settings, config, self.seed)
        old = head_of(network)
        network = with_head(network, len(data.classes))
        if settings.train == "se" and head_of(network) is not old:
            raise ArgumentError(
                f"--train se keeps the head of {settings.model}, which is for other classes than"
                f" the {len(data.classes)} of the data. Use --train se+head."
            )
        size = settings.img_size or config["input_size"][-1]
        example = torch.empty(2, 3, size, size)
        if not _blocks(network):
            inject_se(
                network,
                settings.r,
                example_input=example,
                include=settings.include or None,
                exclude=settings.exclude or None,
                placement=settings.placement,
                squeeze=settings.squeeze,
                gate=settings.gate,
                bias=settings.bias,
                init=settings.init,
                divisor=settings.divisor,
                se_layer=settings.se_layer,
            )
        blocks = _blocks(network)
        if self.arm == "control":
            remove_se(network)
        params, macs = _size(network, example)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        recipe = Recipe(network, settings, len(data.classes), self.seed, blocks)
        sharded = settings.strategy == "fsdp"
        plain = copy.deepcopy(network) if sharded else None
        history = RunFolder(self.folder, self.arm, self.seed, settings, plain)
        trainer = self._trainer(history)
        if trainer.is_global_zero:
            _check_space(self.folder, params)
            self._say(data, recipe, trainer)
        last = self.folder / "last.ckpt"
        done = _epochs_done(last)
        with _stoppable(run, self.console, settings):
            trainer.fit(
                recipe,
                loader(data.train, settings, training=True, epoch=done, **_ranks(trainer)),
                loader(data.val, settings, training=False, epoch=done, **_ranks(trainer)),
                ckpt_path=str(last) if last.exists() else None,
                weights_only=True,
            )
        if history.unreadable and trainer.is_global_zero:
            first = next(iter(history.unreadable))
            warnings.warn(
                f"{len(history.unreadable)} images could not be read and were left out, such as"
                f" {first}.",
                stacklevel=2,
            )
        rows = history.rows
        return {
            "arm": self.arm,
            "seed": self.seed,
            "val_acc": max(row["val_acc"] for row in rows),
            "last_val_acc": rows[-1]["val_acc"],
            "params": params,
            "macs": macs,
            "seconds": history.seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "unreadable": list(history.unreadable),
            "classes": list(data.classes),
            "input_size": [3, size, size],
            "history": rows,
        }

    def _trainer(self, history: "RunFolder") -> pl.Trainer:
        settings, console = self.settings, self.console
        callbacks: list[Callback] = [history]
        if settings.ema:
            device = "cuda" if torch.cuda.is_available() else None
            callbacks.append(WeightAveraging(device=device, avg_fn=_average(settings.ema)))
        callbacks.append(
            ModelCheckpoint(
                dirpath=self.folder,
                filename="last",
                enable_version_counter=False,
                save_on_train_epoch_end=True,
            )
        )
        if console.is_terminal:
            callbacks.append(RichProgressBar(leave=True))
        else:
            callbacks.append(PlainLines(console))
        gpu = torch.cuda.is_available()
        world = _processes(settings)
        two_phases = settings.train == "all" and settings.warmup_epochs > 0
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
        return pl.Trainer(
            max_epochs=settings.epochs,
            accelerator="gpu" if gpu else "cpu",
            devices=int(devices) if str(devices).isdigit() else devices,
            num_nodes=settings.nodes,
            strategy=strategy,
            precision=settings.precision or ("bf16-mixed" if gpu else "32-true"),  # type: ignore[arg-type]  # the user's words
            gradient_clip_val=settings.clip,
            callbacks=callbacks,
            logger=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=console.is_terminal,
            deterministic=not gpu,
            default_root_dir=self.folder,
            plugins=[WholeFiles()],
        )

    def _say(self, data: Data, recipe: Recipe, trainer: pl.Trainer) -> None:
        settings, say = self.settings, self.console.print
        sizes = {name: p.numel() for name, p in recipe.network.named_parameters()}
        total, new = sum(sizes.values()), sum(sizes[name] for name in recipe.new)
        added = sum(p.numel() for p in se_parameters(recipe.network))
        say(f"{settings.model}, {self.arm} arm, seed {self.seed}", highlight=False)
        say(
            f"  {len(data.train)} images to train, {len(data.val)} to validate,"
            f" {len(data.classes)} classes"
        )
        parts = [
            *(["SE blocks"] if added else []),
            *(["head"] if settings.train != "se" else []),
        ]
        phases = [(settings.epochs, " and ".join(parts), new)]
        if settings.train == "all":
            first = settings.warmup_epochs
            phases = [(first, " and ".join(parts), new), (settings.epochs - first, "all", total)]
        begin = 1
        for epochs, what, count in phases:
            if epochs:
                say(
                    f"  epochs {begin} to {begin + epochs - 1}: {what}; trainable {count:,} of"
                    f" {total:,} parameters ({100 * count / total:.2f} %)",
                    soft_wrap=True,
                )
            begin += epochs
        say(f"  {added:,} parameters are in SE blocks")
        say(
            f"  {trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision"
            f" {trainer.precision}, effective batch {settings.batch_size}, rate {settings.lr:g}"
            f" (base {settings.lr * settings.base_lr_scale:g})",
            soft_wrap=True,
        )


def _epochs_done(last: Path) -> int:
    """Whole epochs in a checkpoint: on a restart, Lightning starts workers before it says so."""
    if not last.exists():
        return 0
    checkpoint = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def _blocks(network: nn.Module) -> list[str]:
    """Names of the blocks that have SE."""
    return [name for name, module in network.named_modules() if edit_of(module)]


def _ranks(trainer: pl.Trainer) -> dict[str, int]:
    return {"rank": trainer.global_rank, "world": trainer.world_size}


def base_of(settings: Settings) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its weights, and how timm prepares images for it."""
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    if checkpoint is not None and _is_se_file(checkpoint):
        network = restore_model(settings.model, checkpoint, se_layer=settings.se_layer)
    else:
        pretrained = settings.pretrained and checkpoint is None
        try:
            network = load_model(settings.model, pretrained=pretrained)
        except UnknownModelError as error:
            if not pretrained:
                raise
            raise UnknownModelError(
                f"{error}\nGive weights with --checkpoint FILE, or begin with --no-pretrained."
            ) from error
        if checkpoint is not None:
            load_weights(network, checkpoint)
    return network, timm.data.resolve_model_data_config(network)


def _is_se_file(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        read_header(path)
    except CheckpointError as error:
        if "not one of save_se" in str(error):
            return False
        raise
    return True


def with_head(network: nn.Module, classes: int) -> nn.Module:
    """A new classifier, unless the network has one for as many classes."""
    head = head_of(network)
    width = head.out_features if isinstance(head, nn.Linear) else None
    if classes == (width or getattr(network, "num_classes", None)):
        return network
    of_timm: Any = getattr(network, "reset_classifier", None)
    if of_timm is not None:
        of_timm(classes)
        return network
    if not isinstance(head, nn.Linear):
        raise TrainingError(f"{type(network).__name__} has a head that cannot be replaced.")
    new = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    for name, module in network.named_modules():
        for child, value in module.named_children():
            if value is head:
                setattr(network.get_submodule(name), child, new)
    return network


def _size(network: nn.Module, example: torch.Tensor) -> tuple[int, int | None]:
    count = count_model(network, ((example.to("meta"),), {}))
    return count.params, count.macs


def _check_space(folder: Path, params: int) -> None:
    """Weights, two moments and the best weights, and as much again while a file is replaced."""
    wanted, free = 32 * params, shutil.disk_usage(folder).free
    if free < wanted:
        raise ArgumentError(
            f"{folder}: {free / 1e6:.0f} MB are free, the run needs about {wanted / 1e6:.0f} MB."
        )


@contextmanager
def _stoppable(run: Path, console: Console, settings: Settings) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run; what to do next is said in one line."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise TrainingError(f"stopped. Go on with: se-inject finetune --resume {run}") from None
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator" in str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
            raise
        raise TrainingError(
            f"out of memory at --batch-size {settings.batch_size}. Begin anew with"
            f" {max(1, settings.batch_size // 2)}, or a smaller --img-size."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


class WholeFiles(TorchCheckpointIO):
    """Lightning's own goes through the system's folder for temporary files, which may be on
    another disk: a kill in the middle would then leave half a checkpoint, and no other.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as part:
            torch.save(checkpoint, part)


class Sharded(ModelParallelStrategy):
    """FSDP2; Lightning's older FSDP needs CUDA and cannot clip gradients by their norm."""

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, which wants a state of the optimizer for all that has gradients.

        What had not learnt when the checkpoint was made has none.
        """
        recipe = self.lightning_module
        assert isinstance(recipe, Recipe)
        recipe.set_phase(_epochs_done(Path(checkpoint_path)) - 1)
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        recipe.set_phase(recipe.settings.epochs)
        return checkpoint


def _average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]:
    """An exponential moving average that leaves what does not move as it is, to the bit."""

    def average(mean: torch.Tensor, current: torch.Tensor, _: Any) -> torch.Tensor:
        current = current.to(mean.device)
        return mean.lerp(current, 1 - decay) if mean.is_floating_point() else current

    return average


# --- what a run leaves ---------------------------------------------------------------------------


class RunFolder(Callback):
    """Keeps the metrics of each epoch and the best weights; goes on where a checkpoint was."""

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
        self.plain = plain  # a copy of the network, where the one that learns is sharded
        self.rows: list[dict[str, Any]] = []
        self.best = -1.0
        self.seconds = 0.0
        self.unreadable: dict[str, None] = {}  # in the order in which they were met
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best": self.best,
            "seconds": self.seconds,
            "unreadable": list(self.unreadable),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = list(state_dict["rows"]), state_dict["best"]
        self.seconds = state_dict["seconds"]
        self.unreadable = dict.fromkeys(state_dict["unreadable"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Recipe)
        accuracy = float(pl_module.top1.compute())
        if accuracy <= self.best:
            return
        self.best = accuracy
        network = pl_module.network
        if self.plain is not None:  # all processes take part in gathering what is sharded
            state = trainer.strategy.lightning_module_state_dict()
            network = self.plain
            if trainer.is_global_zero:
                network.load_state_dict(
                    {k.removeprefix("network."): v for k, v in state.items()}, strict=True
                )
        if trainer.is_global_zero:
            path = self.folder / "best.safetensors"
            _save_best(network, path, base_is_known=self.settings.base_is_pretrained)

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
        names = ("train_loss_epoch", "train_acc", "val_loss", "val_acc", "val_top5", "images_per_s")
        row = {"arm": self.arm, "seed": self.seed, "epoch": trainer.current_epoch + 1}
        self.rows.append(
            row | {n.removesuffix("_epoch"): metrics[n] for n in names if n in metrics}
        )
        if trainer.is_global_zero:
            _write_rows(self.folder / "metrics.csv", self.rows)


class PlainLines(Callback):
    """A line an epoch, where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            m = trainer.callback_metrics
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}:"
                f" loss {float(m['train_loss_epoch']):.4f}, val loss {float(m['val_loss']):.4f},"
                f" val acc {100 * float(m['val_acc']):.2f} %,"
                f" {float(m['images_per_s']):.0f} images/s",
                highlight=False,
            )


def _save_best(network: nn.Module, path: Path, *, base_is_known: bool) -> None:
    """The SE blocks and what was trained; all where the base began at random, or in the control."""
    if any(edit_of(module) for module in network.modules()):
        save_se(network, path, extra="trained" if base_is_known else "*")
        return
    from safetensors.torch import save_file

    with atomic_write(path) as part:
        save_file({k: v.detach().clone() for k, v in network.state_dict().items()}, part)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each arm, and whether the arms differ by more than noise."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    table = {
        arm: {
            "val_acc": [r["val_acc"] for r in own],
            "mean": statistics.fmean(r["val_acc"] for r in own),
            "sd": statistics.stdev(r["val_acc"] for r in own) if len(own) > 1 else None,
            "params": own[0]["params"],
            "macs": own[0]["macs"],
            "seconds": statistics.fmean(r["seconds"] for r in own),
        }
        for arm, own in arms.items()
    }
    return {
        "arms": table,
        "verdict": _verdict(arms),
        "classes": results[0]["classes"],
        "input_size": results[0]["input_size"],
        "unreadable": sorted({name for r in results for name in r["unreadable"]}),
    }


def _verdict(arms: dict[str, list[dict[str, Any]]]) -> str:
    """In words, from a paired t-test: both arms of a seed saw the same batches."""
    if "control" not in arms:
        return "No control arm: --control says whether the SE blocks helped."
    pairs = list(zip(arms["se"], arms["control"], strict=True))
    differences = [100 * (a["val_acc"] - b["val_acc"]) for a, b in pairs]
    mean = statistics.fmean(differences)
    if len(pairs) < 2:
        return f"With SE {mean:+.2f} points; one seed says nothing of the noise (--seeds 3)."
    from scipy.stats import t

    error = statistics.stdev(differences) / len(pairs) ** 0.5
    margin = float(t.ppf(0.975, len(pairs) - 1)) * error
    beyond = "more than the noise" if abs(mean) > margin else "within the noise"
    return (
        f"With SE {mean:+.2f} points, 95 % interval ±{margin:.2f} over {len(pairs)} seeds:"
        f" {beyond}."
    )


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs, one line an arm and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = {"se": "tab:blue", "control": "tab:orange"}
    for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        epochs, color = [row["epoch"] for row in own], colors[arm]
        left.plot(epochs, [row["train_loss"] for row in own], color=color, linestyle=":")
        left.plot(epochs, [row["val_loss"] for row in own], color=color, label=f"{arm}, {seed}")
        right.plot(
            epochs, [100 * row["val_acc"] for row in own], color=color, label=f"{arm}, {seed}"
        )
    left.set(xlabel="epoch", ylabel="loss (dotted: training)")
    right.set(xlabel="epoch", ylabel="validation accuracy in %")
    right.legend(title="arm, seed")
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
