"""Encoder weights and input scaling of a run, resolved before anything is signed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kmine import cli
from kmine.config import LoopConfig, ModelConfig
from kmine.data.pool import Pool, spaced_images
from kmine.errors import UserError
from kmine.io.files import default_cache_dir
from kmine.models.batch_norms import clear_scaling, feature_agreement, is_untrained, scaling_agreement
from kmine.models.build import FoldedNormsError, build_model
from kmine.models.encoder_hub import PREFIX, cached_weights, fetch_encoder, published_scaling, weights_name
from kmine.models.encoder_weights import LostWeightsError, stated_scaling, weights_sha256, with_local_weights
from kmine.store.run_folder import RunFolder
from kmine.training.model_setup import MAX_RESTORING

Log = Callable[[str], None]
NUM_PROBED = 16
"""Training images that are shown in training and in evaluation mode."""
MIN_AGREEMENT = 0.5
"""Correlation of features below which a warning is due."""
_CANDIDATES = ("half", "imagenet", "unit")
"""Scalings that are tried beside the published one; clip and dpn are too close to imagenet to be told apart."""


def resolve_weights(cfg: LoopConfig, run: RunFolder, log: Log) -> LoopConfig:
    """Settings with files and their SHA-256 in place of `auto` and `hub`; a run that trained anything keeps its own.

    Raises:
        UserError: a file that is missing or not that of `model.encoder_sha256`; a download that fails or is forbidden.
    """
    models = [model for model in cfg.model.split() if model]
    if stored := run.begun_settings().get("model"):
        before = replace(cfg.model, **{name: stored.get(name) for name in ("encoder_weights", "encoder_sha256")})
        before = replace(before, normalization=str(stored.get("normalization", "half")))
        kept = [_kept(now, then) for now, then in zip(models, before.split(), strict=False) if then]
        return replace(cfg, model=cfg.model.joined(kept))
    resolved = [_resolved(model, cfg.offline) for model in models]
    pairs = list(zip(models, resolved, strict=True))
    absent = [then for then, now in pairs if then.encoder_weights == "auto" and not now.is_pretrained]
    if names := list(dict.fromkeys(weights_name(model.name, model.encoder) for model in absent)):
        log(
            f"no weights of encoder {' and '.join(names)} are in a cache: training begins with random ones; few "
            f"labels need ImageNet's: kmine weights get {' '.join(PREFIX + name for name in names)}, or "
            "--model.encoder_weights FILE"
        )
    found = [now.encoder_weights for then, now in pairs if then.encoder_weights in ("auto", "hub")]
    for file in filter(None, dict.fromkeys(found)):
        log(f"encoder weights: {file}")
    return replace(cfg, model=cfg.model.joined(resolved))


def _resolved(model: ModelConfig, offline: bool) -> ModelConfig:
    name, path = weights_name(model.name, model.encoder), model.encoder_weights
    if path in ("auto", "hub"):
        folder = default_cache_dir()
        found = cached_weights(name, folder) if path == "auto" else fetch_encoder(name, folder, offline=offline)
        path = str(found) if found else None
    if path in (None, "none"):
        return with_local_weights(replace(model, encoder_weights=path, encoder_sha256=None))
    actual = weights_sha256(Path(path))
    if model.encoder_sha256 not in (None, actual):
        raise UserError(
            f"model.encoder_weights: expected {path} with model.encoder_sha256 {model.encoder_sha256}, got {actual}; "
            "give the right file, or leave the sum out"
        )
    return replace(model, encoder_weights=path, encoder_sha256=actual)


def _kept(now: ModelConfig, then: ModelConfig) -> ModelConfig:
    """Settings `now` with the weights and the scaling that the run began with, unless the command names others."""
    now = replace(now, normalization=then.normalization if now.normalization == "auto" else now.normalization)
    is_free = now.encoder_weights == "auto" or (now.encoder_weights == "hub" and then.is_pretrained)
    if is_free or not (now.is_pretrained or then.is_pretrained):
        return replace(now, encoder_weights=then.encoder_weights, encoder_sha256=then.encoder_sha256)
    sha256 = (now.encoder_sha256 or then.encoder_sha256) if now.is_pretrained else None
    if now.encoder_weights != then.encoder_weights and sha256:
        with suppress(LostWeightsError):
            sha256 = weights_sha256(Path(str(now.encoder_weights)))
    return replace(now, encoder_sha256=sha256)


def settle_encoders(cfg: LoopConfig, pools: Sequence[Pool], num_classes: int, run: RunFolder, log: Log) -> LoopConfig:
    """Settings with a named normalization; what the encoder weights are is recorded in run.json and config.yaml.

    On images of `pools`, read without masks: the scaling that the weights expect, whether their batch norms were
    folded, and whether the features agree in training and in evaluation mode. A run that trained anything is unchanged.

    Raises:
        UserError: weights that do not fit the encoder, or a given normalization for which they were not made.
    """
    models = [model for model in cfg.model.split() if model]
    if run.begun_settings() or not cfg.model.is_pretrained:
        return cfg
    images = spaced_images(pools, MAX_RESTORING)
    examined = [_examined(model, images, num_classes, cfg.seed) for model in models]
    for text in dict.fromkeys(text for _, record in examined for text in record["messages"].values()):
        log(text)
    cfg = replace(cfg, model=cfg.model.joined([model for model, _ in examined]))
    run.update_run(encoder=[record for _, record in examined])
    if (run.root / "config.yaml").exists():
        run.write_text("config.yaml", yaml.safe_dump(cli.to_dict(cfg), sort_keys=False))
    return cfg


def _examined(
    cfg: ModelConfig, images: NDArray[np.uint8], num_classes: int, seed: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """Settings with a named normalization, and the record of the weights; the former unchanged without weights."""
    file, messages = cfg.encoder_weights, {}
    record: dict[str, Any] = {"model": cfg.name, "encoder": cfg.encoder, "file": file, "messages": messages}
    if not cfg.is_pretrained:
        return cfg, record
    few, measured = images[:: max(1, len(images) // NUM_PROBED)][:NUM_PROBED], {}
    stated = stated_scaling(Path(str(file)))
    published = stated or published_scaling(weights_name(cfg.name, cfg.encoder)) or "half"
    try:
        model = build_model(replace(cfg, normalization=published), num_classes, seed)
        if not stated:
            measured = scaling_agreement(model, few, dict.fromkeys((*_CANDIDATES, published)))
        if is_untrained(model.encoders()[0]):
            messages["untrained"] = f"warning: {file} holds an untrained network: no batch norm has learned"
        normalization, origin = _chosen_scaling(cfg, stated, clear_scaling(measured), published)
        model.set_scaling(normalization)
    except FoldedNormsError:
        normalization, origin = _chosen_scaling(cfg, stated, None, published)
        model = build_model(replace(cfg, normalization=normalization), num_classes, seed, images=lambda: images)
        messages["folded_norms"] = (
            f"the batch norms of {file} were folded into the convolutions; they were restored from {len(images)} "
            f"training images, scaled as {normalization} ({origin}; a folded file does not tell, "
            "--model.normalization does)"
        )
    agreement = feature_agreement(model, few)
    if low := [f"{value:.2f} at stride {stride}" for stride, value in agreement.items() if value < MIN_AGREEMENT]:
        messages["modes_disagree"] = (
            f"warning: features of {file} in training and in evaluation mode correlate by {', '.join(low)} on training "
            f"images (expected {MIN_AGREEMENT} or more): training scrambles them; take other weights, or none"
        )
    record |= {"sha256": cfg.encoder_sha256, "normalization": normalization, "normalization_from": origin}
    record |= {"scalings": _rounded(measured), "agreement": _rounded(agreement)}
    return replace(cfg, normalization=normalization), record


def _chosen_scaling(cfg: ModelConfig, stated: str | None, measured: str | None, published: str) -> tuple[str, str]:
    """Normalization and where it comes from; a given one is refused if the weights clearly expect another."""
    found = {"stated": stated, "measured": measured, "published": published}
    origin, expected = next((origin, name) for origin, name in found.items() if name)
    if cfg.normalization == "auto":
        return expected, origin
    if cfg.normalization != expected and origin != "published" and not cfg.force_normalization:
        raise UserError(
            f"model.normalization: {cfg.normalization} was given, but {cfg.encoder_weights} expects {expected} "
            f"({origin}); leave it at auto, or add --model.force_normalization true"
        )
    return cfg.normalization, "given"


def _rounded(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): round(value, 4) for name, value in values.items()}
