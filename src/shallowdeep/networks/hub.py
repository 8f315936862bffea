"""A Shallow-Deep Network in a folder that others can read: one file of weights, one card that says what it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shallowdeep.data.text import TEXTS
from shallowdeep.errors import ConfigError, FileFormatError, NetworkError, UnknownName, require
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.zoo import spec_of
from shallowdeep.storage import write_text

if TYPE_CHECKING:
    from shallowdeep.networks.sdn import ShallowDeepNetwork

WEIGHTS = "sdn.safetensors"
CARD = "README.md"
CARD_INFO = ("accuracy", "data", "datasets", "license", "notes", "split", "strategy")
"""What a card can be told: accuracies per exit in [0, 1], names, dataset ids of the hub, a licence, Markdown."""


def find_weights(folder_or_id: str | os.PathLike[str], **download: Any) -> Path:
    """The file of weights in a folder, or fetched from a repository of the Hugging Face hub.

    Args:
        folder_or_id: a folder, or ``owner/name``.
        download: for ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, local_files_only.

    Raises:
        FileFormatError: the folder has no such file.
        NetworkError: it cannot be fetched.
    """
    folder = Path(folder_or_id)
    if folder.is_dir():
        if not (folder / WEIGHTS).is_file():
            raise FileFormatError(f"no file {WEIGHTS} in {folder}. Name a folder that save_pretrained wrote.")
        return folder / WEIGHTS
    hub = require("huggingface_hub", extra="zoo")
    try:
        return Path(hub.hf_hub_download(str(folder_or_id), WEIGHTS, **download))
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"cannot fetch {WEIGHTS} of '{folder_or_id}' from the Hugging Face hub ({first_line(error)}). "
            "Name a local folder, or a repository owner/name that is there."
        ) from error


def write_card(sdn: ShallowDeepNetwork, folder: Path, info: Mapping[str, Any]) -> None:
    """Write the card of a network beside its weights."""
    write_text(folder / CARD, make_card(sdn, info))


def push_folder(sdn: ShallowDeepNetwork, repository: str, info: Mapping[str, Any], **options: Any) -> str:
    """Save a network to a folder and upload it as one commit.

    Args:
        sdn: the network.
        repository: ``owner/name``; made if it is not there.
        info: for the card.
        options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``.

    Returns:
        Address of the commit.

    Raises:
        NetworkError: it cannot be uploaded.
    """
    hub = require("huggingface_hub", extra="zoo")
    api = hub.HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    with TemporaryDirectory() as folder:
        sdn.save_pretrained(folder, card_info=info)
        try:
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repository, folder_path=folder, **options))
        except (OSError, ValueError) as error:
            raise NetworkError(
                f"cannot upload to '{repository}' ({first_line(error)}). Log in with `hf auth login`, "
                "or save_pretrained to a folder and upload that."
            ) from error


def make_card(sdn: ShallowDeepNetwork, info: Mapping[str, Any]) -> str:
    """A model card in Markdown: metadata of the hub, what the exits cost and how right they are, how to load it.

    Raises:
        UnknownName: an entry is not one of ``CARD_INFO``.
        ConfigError: there is not one accuracy for each exit.
    """
    for key in info:
        if key not in CARD_INFO:
            raise UnknownName("entry of a model card", key, CARD_INFO)
    accuracy = info.get("accuracy")
    if accuracy is not None and len(accuracy) != sdn.num_exits:
        raise ConfigError(f"a card needs one accuracy per exit, got {len(accuracy)} for {sdn.num_exits} exits.")
    hub = require("huggingface_hub", extra="zoo")
    spec = spec_of(sdn.backbone)
    name = type(sdn.backbone).__name__ if spec is None else spec.name
    metadata = _metadata(hub, name, info)
    return f"---\n{metadata.to_yaml()}\n---\n\n{_text(sdn, name, info)}"


def _metadata(hub: Any, name: str, info: Mapping[str, Any]) -> Any:
    source, _, within = name.partition(":")
    results: dict[str, Any] = {}
    if info.get("accuracy") is not None and info.get("data"):
        results["model_name"] = f"{name} with early exits"
        results["eval_results"] = [
            hub.EvalResult(
                task_type=f"{'text' if info['data'] in TEXTS else 'image'}-classification",
                dataset_type=(info.get("datasets") or [info["data"]])[0],
                dataset_name=info["data"],
                dataset_split=info.get("split", "test"),
                metric_type="accuracy",
                metric_name="accuracy of the last exit",
                metric_value=float(info["accuracy"][-1]),
            )
        ]
    return hub.ModelCardData(
        library_name="shallowdeep",
        tags=["early-exit", "shallow-deep-network", "adaptive-inference", *([source] if within else [])],
        # The licence of trained weights depends on data and backbone: only whoever trained them can say.
        license=info.get("license"),
        datasets=info.get("datasets"),
        base_model=within if source == "hf" and "/" in within else None,
        **results,
    )


def _text(sdn: ShallowDeepNetwork, name: str, info: Mapping[str, Any]) -> str:
    split = info.get("split", "test")
    facts = {
        "network": f"`{name}`",
        "data": info.get("data"),
        "strategy": info.get("strategy"),
        "label spaces": ", ".join(f"{key}: {value}" for key, value in sdn.label_spaces.items()),
        "FLOPs of the plain network": f"{sdn.costs.backbone_flops[-1]:,} (2 per multiply-add)",
        "licence": info.get("license") or "not stated",
    }
    load = f'sdn = ShallowDeepNetwork.from_pretrained("{{this repository}}"{_arguments(sdn, name)})'
    parts = [
        f"# {name} with early exits",
        "A [Shallow-Deep Network](https://arxiv.org/abs/1810.07052): a network with classifiers at several depths, "
        "so that it can answer as soon as it is sure.",
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value),
        "## Exits",
        _exit_table(sdn, info.get("accuracy"), split),
        "Cost is the share of the plain network's FLOPs to leave there, earlier exits included.",
        "## Load",
        f"```python\nfrom shallowdeep import ShallowDeepNetwork\n\n{load}\n```",
        "Nothing is unpickled: the weights are one safetensors file.",
        info.get("notes", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _exit_table(sdn: ShallowDeepNetwork, accuracy: Sequence[float] | None, split: str) -> str:
    columns = ["exit", "after", "cost", *([f"accuracy ({split})"] if accuracy is not None else [])]
    rows = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for i, (tap, cost) in enumerate(zip((*sdn.taps, "the network's own output"), sdn.costs.relative(), strict=True)):
        cells = [str(i), tap, f"{cost:.3f}", *([f"{accuracy[i]:.4f}"] if accuracy is not None else [])]
        rows.append(" | ".join(cells))
    return "\n".join(f"| {row} |" for row in rows)


def _arguments(sdn: ShallowDeepNetwork, name: str) -> str:
    spec = spec_of(sdn.backbone)
    if spec is None:
        return ", backbone=net"  # a network that is not known by name
    return ", trust_code=True" if spec.runs_code else ""
