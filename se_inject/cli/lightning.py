"""What the commands of fine-tuning need before anything of Lightning is imported."""

import importlib.util
import logging
import warnings
from typing import Annotated

import typer

from se_inject.errors import ArgumentError

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Allow the import of the module:callable that the run folder names as its network.",
    ),
]


def need_lightning() -> None:
    """Raise an :class:`ArgumentError` where the extra is not installed; else make it quiet."""
    if importlib.util.find_spec("lightning") is None:
        raise ArgumentError(
            "this command needs Lightning, which is not installed:"
            " pip install 'se-inject[finetune]'."
        )
    import lightning.pytorch  # noqa: F401  # sets the levels of its loggers

    # Tips, devices and its own deprecations; errors still come through.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
