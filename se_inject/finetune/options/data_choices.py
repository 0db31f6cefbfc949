"""The options of a fine-tuning run for its images and their augmentation."""

from dataclasses import dataclass
from typing import Literal

from se_inject.plan.injection import option

Sampler = Literal["shuffle", "balanced"]

_DATA = {"panel": "Data"}


@dataclass(frozen=True, kw_only=True)
class DataChoices:
    """Which images a run uses, and how it draws and augments them."""

    data: str = option(
        "digits",
        "The images to learn from. This is a folder with one folder of images for each class (or"
        " with train/, val/ and test/), a FILE.csv with path,label[,split], torch/NAME of"
        " torchvision, hfds/NAME of Hugging Face, wds/FOLDER with WebDataset shards, or digits,"
        " the 1,797 handwritten digits of scikit-learn.",
        show_default=False,
        **_DATA,
    )
    data_dir: str | None = option(
        None,
        "The folder that holds torch/, hfds/ or wds/ data, or that they are downloaded to.",
        show_default="here",
        **_DATA,
    )
    image_column: str | None = option(
        None, "The column of hfds/ data that holds the images.", show_default="by its type", **_DATA
    )
    label_column: str | None = option(
        None,
        "The column of hfds/ data that holds the classes.",
        show_default="by its type",
        **_DATA,
    )
    val_split: float = option(
        0.2, "The share of each class that is validated on where the data have no val/.", **_DATA
    )
    limit: int | None = option(
        None,
        "For a dry run: use at most so many images of each part, from all classes alike.",
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
        "How an epoch draws its images: shuffle takes each image once, and balanced takes equally"
        " many of each class.",
        **_DATA,
    )
    scale: float = option(
        0.7,
        "The smallest share of an image's area that a random crop may have.",
        min=0.01,
        max=1,
        **_DATA,
    )
    hflip: float | None = option(
        None,
        "The share of the training images that are mirrored from left to right.",
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
        "The largest change of brightness, contrast and saturation, as a share. It excludes --aa.",
        min=0,
        show_default="none",
        **_DATA,
    )
    aa: str | None = option(
        None,
        "An automatic augmentation by its name in timm, such as rand-m9-mstd0.5.",
        show_default="none",
        **_DATA,
    )
    reprob: float = option(
        0.0,
        "The share of the training images in which a random rectangle is erased.",
        min=0,
        max=1,
        **_DATA,
    )
    mixup: float = option(
        0.0, "The alpha of mixup's Beta distribution; 0 mixes no images.", min=0, **_DATA
    )
    cutmix: float = option(
        0.0, "The alpha of CutMix's Beta distribution; 0 mixes no images.", min=0, **_DATA
    )
