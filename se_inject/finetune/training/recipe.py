"""What is trained when, at which rate, on which loss: a LightningModule."""

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
    """Phase 1: only the SE blocks and the head learn; phase 2: all, the base at a smaller rate.

    In phase 1 the base is frozen wholly: no gradients, and its modules stay in eval mode, so that
    BatchNorm statistics do not move either, whatever calls ``train()``. In phase 2 a pretrained
    base keeps its statistics unless ``--bn-stats moving`` says otherwise: with those of each batch
    it would compute something else from one step to the next, and unlearn what it knew.

    Args:
        network: the network on the CPU, with its SE blocks and the head that is to be trained.
        classes: how many classes the data have.
        seed: dropout, stochastic depth and mixup follow from it.
        weights: the weight of each class in the loss.
        blocks: names of the blocks that ``--strategy fsdp`` shards one by one.

    Raises:
        TrainingError: there is nothing to train; in a step, a loss that is no number.
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
        # It is in a list, because Lightning would take the compiled network for a second one.
        self._forward = [torch.compile(network) if settings.compile else network]
        self.settings = settings
        self.seed = seed
        self.blocks = blocks
        self.classes = classes
        self.unreadable: dict[str, None] = {}  # in the order in which they were met
        self._parts = new_parts(network, settings)
        self.new = self._parts | base_parts(network, settings)
        self._smoothing = nn.CrossEntropyLoss(weights, label_smoothing=settings.label_smoothing)
        self._soft = nn.CrossEntropyLoss(weights)  # of mixed labels, smoothed already
        self._mixup = _mixup(settings, classes)
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.confusion = MulticlassConfusionMatrix(classes)
        self.val_loss = MeanMetric()
        self._images, self._started = 0, 0.0
        self._statistics_frozen = settings.statistics_frozen
        if not self._statistics_frozen:
            _follow_closely(network)
        # DDP wires what requires a gradient when it wraps the model, so the last phase comes first.
        self.set_phase(settings.epochs)
        if not any(p.requires_grad for p in network.parameters()):
            raise TrainingError("there is nothing to train: no SE block and no head.")

    # --- phases ----------------------------------------------------------------------------------

    def set_phase(self, epoch: int) -> None:
        """What learns in this epoch (counted from 0) requires gradients, and nothing else does."""
        all_learn = self.settings.train == "all" and epoch >= self.settings.frozen_epochs
        for name, p in self.network.named_parameters():
            p.requires_grad_(all_learn or name in self.new)
        self._base_frozen = not all_learn

    def train(self, mode: bool = True) -> "Recipe":
        # A norm of the base whose scale and shift learn (--train norm, bias) is no new part: its
        # statistics stay those of the base.
        super().train(mode)
        for prefix, module in self.network.named_modules():
            # A container of new parts only (SE blocks, head) trains in each phase.
            own = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            if mode and (not own or not self._parts.issuperset(own)):
                keeps_statistics = isinstance(module, _BatchNorm) and self._statistics_frozen
                if self._base_frozen or keeps_statistics:
                    module.training = False
        return self

    def configure_model(self) -> None:
        """Shard the blocks, then the rest, where ``--strategy fsdp`` asks for it."""
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for name in self.blocks:
            fully_shard(self.network.get_submodule(name), mesh=mesh)
        if not isinstance(self.network, FSDPModule):  # "" among the blocks is the network
            fully_shard(self.network, mesh=mesh)

    def on_train_epoch_start(self) -> None:
        self.set_phase(self.current_epoch)
        self.train()
        self._images, self._started = 0, time.perf_counter()

    # --- steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, labels = self._images_of(batch)
        # Dropout and stochastic depth follow from the step: a resumed run draws the same numbers.
        step: tuple[int, ...] = (self.seed, self.global_step, self.global_rank)
        if self.settings.accumulate > 1:
            step += (index % self.settings.accumulate,)
        torch.manual_seed(seed_of(*step))
        count = int((labels != NO_IMAGE).sum())
        if self._mixup is not None and count > 1:
            even = count // 2 * 2  # it mixes pairs
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
        if self.device_mesh is not None:  # DDP does so by itself
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
        self._check(loss, f"step {index} of the validation")  # torchmetrics would leave it out
        self.val_loss.update(loss, weight=len(labels))

    def on_validation_epoch_end(self) -> None:
        """Log what all processes saw together, each image once."""
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
    """The names of the parameters of the SE blocks and, but for ``--train se``, of the head."""
    head = list(head_of(network).parameters()) if settings.train != "se" else []
    new = {id(p) for p in (*se_parameters(network), *head)}
    return frozenset(name for name, p in network.named_parameters() if id(p) in new)


def base_parts(network: nn.Module, settings: Settings) -> frozenset[str]:
    """The names of the base's own parameters that ``--train norm`` or ``bias`` lets learn.

    They learn at the whole rate, as the SE blocks do that they are compared with.

    Raises:
        TrainingError: the base has none of them.
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
    # The bias of the head learns with the head, and does not make a base that has biases.
    if not found - new_parts(network, settings):
        raise TrainingError(
            f"--train {settings.train} has nothing to train: the base has no such parameters."
            " Use --train head."
        )
    return frozenset(found)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: torch, timm and others have no class of theirs in common, but
    all say it in its name (BatchNormAct2d, LayerNorm2d, RmsNorm, GlobalResponseNorm).
    """
    return "norm" in type(module).__name__.lower()


def _follow_closely(network: nn.Module) -> None:
    """Let BatchNorm statistics follow at PyTorch's rate at least.

    TensorFlow's networks average over some hundred steps (momentum 0.01 or less). A fine-tuning
    run has not many more: validation would see statistics of weights and images long past.
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
