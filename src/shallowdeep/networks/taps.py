"""The only file with hooks: reading features at taps, dropping rows there, stopping there, watching a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shallowdeep.errors import IllegalTap
from shallowdeep.networks.calls import call, first_tensor, taking_turns


def submodule(net: nn.Module, name: str) -> nn.Module:
    """A submodule by its dotted name.

    Raises:
        IllegalTap: there is none of that name.
    """
    try:
        return net.get_submodule(name)
    except AttributeError:
        parent = name.rpartition(".")[0]
        children = [n for n, _ in net.named_modules() if n and n.rpartition(".")[0] == parent] or [
            n for n, _ in net.named_children()
        ]
        raise IllegalTap(f"the network has no module '{name}'. Nearby: {', '.join(children)}") from None


@contextmanager
def tapped(net: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of some submodules at every forward inside the context.

    Enter it once around a loop, and before ``torch.compile`` sees the network: hooks put on later are
    ignored by a compiled graph. Threads that tap the same network take turns.

    Args:
        net: any network; it is left as it was, also after an error.
        names: of submodules.

    Yields:
        A dictionary that the next forward fills, name to output (the first tensor of a tuple). Whoever
        reads it takes the entries out.
    """
    features: dict[str, Tensor] = {}

    def collector(name: str) -> Any:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else first_tensor(output)
            if tensor is not None:
                features[name] = tensor

        return collect

    with taking_turns(net), _hooked((submodule(net, name), collector(name)) for name in names):
        yield features


@contextmanager
def replaced(net: nn.Module, name: str | None, features: Tensor | None) -> Iterator[None]:
    """Give out other features at a submodule at every forward inside the context.

    Args:
        net: any network; left as it was.
        name: of the submodule; ``None``: nothing is replaced.
        features: what it gives out instead of its own output (of the first tensor of a tuple).
    """

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        first = first_tensor(output)
        return pytree.tree_map_only(Tensor, lambda t: features if t is first else t, output)

    with taking_turns(net), _hooked([] if name is None else [(submodule(net, name), replace)]):
        yield


RowInput = tuple[str, int]
"""A submodule's name, and which of its flattened inputs holds a row for each sample."""


