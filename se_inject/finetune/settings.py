"""All options of a fine-tuning run."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from se_inject.errors import ArgumentError
from se_inject.keep.atomic import atomic_write
from se_inject.layers.attention import Attention
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeezes import Squeeze
from se_inject.sites.placements import Placement

Train = Literal["se", "se+head", "all"]
BNStats = Literal["auto", "frozen", "moving"]
Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Settings:
    """What ``config.json`` keeps, so that a run can be repeated or gone on with."""

    model: str
    data: str = "digits"
    data_dir: str | None = None
    r: int | dict[str, int] = 16
    divisor: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    placement: Placement = "standard"
    squeeze: Squeeze = "avg"
    gate: Gate = "sigmoid"
    bias: bool = True
    init: Init = "identity"
    attention: str | None = None  # of timm, in place of SE
    pretrained: bool = True
    checkpoint: str | None = None
    epochs: int = 10
    warmup_epochs: int = 2
    batch_size: int = 64  # of all processes together
    lr: float = 1e-3
    base_lr_scale: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    img_size: int | None = None
    val_split: float = 0.2
    train: Train = "all"
    bn_stats: BNStats = "auto"
    aa: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: str | None = None
    devices: str = "auto"
    nodes: int = 1
    strategy: Strategy = "auto"
    workers: int = 2
    seed: int = 0
    seeds: int = 1
    control: bool = False
    ema: float | None = None
    compile: bool = False

    @property
    def se_layer(self) -> Attention | None:
        """What goes in in place of SE blocks."""
        return None if self.attention is None else Attention(self.attention)

    @property
    def base_is_pretrained(self) -> bool:
        """Whether the base has weights that can be had again; a callable's are its own affair."""
        from_library = self.pretrained and ":" not in self.model
        return from_library or self.checkpoint is not None

    @property
    def statistics_frozen(self) -> bool:
        """Whether BatchNorms keep their statistics in phase 2 too; a random base has none yet."""
        return self.bn_stats == "frozen" or (self.bn_stats == "auto" and self.base_is_pretrained)

    def check(self) -> None:
        """Raise an :class:`ArgumentError` for values that cannot work together."""
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ArgumentError(
                f"--warmup-epochs {self.warmup_epochs} are the first of --epochs {self.epochs},"
                " so between 0 and that."
            )
        if not 0 < self.val_split < 1:
            raise ArgumentError(f"--val-split {self.val_split} is a share between 0 and 1.")
        if self.lr <= 0:
            raise ArgumentError(f"--lr {self.lr} must be above 0.")
        if self.strategy == "fsdp" and (self.ema or self.compile):
            raise ArgumentError("--strategy fsdp goes with neither --ema nor --compile.")
        if self.control and self.train == "se":
            raise ArgumentError(
                "--control with --train se has nothing to train: the control has no SE blocks."
                " Use --train se+head or all."
            )

    def write(self, path: Path) -> None:
        with atomic_write(path) as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Raises an :class:`ArgumentError` where there is no readable configuration."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            return cls(
                **{
                    **data,
                    "include": tuple(data["include"]),
                    "exclude": tuple(data["exclude"]),
                }
            )
        except FileNotFoundError:
            raise ArgumentError(f"{path.parent} is no run folder: it has no {path.name}.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(f"{path} is damaged ({error}).") from error
