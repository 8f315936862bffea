"""The engine: answers of a Shallow-Deep Network, each sample leaving where its policy lets it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from shallowdeep.data.pytrees import map_tensors
from shallowdeep.data.samples import Samples
from shallowdeep.data.streams import as_samples
from shallowdeep.errors import ConfigError, DataError, UnknownName
from shallowdeep.inference.answers import Answers, collect
from shallowdeep.inference.backends import ALL_EXITS, BACKENDS, PRECISIONS, Driver, Order
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.onnx.precisions import check_calibration
from shallowdeep.inference.stages import as_values, check_label_sets, check_values
from shallowdeep.inference.tuning.result import Tuning
from shallowdeep.inference.tuning.task import CANDIDATES, make_task
from shallowdeep.inference.tuning.tune import tune
from shallowdeep.networks.calls import call_on_example, evaluating, taking_turns
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of
from shallowdeep.traces.record import check_float32, describe, record_with
from shallowdeep.traces.trace import Trace


class Engine:
    """Answers batches of any size; each sample leaves as soon as the policy lets it.

    The same policy object decides as in ``replay``: the answers are those of a replay of the Trace that
    ``engine.record`` gives (in ``"fp32"``, that ``record`` gives), but for ties within rounding.

    Args:
        sdn: neither its weights nor its mode change. Its device is the engine's; a back end that does not compute
            there says so, where its options name no other.
        policy: when to stop.
        backend: ``"eager"`` runs any attached network by its own code, threads taking turns; ``"stages"``,
            ``"compiled"``, ``"onnx"`` and ``"openvino"`` run an exported copy cut at the exits; ``"plain"`` runs
            the backbone alone, without early exit, for comparison.
        precision: of weights and arithmetic: ``"fp32"``, ``"bf16"`` or ``"int8"``. Anything but ``"fp32"`` answers
            otherwise: record it with ``engine.record`` and calibrate on that.
        micro_batch: rows run at a time; ``None``: what the back end is best at.
        example_inputs: what the network takes, of any batch size; ``None``: learnt from the first call.
        calibration: for ``"int8"`` and that alone: inputs as the network takes them, real ones, some hundred rows.
        options: of the back end, such as ``threads``.

    Raises:
        UnknownName: there is no such back end or precision.
        ConfigError: the back end has not got the precision, the policy looks at exits that are not there, or the
            network's weights are not float32.
        NetworkError: the network answers in several label sets.
    """

    def __init__(
        self,
        sdn: ShallowDeepNetwork,
        policy: ExitPolicy,
        *,
        backend: str = "eager",
        precision: str = "fp32",
        micro_batch: int | None = None,
        example_inputs: Any = None,
        calibration: Any = None,
        **options: Any,
    ):
        if backend not in BACKENDS:
            raise UnknownName("back end", backend, BACKENDS)
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        if precision not in BACKENDS[backend].precisions:
            have = ", ".join(BACKENDS[backend].precisions)
            raise ConfigError(f"backend={backend!r} runs in {have}, not in {precision!r}.")
        check_float32(sdn, "an engine")
        check_label_sets(sdn)
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"a micro-batch has at least one row, got micro_batch={micro_batch}.")
        self.backend = backend
        exits_of(policy, sdn.num_exits)  # refuses those that are not there
        self._order = Order(sdn, policy, precision, None, micro_batch, options, calibration)
        self._guard = threading.Lock()
        self._driver: Driver | None = None
        if example_inputs is not None:
            self.prepare(example_inputs)

    @property
    def sdn(self) -> ShallowDeepNetwork:
        """The network."""
        return self._order.sdn

    @property
    def policy(self) -> ExitPolicy:
        """When samples stop."""
        return self._order.policy

    @property
    def exits(self) -> list[int]:
        """The exits at which samples may leave, the last among them; after ``tune(allow_plain=True)`` perhaps alone."""
        return self._order.exits if self._driver is None else list(self._driver.exits)

    @property
    def precision(self) -> str:
        """Of weights and arithmetic."""
        return self._order.precision

    @property
    def latency(self) -> Latency | None:
        """What ``measure`` or ``tune`` found."""
        return None if self._driver is None else self._driver.latency

    @property
    def micro_batch(self) -> int | None:
        """Rows run at a time; ``None``: all that come together."""
        return self._order.micro_batch if self._driver is None else self._driver.micro_batch

    def prepare(self, example_inputs: Any) -> Engine:
        """Export, compile or load now what the first call would; returns the engine itself.

        Args:
            example_inputs: what the network takes, of any batch size.

        Raises:
            NetworkError: the back end cannot run this network.
            ConfigError: not with these options or this ``calibration``, or not on the network's device.
            MissingExtra: it is not installed.
        """
        if self._driver is not None:
            return self
        check_calibration(self.precision, self._order.calibration)
        self._learn(example_inputs)
        with taking_turns(self.sdn), self._guard:  # in the order in which a thread that runs the network has them
            if self._driver is None:
                self._driver = BACKENDS[self.backend].build(self._order)
        return self

    def __call__(self, inputs: Any) -> Answers:
        """Answer a batch.

        Args:
            inputs: what the backbone takes, ``(n, …)`` with n of at least 1: a tensor, a tuple or a mapping.

        Returns:
            One answer per sample, in the order of the inputs, as numpy arrays.

        Raises:
            DataError: the batch is empty, of another shape or type than the engine was prepared for, or holds
                numbers that are not finite.
        """
        driver, values = self.ready(inputs)
        return driver.answer(values)

    def stream(self, batches: Iterable[Any], *, refill: bool = False) -> Iterator[Answers]:
        """Hand each answer out when its sample leaves.

        Args:
            batches: of inputs; read one at a time.
            refill: samples that stay may wait for those of later batches and go on together, where that is faster
                by what was measured. More throughput, and a longer wait.

        Yields:
            Answers of samples that leave together; ``ids`` number the samples over all batches.

        Raises:
            ConfigError: the back end cannot refill.
            DataError: as for a call.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return
        driver, on_tensors = self._built(first)
        values = self._values(first, on_tensors)
        rest = (self._values(inputs, on_tensors) for inputs in batches)
        for leaving in driver.stream(chain([values], rest), refill=refill):
            yield collect([leaving], driver.exits, driver.costs)

    def anytime(self, inputs: Any) -> Iterator[Answers]:
        """The best answer so far for every sample, exit by exit, until nobody is left in the network.

        Yields:
            Answers of all samples, in their order: of those that left where they left, of the others as they would
            be answered here.
        """
        driver, values = self.ready(inputs)
        so_far: Answers | None = None
        for leaving in driver.anytime(values):
            here = collect([leaving], driver.exits, driver.costs)
            so_far = here if so_far is None else so_far.updated(here)
            yield so_far

    def record(
        self, data: Samples | Iterable[Any], *, batch_size: int = 256, split: str | None = None, progress: bool = False
    ) -> Trace:
        """Run a split through this very back end and precision, nobody leaving; see ``record``.

        Returns:
            A Trace of every exit, to calibrate this engine's policy on and to replay. Exits that the policy does not
            look at are run beside those it does, as an engine that looks at all would. An engine that lets nobody leave
            early (``"plain"``, or ``exits=()``) gives a Trace of the last exit alone.
        """
        samples = as_samples(data, split=split or "")
        info = replace(describe(self.sdn, samples, split), precision=self.precision)
        driver, _ = self.ready(samples.example_inputs)
        beside = self._beside(driver)
        exits = driver.exits if beside is None else beside.exits

        def forward(inputs: Any) -> list[Tensor]:
            driver, values = self.ready(inputs)
            logits: dict[int, Any] = {}
            for one in (driver,) if beside is None else (beside, driver):  # what the engine itself says is kept
                logits.update(zip(one.exits, one.logits(values), strict=True))
            return [torch.as_tensor(logits[exit]) for exit in exits]

        costs = self.sdn.costs.select(exits)
        return record_with(forward, samples, costs, info, batch_size=batch_size, progress=progress)

    def _beside(self, driver: Driver) -> Driver | None:
        """What runs the exits that a driver leaves out; ``None`` where it runs all, or the last alone."""
        if len(driver.exits) in (1, self.sdn.num_exits):
            return None
        with self._guard:
            backend, order = self.backend, replace(self._order, policy=ALL_EXITS)
        with taking_turns(self.sdn):
            return BACKENDS[backend].build(order)

    def measure(self, inputs: Any, sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64), *, repeats: int = 10) -> Latency:
        """Time every stage by batch size; from now on rows are dropped only where that pays.

        Args:
            inputs: at least one sample; rows repeat where there are fewer than a batch needs.
            sizes: of batches; 1 is always among them.
            repeats: the median counts.

        Raises:
            ConfigError: a size or ``repeats`` is below 1.
            DataError: as for a call.
        """
        if min([repeats, *sizes]) < 1:
            raise ConfigError(f"sizes and repeats are at least 1, got sizes={list(sizes)} and repeats={repeats}.")
        driver, values = self.ready(inputs)
        latency = driver.measure(values, sorted({1, *sizes}), repeats=repeats)
        with self._guard:
            if self._driver is driver:  # and was not exchanged meanwhile
                self._driver = replace(driver, latency=latency)  # type: ignore[type-var]
        return latency

    def tune(
        self,
        batch_size: int = 32,
        *,
        inputs: Any = None,
        exit_shares: Sequence[float] | None = None,
        backends: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
        repeats: int = 10,
        allow_plain: bool = False,
        anew: bool = False,
        progress: bool = False,
    ) -> Tuning:
        """Time the back ends here, on batches of this size, and go on with the fastest of the same precision.

        What was chosen is kept in the user's cache folder and found there again. A back end that fails is left out,
        with its reason.

        Args:
            batch_size: rows of a batch.
            inputs: like those that will come, at least one, repeated or cut to a batch: where they leave decides.
                ``None``: random ones, of which as many leave at each exit.
            exit_shares: the share that leaves at each of ``exits``, in place of the policy's decisions.
            backends: those to try, by name; a mapping gives options to each. ``None``: all, the engine's own with
                the options it was made with.
            repeats: the median counts.
            allow_plain: go on without exits where that is faster than every way with them. The last exit then answers
                all samples, which are other answers than the policy's. Not allowed, the engine keeps its exits, and
                what is found says by how much they are slower (``exits_ratio``).
            anew: do not look for an earlier choice.
            progress: show how far it is, on a terminal.

        Raises:
            ConfigError: an argument is not usable, or nothing says what inputs look like, or ``"int8"`` has no
                ``calibration``, or no back end runs here.
            DataError: the inputs are none for this engine.
        """
        check_calibration(self.precision, self._order.calibration)
        if inputs is not None:
            self._learn(inputs)
            self._values(inputs, on_tensors=True)
        elif self._order.example_inputs is None:
            raise ConfigError("nothing says what inputs look like: pass inputs=, or example_inputs= to the engine.")
        if backends is None:
            backends = {name: self._order.options if name == self.backend else {} for name in CANDIDATES}
        task = make_task(
            self._order,
            batch_size,
            inputs=inputs,
            exit_shares=exit_shares,
            backends=backends,
            repeats=repeats,
            allow_plain=allow_plain,
            progress=progress,
        )
        tuning, driver = tune(task, anew=anew)
        with self._guard:
            self.backend, self._driver = tuning.chosen.backend, driver
            self._order = replace(self._order, options=task.backends.get(self.backend, {}))
        return tuning

    def ready(self, inputs: Any) -> tuple[Driver, Values]:
        """What runs a batch, and the batch as it takes it: for those who measure.

        Raises:
            DataError: as for a call.
        """
        driver, on_tensors = self._built(inputs)
        return driver, self._values(inputs, on_tensors)

    def _built(self, inputs: Any) -> tuple[Driver, bool]:
        self.prepare(inputs)
        with self._guard:  # tuning exchanges both
            assert self._driver is not None
            return self._driver, BACKENDS[self.backend].on_tensors

    def _learn(self, inputs: Any) -> None:
        """Keep what inputs look like, where that is not known."""
        with taking_turns(self.sdn), self._guard:
            if self._order.example_inputs is None:
                _check_example(self.sdn, inputs)
                self._order = replace(self._order, example_inputs=inputs)

    def _values(self, inputs: Any, on_tensors: bool) -> Values:
        """A batch as the back end takes it, once it is known to be one."""
        values = as_values(inputs)
        check_values(values, as_values(self._order.example_inputs))
        if not on_tensors:
            return {name: tensor.detach().cpu().numpy() for name, tensor in values.items()}
        device = next(self.sdn.parameters()).device
        return {name: tensor.to(device) for name, tensor in values.items()}


def _check_example(sdn: ShallowDeepNetwork, example_inputs: Any) -> None:
    """Refuse what the network does not take, before it is exported or compiled for it."""
    for name, tensor in as_values(example_inputs).items():
        if tensor.ndim == 0 or len(tensor) == 0:
            raise DataError(f"{name} holds no sample: a batch has at least one.")
    device = next(sdn.parameters()).device
    with evaluating(sdn):
        call_on_example(sdn, (map_tensors(lambda t: t[:1].to(device), example_inputs),))  # its one argument
