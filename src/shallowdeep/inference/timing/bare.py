"""The network without exits as one runs it without this package: what a back end's overhead is seen against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shallowdeep.data.pytrees import map_tensors, row_counts, take_rows
from shallowdeep.errors import require
from shallowdeep.inference.backends import NO_EXITS, PRECISIONS, Order
from shallowdeep.inference.onnx.onnxruntime import provider_for
from shallowdeep.inference.onnx.precisions import models_for
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.stages import as_values
from shallowdeep.networks.calls import exact_float32
from shallowdeep.networks.compiler import check_compiler
from shallowdeep.networks.sdn import ShallowDeepNetwork

Bare = Callable[[Any], Any]
"""Takes inputs as the network does, and gives its logits ``(n, outputs)`` on the host."""


def bare_compiled(sdn: ShallowDeepNetwork, precision: str, example: Any, sizes: Sequence[int]) -> Bare:
    """``torch.compile(network)``, compiled now, once for each size of batch.

    Args:
        sdn: its backbone is copied.
        precision: of weights and arithmetic.
        example: inputs as the network takes them.
        sizes: of the batches that will come; others are compiled when they do.

    Raises:
        ConfigError: there is no compiler.
    """
    device, dtype = next(sdn.parameters()).device, PRECISIONS[precision]
    check_compiler(device, "torch.compile", "leave out backend='compiled'")
    net = copy.deepcopy(sdn).eval().to(dtype)

    def run(inputs: Any) -> Tensor:
        with torch.inference_mode(), exact_float32():
            return net.run_backbone(map_tensors(lambda t: _cast(t.to(device), dtype), inputs)).cpu()

    import torch._dynamo.config as settings  # not above: only those who compile shall wait for it

    (rows,) = row_counts(example)
    # Behind its limit the compiler would run the network as it is, and say nothing.
    with settings.patch(recompile_limit=10_000, fail_on_recompile_limit_hit=True), warnings.catch_warnings():
        # The compiler imports what PyTorch itself says is out of date.
        warnings.filterwarnings("ignore", ".*torch.jit.script_method.*", DeprecationWarning)
        compiled: Any = torch.compile(net.backbone, dynamic=False)
        net.backbone = compiled
        for size in dict.fromkeys(sizes):
            run(take_rows(example, torch.arange(size) % rows))
    return run


def bare_onnx(
    sdn: ShallowDeepNetwork, precision: str, example: Any, options: Mapping[str, Any], calibration: Any
) -> Bare:
    """One session of ONNX Runtime with its own defaults (its threads spin while they wait), a batch in one call.

    Args:
        sdn: not changed.
        precision: of weights and arithmetic.
        example: inputs as the network takes them.
        options: of the back end: its threads, providers, pool of threads and bits of weights are these too.
        calibration: inputs on which ``"int8"`` is calibrated.

    Raises:
        NetworkError: the network has no ONNX form.
        RunnerError: ONNX Runtime does not open it.
    """
    extractor = require("onnx.utils", extra="onnx").Extractor
    order = Order(sdn, NO_EXITS, precision, example)
    (model,), _ = models_for(order, calibration, options.get("weight_bits"))
    names = list(as_values(example))
    logits = extractor(model.model).extract_model(names, ["logits"])
    device, available = next(sdn.parameters()).device, require("onnxruntime", extra="onnx").get_available_providers()
    settings = Settings(
        threads=torch.get_num_threads() if options.get("threads") is None else options["threads"],
        providers=tuple(options.get("providers") or [provider_for(device, available)]),
        spinning=True,
        device_id=device.index or 0,
    )
    if options.get("shared_pool"):
        settings = replace(settings, shared_pool=True, spinning=False)
    session = settings.open(logits.SerializeToString(), "the network without exits")

    def run(inputs: Any) -> Any:
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in as_values(inputs).items()}
        return session.run(None, feeds)[0]

    return run


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
