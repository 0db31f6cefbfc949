"""The experiments of evidence.py as data: which arms of which network on which images.

Everything but the learning rate is fixed here before anything is measured. The learning rate is
chosen for each arm from the same grid, on training images (:func:`evidence.rate_of`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

RATES = (1e-3, 3e-3, 1e-2)
RATE_SEED = 1000  # the seed of the runs that choose a rate; no reported run has it


@dataclass(frozen=True)
class Arm:
    """One way to train the network of an experiment."""

    name: str
    text: str  # what the page calls it
    se: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # options of se-inject finetune
    network: str | None = None  # a network other than the experiment's
    late: bool = False  # whether it is trained after the other arms of all experiments
    rate: float | None = None  # a fixed rate, if none is to be chosen


@dataclass(frozen=True)
class Sizes:
    """The numbers of images of an arm with one seed."""

    train: int
    val: int  # taken from the training images too; the rates are chosen on these
    test: int  # nothing is chosen on these
    watched: int = 32  # how many images of val a reported run validates on in each epoch


@dataclass(frozen=True)
class Experiment:
    """Arms of one network on one data set, each compared with the arm ``base``."""

    question: int
    network: str
    data: str
    base: str
    arms: tuple[Arm, ...]
    recipe: Mapping[str, Any]  # options of se-inject finetune that all arms share
    sizes: Sizes
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = RATES
    rate_epochs: int = 1  # the epochs of the runs that choose a rate
    late: bool = False  # whether it is trained after the others, as late arms are
    note: str = ""  # what the page says beside its name
    folder: str = ""  # the folder of its files; questions that share arms share their files

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


QUESTIONS = {
    1: "From scratch: does a network learn more with SE blocks?",
    2: "In a pretrained network that is trained as a whole: do SE blocks help?",
    3: "As an adapter: do SE blocks help if the base is frozen and a head learns with them?",
}

BASE = Arm("base", "without SE")
SE = Arm("se", "SE", se=True)
IDENTITY = Arm(
    "se-identity",
    "SE on the shortcut",
    se=True,
    options={"placement": "identity"},
    late=True,
)


def _wider(network: str) -> Arm:
    return Arm("wide", "wider, as many parameters", network=f"{network}_wide", late=True)


EVERYTHING = Arm("all", "everything learns, no SE")
EVERYTHING_SE = Arm("all-se", "everything learns, with SE", se=True)
# What the gates of all-se showed led to these two. docs/evidence.md says what was found.
REMEDIES = (
    Arm(
        "all-se-3x3",
        "everything, SE behind the depthwise convolutions",
        se=True,
        options={"placement": "3x3"},
        late=True,
    ),
    Arm("all-se-r4", "everything, SE with r = 4", se=True, options={"r": 4}, late=True),
)
HEAD = Arm("head", "head only", options={"train": "head"})
# This arm was added after the results of the others were seen. On Fashion-MNIST the head alone got
# the highest rate of the grid, because two more images of 128 were right, but at twice the loss. So
# the comparisons are repeated with the next lower rate, which the arm with SE blocks got.
HEAD_SLOWER = Arm(
    "head-0.003", "head only, rate 0.003", options={"train": "head"}, late=True, rate=3e-3
)
ADAPTERS = (
    Arm("se", "SE + head", se=True, options={"train": "se+head"}),
    Arm("bias", "biases + head", options={"train": "bias"}, late=True),
    Arm("norm", "norms' scales and shifts + head", options={"train": "norm"}, late=True),
    Arm("se-r4", "SE with r = 4 + head", se=True, options={"train": "se+head", "r": 4}, late=True),
)

SCRATCH: Mapping[str, Any] = {
    "img_size": 32,
    "batch_size": 32,
    "epochs": 8,
    "freeze_epochs": 0,
    "base_lr_scale": 1.0,
    "hflip": 0.5,
}
# The base is frozen for one epoch. Then everything learns, the base at a tenth of the rate and with
# its statistics kept. This is what se-inject finetune does with a pretrained network by default,
# except for the numbers of epochs.
PRETRAINED: Mapping[str, Any] = {
    "img_size": 48,
    "batch_size": 32,
    "epochs": 4,
    "freeze_epochs": 1,
    "bn_stats": "frozen",
    "hflip": 0.5,
}


def _scratch(network: str, data: str, sizes: Sizes, **more: Any) -> Experiment:
    # The paper's placements are for residual branches. Units have only the standard one.
    arms = (BASE, SE, *((IDENTITY,) if network == "residual" else ()), _wider(network))
    return Experiment(
        *(1, network, data, "base", arms, SCRATCH, sizes), folder=f"{network}-{data}", **more
    )


def _pretrained(data: str, sizes: Sizes, **more: Any) -> tuple[Experiment, ...]:
    shared = {"recipe": PRETRAINED, "sizes": sizes, "folder": f"lite0-{data}", **more}
    inside = (EVERYTHING, EVERYTHING_SE, *REMEDIES)
    return (
        Experiment(2, "lite0", data, "all", inside, **shared),
        Experiment(3, "lite0", data, "head", (HEAD, *ADAPTERS, EVERYTHING), **shared),
        *((_afterwards(**shared),) if data == "fashion" else ()),
    )


def _afterwards(**shared: Any) -> Experiment:
    arms = (HEAD_SLOWER, *ADAPTERS, EVERYTHING)
    note = "the same arms against the head at the rate of SE + head, added after the rest was seen"
    return Experiment(3, "lite0", "fashion", "head-0.003", arms, note=note, **shared)


def _longer() -> Experiment:
    """The first two arms of question 2, trained four times as long at the rates that they got."""
    arms = tuple(replace(arm, rate=3e-3) for arm in (EVERYTHING, EVERYTHING_SE))
    return Experiment(
        *(2, "lite0", "fashion", "all", arms, {**PRETRAINED, "epochs": 16}),
        *(Sizes(320, 128, 500), tuple(range(5))),
        late=True,
        note="sixteen epochs at the rates of the table above, added after that was seen",
        folder=LONGER,
    )


LONGER = "lite0-fashion-longer"


def small() -> tuple[Experiment, ...]:
    """The experiments that two shared CPU cores train in an hour."""
    more: dict[str, Any] = {"seeds": tuple(range(5)), "rate_epochs": 4}
    few = Sizes(512, 256, 1000)
    cells = Sizes(512, 256, 656)
    fewer: dict[str, Any] = {"sizes": Sizes(320, 128, 500), **more, "rate_epochs": 2}
    return (
        _scratch("residual", "fashion", few, **more),
        *_pretrained("fashion", **fewer),
        _scratch("plain", "fashion", few, late=True, **more),
        _scratch("units", "fashion", few, late=True, **more),
        _scratch("residual", "elpv", cells, **more),
        *_pretrained("elpv", **fewer),
        _scratch("plain", "elpv", cells, late=True, **more),
        _scratch("units", "elpv", cells, late=True, **more),
        _longer(),
    )


def full() -> tuple[Experiment, ...]:
    """The same questions with all images and longer training, for a GPU."""

    def whole(experiment: Experiment) -> Experiment:
        fashion = experiment.data == "fashion"
        sizes = Sizes(55_000, 5_000, 10_000) if fashion else Sizes(1_600, 368, 656)
        recipe = {**experiment.recipe, "batch_size": 256 if fashion else 64, "epochs": 20}
        if experiment.network == "lite0":
            recipe["img_size"] = 96
        return replace(experiment, sizes=sizes, recipe=recipe, rate_epochs=5)

    return tuple(whole(experiment) for experiment in small() if experiment.folder != LONGER)


def quick() -> tuple[Experiment, ...]:
    """One arm of each kind, trained in seconds: on digits, for one epoch, from random weights."""
    tiny = Sizes(32, 16, 16)
    skipped = ("all-se-r4", "norm", "se-r4", "head-0.003")

    def short(experiment: Experiment) -> Experiment:
        return replace(
            experiment,
            network="residual",
            recipe={**experiment.recipe, "epochs": 1, "freeze_epochs": 0, "img_size": 32},
            arms=tuple(arm for arm in experiment.arms if arm.name not in skipped),
        )

    scratch = _scratch("residual", "digits", tiny, seeds=(0, 1), rates=(1e-3, 3e-3))
    inside = _pretrained("digits", tiny, seeds=(0, 1), rates=(3e-3,))[:2]
    return tuple(map(short, (scratch, *inside)))


SCALES = {"small": small, "full": full, "quick": quick}
