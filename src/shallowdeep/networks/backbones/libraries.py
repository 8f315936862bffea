"""Networks of other libraries by name: timm, torchvision, and any function of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.errors import ConfigError, NetworkError, ShallowDeepError, UnknownName, require
from shallowdeep.networks.backbones.weights import put_weights, read_weights
from shallowdeep.networks.calls import first_line

TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.")
"""Side classifiers of GoogLeNet and Inception: published with the weights, and no part of a prediction."""


@dataclass(frozen=True)
class NetworkSpec:
    """What it takes to build a network again: its name and the options it was loaded with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def runs_code(self) -> bool:
        """Whether building it imports a module that the name gives."""
        return ":" in self.name and self.name.partition(":")[0] not in ("timm", "torchvision", "hf")


@dataclass(frozen=True)
class Request:
    """What a library is asked for.

    Attributes:
        source: ``"timm"``, ``"torchvision"``, ``"hf"`` or a module of the user's.
        name: of the network within it.
        num_classes: outputs; ``None``: those of the network's own head.
        image_size: side of the images in pixels; ``None``: the network's own.
        pretrained: fetch weights; ``None``: whatever is usual for the source.
        weights: a file or folder, or a name under which the library publishes weights.
        options: the library's own.
    """

    source: str
    name: str
    num_classes: int | None = None
    image_size: int | None = None
    pretrained: bool | None = None
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name with its source."""
        return f"{self.source}:{self.name}"

    @property
    def asked(self) -> dict[str, Any]:
        """The number of classes and the image size, where given."""
        asked = {"num_classes": self.num_classes, "image_size": self.image_size}
        return {key: value for key, value in asked.items() if value is not None}


@dataclass(frozen=True)
class Built:
    """A network, what builds it again without weights, and how its images are prepared.

    Attributes:
        net: the network.
        spec: what builds it again, with fresh weights.
        preprocessing: of its images, where the library says it.
        fresh_head: whether all but its classification layer came with weights, which are for other classes.
    """

    net: nn.Module
    spec: NetworkSpec
    preprocessing: Preprocessing | None = None
    fresh_head: bool = False


def from_timm(request: Request) -> Built:
    """A network of timm; ``weights`` is a file, or the tag of a published set (``"a1_in1k"``)."""
    timm = require("timm", extra="zoo")
    name, is_file = request.name, request.weights is not None and Path(request.weights).is_file()
    if ":" not in name:  # hf-hub:… and local-dir:… are timm's to find
        check_known("timm network", name.partition(".")[0], timm.list_models())
    if request.weights is not None and not is_file:
        name = f"{name.partition('.')[0]}.{request.weights}"
        check_known("file or tag of timm weights", name, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
    options = dict(request.options)
    with building(request.full_name):
        if ":" not in name and request.image_size is not None and _is_fixed(timm, name):
            options.setdefault("img_size", request.image_size)
        if is_file:
            net, fresh = _timm_from_file(timm, name, request, options)
        else:
            trained = bool(request.pretrained or request.weights)
            net = timm.create_model(name, pretrained=trained, num_classes=request.num_classes, **options)
            own = dict(getattr(net, "pretrained_cfg", {})).get("num_classes")
            fresh = trained and request.num_classes not in (None, own)
    config = dict(getattr(net, "pretrained_cfg", {}))
    if ":" in name:
        name, options = config.get("architecture", name), {**getattr(net, "_model_args", {}), **options}
    side = options.pop("img_size", None) if request.image_size is not None else options.get("img_size")
    spec = NetworkSpec(f"timm:{name}", {**options, **request.asked, "num_classes": net.num_classes})
    return Built(net, spec, _timm_preprocessing(config, request.image_size or side), fresh)


def _timm_from_file(timm: Any, name: str, request: Request, options: Mapping[str, Any]) -> tuple[Any, bool]:
    """A network with the file's own head, so that timm insists on every tensor, then with the head asked for.

    Returns:
        The network, and whether that is a fresh one.
    """
    config = timm.get_pretrained_cfg(name)
    classifier = (config.classifier if config else None) or ""
    first = classifier if isinstance(classifier, str) else classifier[0]
    bias = read_weights(str(request.weights)).get(f"{first}.bias")
    own = request.num_classes if bias is None else len(bias)
    overlay = {"file": request.weights, "custom_load": False, **({} if own is None else {"num_classes": own})}
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=own, **options)
    fresh = request.num_classes not in (None, own)
    if fresh:
        net.reset_classifier(request.num_classes)
    return net, fresh


def _is_fixed(timm: Any, name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _timm_preprocessing(config: Mapping[str, Any], image_size: int | None) -> Preprocessing | None:
    try:
        found = Preprocessing.from_timm(config)
    except ConfigError:  # not every input is a colour square
        return None
    return found if image_size is None else replace(found, image_size=image_size)


def from_torchvision(request: Request) -> Built:
    """A network of torchvision; ``weights`` is a file, or the name of a published set (``"IMAGENET1K_V1"``)."""
    models = require("torchvision.models", extra="zoo")
    check_known("torchvision network", request.name, models.list_models(module=models))
    published = models.get_model_weights(request.name)
    file = request.weights if request.weights is not None and Path(request.weights).is_file() else None
    if file is None and request.weights is not None:
        check_known("file or set of torchvision weights", request.weights, published.__members__)
    entry = published[(None if file else request.weights) or "DEFAULT"]
    trained = bool(request.weights or request.pretrained)
    options = {**_torchvision_defaults(request, trained), **request.options}
    with building(request.full_name):
        net = models.get_model(request.name, weights=None, **options)
        fresh = False
        if trained:
            state = entry.get_state_dict(progress=False, check_hash=True) if file is None else read_weights(file)
            source = file or request.full_name
            fresh = put_weights(net, state, source, num_classes=request.num_classes, spare=TRAINING_ONLY)
    spec = NetworkSpec(request.full_name, {**options, **request.asked})
    return Built(net, spec, _torchvision_preprocessing(entry.transforms(), request.image_size), fresh)


def _torchvision_defaults(request: Request, trained: bool) -> dict[str, Any]:
    options: dict[str, Any] = {} if request.num_classes is None else {"num_classes": request.num_classes}
    if request.name in ("googlenet", "inception_v3"):
        # Unset, they warn of their initial weights. The published weights expect pixels turned about inside.
        options |= {"aux_logits": False, "init_weights": not trained, "transform_input": trained}
    if request.image_size is not None and request.name.startswith("vit_"):
        options["image_size"] = request.image_size
    if request.image_size is not None and request.name.startswith("maxvit"):
        options["input_size"] = (request.image_size, request.image_size)
    return options


def _torchvision_preprocessing(transforms: Any, image_size: int | None) -> Preprocessing:
    return Preprocessing(
        image_size=image_size or transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_share=transforms.crop_size[0] / transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
    )


def from_function(request: Request) -> Built:
    """What a function ``package.module:function`` returns, called with the options and what its signature takes."""
    build = _imported(request)
    parameters = inspect.signature(build).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    asked = {key: value for key, value in request.asked.items() if key in parameters or takes_any}
    with building(request.full_name):
        net = build(**asked, **request.options)
    if not isinstance(net, nn.Module):
        raise NetworkError(f"{request.full_name} returned a {type(net).__name__}, not an nn.Module.")
    if request.pretrained:
        raise ConfigError(f"nothing is published for {request.full_name}. Pass weights= or an option of its own.")
    fresh = request.weights is not None and put_weights(
        net, read_weights(request.weights), request.weights, num_classes=request.num_classes
    )
    return Built(net, NetworkSpec(request.full_name, {**request.options, **request.asked}), fresh_head=fresh)


def _imported(request: Request) -> Any:
    try:
        module = importlib.import_module(request.source)
    except ImportError as error:
        raise NetworkError(
            f"cannot import '{request.source}' for the network {request.full_name} ({error}). "
            "A name with a colon is timm:…, torchvision:…, hf:… or package.module:function, where the package is "
            "installed or PYTHONPATH leads to it."
        ) from error
    build = getattr(module, request.name, None)
    if not callable(build):
        found = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownName(f"function in {request.source}", request.name, _nearest(request.name, found))
    return build


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that a library does not list, and offer the nearest ones.

    Raises:
        UnknownName: it is not among them.
    """
    known = list(known)
    if name not in known:
        raise UnknownName(kind, name, _nearest(name, known))


def _nearest(name: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=8, cutoff=0.5) or known[:8]  # libraries list a thousand


@contextmanager
def building(name: str) -> Iterator[None]:
    """Turn what a library raises while it builds or fetches a network into one message of ours.

    Raises:
        NetworkError: it was not built, or its weights could not be fetched.
    """
    try:
        yield
    except ShallowDeepError:
        raise
    except OSError as error:
        raise NetworkError(
            f"cannot fetch what {name} needs ({first_line(error)}). Where there is no connection, fetch it elsewhere "
            "and pass the local path: weights='model.safetensors' (timm, torchvision) or 'hf:folder'."
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise NetworkError(
            f"cannot build {name}: {first_line(error)}. Check the options against those of its library."
        ) from error


def as_json(values: Any) -> Any:
    """Values as JSON gives them back; ``None`` where they are no JSON."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError):
        return None
