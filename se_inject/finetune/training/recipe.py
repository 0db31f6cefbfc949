"""The LightningModule of a run: what learns in which epoch, with which loss and metrics."""

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from se_inject.api import se_parameters
from se_inject.errors import TrainingError
from se_inject.finetune.data.loading import NO_IMAGE, Batch, seed_of, seeded
from se_inject.finetune.figures.measure import TOP5_FROM, figures_of
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.training.network import head_of
from se_inject.finetune.training.optimizer import optimizer_of


class Recipe(pl.LightningModule):
    """Trains only the SE blocks and the head in phase 1, and the whole network in phase 2.

    In phase 1 the base is frozen completely: it gets no gradients, and its modules stay in eval
    mode even when ``train()`` is called, so that its BatchNorm statistics do not move either. In
    phase 2 the base learns at a smaller rate. A pretrained base still keeps its statistics unless
    ``--bn-stats moving`` says otherwise. With the statistics of each batch it would compute
    something else in every step, and would unlearn what it knew. Only ``--train all`` has a
    phase 2.

    Args:
        network: the network on the CPU, with its SE blocks and the head that is to be trained.
        classes: the number of classes of the data.
        seed: the seed of dropout, stochastic depth and mixup.
        weights: the weight of each class in the loss.
        blocks: the names of the blocks that ``--strategy fsdp`` shards one by one.

    Raises:
        TrainingError: there is nothing to train, or the loss of a step is not a finite number.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: Settings,
        classes: int,
        seed: int,
        blocks: Sequence[str] = (),
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        if torch.cuda.is_available():
            network.to(memory_format=torch.channels_last)
        # The list keeps Lightning from taking the compiled network for a second submodule.
        self._forward = [torch.compile(network) if settings.compile else network]
        self.settings = settings
        self.seed = seed
        self.blocks = blocks
        self.classes = classes
        self.unreadable: dict[str, None] = {}  # messages, in the order of the images
        self._parts = new_parts(network, settings)
        self.new = self._parts | base_parts(network, settings)
        self._smoothing = nn.CrossEntropyLoss(weights, label_smoothing=settings.label_smoothing)
        self._soft = nn.CrossEntropyLoss(weights)  # for mixed labels, which are smoothed already
        self._mixup = _mixup(settings, classes)
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.confusion = MulticlassConfusionMatrix(classes)
        self.val_loss = MeanMetric()
        self._images, self._started = 0, 0.0
        self._statistics_frozen = settings.statistics_frozen
        if not self._statistics_frozen:
            _follow_closely(network)
        # When DDP wraps the model, it registers the parameters that require a gradient. The last
        # phase is set first, because the most parameters do so then.
        self.set_phase(settings.epochs)
        if not any(p.requires_grad for p in network.parameters()):
            raise TrainingError("there is nothing to train: no SE block and no head.")

    # --- phases ----------------------------------------------------------------------------------

    def set_phase(self, epoch: int) -> None:
        """Let only the parameters that learn in this epoch (counted from 0) require gradients."""
        all_learn = self.settings.train == "all" and epoch >= self.settings.frozen_epochs
        for name, p in self.network.named_parameters():
            p.requires_grad_(all_learn or name in self.new)
        self._base_frozen = not all_learn

    def train(self, mode: bool = True) -> "Recipe":
        # With --train norm or bias, norms of the base learn their scale and shift. They are no new
        # parts, so their statistics stay those of the base.
        super().train(mode)
        for prefix, module in self.network.named_modules():
            # A module that has only new parameters (an SE block, the head) trains in each phase.
            own = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            if mode and (not own or not self._parts.issuperset(own)):
                keeps_statistics = isinstance(module, _BatchNorm) and self._statistics_frozen
                if self._base_frozen or keeps_statistics:
                    module.training = False
        return self

    def configure_model(self) -> None:
        """With ``--strategy fsdp``, shard the blocks and then the rest of the network."""
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for name in self.blocks:
            fully_shard(self.network.get_submodule(name), mesh=mesh)
        if not isinstance(self.network, FSDPModule):  # the block "" is the network
            fully_shard(self.network, mesh=mesh)

    def on_train_epoch_start(self) -> None:
        self.set_phase(self.current_epoch)
        self.train()
        self._images, self._started = 0, time.perf_counter()

    # --- steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, labels = self._images_of(batch)
        # The seed follows from the step, so that a resumed run draws the same random numbers for
        # dropout and stochastic depth.
        step: tuple[int, ...] = (self.seed, self.global_step, self.global_rank)
        if self.settings.accumulate > 1:
            step += (index % self.settings.accumulate,)
        torch.manual_seed(seed_of(*step))
        count = int((labels != NO_IMAGE).sum())
        if self._mixup is not None and count > 1:
            even = count // 2 * 2  # mixup works on pairs
            with seeded(*step):
                images, targets = self._mixup(images[:even], labels[:even])
            labels = labels[:even]
            scores = self._forward[0](images)
            loss: Tensor = self._soft(scores, targets)
        elif count:
            scores = self._forward[0](images)
            loss = self._smoothing(scores, labels)
        else:
            # There is nothing to learn from, but the other processes wait for these gradients.
            scores = self._forward[0](images)
            loss = scores.sum() * 0
        self._check(loss, f"step {index}")
        self._images += count * self.trainer.world_size
        accuracy = (scores.argmax(1) == labels).float().mean()
        speed = self._images / (time.perf_counter() - self._started)
        options: dict[str, Any] = {"on_epoch": True, "batch_size": max(1, count)}
        self.log(
            "train_loss", loss.detach(), on_step=True, prog_bar=True, sync_dist=True, **options
        )
        self.log("train_acc", accuracy, on_step=False, prog_bar=True, sync_dist=True, **options)
        self.log("images_per_s", speed, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        if self.device_mesh is not None:  # DDP does this by itself, but FSDP does not
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, index: int) -> None:
        images, labels = self._images_of(batch)
        scores = self._forward[0](images).float()
        if labels[0] == NO_IMAGE:
            return
        self.top1.update(scores, labels)
        self.top5.update(scores, labels)
        self.confusion.update(scores, labels)
        loss = nn.functional.cross_entropy(scores, labels)
        self._check(loss, f"step {index} of the validation")  # torchmetrics would skip a nan
        self.val_loss.update(loss, weight=len(labels))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all processes. Each image counts once."""
        self.log("val_loss", self.val_loss)
        self.log("val_acc", self.top1, prog_bar=True)
        if self.classes >= TOP5_FROM:
            self.log("val_top5", self.top5)
        figures = figures_of(self.confusion.compute())
        self.confusion.reset()
        for name in ("balanced", "macro_f1", "majority"):
            self.log(f"val_{name}", getattr(figures, name))

    def _check(self, loss: Tensor, where: str) -> None:
        if torch.isfinite(loss):
            return
        kept = "The weights of the last whole epoch are kept."
        if not self.current_epoch:
            kept = "No weights are kept, for no epoch was whole."
        raise TrainingError(
            f"the loss is {loss.item()} at epoch {self.current_epoch + 1}, {where}. {kept} Try a"
            " smaller --lr."
        )

    def _images_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels, unreadable = batch
        self.unreadable.update(dict.fromkeys(unreadable))
        if torch.cuda.is_available():
            images = images.to(memory_format=torch.channels_last)
        return images, labels

    # --- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_of(self.network, self.new, self.settings, steps)


