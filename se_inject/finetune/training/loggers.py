"""Lightning's loggers, by the names that ``--logger`` takes. They write into an arm's folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from se_inject.errors import ArgumentError
from se_inject.finetune.options.config import to_dict
from se_inject.finetune.options.settings import Settings

# The user's own server. MLflow sets the variable itself as soon as it is used.
_TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI")


def loggers_of(settings: Settings, folder: Path) -> list[Logger]:
    """Make the loggers of one arm, and log the settings with each.

    Raises:
        ArgumentError: the package of a logger is not installed.
    """
    made = []
    for name in settings.loggers:
        try:
            logger = _LOGGERS[name](folder)
        except (ImportError, ModuleNotFoundError) as error:
            raise ArgumentError(
                f"--logger {name} needs a package that is not installed: pip install {name}, or"
                " 'se-inject[loggers]' for all loggers."
            ) from error
        logger.log_hyperparams(to_dict(settings))
        made.append(logger)
    return made


def _tensorboard(folder: Path) -> Logger:
    return loggers.TensorBoardLogger(
        folder, name="", version="tensorboard", default_hp_metric=False
    )


def _csv(folder: Path) -> Logger:
    # A resumed run gets a new version, because Lightning cannot append to a file of this kind.
    return loggers.CSVLogger(folder, name="csv")


class _WandbLogger(loggers.WandbLogger):
    """Ends its run with its arm. W&B would otherwise write the next arm into the same run."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(0 if status == "success" else 1)


def _wandb(folder: Path) -> Logger:
    return _WandbLogger(name=_name(folder), project="se-inject", save_dir=folder)


def _mlflow(folder: Path) -> Logger:
    # MLflow stores runs in a database, which the arms of a run share. Its store of plain files is
    # no longer developed, and the newest versions refuse to use it.
    run = folder.resolve().parent
    return loggers.MLFlowLogger(
        experiment_name="se-inject",
        run_name=_name(folder),
        tracking_uri=_TRACKING_URI or f"sqlite:///{run / 'mlflow.db'}",
        artifact_location=str(run / "mlruns"),
    )


def _name(folder: Path) -> str:
    """The name of an arm for a logger: ``runs/resnet50-flowers/se-0`` is resnet50-flowers/se-0."""
    return "/".join(folder.resolve().parts[-2:])


_LOGGERS: Mapping[str, Callable[[Path], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
