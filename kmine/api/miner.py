"""The estimator: knowledge mining with scikit-learn's habits."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kmine import cli
from kmine.api.arrays import ArrayDataset
from kmine.api.predictor import Predictor
from kmine.api.run import PseudoMasks, Run
from kmine.config import DataConfig, LoopConfig
from kmine.errors import UserError
from kmine.feedback.verdict_effects import NO_VERDICTS, resolve_verdicts
from kmine.io.errors import expanded
from kmine.io.presets import settings_file
from kmine.predict.run_model import load_model, open_run_model
from kmine.segmenters import SEGMENTERS, Segmenter, register_segmenter
from kmine.types import ProgressReporter, RoundResult

if TYPE_CHECKING:
    from kmine.models.base import LocalModel


class KnowledgeMiner:
    """Train a local model on few masks, mine pseudo masks with a promptable segmenter, retrain, repeat.

    The algorithm is `kmine.methods.mining.mine` (arXiv 2503.06816). `fit` does the work of `kmine loop`: everything is
    kept in a run folder, and the same call resumes there. Other commands (`kmine audit`, `kmine predict`) read it.

    Args:
        segmenter: name of a segmenter (tiny, ellipse, sam_vit_b, ...), or an object of the `Segmenter` protocol. None,
            here and in the next four: as in `config`, without it the default of `kmine loop`.
        model: name of the local model: unetpp, unet, dpt or sks.
        rounds: mining rounds after round 0; 0 is supervised training.
        seed: draws labeled images, initial weights, batches and augmentation.
        device: auto, cpu, cuda or cuda:N.
        out: run folder; None makes a temporary one, named by `run_.root`.
        config: further settings: a `LoopConfig`, or a YAML file or preset as of `kmine loop --config`.
        **settings: settings of `kmine loop` with `__` for the dot, such as `fit__steps=600`.

    Attributes:
        run_: the run folder (`kmine.open_run`); this and the following are set by `fit`.
        rounds_: results of the rounds, in order.
        labeled_round_: round in which each image entered training: 0 for labeled ones; absent images took no part.
        termination_condition_: rounds, no_pseudo_masks or refused_twice, as in run.json.
        pseudo_labels_: pseudo masks of the kept model by sample id, (H, W) uint8 class ids, 255 ignored.
        model_: the local model of the kept round, in evaluation mode on the CPU.

    Example:
        >>> KnowledgeMiner(rounds=2, fit__steps=50).get_params()["fit__steps"]
        50
    """

    def __init__(
        self,
        *,
        segmenter: str | Segmenter | None = None,
        model: str | None = None,
        rounds: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        out: str | Path | None = None,
        config: LoopConfig | str | Path | None = None,
        **settings: Any,
    ) -> None:
        self.segmenter, self.model, self.rounds, self.seed = segmenter, model, rounds, seed
        self.device, self.out, self.config = device, out, config
        self.settings = settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments of the constructor by name, `settings` among them; `deep` changes nothing."""
        names = ("segmenter", "model", "rounds", "seed", "device", "out", "config")
        return {**{name: getattr(self, name) for name in names}, **self.settings}

    def set_params(self, **params: Any) -> KnowledgeMiner:
        """Set arguments of the constructor; returns the estimator itself."""
        self.__init__(**{**self.get_params(), **params})  # type: ignore[misc]
        return self

    def fit(self, data: DataConfig | ArrayDataset, *, progress: ProgressReporter | None = None) -> KnowledgeMiner:
        """Run all rounds, or resume them in `out`; returns the estimator itself.

        Args:
            data: images and masks in memory, or the settings of a data set on disk. All masks of an `ArrayDataset` are
                used: a part for validation, none for a test split, unless `data__...` settings differ.
            progress: receives the progress; None is silent.

        Raises:
            UserError: settings or data that cannot work; the message holds the cure.
        """
        from kmine.loop.engine import run_rounds

        root = expanded(self.out) if self.out is not None else Path(tempfile.mkdtemp(prefix="kmine-"))
        run_rounds(self._loop_config(data, root), progress or cli.Terminal(quiet=True))
        self.run_ = Run(root)
        self.rounds_: list[RoundResult] = self.run_.rounds
        self.termination_condition_: str = self.run_.info["stopped_by"]
        self.pseudo_labels_: PseudoMasks = self.run_.pseudo_masks()
        self.labeled_round_ = _labeled_round(self.run_)
        self.__dict__.pop("_predictor", None)
        return self

    def predict(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mask of an image: (H, W, 3) RGB or (H, W) grey uint8 -> (H, W) uint8 class ids."""
        return self._predictor.predict(image).mask

    def predict_proba(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities of an image: (H, W, 3) RGB or (H, W) grey uint8 -> (K, H, W) float32, sum 1 over K."""
        probs = self._predictor.predict(image).probs
        assert probs is not None
        return probs

    @property
    def model_(self) -> LocalModel:
        """The local model of the kept round, in evaluation mode on the CPU."""
        return load_model(open_run_model(self._fitted_root(), None, "best"))

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor.from_run(self._fitted_root(), device=self.device or self.run_.config.device)

    def _fitted_root(self) -> Path:
        if not hasattr(self, "run_"):
            raise UserError("expected a fitted KnowledgeMiner, got one without a run; call fit(data) first")
        return self.run_.root

    def _loop_config(self, data: DataConfig | ArrayDataset, root: Path) -> LoopConfig:
        """The settings of a run; arrays are written below its folder."""
        base = LoopConfig() if self.config is None else self.config
        if not isinstance(base, LoopConfig):
            base = cli.load_config(LoopConfig, settings_file(base) if isinstance(base, str) else base)
        if isinstance(data, ArrayDataset):
            data = data.write(root / "data", replace(base.data, label_fraction=1.0, test_fraction=0.0))
        given = {"rounds": self.rounds, "seed": self.seed, "device": self.device, "model.name": self.model}
        given["segmenter.name"] = self._segmenter_name()
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        changes |= {"out": str(root)} | {name.replace("__", "."): value for name, value in self.settings.items()}
        written = {name: _written(name, value) for name, value in changes.items()}
        return cli.override(LoopConfig, cli.to_dict(replace(base, data=data)), written, "KnowledgeMiner")

    def _segmenter_name(self) -> str | None:
        if self.segmenter is None or isinstance(self.segmenter, str):
            return self.segmenter
        instance = self.segmenter
        name = f"{instance.name}:object" if SEGMENTERS.is_builtin(instance.name) else instance.name
        register_segmenter(name, lambda *_: instance)
        return name


def _written(name: str, value: object) -> str:
    """The value of a setting as on a command line; `UserError` for a type that no setting has."""
    try:
        text = json.dumps(
            value, default=lambda x: x.tolist() if isinstance(x, np.generic | np.ndarray) else os.fspath(x)
        )
    except (TypeError, ValueError) as error:
        problem = f"expected text, a number, a path, or a list of these, got {type(value).__name__}; convert it"
        raise UserError(f"KnowledgeMiner: {name}: {problem}") from error
    return json.loads(text) if text.startswith('"') else text  # a command line has text unquoted


def _labeled_round(run: Run) -> Mapping[str, int]:
    """Sample id -> round in which it entered training: 0 for labeled images and those that a reviewer's verdicts made
    so, else the first round that used its mask."""
    splits, verdicts = run.splits, run.config.verdicts
    ids = splits["sample_id"]
    labeled, unlabeled = (list(ids[splits["split"] == name]) for name in ("labeled", "unlabeled"))
    review = resolve_verdicts(Path(verdicts), labeled, unlabeled, set(ids)) if verdicts else NO_VERDICTS
    entered = dict.fromkeys([i for i in (*labeled, *review.corrected) if i not in review.dropped_labels], 0)
    for result in run.rounds[1:]:
        for sample_id in run.pseudo_masks(result.round_idx):
            entered.setdefault(sample_id, result.round_idx)
    return entered
