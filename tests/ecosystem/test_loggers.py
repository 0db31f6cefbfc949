"""W&B (offline) and MLflow write down both arms of a real run, each arm as a run of its own."""

from pathlib import Path

import pytest
from rich.console import Console

from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs.trainer import start
from se_inject.finetune.training import loggers

wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]  # of their own code


def test_each_arm_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(loggers, "_TRACKING_URI", None)
    run = tmp_path / "run"
    settings = Settings(
        "test_resnet", data="digits", pretrained=False, epochs=2, freeze_epochs=0, img_size=32,
        limit=40, batch_size=20, workers=0, control=True, logger=("wandb", "mlflow"),
    )  # fmt: skip
    start(settings, run, Console(quiet=True))
    for arm in ("se-0", "control-0"):
        assert len(list((run / arm / "wandb").glob("offline-run-*/*.wandb"))) == 1
    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'se-inject'")
    found = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"run/se-0", "run/control-0"}
    for one in found.values():
        assert one.info.status == "FINISHED"
        assert one.data.params["model"] == "test_resnet"
        (accuracy,) = [key for key in one.data.metrics if "val" in key and "acc" in key]
        assert len(client.get_metric_history(one.info.run_id, accuracy)) == 2
