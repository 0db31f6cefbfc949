"""The options of a fine-tuning run by the panels of its help: type, default, help and limits.

Those of the data are in ``data_choices.py``.
"""

from dataclasses import dataclass
from typing import Literal

from se_inject.names import Patterns
from se_inject.plan.injection import option

Train = Literal["se", "se+head", "all", "head", "norm", "bias"]
# These values of --train put no SE block into the network: they are what people train instead of an
# adapter, and so what SE blocks as an adapter are compared with.
WITHOUT_SE = ("head", "norm", "bias")
BNStats = Literal["auto", "frozen", "moving"]
Select = Literal["best", "last"]
ClassWeights = Literal["none", "balanced"]
Strategy = Literal["auto", "ddp", "fsdp"]
Sched = Literal["cosine", "tanh", "poly", "step", "none"]
LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")

_NETWORK, _RECIPE, _MACHINE, _OUTPUT = (
    {"panel": name} for name in ("Network", "Recipe", "Machine", "Output")
)


@dataclass(frozen=True, kw_only=True)
class NetworkChoices:
    """What the network begins with."""

    pretrained: bool = option(True, "Begin from the library's weights.", **_NETWORK)
    checkpoint: str | None = option(
        None,
        "Begin from the weights in this file: a state dict, or a file of save_se.",
        metavar="FILE",
        show_default=False,
        **_NETWORK,
    )
    drop_path: float | None = option(
        None,
        "The share of the residual branches that stochastic depth drops in training, at the last"
        " block; fewer before.",
        min=0,
        max=0.99,
        show_default="the model's own",
        **_NETWORK,
    )


@dataclass(frozen=True, kw_only=True)
class RecipeChoices:
    """What learns when, how fast and from which loss."""

    epochs: int = option(10, "The number of epochs of the whole run.", min=1, **_RECIPE)
    freeze_epochs: int | None = option(
        None,
        "The number of first epochs in which the base is frozen: only the SE blocks and the head"
        " learn.",
        min=0,
        show_default="2, fewer in a short run, 0 with a random base",
        alias="--warmup-epochs",
        **_RECIPE,
    )
    batch_size: int = option(
        64,
        "The number of images in a step, of all processes together; auto: as many as the memory of"
        " the GPU holds.",
        min=1,
        auto=True,
        **_RECIPE,
    )
    accumulate: int = option(
        1, "The number of batches whose gradients make one step together.", min=1, **_RECIPE
    )
    opt: str = option(
        "adamw", "The optimizer in timm's words, such as adamw, sgd, lamb or lion.", **_RECIPE
    )
    lr: float = option(
        1e-3,
        "The peak learning rate of the SE blocks and the head; auto: as Lightning's finder says.",
        auto=True,
        **_RECIPE,
    )
    lr_warmup: float | None = option(
        None,
        "The number of epochs, or a fraction of one, in which the rate rises to its peak.",
        min=0,
        show_default="a twentieth of all",
        **_RECIPE,
    )
    sched: Sched = option(
        "cosine",
        "How the rate falls after that, in timm's words; poly is a straight line, step a tenth"
        " after each third.",
        **_RECIPE,
    )
    base_lr_scale: float = option(
        0.1, "The base learns at this share of the rate.", min=0, **_RECIPE
    )
    layer_decay: float | None = option(
        None,
        "The factor from the rate of each layer of the base to that of the layer before it.",
        min=0,
        max=1,
        show_default="1",
        **_RECIPE,
    )
    weight_decay: float = option(
        0.05, "The weight decay; biases and norms have none.", min=0, **_RECIPE
    )
    label_smoothing: float = option(
        0.1, "The share of each label that is spread over all classes.", min=0, max=0.9, **_RECIPE
    )
    class_weights: ClassWeights = option(
        "none",
        "The weights of the classes in the loss: balanced gives each class the same sum.",
        **_RECIPE,
    )
    clip: float = option(
        1.0,
        "The largest norm that the gradient of a step may have; 0 lets it have any.",
        min=0,
        **_RECIPE,
    )
    train: Train = option(
        "all",
        "What learns after the epochs of the frozen base. head, norm and bias put in no SE blocks,"
        " so that SE as an adapter has something to be compared with: the head alone, or the head"
        " with the scales and shifts of the norms, or with all biases.",
        **_RECIPE,
    )
    bn_stats: BNStats = option(
        "auto",
        "BatchNorm statistics after the epochs of the frozen base: auto keeps those of a pretrained"
        " base frozen and lets those of a random one move.",
        **_RECIPE,
    )
    ema: float | None = option(
        None,
        "The decay of a moving average of the weights, such as 0.999; the average is validated and"
        " kept.",
        min=0,
        max=1,
        show_default="off",
        **_RECIPE,
    )
    early_stop: int | None = option(
        None,
        "The number of epochs without a better validation accuracy after which an arm stops.",
        min=1,
        show_default="off",
        **_RECIPE,
    )
    seed: int = option(0, "The seed of the first run.", **_RECIPE)
    seeds: int = option(1, "The number of runs, each with the next seed.", min=1, **_RECIPE)
    control: bool = option(
        False,
        "Also train the same network without SE blocks, with the same batches and head.",
        **_RECIPE,
    )


@dataclass(frozen=True, kw_only=True)
class MachineChoices:
    """Where and in which arithmetic; all but the precision may change when a run goes on."""

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


@dataclass(frozen=True, kw_only=True)
class OutputChoices:
    """What is kept and where it is told."""

    select: Select = option(
        "best",
        "Which epoch's weights are kept: the best on the validation images (of equal accuracies"
        " that of the smaller loss), or the last.",
        **_OUTPUT,
    )
    logger: Patterns = option(
        None,
        f"A logger of Lightning that is told each step too: {', '.join(LOGGERS)}. May be given"
        " several times.",
        metavar="NAME",
        show_default="none",
        **_OUTPUT,
    )
