"""The settings of a fine-tuning run: all of its options, and the check that they fit together.

The command line makes its options from the fields, and ``config.json`` keeps their values.
"""

import math
import re
from dataclasses import dataclass, field, fields

from se_inject.errors import ArgumentError
from se_inject.finetune.options.choices import (
    LOGGERS,
    WITHOUT_SE,
    MachineChoices,
    NetworkChoices,
    OutputChoices,
    RecipeChoices,
)
from se_inject.finetune.options.data_choices import DataChoices
from se_inject.models.names import is_code
from se_inject.plan.injection import Injection

# What may change when a run goes on. These concern the machine and the loggers, not what is learnt.
ON_RESUME = ("devices", "nodes", "strategy", "workers", "logger")


@dataclass(frozen=True)
class Settings(
    Injection, OutputChoices, MachineChoices, RecipeChoices, NetworkChoices, DataChoices
):
    """All options of a run. ``config.json`` keeps them, so that the run can be repeated or resumed.

    The options of the SE blocks come from :class:`Injection`, as for every other command.
    """

    model: str = field(
        metadata={
            "argument": True,
            "metavar": "MODEL",
            "help": "A timm name, torchvision/NAME, or module:callable.",
            "show_default": False,
        }
    )

    @property
    def base_is_pretrained(self) -> bool:
        """Whether the base begins with weights that can be loaded again.

        A ``module:callable`` has such weights only with ``--checkpoint``, because nothing is known
        about the weights that it makes.
        """
        from_library = self.pretrained and not is_code(self.model)
        return from_library or self.checkpoint is not None

    @property
    def base_is_random(self) -> bool:
        """Whether the base begins with random weights, as far as the options tell."""
        return not self.pretrained and self.checkpoint is None

    @property
    def arms(self) -> tuple[str, ...]:
        """The networks that a run trains: ``se`` has SE blocks, and ``control`` has none."""
        if self.train in WITHOUT_SE:
            return ("control",)
        return ("se", "control") if self.control else ("se",)

    @property
    def frozen_epochs(self) -> int:
        """The number of epochs at the start in which the base is frozen.

        By default a random base is not frozen, because its features are not worth learning from.
        """
        if self.freeze_epochs is not None:
            return self.freeze_epochs
        return 0 if self.base_is_random else min(2, self.epochs - 1)

    @property
    def statistics_frozen(self) -> bool:
        """Whether the BatchNorms of the base keep their statistics in phase 2 too.

        With ``auto`` those of a pretrained base do. A random base has no statistics worth keeping.
        """
        return self.bn_stats == "frozen" or (self.bn_stats == "auto" and self.base_is_pretrained)

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names of the loggers, each once. The user gives them one by one or with commas."""
        given = [self.logger] if isinstance(self.logger, str) else self.logger or ()
        return tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",")))

    def check(self) -> None:
        """Raise an :class:`ArgumentError` for values that cannot work together."""
        if not 0 <= self.frozen_epochs <= self.epochs:
            raise ArgumentError(
                f"--freeze-epochs {self.freeze_epochs} must be between 0 and --epochs"
                f" {self.epochs}, because they are the first of these."
            )
        if not 0 < self.val_split < 1:
            raise ArgumentError(f"--val-split {self.val_split} must be a share between 0 and 1.")
        if not 0 < self.lr < math.inf:  # nan fails this too
            raise ArgumentError(f"--lr {self.lr} must be above 0.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ArgumentError(f"--ema {self.ema} must be at least 0 and below 1.")
        if not 0 <= self.seed <= 2**32 - self.seeds:
            raise ArgumentError(f"--seed {self.seed} must be between 0 and {2**32 - self.seeds}.")
        if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+,?|\d+,", self.devices):
            raise ArgumentError(
                f"--devices {self.devices} is not a number of devices. Give auto, a number, or the"
                " indices of GPUs, such as 0,2."
            )
        self._check_limits()
        if self.lr_warmup is not None and self.lr_warmup > self.epochs:
            raise ArgumentError(
                f"--lr-warmup {self.lr_warmup} must be at most --epochs {self.epochs}, because it"
                " is a part of them."
            )
        if self.color_jitter is not None and self.aa is not None:
            raise ArgumentError(
                "--color-jitter and --aa exclude each other, as in timm. Leave one out."
            )
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ArgumentError(f"--logger {unknown[0]} is not one of {', '.join(LOGGERS)}.")
        if self.strategy == "fsdp" and (self.ema or self.compile):
            raise ArgumentError("--strategy fsdp works with neither --ema nor --compile.")
        if self.control and self.train in WITHOUT_SE:
            raise ArgumentError(
                f"--control would train the same again: --train {self.train} has no SE blocks"
                " either. Leave out --control, and compare with a run of --train se+head."
            )
        if self.control and self.train == "se":
            raise ArgumentError(
                "--control with --train se has nothing to train: the control has no SE blocks."
                " Use --train se+head or all."
            )

    def _check_limits(self) -> None:
        """Check the limits of the options, which hold for values from files and Python too."""
        for known in fields(self):
            low, high = known.metadata.get("min"), known.metadata.get("max")
            value = getattr(self, known.name)
            if low is None or value is None:
                continue
            if not low <= value <= (math.inf if high is None else high) or math.isinf(value):
                wanted = f"{low} or more" if high is None else f"between {low} and {high}"
                flag = "--" + known.name.replace("_", "-")
                raise ArgumentError(f"{flag} {value} must be {wanted}.")
