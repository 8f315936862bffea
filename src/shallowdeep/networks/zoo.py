"""A name becomes a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.errors import ConfigError, NetworkError, UnknownName
from shallowdeep.networks.backbones.huggingface import from_hf
from shallowdeep.networks.backbones.libraries import (
    Built,
    NetworkSpec,
    Request,
    as_json,
    from_function,
    from_timm,
    from_torchvision,
)
from shallowdeep.networks.backbones.mobilenet import mobilenet
from shallowdeep.networks.backbones.resnet import resnet20, resnet56, resnet110, wrn32_4
from shallowdeep.networks.backbones.vgg import vgg16
from shallowdeep.networks.backbones.weights import put_weights, read_weights

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build for build in (vgg16, resnet20, resnet56, resnet110, wrn32_4, mobilenet)
}
IMAGE_SIZES = (32, 64)
_OF_HF = {"config", "image_size", "num_classes", "preprocessing", "task"}  # what a saved network of transformers has
LIBRARIES: dict[str, Callable[[Request], Built]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "hf": from_hf,
}


def networks() -> list[str]:
    """Names of our own networks; ``load_network`` also takes those of libraries, ``timm:…`` and others."""
    return sorted(NETWORKS)


def load_network(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool | None = None,
    weights: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a backbone by name.

    - ``"resnet56"``: one of ``networks()``, for images of 32 or 64 pixels, with fresh weights
    - ``"timm:resnet50"``, ``"torchvision:resnet50"``: fresh weights unless asked for
    - ``"hf:google/vit-base-patch16-224"`` or ``"hf:folder"``: configuration and weights of a Hugging Face
      classifier of images or text; ``"hf:vit"``, ``"hf:bert"``: a type with fresh weights, shaped by the options
    - ``"package.module:function"``: whatever a function of yours returns

    Args:
        name: of the network.
        num_classes: outputs; ``None`` keeps the library's own head. Our own networks need it.
        image_size: side of the square RGB images in pixels; ``None``: the network's own (ours: 32).
        pretrained: fetch published weights. ``None``: for a repository or folder of ``hf:`` yes, else no.
        weights: a file of weights (safetensors or a torch state dict, never unpickled), for ``hf:`` a folder;
            for timm and torchvision also the name under which they publish some. A head of another number
            of classes starts fresh.
        preprocessing: how images are prepared, where the library does not say; a ``Preprocessing`` or its values.
        options: the library's own, e.g. ``drop_rate=0.1``.

    Returns:
        The network. Where name and options are plain values, ``ShallowDeepNetwork.load`` builds it again
        without fetching anything.

    Raises:
        UnknownName: the name is in no table; the nearest are offered.
        ConfigError: the size or the number of classes is not usable.
        NetworkError: it cannot be built or fetched, or the weights do not fit.
        FileFormatError: the file holds no weights.
        MissingExtra: the library is not installed.
    """
    if num_classes is not None and num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got num_classes={num_classes}.")
    source, colon, within = name.partition(":")
    build = LIBRARIES.get(source, from_function) if colon else _from_ours
    request = Request(source if colon else "", within if colon else name)
    request = replace(
        request, num_classes=num_classes, image_size=image_size, pretrained=pretrained, weights=weights, options=options
    )
    return _described(build(request), preprocessing)


def _described(built: Built, preprocessing: Preprocessing | Mapping[str, Any] | None) -> nn.Module:
    prepared = built.preprocessing if preprocessing is None else preprocessing
    if isinstance(prepared, Mapping):  # a file gives lists back
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in prepared.items()}
        prepared = Preprocessing(**values)
    options = built.spec.options if prepared is None else {**built.spec.options, "preprocessing": asdict(prepared)}
    plain = as_json(options)
    built.net.shallowdeep_spec = None if plain is None else NetworkSpec(built.spec.name, plain)  # type: ignore[assignment]
    built.net.shallowdeep_preprocessing = prepared  # type: ignore[assignment]
    built.net.shallowdeep_fresh_head = built.fresh_head  # type: ignore[assignment]
    built.net.shallowdeep_structure = repr(built.net)  # type: ignore[assignment]
    return built.net


def _from_ours(request: Request) -> Built:
    name, image_size = request.name, 32 if request.image_size is None else request.image_size
    if name not in NETWORKS:
        raise UnknownName("network", name, networks())
    if image_size not in IMAGE_SIZES:
        raise ConfigError(f"{name} is made for images of {IMAGE_SIZES} pixels, got image_size={image_size}.")
    if request.num_classes is None:
        raise ConfigError(f"{name} needs a number of classes. Pass num_classes=.")
    if request.options:
        raise ConfigError(f"{name} has no option '{next(iter(request.options))}', only num_classes and image_size.")
    if request.pretrained:
        raise ConfigError(f"no weights are published for {name}. Pass weights=, a file, or train it.")
    net = NETWORKS[name](request.num_classes, image_size)
    fresh = request.weights is not None and put_weights(
        net, read_weights(request.weights), request.weights, num_classes=request.num_classes
    )
    spec = NetworkSpec(name, {"num_classes": request.num_classes, "image_size": image_size})
    return Built(net, spec, fresh_head=fresh)


def spec_of(net: nn.Module) -> NetworkSpec | None:
    """How a network that ``load_network`` built can be built again; ``None`` for any other, or once it was rebuilt."""
    spec, structure = getattr(net, "shallowdeep_spec", None), getattr(net, "shallowdeep_structure", None)
    return spec if structure in (None, repr(net)) else None


def has_fresh_head(net: nn.Module) -> bool:
    """Whether ``load_network`` gave a network weights that are for other classes, and its last layer fresh ones."""
    return getattr(net, "shallowdeep_fresh_head", False)


def rebuild_network(spec: NetworkSpec, *, trust_code: bool = False) -> nn.Module:
    """Build a network again from its description, with fresh weights and without fetching any.

    Args:
        spec: from a file, perhaps of a stranger's.
        trust_code: import the module that a name ``package.module:function`` gives.

    Raises:
        NetworkError: the name would run code of that module, and ``trust_code`` is not set.
    """
    if spec.runs_code and not trust_code:
        raise NetworkError(
            f"the network of this file is built by code of its own, '{spec.name}'. "
            "If you trust it, pass trust_code=True; else build the network and pass backbone=."
        )
    if spec.name.startswith("hf:") and not {"config"} <= spec.options.keys() <= _OF_HF:
        raise NetworkError(
            f"'{spec.name}' is described by {', '.join(sorted(spec.options)) or 'nothing'}, where its configuration is "
            "needed and nothing else. Build the network and pass backbone=."
        )
    fetching = ("pretrained", "weights", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
    options = {key: value for key, value in spec.options.items() if key not in fetching}
    # A network of ours knows no weights to leave out, and an hf configuration has its own values.
    return load_network(spec.name, pretrained=False, **options)
