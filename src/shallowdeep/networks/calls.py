"""How a network of any kind is called, and where its logits are in what it returns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shallowdeep.errors import NetworkError, UnknownName

LogitsOf = Callable[[Any], Tensor] | str
"""Takes what a network returned and gives its logits, shape ``(n, outputs)``; or the name they have in it."""


def call(net: nn.Module, inputs: Any) -> Any:
    """Call a network with a tensor, a tuple (positional) or a mapping (keywords) of inputs."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    if isinstance(inputs, tuple | list):
        return net(*inputs)
    return net(inputs)


def plain_inputs(inputs: Any) -> Any:
    """Inputs as a tensor, tuple or dict: another library's mapping (a tokenizer's batch) is no tree to PyTorch."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def find_logits(output: Any, logits: LogitsOf | None = None) -> Tensor:
    """The logits in what a network returned.

    Args:
        output: a tensor, an object or mapping with ``logits``, or a tuple or mapping with exactly
            one tensor of shape ``(n, outputs)``.
        logits: takes them out of anything else, or is the name of the entry or attribute that they are.

    Raises:
        NetworkError: there is no obvious entry, or it is not two-dimensional.
    """
    if logits is None:
        found = _obvious_logits(output)
    else:
        found = logits(output) if callable(logits) else _named_logits(output, logits)
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise NetworkError(
            f"the network returned {what} where logits of shape (n, outputs) are needed. "
            "Pass logits=, their name in the network's output, or a function that takes them out of it."
        )
    return found


def example_logits(net: nn.Module, inputs: Any, logits: LogitsOf | None = None) -> Tensor:
    """Call a network on an example and find its logits.

    Raises:
        NetworkError: it does not take the example, or returns no logits.
    """
    found = find_logits(call_on_example(net, inputs), logits)
    if not found.isfinite().all():
        raise NetworkError("the network answers the example inputs with logits that are not finite. Check its weights.")
    return found


def call_on_example(net: nn.Module, inputs: Any) -> Any:
    """What a network returns for an example.

    Raises:
        NetworkError: it does not take the example.
    """
    try:
        return call(net, inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what layers raise on a wrong shape
        raise NetworkError(
            f"the network does not take the example inputs: {first_line(error)}. "
            "Pass example_inputs of the shape it is made for."
        ) from error


def first_line(error: Exception) -> str:
    """The beginning of what an error says, short enough for a message of our own."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def _named_logits(output: Any, name: str) -> Any:
    if isinstance(output, Mapping) and name in output:
        return output[name]
    if hasattr(output, name):
        return getattr(output, name)
    known = output.keys() if isinstance(output, Mapping) else [key for key in dir(output) if not key.startswith("_")]
    raise UnknownName(f"entry of the network's output, a {type(output).__name__},", name, map(str, known))


def _obvious_logits(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if not isinstance(output, Mapping | tuple | list):
        return output
    entries = output.values() if isinstance(output, Mapping) else output
    tensors = [t for t in entries if isinstance(t, Tensor) and t.ndim == 2]
    return tensors[0] if len(tensors) == 1 else output


def first_tensor(output: Any) -> Tensor | None:
    """The hidden state a submodule gave out: its output, or the first tensor in it."""
    return next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)


def batch_size(inputs: Any) -> int:
    """Number of rows of the inputs."""
    tensor = first_tensor(plain_inputs(inputs))
    if tensor is None or tensor.ndim == 0 or len(tensor) == 0:
        raise NetworkError("the inputs hold no tensor with a batch of at least one row.")
    return len(tensor)


def distinct_rows(inputs: Any, num_rows: int) -> Any:
    """Inputs with ``num_rows`` rows that differ from each other, made from an example of any batch size.

    Numbers get noise of the example's own spread; whole numbers (tokens) are rolled along the row, which
    keeps them in their vocabulary.

    Raises:
        NetworkError: the example repeats one token, so that rolling changes nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def widen(t: Tensor) -> Tensor:
        t = t[torch.arange(num_rows) % len(t)]
        if not t.is_floating_point():
            return torch.stack([row.roll(i, -1) if row.ndim else row for i, row in enumerate(t)])
        spread = t.std().nan_to_num().clamp_min(0.1)
        return t + spread * torch.randn(t.shape, generator=generator).to(t)

    widened = pytree.tree_map_only(Tensor, widen, plain_inputs(inputs))
    tensors = [leaf for leaf in pytree.tree_leaves(widened) if isinstance(leaf, Tensor)]
    if all(bool((t == t[:1]).all()) for t in tensors):
        raise NetworkError(
            "example_inputs repeats one value, and samples that do not differ prove nothing. "
            "Pass an example with different tokens."
        )
    return widened


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; every submodule's own mode is restored, also after an error."""
    with taking_turns(net):  # another thread would take this one's modes for the network's own
        training = [module for module in net.modules() if module.training]
        try:
            if training:
                net.eval()
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and weights are as before afterwards, also after an error.

    No weight asks for a gradient either: PyTorch's FLOP counter stumbles, under ``no_grad``, over one that is given
    to a submodule as an input.
    """
    with in_eval_mode(net):
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.no_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


_exact_guard = threading.Lock()
_exact_inside = 0
_exact_before: list[Callable[[], None]] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 is float32 inside, neither TF32 nor bf16 nor autocast, whatever the caller allows.

    The switches are the process's: the first thread inside sets them, the last one puts them back. That takes some ten
    microseconds, and entering again inside next to nothing: who runs many small pieces enters around all of them.
    """
    global _exact_inside
    with _exact_guard:
        if _exact_inside == 0:
            _exact_before.extend(_set_exact())
        _exact_inside += 1
    try:
        with without_autocast():
            yield
    finally:
        with _exact_guard:
            _exact_inside -= 1
            while _exact_inside == 0 and _exact_before:
                _exact_before.pop()()


@contextmanager
def without_autocast() -> Iterator[None]:
    """No operation changes its precision inside, whatever the caller's autocast says; this thread's alone."""
    active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not active:
        yield
        return
    with ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _set_exact() -> list[Callable[[], None]]:
    """Set the switches; gives what puts each back."""
    everywhere: Any = torch.backends
    matmul, cudnn, cpu = everywhere.cuda.matmul, everywhere.cudnn, everywhere.mkldnn
    if not hasattr(matmul, "fp32_precision"):  # until PyTorch 2.8
        return [_switched(place, "allow_tf32", False) for place in (matmul, cudnn)]
    back = [_switched(place, "fp32_precision", "ieee") for place in (matmul, cpu.matmul, cpu.conv)]
    if {everywhere.fp32_precision, cudnn.fp32_precision} == {"none"}:
        with suppress(RuntimeError):  # whoever set cuDNN's in the new way may not ask in the old one
            # In the old way wherever that is possible: PyTorch's own compiler stumbles over the new one.
            return [*back, _switched(cudnn, "allow_tf32", False)]
    return [*back, *(_switched(place, "fp32_precision", "ieee") for place in (cudnn.conv, cudnn.rnn))]


def _switched(place: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(place, name)
    setattr(place, name, value)
    return partial(setattr, place, name, before)


_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_turns_guard = threading.Lock()


@contextmanager
def taking_turns(net: nn.Module) -> Iterator[None]:
    """Threads that change the same network take turns; a thread already inside goes on.

    A network with exits has its backbone's lock: who runs one of them also keeps the others off.
    """
    while isinstance(inner := getattr(net, "backbone", None), nn.Module):
        net = inner
    with _turns_guard:
        lock = _turns.setdefault(net, threading.RLock())
    with lock:
        yield
