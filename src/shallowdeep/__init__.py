"""See where a neural network overthinks, and stop it there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallowdeep.analysis.backdoor import measure_backdoor
    from shallowdeep.analysis.budgets import cross_fit_budgets, measure_budgets
    from shallowdeep.analysis.confusion import confusion_scores, measure_confusion
    from shallowdeep.analysis.gradcam import Saliency, gradcam
    from shallowdeep.analysis.overthinking import measure_overthinking
    from shallowdeep.config import RunConfig, load_config
    from shallowdeep.data.encoded import EncodedImages
    from shallowdeep.data.files.stores import FileStore
    from shallowdeep.data.images import ImageSet
    from shallowdeep.data.labels import LabelTree
    from shallowdeep.data.preprocess import Preprocessing
    from shallowdeep.data.samples import Augmentation, Samples, Splits
    from shallowdeep.data.sources import load_data
    from shallowdeep.data.streams import Stream
    from shallowdeep.data.tensors import TensorSet
    from shallowdeep.data.triggers import Backdoor, Stamp, poison, stamp, triggered
    from shallowdeep.errors import ShallowDeepError
    from shallowdeep.inference.answers import Answers
    from shallowdeep.inference.engine import Engine
    from shallowdeep.inference.onnx.export import Export, export
    from shallowdeep.inference.runner.folder import Runner
    from shallowdeep.networks.attach import attach
    from shallowdeep.networks.costs import Costs
    from shallowdeep.networks.exits import InternalClassifier, TokenClassifier, VectorClassifier
    from shallowdeep.networks.inputs import example_inputs_for, preprocessing_of
    from shallowdeep.networks.multi_exit import MultiExitNetwork
    from shallowdeep.networks.sdn import ShallowDeepNetwork
    from shallowdeep.networks.sites import Site, probe
    from shallowdeep.networks.zoo import load_network
    from shallowdeep.policies.calibrate import calibrate
    from shallowdeep.policies.replay import Decisions, oracle, replay, sweep, sweep_confidence
    from shallowdeep.policies.rules import Confidence, ExitPolicy, Patience, Verdict, policy_from_dict
    from shallowdeep.runs.run import Run
    from shallowdeep.traces.record import record
    from shallowdeep.traces.trace import Trace, TraceInfo
    from shallowdeep.training.features import FeatureReuse
    from shallowdeep.training.loop import fit
    from shallowdeep.training.objectives import Distil, Exits, Joint, Plain
    from shallowdeep.training.recipes import Recipe, named_recipe
    from shallowdeep.training.strategies import Phase, named_strategy

_HOMES = {
    "analysis.backdoor": ["measure_backdoor"],
    "analysis.budgets": ["cross_fit_budgets", "measure_budgets"],
    "analysis.confusion": ["confusion_scores", "measure_confusion"],
    "analysis.gradcam": ["Saliency", "gradcam"],
    "analysis.overthinking": ["measure_overthinking"],
    "config": ["RunConfig", "load_config"],
    "data.encoded": ["EncodedImages"],
    "data.files.stores": ["FileStore"],
    "data.images": ["ImageSet"],
    "data.labels": ["LabelTree"],
    "data.preprocess": ["Preprocessing"],
    "data.samples": ["Augmentation", "Samples", "Splits"],
    "data.sources": ["load_data"],
    "data.streams": ["Stream"],
    "data.tensors": ["TensorSet"],
    "data.triggers": ["Backdoor", "Stamp", "poison", "stamp", "triggered"],
    "errors": ["ShallowDeepError"],
    "inference.answers": ["Answers"],
    "inference.engine": ["Engine"],
    "inference.onnx.export": ["Export", "export"],
    "inference.runner.folder": ["Runner"],
    "networks.attach": ["attach"],
    "networks.costs": ["Costs"],
    "networks.exits": ["InternalClassifier", "TokenClassifier", "VectorClassifier"],
    "networks.inputs": ["example_inputs_for", "preprocessing_of"],
    "networks.multi_exit": ["MultiExitNetwork"],
    "networks.sdn": ["ShallowDeepNetwork"],
    "networks.sites": ["Site", "probe"],
    "networks.zoo": ["load_network"],
    "policies.calibrate": ["calibrate"],
    "policies.replay": ["Decisions", "oracle", "replay", "sweep", "sweep_confidence"],
    "policies.rules": ["Confidence", "ExitPolicy", "Patience", "Verdict", "policy_from_dict"],
    "runs.run": ["Run"],
    "traces.record": ["record"],
    "traces.trace": ["Trace", "TraceInfo"],
    "training.features": ["FeatureReuse"],
    "training.loop": ["fit"],
    "training.objectives": ["Distil", "Exits", "Joint", "Plain"],
    "training.recipes": ["Recipe", "named_recipe"],
    "training.strategies": ["Phase", "named_strategy"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Answers",
    "Augmentation",
    "Backdoor",
    "Confidence",
    "Costs",
    "Decisions",
    "Distil",
    "EncodedImages",
    "Engine",
    "ExitPolicy",
    "Exits",
    "Export",
    "FeatureReuse",
    "FileStore",
    "ImageSet",
    "InternalClassifier",
    "Joint",
    "LabelTree",
    "MultiExitNetwork",
    "Patience",
    "Phase",
    "Plain",
    "Preprocessing",
    "Recipe",
    "Run",
    "RunConfig",
    "Runner",
    "Saliency",
    "Samples",
    "ShallowDeepError",
    "ShallowDeepNetwork",
    "Site",
    "Splits",
    "Stamp",
    "Stream",
    "TensorSet",
    "TokenClassifier",
    "Trace",
    "TraceInfo",
    "VectorClassifier",
    "Verdict",
    "attach",
    "calibrate",
    "confusion_scores",
    "cross_fit_budgets",
    "example_inputs_for",
    "export",
    "fit",
    "gradcam",
    "load_config",
    "load_data",
    "load_network",
    "measure_backdoor",
    "measure_budgets",
    "measure_confusion",
    "measure_overthinking",
    "named_recipe",
    "named_strategy",
    "oracle",
    "poison",
    "policy_from_dict",
    "preprocessing_of",
    "probe",
    "record",
    "replay",
    "stamp",
    "sweep",
    "sweep_confidence",
    "triggered",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing the package alone does not import torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shallowdeep' has no attribute '{name}'")
    return getattr(importlib.import_module(f"shallowdeep.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
