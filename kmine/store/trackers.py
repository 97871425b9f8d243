"""Experiment trackers (`log`): TensorBoard, Weights & Biases and MLflow, through the loggers of Lightning.

A tracker that is missing or does not answer is refused before the run starts, when the cure costs nothing. One that
fails later is left out with one line, as a training must not be lost for its curves: history.csv has all of them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kmine.errors import UserError, first_names
from kmine.store.run_folder import RunFolder

CURES = {
    "tensorboard": "check that the run folder can be written",
    "wandb": "run wandb login, or pass --offline true to write to wandb/ in the run folder, for wandb sync",
    "mlflow": "start the server of MLFLOW_TRACKING_URI, or unset it to write to mlruns/ in the run folder",
}
SERVER_TIMEOUT = 20
"""Seconds that a server has for an answer."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` for a tracker whose package is not installed; loads none."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            install = f"pip install 'kmine[{name}]', or leave out --log {name}"
            raise UserError(f"log: expected the package {name}, which is not installed; {install}")


def open_trackers(run: RunFolder, names: Sequence[str], settings: Mapping[str, Any], *, offline: bool) -> None:
    """Open the trackers of a run, which go on with what they have of it; its `settings` by dotted name are sent.

    Raises:
        UserError: a tracker that is not installed or does not answer.
    """
    require_trackers(names)
    known = run.run().get("trackers", {})
    run.trackers = [Tracker(name, run.root, known.get(name), settings, offline=offline) for name in names]
    if names:
        run.update_run(trackers=known | {tracker.name: tracker.run_id for tracker in run.trackers})


class Tracker:
    """One tracker of a run; its errors are one line in `log`, and nothing is sent to it any more.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(
        self, name: str, root: Path, run_id: str | None, settings: Mapping[str, Any], *, offline: bool
    ) -> None:
        self.name = name
        try:
            self._logger = _OPENERS[name](root, run_id, offline)
            self._logger.log_hyperparams(dict(settings))
            self.run_id = str(self._logger.version)
        except Exception as error:  # each package raises its own types
            raise UserError(f"log: {name} cannot be opened ({_first_line(error)}); {_cure(name)}") from error

    def log_metrics(self, values: Mapping[str, float], step: int, log: Callable[[str], None]) -> None:
        """Send numbers by name."""
        if self._logger is not None:
            self._guarded(lambda: self._logger.log_metrics(dict(values), step), log)

    def close(self, log: Callable[[str], None]) -> None:
        """Send what waits; failed where an exception is on its way."""
        if self._logger is not None:
            self._guarded(self._finish, log)
        self._logger = None

    def _finish(self) -> None:
        self._logger.finalize("failed" if sys.exc_info()[0] else "success")
        if self.name == "wandb":
            self._logger.experiment.finish()  # the next run of this process would else go on with it

    def _guarded(self, work: Callable[[], object], log: Callable[[str], None]) -> None:
        try:
            work()
        except Exception as error:  # as above
            self._logger = None
            cause = f"{_first_line(error)}; {_cure(self.name)}"
            log(f"{self.name} gets no more figures ({cause}); the run goes on, and history.csv has all of them")


def _cure(name: str) -> str:
    return f"{CURES[name]}, or leave out --log {name}"


def _first_line(error: Exception) -> str:
    return first_names([f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"])


def _tensorboard(root: Path, run_id: str | None, offline: bool) -> Any:
    from lightning.fabric.loggers import TensorBoardLogger

    logger = TensorBoardLogger(root, "tensorboard", "", default_hp_metric=False)
    _ = logger.experiment  # opens the file
    return logger


def _wandb(root: Path, run_id: str | None, offline: bool) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if not offline and not wandb.login(prompt=False):
        raise ConnectionError("no API key")
    settings = wandb.Settings(silent=True, console="off", init_timeout=SERVER_TIMEOUT)
    project = os.environ.get("WANDB_PROJECT", "kmine")
    mode = {"mode": "offline"} if offline else {}
    return WandbLogger(root.name, root, project=project, id=run_id, settings=settings, **mode)


def _mlflow(root: Path, run_id: str | None, offline: bool) -> Any:
    # Else an absent server costs minutes, and the file store, which needs none, is refused.
    defaults = {
        "HTTP_REQUEST_MAX_RETRIES": "2",
        "HTTP_REQUEST_TIMEOUT": str(SERVER_TIMEOUT),
        "ALLOW_FILE_STORE": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    from lightning.pytorch.loggers import MLFlowLogger

    server = None if offline else os.environ.get("MLFLOW_TRACKING_URI")
    uri = server or (root.resolve() / "mlruns").as_uri()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kmine")
    if run_id:
        from mlflow import MlflowClient, MlflowException

        try:
            MlflowClient(uri).get_run(run_id)
        except MlflowException as error:
            run_id = None if error.error_code == "RESOURCE_DOES_NOT_EXIST" else run_id  # it was removed there
    return MLFlowLogger(experiment, root.name, uri, run_id=run_id)


_OPENERS: dict[str, Callable[[Path, str | None, bool], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
