"""What a shared folder says about its network: its base, its blocks, and what a run found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from se_inject.api import se_parameters
from se_inject.errors import CheckpointError, first_line
from se_inject.keep.header import SavedSite, saved_sites
from se_inject.layers.layout import first_convolution
from se_inject.models.head import num_classes_of
from se_inject.names import base_architecture


@dataclass(frozen=True)
class Figure:
    """One accuracy of a run."""

    images: str  # which images were used, in words
    split: str  # the name of the split in a card
    value: float  # between 0 and 1


@dataclass(frozen=True)
class RunSaid:
    """What the folder of a fine-tuning run says, as far as a card needs it."""

    base: str
    data: str  # the name of a data set, or of a folder without its path
    classes: tuple[str, ...]
    input_size: tuple[int, ...]
    figures: tuple[Figure, ...]
    verdict: str


@dataclass(frozen=True)
class About:
    """What ``config.json`` and the card are written from."""

    base: str | None  # the name of the base as load_model takes it; None if nobody knows it
    base_repo: str | None  # the repository of the base on the Hub
    license: str | None
    in_chans: int | None
    num_classes: int | None
    sites: tuple[SavedSite, ...]
    params: int
    se_params: int
    run: RunSaid | None
    class_name: str

    @property
    def name(self) -> str:
        """A short name of the base, for a title."""
        return (self.base or self.class_name).rpartition("/")[2].partition(".")[0]

    @property
    def library_base(self) -> str | None:
        """The name of the base if a library builds it, or None if code or a repository does."""
        return None if self.base is None or ":" in self.base else self.base


def about(model: nn.Module, base: str | None, run: Path | None, license: str | None) -> About:
    """Collect what is known about an injected model.

    timm writes the architecture, the tag of the weights and their licence on its models. For
    another library's model, ``base`` or the run has to say the name.
    """
    said = None if run is None else read_run(run)
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    of_timm = _name_in_timm(config)
    first = first_convolution(model)
    return About(
        base=base or (said.base if said else None) or of_timm,
        base_repo=config.get("hf_hub_id") or None,
        license=license or config.get("license") or None,
        in_chans=first.in_channels if first is not None and of_timm else None,
        num_classes=num_classes_of(model),
        sites=tuple(saved_sites(model, [])),
        params=sum(p.numel() for p in model.parameters()),
        se_params=sum(p.numel() for p in se_parameters(model)),
        run=said,
        class_name=type(model).__name__,
    )


def _name_in_timm(config: Mapping[str, Any]) -> str | None:
    """The name by which a timm model can be built again, with the tag of its weights."""
    repo = str(config.get("hf_hub_id") or "")
    if config.get("source") == "hf-hub" and not repo.startswith("timm/"):
        return f"hf-hub:{repo}"
    architecture = base_architecture(config.get("architecture") or "")
    return ".".join(filter(None, (architecture, config.get("tag")))) or None


def read_run(folder: Path) -> RunSaid:
    """What a finished fine-tuning run says about its data and its accuracies.

    Raises:
        CheckpointError: the folder has no finished run, or its files are damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        arm = summary["arms"]["se"]
        tested, last = arm.get("test"), arm["last"]["mean"]
        figures = [Figure("validation images, last epoch", "validation", float(last))]
        if tested:
            figures.insert(0, Figure("test images", "test", float(tested["mean"])))
        return RunSaid(
            base=str(config["model"]),
            data=_name_of_data(str(config["data"])),
            classes=tuple(map(str, summary["classes"])),
            input_size=tuple(map(int, summary["input_size"])),
            figures=tuple(figures),
            verdict=str(summary["verdict"]),
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no finished run: it has no {Path(error.filename).name}."
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is a damaged run ({first_line(error)}).") from error


def _name_of_data(data: str) -> str:
    """The data as ``--data`` took it. Of a folder only its name is given, as its path is private.

    ``hfds/user/name`` and ``torch/cifar10`` are names and not paths.
    """
    if data.startswith(("hfds/", "torch/")):
        return data
    return Path(data.removeprefix("wds/")).resolve().name
