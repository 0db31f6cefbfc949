"""What the commands of fine-tuning share: --trust-code, and a check for Lightning."""

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
    """Check that Lightning is installed, and silence its tips and deprecation warnings.

    Raises:
        ArgumentError: the extra is not installed.
    """
    if importlib.util.find_spec("lightning") is None:
        raise ArgumentError(
            "this command needs Lightning, which is not installed:"
            " pip install 'se-inject[finetune]'."
        )
    import lightning.pytorch  # noqa: F401  # sets the levels of its loggers

    # This hides tips, lists of devices and Lightning's own deprecations. Errors still get through.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
