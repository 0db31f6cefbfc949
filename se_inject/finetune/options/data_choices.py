"""The options of a fine-tuning run that are of the images and their changes."""

from dataclasses import dataclass
from typing import Literal

from se_inject.plan.injection import option

Sampler = Literal["shuffle", "balanced"]

_DATA = {"panel": "Data"}


@dataclass(frozen=True, kw_only=True)
class DataChoices:
    """Which images, and how they are drawn and changed."""

    data: str = option(
        "digits",
        "The images to learn from: a folder of class folders (or of train/, val/ and test/), a"
        " FILE.csv with path,label[,split], torch/NAME of torchvision, hfds/NAME of Hugging Face,"
        " wds/FOLDER of WebDataset shards, or digits: scikit-learn's 1,797 handwritten digits.",
        show_default=False,
        **_DATA,
    )
    data_dir: str | None = option(
        None,
        "The folder where torch/, hfds/ or wds/ data lie or go.",
        show_default="here",
        **_DATA,
    )
    image_column: str | None = option(
        None, "The column of hfds/ data that has the images.", show_default="by its type", **_DATA
    )
    label_column: str | None = option(
        None, "The column of hfds/ data that has the classes.", show_default="by its type", **_DATA
    )
    val_split: float = option(
        0.2, "The share of each class to validate on, where the data have no val/.", **_DATA
    )
    limit: int | None = option(
        None,
        "The number of images of each part that are used at most, of all classes alike; for a dry"
        " run.",
        min=1,
        show_default="all",
        **_DATA,
    )
    img_size: int | None = option(
        None,
        "The side of the images in pixels.",
        min=1,
        show_default="the model's own",
        **_DATA,
    )
    sampler: Sampler = option(
        "shuffle",
        "How an epoch draws its images: shuffle takes each once, balanced as many of each class.",
        **_DATA,
    )
    scale: float = option(
        0.7,
        "The smallest share of the area of an image that a random crop has.",
        min=0.01,
        max=1,
        **_DATA,
    )
    hflip: float | None = option(
        None,
        "The share of the training images that are mirrored, left for right.",
        min=0,
        max=1,
        show_default="0.5, and 0 for digits",
        **_DATA,
    )
    vflip: float = option(
        0.0, "The share of the training images that are turned upside down.", min=0, max=1, **_DATA
    )
    color_jitter: float | None = option(
        None,
        "The largest change of brightness, contrast and saturation, as a share; not with --aa.",
        min=0,
        show_default="none",
        **_DATA,
    )
    aa: str | None = option(
        None,
        "The automatic augmentation in timm's words, such as rand-m9-mstd0.5.",
        show_default="none",
        **_DATA,
    )
    reprob: float = option(
        0.0, "The share of the training images with an erased rectangle.", min=0, max=1, **_DATA
    )
    mixup: float = option(
        0.0, "The alpha of mixup's Beta distribution; 0 mixes no images.", min=0, **_DATA
    )
    cutmix: float = option(
        0.0, "The alpha of CutMix's Beta distribution; 0 mixes no images.", min=0, **_DATA
    )
