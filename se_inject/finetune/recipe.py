"""What is trained when, at which rate, on which loss: a LightningModule."""

import math
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from se_inject.errors import TrainingError
from se_inject.finetune.data import Batch, seeded
from se_inject.finetune.settings import Settings
from se_inject.inject import se_parameters


class Recipe(pl.LightningModule):
    """Phase 1: only the SE blocks and the head learn; phase 2: all, the base at a smaller rate.

    In phase 1 the base is frozen wholly: no gradients, and its modules stay in eval mode, so that
    BatchNorm statistics do not move either, whatever calls ``train()``.
    """

    def __init__(self, network: nn.Module, settings: Settings, classes: int, seed: int) -> None:
        super().__init__()
        self.network = network
        # In a list, or Lightning would take the compiled network for a second one.
        self._forward = [torch.compile(network) if settings.compile else network]
        self.settings = settings
        self.seed = seed
        self.unreadable: dict[str, None] = {}  # in the order in which they were met
        head = list(head_of(network).parameters()) if settings.train != "se" else []
        self._new = {id(p) for p in (*se_parameters(network), *head)}
        self._smoothing = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self._soft = SoftTargetCrossEntropy()
        self._mixup = _mixup(settings, classes)
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self._images, self._started = 0, 0.0
        # As in the last phase, because DDP wires what requires a gradient when it wraps the model.
        self._set_phase(settings.epochs)
        if not any(p.requires_grad for p in network.parameters()):
            raise TrainingError("there is nothing to train: no SE block and no head.")

    # --- phases ----------------------------------------------------------------------------------

    def _set_phase(self, epoch: int) -> None:
        all_learn = self.settings.train == "all" and epoch >= self.settings.warmup_epochs
        for p in self.network.parameters():
            p.requires_grad_(all_learn or id(p) in self._new)
        self._base_frozen = not all_learn

    def train(self, mode: bool = True) -> "Recipe":
        super().train(mode)
        if mode and self._base_frozen:
            for module in self.network.modules():
                # A container of new parts only (SE blocks, head) trains; the base does not.
                own = list(module.parameters())
                if not own or not all(id(p) in self._new for p in own):
                    module.training = False
        return self

    def on_train_epoch_start(self) -> None:
        self._set_phase(self.current_epoch)
        self.train()
        self._images, self._started = 0, time.perf_counter()

    # --- steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        images, labels, unreadable = batch
        self.unreadable.update(dict.fromkeys(unreadable))
        if not len(labels):
            return None
        if torch.cuda.is_available():
            images = images.to(memory_format=torch.channels_last)
        # Dropout and stochastic depth follow from the step: a resumed run draws the same numbers.
        torch.manual_seed(hash((self.seed, self.global_step, self.global_rank)) % 2**63)
        if self._mixup is not None and len(labels) % 2 == 0:
            with seeded(self.seed, self.global_step, self.global_rank):
                images, targets = self._mixup(images, labels)
            scores = self._forward[0](images)
            loss: Tensor = self._soft(scores, targets)
        else:
            scores = self._forward[0](images)
            loss = self._smoothing(scores, labels)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at epoch {self.current_epoch + 1}, step {index}. The"
                " weights of the last whole epoch are kept; try a smaller --lr."
            )
        self._images += len(labels) * self.trainer.world_size
        accuracy = (scores.argmax(1) == labels).float().mean()
        speed = self._images / (time.perf_counter() - self._started)
        options: dict[str, Any] = {"on_epoch": True, "batch_size": len(labels), "sync_dist": True}
        self.log("train_loss", loss.detach(), on_step=True, prog_bar=True, **options)
        self.log("train_acc", accuracy, on_step=False, prog_bar=True, **options)
        self.log("images_per_s", speed, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        images, labels, unreadable = batch
        self.unreadable.update(dict.fromkeys(unreadable))
        if not len(labels):
            return
        scores = self._forward[0](images).float()
        self.top1(scores, labels)
        self.top5(scores, labels)
        loss = nn.functional.cross_entropy(scores, labels)
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(labels)}
        self.log("val_loss", loss, sync_dist=True, **options)
        self.log("val_acc", self.top1, prog_bar=True, **options)
        self.log("val_top5", self.top5, **options)

    # --- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW; the base at a smaller rate, no decay on biases and norms; warm-up and cosine."""
        optimizer = torch.optim.AdamW(list(self._groups()))
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _groups(self) -> Iterator[dict[str, Any]]:
        settings = self.settings
        for new in (False, True):
            for decays in (False, True):
                parameters = [
                    p
                    for name, p in self.network.named_parameters()
                    if p.requires_grad
                    and (id(p) in self._new) == new
                    and (p.dim() > 1 and not name.endswith("bias")) == decays
                ]
                if parameters:
                    yield {
                        "params": parameters,
                        "lr": settings.lr * (1.0 if new else settings.base_lr_scale),
                        "weight_decay": settings.weight_decay if decays else 0.0,
                    }


def _mixup(settings: Settings, classes: int) -> Mixup | None:
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=classes,
    )


def head_of(network: nn.Module) -> nn.Module:
    """The classifier: what timm says it is, else the last Linear."""
    of_timm: Any = getattr(network, "get_classifier", None)
    if of_timm is not None:
        head = of_timm()
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            return head
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise TrainingError(f"{type(network).__name__} has no Linear that could be its classifier.")
    return linears[-1]