@contextmanager
def take_rows(net: nn.Module, name: str, rows: Tensor, row_inputs: Iterable[RowInput] = ()) -> Iterator[None]:
    """Let only some rows pass a submodule at every forward inside the context.

    Args:
        net: any network; left as it was.
        name: of the submodule.
        rows: indices of the rows to keep, shape ``(kept,)``.
        row_inputs: inputs of later submodules, such as an attention mask, whose rows are dropped too
            (``Site.row_inputs``).
    """

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        num_rows = len(_batched(first_tensor(output)))
        return pytree.tree_map_only(Tensor, lambda t: t[rows] if t.ndim and len(t) == num_rows else t, output)

    def keep_chosen(chosen: set[int], place: int, t: Tensor) -> Tensor:
        return t[rows] if place in chosen else t

    def keep_inputs(chosen: set[int], module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _map_inputs(args, kwargs, partial(keep_chosen, chosen))

    with taking_turns(net), ExitStack() as stack:
        stack.enter_context(_hooked([(submodule(net, name), keep)]))
        for module, chosen in _by_module(row_inputs).items():
            hook = partial(keep_inputs, chosen)
            stack.callback(submodule(net, module).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def letting_leave(
    net: nn.Module, looks: Mapping[str, Callable[[Tensor], Tensor | None]], row_inputs: Iterable[RowInput] = ()
) -> Iterator[None]:
    """Let rows leave at several submodules during one forward inside the context.

    Args:
        net: any network; left as it was, also when a look raises to end the forward.
        looks: submodule's name to what is shown its output (the first tensor of a tuple) and gives the indices
            of the rows that go on, shape ``(kept,)``; ``None``: all of them.
        row_inputs: as for ``take_rows``, of all these submodules together.
    """
    drops: list[tuple[int, Tensor]] = []  # each: of how many rows, which went on

    def looking(look: Callable[[Tensor], Tensor | None]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            features = _batched(first_tensor(output))
            rows = look(features)
            if rows is None:
                return None
            drops.append((len(features), rows))
            return pytree.tree_map_only(Tensor, lambda t: t[rows] if t.ndim and len(t) == len(features) else t, output)

        return hook

    def dropped(chosen: set[int], place: int, t: Tensor) -> Tensor:
        for num_rows, rows in drops if place in chosen and t.ndim else []:
            t = t[rows] if len(t) == num_rows else t  # it may have met the first drops already
        return t

    def drop(chosen: set[int], module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _map_inputs(args, kwargs, partial(dropped, chosen)) if drops else None

    with taking_turns(net), ExitStack() as stack:
        stack.enter_context(_hooked((submodule(net, name), looking(look)) for name, look in looks.items()))
        for module, chosen in _by_module(row_inputs).items():
            hook = partial(drop, chosen)
            stack.callback(submodule(net, module).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _by_module(row_inputs: Iterable[RowInput]) -> dict[str, set[int]]:
    places: dict[str, set[int]] = {}
    for module, place in row_inputs:
        places.setdefault(module, set()).add(place)
    return places


@contextmanager
def find_row_inputs(net: nn.Module, name: str, rows: Tensor, num_rows: int) -> Iterator[list[RowInput]]:
    """``take_rows`` that also finds the row inputs: tensors of ``num_rows`` rows that come in after the drop.

    Only a tensor that needs no gradient is taken for one. With gradients on and weights that need them, such
    a tensor depends on the network's inputs alone, as an attention mask does; one that depends on earlier
    layers would make the submodule see less than the layers after it.

    Yields:
        What was found, once a forward inside the context is done.
    """
    found: list[RowInput] = []
    dropped = False

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal dropped
        dropped = True
        return pytree.tree_map_only(Tensor, lambda t: t[rows] if t.ndim and len(t) == num_rows else t, output)

    def kept(name: str, place: int, t: Tensor) -> Tensor:
        if t.requires_grad or t.ndim == 0 or len(t) != num_rows:
            return t
        found.append((name, place))
        return t[rows]

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _map_inputs(args, kwargs, partial(kept, name)) if dropped else None

    with taking_turns(net), ExitStack() as stack:
        stack.enter_context(_hooked([(submodule(net, name), keep)]))
        for other, module in net.named_modules():
            if other:
                hook = partial(enter, other)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def _map_inputs(args: Any, kwargs: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """A submodule's inputs with some tensors changed, told apart by their place among the leaves."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    changed = [change(place, leaf) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(leaves)]
    return pytree.tree_unflatten(changed, structure)


class _Reached(Exception):
    def __init__(self, features: Tensor):
        self.features = features


def run_until(net: nn.Module, name: str, inputs: Any) -> Tensor:
    """Run a network only as far as a submodule.

    Returns:
        The submodule's output (the first tensor of a tuple); nothing after it is computed.
    """

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(_batched(first_tensor(output)))

    with taking_turns(net), _hooked([(submodule(net, name), stop)]):
        try:
            call(net, inputs)
        except _Reached as reached:
            return reached.features
    raise IllegalTap(f"'{name}' is not called in a forward of this network.")


@contextmanager
def watched(
    net: nn.Module,
    enter: Callable[[str, Any], None] = lambda name, inputs: None,
    leave: Callable[[str, Any], None] = lambda name, output: None,
) -> Iterator[None]:
    """Be told of every submodule that a forward inside the context enters: its name, what goes in, what comes out.

    Args:
        net: any network; left as it was.
        enter: called with the name and the inputs, ``(args, kwargs)``, before the submodule runs.
        leave: called with the name and the output after it ran.
    """
    with taking_turns(net), ExitStack() as hooks:
        for name, module in net.named_modules():
            if name:
                before = partial(_tell_entry, enter, name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(partial(_tell_output, leave, name)).remove)
        yield


def _tell_entry(enter: Callable[[str, Any], None], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    enter(name, (args, kwargs))


def _tell_output(leave: Callable[[str, Any], None], name: str, module: nn.Module, args: Any, output: Any) -> None:
    leave(name, output)


def _batched(tensor: Tensor | None) -> Tensor:
    if tensor is None or tensor.ndim == 0:
        raise IllegalTap("a tapped module gave out no tensor with a batch of rows.")
    return tensor


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in list(hooks):
            stack.callback(module.register_forward_hook(hook).remove)
        yield
