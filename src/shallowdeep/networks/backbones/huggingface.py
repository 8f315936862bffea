"""Networks of transformers by name: a model type, a repository of the hub, or a local folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.errors import ConfigError, FileFormatError, MissingExtra, NetworkError, UnknownName, require
from shallowdeep.networks.backbones.libraries import Built, NetworkSpec, Request, as_json, building, check_known
from shallowdeep.networks.calls import first_line
from shallowdeep.storage import read_json

AUTO_CLASSES = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}
_FETCHES_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")


def from_hf(request: Request) -> Built:
    """A classifier of transformers.

    ``hf:vit`` builds a model type with random weights from the options; ``hf:owner/name`` and ``hf:folder``
    read configuration and weights (``pretrained=False``: the configuration alone). Options of ours:
    ``task="image"`` or ``"text"`` where a type does both, ``config=`` the values of a whole configuration.
    """
    transformers = require("transformers", extra="zoo")
    options = dict(request.options)
    task, values = options.pop("task", None), options.pop("config", None)
    origin = _origin(transformers, request, values)
    if request.num_classes is not None:
        options["num_labels"] = request.num_classes
    with _importing(request.full_name), building(request.full_name):
        config = _config(transformers, request, origin, values, options)
        auto = _auto_class(transformers, config, task)
        _set_image_size(request, config, auto)
        if auto.__name__ == AUTO_CLASSES["text"] and getattr(config, "pad_token_id", 0) is None:
            # Decoders answer at the last token that is no padding, and refuse a batch without knowing which is.
            end = config.eos_token_id
            config.pad_token_id = end if isinstance(end, int) and end < config.vocab_size else 0
        config.architectures = config.architectures or []  # else some types do not know which of two they are
        if origin is None or request.pretrained is False or values is not None:
            net, fresh = auto.from_config(config, trust_remote_code=False), False
        else:
            net, fresh = _trained(auto, config, origin, request)
    preprocessing = None if origin is None or values is not None else _preprocessing(transformers, origin, request)
    return Built(net, _spec(request, net, origin, task), preprocessing, fresh)


def _origin(transformers: Any, request: Request, values: Any) -> str | None:
    """The folder or repository to read from; ``None`` for a model type, or where the configuration is given."""
    where = request.weights or request.name
    if values is not None:
        return None
    if Path(where).is_dir() and where not in transformers.CONFIG_MAPPING:
        return where
    if "/" in where and request.weights is None:
        return where
    if request.weights is not None:
        raise NetworkError(f"no folder {where} with weights for {request.full_name}. Name one that is there.")
    kind = "Hugging Face model type, local folder or hub repository (owner/name)"
    check_known(kind, where, [*transformers.CONFIG_MAPPING.keys()])
    if request.pretrained:
        raise ConfigError(f"a model type has no weights, got {request.full_name}. Name a repository: hf:owner/name.")
    return None


def _config(transformers: Any, request: Request, origin: str | None, values: Any, options: dict[str, Any]) -> Any:
    if values is not None:
        known = {key: value for key, value in values.items() if key not in _FETCHES_CODE}
        config = transformers.CONFIG_MAPPING[known["model_type"]].from_dict(known)
        config.update(options)
        return config
    if origin is None:
        return transformers.AutoConfig.for_model(request.name, **options)
    # Many weights are published in half precision, which is chosen here, never found.
    options = {"dtype": "float32", **options, "trust_remote_code": False}
    return transformers.AutoConfig.from_pretrained(origin, **options)


def _auto_class(transformers: Any, config: Any, task: str | None) -> Any:
    if task is not None and task not in AUTO_CLASSES:
        raise UnknownName("task of a Hugging Face network", task, AUTO_CLASSES)
    tables = {
        "image": transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "text": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    found = [name for name, table in tables.items() if type(config) in table and task in (None, name)]
    if not found:
        raise NetworkError(
            f"transformers has no {task or 'image or text'} classifier of type '{config.model_type}'. "
            "Build the network yourself and pass it to attach."
        )
    return getattr(transformers, AUTO_CLASSES[found[0]])


def _set_image_size(request: Request, config: Any, auto: Any) -> None:
    if request.image_size is None:
        return
    if auto.__name__ == AUTO_CLASSES["text"]:
        raise ConfigError(f"{request.full_name} reads text, got image_size={request.image_size}. Leave it out.")
    config.image_size = request.image_size


def _trained(auto: Any, config: Any, origin: str, request: Request) -> tuple[nn.Module, bool]:
    """A network with its weights, and whether some layer has none among them."""
    net, report = auto.from_pretrained(
        origin,
        config=config,
        dtype=config.dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=request.num_classes is not None,
        output_loading_info=True,
    )
    wrong = [name for name, _, own in _mismatched(report) if own[0] != request.num_classes]
    if wrong:
        raise NetworkError(
            f"the weights of {request.full_name} do not fit the network: '{wrong[0]}' has another shape. "
            "Leave out the options that change it."
        )
    return net, bool(_mismatched(report) or report.get("missing_keys"))


def _mismatched(report: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, *shapes) for name, *shapes in report.get("mismatched_keys", ())]


def _spec(request: Request, net: Any, origin: str | None, task: str | None) -> NetworkSpec:
    # A local folder may be gone, and says nothing to others.
    is_local = origin is not None and Path(origin).is_dir()
    name = f"hf:{net.config.model_type}" if is_local else request.full_name
    values = json.loads(net.config.to_json_string(use_diff=False))
    kept = {key: value for key, value in values.items() if key not in (*_FETCHES_CODE, "_name_or_path")}
    options = {"num_classes": net.config.num_labels, "config": as_json(kept)}
    return NetworkSpec(name, options if task is None else {**options, "task": task})


def _preprocessing(transformers: Any, origin: str, request: Request) -> Preprocessing | None:
    """What the repository's image processor does; ``None`` where it has none, as for text, or a kind of its own."""
    try:
        path = transformers.utils.cached_file(origin, "preprocessor_config.json")
        found = Preprocessing.from_hf(read_json(path))
    except (OSError, FileFormatError, ConfigError):
        return None
    return found if request.image_size is None else replace(found, image_size=request.image_size)


@contextmanager
def _importing(name: str) -> Iterator[None]:
    """A model's code is imported when it is first used, and torchvision with it."""
    try:
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        raise MissingExtra(
            f"{name} needs a library that does not import here ({first_line(error)}). "
            'Install it with: pip install "shallowdeep[zoo]"'
        ) from error
