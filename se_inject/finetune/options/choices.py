"""The options of a fine-tuning run, one class for each panel of the help.

Each option has its type, default, help text and limits. The options of the data are in
``data_choices.py``.
"""

from dataclasses import dataclass
from typing import Literal

from se_inject.names import Patterns
from se_inject.plan.injection import option

Train = Literal["se", "se+head", "all", "head", "norm", "bias"]
# With these values of --train the network gets no SE blocks. People train these parts instead of an
# adapter, so SE blocks that serve as an adapter are compared with them.
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
    """Which weights the network begins with, and its stochastic depth."""

    pretrained: bool = option(True, "Begin with the pretrained weights of the library.", **_NETWORK)
    checkpoint: str | None = option(
        None,
        "Begin with the weights in this file, which is a state dict or was written by save_se.",
        metavar="FILE",
        show_default=False,
        **_NETWORK,
    )
    drop_path: float | None = option(
        None,
        "The share of training steps in which stochastic depth drops the last residual branch;"
        " earlier branches are dropped less often.",
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
        "The number of epochs at the start in which the base is frozen and only the SE blocks and"
        " the head learn.",
        min=0,
        show_default="2, fewer in a short run, 0 with a random base",
        alias="--warmup-epochs",
        **_RECIPE,
    )
    batch_size: int = option(
        64,
        "The number of images in a batch, of all processes together; auto takes as many as fit into"
        " the memory of the GPU.",
        min=1,
        auto=True,
        **_RECIPE,
    )
    accumulate: int = option(
        1, "The number of batches whose gradients are summed up for one step.", min=1, **_RECIPE
    )
    opt: str = option(
        "adamw", "An optimizer by its name in timm: adamw, sgd, lamb, lion, ...", **_RECIPE
    )
    lr: float = option(
        1e-3,
        "The highest learning rate of the SE blocks and the head; auto lets Lightning's finder"
        " choose it.",
        auto=True,
        **_RECIPE,
    )
    lr_warmup: float | None = option(
        None,
        "The number of epochs, or a fraction of one, in which the rate rises to --lr.",
        min=0,
        show_default="a twentieth of all",
        **_RECIPE,
    )
    sched: Sched = option(
        "cosine",
        "How the rate falls afterwards, by timm's names; poly is a straight line, and step divides"
        " the rate by 10 after each third of the run.",
        **_RECIPE,
    )
    base_lr_scale: float = option(
        0.1, "The base learns with this factor times --lr.", min=0, **_RECIPE
    )
    layer_decay: float | None = option(
        None,
        "Each layer of the base learns with this factor times the rate of the layer behind it.",
        min=0,
        max=1,
        show_default="1",
        **_RECIPE,
    )
    weight_decay: float = option(
        0.05, "The weight decay. Biases and norms are not decayed.", min=0, **_RECIPE
    )
    label_smoothing: float = option(
        0.1,
        "Label smoothing: this share of each label is spread over all classes.",
        min=0,
        max=0.9,
        **_RECIPE,
    )
    class_weights: ClassWeights = option(
        "none",
        "The weights of the classes in the loss; balanced lets each class count as much as every"
        " other one, however many images it has.",
        **_RECIPE,
    )
    clip: float = option(
        1.0,
        "The largest norm that the gradient of a step may have; 0 sets no limit.",
        min=0,
        **_RECIPE,
    )
    train: Train = option(
        "all",
        "What learns after the epochs of the frozen base. With head, norm or bias the network gets"
        " no SE blocks, for comparison: then the head learns alone, with the scales and shifts of"
        " the norms, or with all biases.",
        **_RECIPE,
    )
    bn_stats: BNStats = option(
        "auto",
        "What happens to BatchNorm statistics after the epochs of the frozen base. auto keeps those"
        " of a pretrained base as they are, and lets those of a random base move.",
        **_RECIPE,
    )
    ema: float | None = option(
        None,
        "The decay of a moving average of the weights, such as 0.999. The averaged weights are"
        " validated and kept.",
        min=0,
        max=1,
        show_default="off",
        **_RECIPE,
    )
    early_stop: int | None = option(
        None,
        "Training stops after so many epochs without a better validation accuracy.",
        min=1,
        show_default="off",
        **_RECIPE,
    )
    seed: int = option(0, "The seed of the first training.", **_RECIPE)
    seeds: int = option(1, "The number of trainings, each with the next seed.", min=1, **_RECIPE)
    control: bool = option(
        False,
        "Also train the same network without SE blocks, on the same batches and with the same"
        " head at the start.",
        **_RECIPE,
    )


@dataclass(frozen=True, kw_only=True)
class MachineChoices:
    """The processes and the arithmetic of a run.

    When a run goes on, all of these but ``precision`` and ``compile`` may change.
    """

    precision: str | None = option(
        None,
        "Lightning's name of the precision of the arithmetic: 32-true, 16-mixed, bf16-mixed, ...",
        show_default="bf16-mixed on a GPU, else 32-true",
        **_MACHINE,
    )
    devices: str = option("auto", "The number of GPUs or processes of each machine.", **_MACHINE)
    nodes: int = option(
        1,
        "The number of machines. All of them must be able to write to the run folder.",
        min=1,
        **_MACHINE,
    )
    strategy: Strategy = option(
        "auto",
        "How several processes share the work. ddp gives each a copy of the network, and auto does"
        " the same; fsdp gives each a part of it.",
        **_MACHINE,
    )
    workers: int = option(
        2, "The number of processes that load images for each GPU.", min=0, **_MACHINE
    )
    compile: bool = option(False, "Compile the network with torch.compile.", **_MACHINE)


@dataclass(frozen=True, kw_only=True)
class OutputChoices:
    """Which weights are kept, and which loggers get the figures."""

    select: Select = option(
        "best",
        "Which epoch's weights are kept: those of the last epoch, or of the one with the best"
        " validation accuracy (of equals, the one with the smaller loss).",
        **_OUTPUT,
    )
    logger: Patterns = option(
        None,
        f"A logger of Lightning that gets the figures of each step: {', '.join(LOGGERS)}. May be"
        " given several times.",
        metavar="NAME",
        show_default="none",
        **_OUTPUT,
    )