def new_parts(network: nn.Module, settings: Settings) -> frozenset[str]:
    """The names of the parameters of the SE blocks and, except with ``--train se``, of the head."""
    head = list(head_of(network).parameters()) if settings.train != "se" else []
    new = {id(p) for p in (*se_parameters(network), *head)}
    return frozenset(name for name, p in network.named_parameters() if id(p) in new)


def base_parts(network: nn.Module, settings: Settings) -> frozenset[str]:
    """The names of the parameters that ``--train norm`` or ``bias`` lets learn.

    They learn at the full rate, as do the SE blocks with which they are compared.

    Raises:
        TrainingError: the base has no such parameters.
    """
    if settings.train == "norm":
        found = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in network.named_modules()
            if _is_norm(module)
            for name, p in module.named_parameters(recurse=False)
            if p.dim() == 1
        }
    elif settings.train == "bias":
        found = {n for n, _ in network.named_parameters() if n.rpartition(".")[2] == "bias"}
    else:
        return frozenset()
    # The bias of the head does not count here, because it learns together with the head.
    if not found - new_parts(network, settings):
        raise TrainingError(
            f"--train {settings.train} has nothing to train: the base has no such parameters."
            " Use --train head."
        )
    return frozenset(found)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class.

    The norms of torch, timm and others have no base class in common, but their names all say so
    (BatchNormAct2d, LayerNorm2d, RmsNorm, GlobalResponseNorm).
    """
    return "norm" in type(module).__name__.lower()


def _follow_closely(network: nn.Module) -> None:
    """Let BatchNorm statistics move at least as fast as by PyTorch's default (momentum 0.1).

    Networks from TensorFlow average over some hundred steps (momentum 0.01 or less). A fine-tuning
    run does not have many more, so validation would use statistics of weights that are long past.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, 0.1)


def _mixup(settings: Settings, classes: int) -> Mixup | None:
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=classes,
    )
