"""What a run starts from: weights that were trained before, and whether they go with its classes, images and split."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from shallowdeep.config import RunConfig
from shallowdeep.data.samples import IndexedSamples, Splits
from shallowdeep.errors import ConfigError
from shallowdeep.networks.backbones.weights import put_weights
from shallowdeep.networks.hub import WEIGHTS
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import NetworkSpec, has_fresh_head, spec_of
from shallowdeep.runs.folder import RunFolder
from shallowdeep.storage import load_tensors


def check_frozen(config: RunConfig, net: nn.Module, data: Splits) -> None:
    """Refuse to leave a backbone as it is that comes without a trained last layer; warn where that is taken on trust.

    Raises:
        ConfigError: its weights are for other classes.
    """
    if config.strategy not in ("ic_only", "distil") or config.init is not None:
        return
    if NetworkSpec(config.network).runs_code and not config.network_options.get("weights"):
        warnings.warn(
            f"{config.strategy} leaves the backbone as it is: {config.network} is taken to return it trained. "
            "Else give a run that trained it, --init RUN.",
            stacklevel=3,
        )
    if has_fresh_head(net):
        raise ConfigError(
            f"{config.strategy} leaves the backbone as it is, and the last layer of {config.network} is fresh: "
            f"its weights are for other classes than the {data.num_classes} of {config.data}. Train it on them "
            "first (--strategy plain), then --init RUN."
        )


def check_held_out(run: RunFolder, data: Splits) -> None:
    """Refuse a validation split that the backbone has learned from: no threshold chosen on it would hold.

    Args:
        run: that begins.
        data: its own.

    Raises:
        ConfigError: a run that the backbone's weights come from has learned from some of its validation samples.
    """
    if not isinstance(data.val, IndexedSamples):
        return
    config, held_out = run.config, set(data.val.ids.tolist())
    for origin in run.origins:
        split = {"val_size": origin.val_size, "data_options.seed": origin.data_options.seed}
        if origin.strategy in ("ic_only", "distil"):  # they left the backbone as it was
            continue
        if origin.data != config.data or list(split.values()) == [config.val_size, config.data_options.seed]:
            continue
        options = config.data_options.model_copy(update={"seed": origin.data_options.seed})
        changes = {"val_size": origin.val_size, "data_options": options}
        learned = RunFolder(run.folder, config.model_copy(update=changes)).load_data().train
        seen = held_out.intersection(learned.ids.tolist()) if isinstance(learned, IndexedSamples) else ()
        if seen:
            words = ", ".join(f"no {key}" if value is None else f"{key}={value}" for key, value in split.items())
            raise ConfigError(
                f"the backbone of {config.init} has learned from {len(seen)} of the {len(held_out)} validation "
                f"samples, and thresholds chosen on those would not hold. Take its own split: {words}"
            )


def load_backbone(sdn: ShallowDeepNetwork, path: Path, *, prepared: bool) -> None:
    """Take over the backbone of a run, or of a file.

    Args:
        sdn: changed.
        path: of the run, or the file.
        prepared: whether images are prepared as the network says: then it has to say what that one did.

    Raises:
        ConfigError: it says something else.
        FileFormatError: there are no weights, or the file is damaged.
        NetworkError: they do not fit.
    """
    if path.is_dir() and (path / "config.json").exists() and not (path / WEIGHTS).exists():
        RunFolder.open(path).check_trained()
    path = path / WEIGHTS if path.is_dir() else path
    tensors, info = load_tensors(path, kind="sdn")
    spec, network = spec_of(sdn.backbone), info.get("network")
    own = None if spec is None else spec.options.get("preprocessing")
    theirs = network.get("preprocessing") if isinstance(network, dict) else None
    if prepared and own != theirs:
        raise ConfigError(
            f"{path} learned from images prepared by {theirs}, this network wants {own}. Repeat the network_options "
            "of that run, or set network_options.preprocessing."
        )
    prefix = "backbone."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    put_weights(sdn.backbone, weights, str(path))
