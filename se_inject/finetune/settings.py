"""All options of a fine-tuning run, each of them once: type, default, help and limits.

The command line makes its options from these fields, ``config.json`` keeps them.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from se_inject.errors import ArgumentError
from se_inject.plan.injection import Injection, option

Train = Literal["se", "se+head", "all"]
BNStats = Literal["auto", "frozen", "moving"]
Select = Literal["best", "last"]
ClassWeights = Literal["none", "balanced"]
Sampler = Literal["shuffle", "balanced"]
Strategy = Literal["auto", "ddp", "fsdp"]

_NETWORK, _TRAINING, _MACHINE = ({"panel": name} for name in ("Network", "Training", "Machine"))

# What may be another than before when a run goes on: the machine, and nothing that is learnt.
ON_RESUME = ("devices", "nodes", "strategy", "workers")


@dataclass(frozen=True)
class Settings(Injection):
    """What ``config.json`` keeps, so that a run can be repeated or gone on with.

    The options of the SE blocks are those of every injection.
    """

    model: str = field(
        metadata={
            "argument": True,
            "metavar": "MODEL",
            "help": "A timm name, torchvision/NAME, or module:callable.",
            "show_default": False,
        }
    )
    data: str = option(
        "digits",
        "The images to learn from: a folder of class folders (or of train/, val/ and test/), a"
        " FILE.csv with path,label[,split], torch/NAME of torchvision, hfds/NAME of Hugging Face,"
        " wds/FOLDER of WebDataset shards, or digits: scikit-learn's 1,797 handwritten digits.",
        show_default=False,
    )
    data_dir: str | None = option(
        None, "The folder where torch/, hfds/ or wds/ data lie or go.", show_default="here"
    )
    image_column: str | None = option(
        None, "The column of hfds/ data that has the images.", show_default="by its type"
    )
    label_column: str | None = option(
        None, "The column of hfds/ data that has the classes.", show_default="by its type"
    )

    pretrained: bool = option(True, "Begin from the library's weights.", **_NETWORK)
    checkpoint: str | None = option(
        None,
        "Begin from the weights in this file: a state dict, or a file of save_se.",
        metavar="FILE",
        show_default=False,
        **_NETWORK,
    )

    epochs: int = option(10, "The number of epochs of the whole run.", min=1, **_TRAINING)
    freeze_epochs: int | None = option(
        None,
        "The number of first epochs in which the base is frozen: only the SE blocks and the head"
        " learn.",
        min=0,
        show_default="2, fewer in a short run, 0 with a random base",
        alias="--warmup-epochs",
        **_TRAINING,
    )
    batch_size: int = option(
        64, "The number of images in a step, of all processes together.", min=1, **_TRAINING
    )
    lr: float = option(
        1e-3, "The peak learning rate of the SE blocks and the head (AdamW).", **_TRAINING
    )
    base_lr_scale: float = option(
        0.1, "The base learns at this share of that rate.", min=0, **_TRAINING
    )
    weight_decay: float = option(
        0.05, "The weight decay of AdamW; biases and norms have none.", min=0, **_TRAINING
    )
    label_smoothing: float = option(
        0.1,
        "The share of each label that is spread over all classes.",
        min=0,
        max=0.9,
        **_TRAINING,
    )
    clip: float = option(
        1.0,
        "The largest norm that the gradient of a step may have; 0 lets it have any.",
        min=0,
        **_TRAINING,
    )
    train: Train = option("all", "What learns after the epochs of the frozen base.", **_TRAINING)
    bn_stats: BNStats = option(
        "auto",
        "BatchNorm statistics after the epochs of the frozen base: auto keeps those of a pretrained"
        " base frozen and lets those of a random one move.",
        **_TRAINING,
    )
    img_size: int | None = option(
        None,
        "The side of the images in pixels.",
        min=1,
        show_default="the model's own",
        **_TRAINING,
    )
    val_split: float = option(
        0.2,
        "The share of each class to validate on, where the data have no val/.",
        **_TRAINING,
    )
    aa: str | None = option(
        None,
        "The automatic augmentation in timm's words, such as rand-m9-mstd0.5.",
        show_default="none",
        **_TRAINING,
    )
    mixup: float = option(
        0.0, "The alpha of mixup's Beta distribution; 0 mixes no images.", min=0, **_TRAINING
    )
    cutmix: float = option(
        0.0, "The alpha of CutMix's Beta distribution; 0 mixes no images.", min=0, **_TRAINING
    )
    ema: float | None = option(
        None,
        "The decay of a moving average of the weights, such as 0.999; the average is validated and"
        " kept.",
        min=0,
        max=1,
        show_default="off",
        **_TRAINING,
    )
    seed: int = option(0, "The seed of the first run.", **_TRAINING)
    seeds: int = option(1, "The number of runs, each with the next seed.", min=1, **_TRAINING)
    control: bool = option(
        False,
        "Also train the same network without SE blocks, with the same batches and head.",
        **_TRAINING,
    )

    select: Select = option(
        "best",
        "Which epoch's weights are kept: the best on the validation images (of equal accuracies"
        " that of the smaller loss), or the last.",
        **_TRAINING,
    )
    class_weights: ClassWeights = option(
        "none",
        "The weights of the classes in the loss: balanced gives each class the same sum.",
        **_TRAINING,
    )
    sampler: Sampler = option(
        "shuffle",
        "How an epoch draws its images: shuffle takes each once, balanced as many of each class.",
        **_TRAINING,
    )

    precision: str | None = option(
        None,
        "The precision of the arithmetic in Lightning's words: 32-true, 16-mixed, ...",
        show_default="bf16-mixed on a GPU, else 32-true",
        **_MACHINE,
    )
    devices: str = option("auto", "The number of GPUs or processes of each machine.", **_MACHINE)
    nodes: int = option(
        1,
        "The number of machines. The run folder has to be on a disk that all of them share.",
        min=1,
        **_MACHINE,
    )
    strategy: Strategy = option(
        "auto",
        "How several processes share the work: ddp copies the network to each (as auto does), fsdp"
        " shards it.",
        **_MACHINE,
    )
    workers: int = option(
        2, "The number of processes that load images, for each GPU.", min=0, **_MACHINE
    )
    compile: bool = option(False, "Compile the network with torch.compile.", **_MACHINE)

    @property
    def base_is_pretrained(self) -> bool:
        """Whether the base has weights that can be had again; a callable's are its own affair."""
        from_library = self.pretrained and ":" not in self.model
        return from_library or self.checkpoint is not None

    @property
    def base_is_random(self) -> bool:
        """Whether the base begins with random weights, as far as the options tell."""
        return not self.pretrained and self.checkpoint is None

    @property
    def frozen_epochs(self) -> int:
        """The first epochs, in which the base is frozen. To freeze a random one teaches nothing."""
        if self.freeze_epochs is not None:
            return self.freeze_epochs
        return 0 if self.base_is_random else min(2, self.epochs - 1)

    @property
    def statistics_frozen(self) -> bool:
        """Whether BatchNorms keep their statistics in phase 2 too; a random base has none yet."""
        return self.bn_stats == "frozen" or (self.bn_stats == "auto" and self.base_is_pretrained)

    def check(self) -> None:
        """Raise an :class:`ArgumentError` for values that cannot work together."""
        if not 0 <= self.frozen_epochs <= self.epochs:
            raise ArgumentError(
                f"--freeze-epochs {self.freeze_epochs} are the first of --epochs {self.epochs},"
                " so between 0 and that."
            )
        if not 0 < self.val_split < 1:
            raise ArgumentError(f"--val-split {self.val_split} is a share between 0 and 1.")
        if not 0 < self.lr < math.inf:  # nor nan
            raise ArgumentError(f"--lr {self.lr} must be above 0.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ArgumentError(f"--ema {self.ema} must be at least 0 and below 1.")
        if not 0 <= self.seed <= 2**32 - self.seeds:
            raise ArgumentError(f"--seed {self.seed} must be between 0 and {2**32 - self.seeds}.")
        if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+,?|\d+,", self.devices):
            raise ArgumentError(
                f"--devices {self.devices} is no number of devices: give auto, 1, 2, ... or the"
                " indices of GPUs, such as 0,2."
            )
        self._check_limits()
        if self.strategy == "fsdp" and (self.ema or self.compile):
            raise ArgumentError("--strategy fsdp goes with neither --ema nor --compile.")
        if self.control and self.train == "se":
            raise ArgumentError(
                "--control with --train se has nothing to train: the control has no SE blocks."
                " Use --train se+head or all."
            )

    def _check_limits(self) -> None:
        """Numbers between the limits of their options, which hold for files and Python too."""
        for known in fields(self):
            low, high = known.metadata.get("min"), known.metadata.get("max")
            value = getattr(self, known.name)
            if low is None or value is None:
                continue
            if not low <= value <= (math.inf if high is None else high) or math.isinf(value):
                wanted = f"{low} or more" if high is None else f"between {low} and {high}"
                flag = "--" + known.name.replace("_", "-")
                raise ArgumentError(f"{flag} {value} must be {wanted}.")
