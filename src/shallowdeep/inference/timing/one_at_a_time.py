"""Early exit sample by sample, each stage asked for by Python: what an engine is compared to."""

from __future__ import annotations

from typing import Any

import numpy as np

from shallowdeep.inference.answers import Answers, Leaving, collect
from shallowdeep.inference.stages import as_values, cut
from shallowdeep.inference.torch_stages import TorchStages
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of


class OneAtATime:
    """Early exit as the paper's published code has it, in our own words: sample by sample, stage by stage.

    After each exit Python asks whether this one sample may leave. Each stage is a PyTorch module; nothing is
    folded or compiled.

    Args:
        sdn: the network.
        policy: when to stop.
        example: inputs as the network takes them.
    """

    def __init__(self, sdn: ShallowDeepNetwork, policy: ExitPolicy, example: Any):
        exits = exits_of(policy, sdn.num_exits)
        self.stages = TorchStages(cut(sdn, example, exits=exits, fold=False), policy, sdn.num_outputs)
        self.costs = sdn.costs.relative(exits[:-1])[exits].tolist()
        self.device = next(sdn.parameters()).device

    def __call__(self, inputs: Any) -> Answers:
        """Answer a batch, its samples one after another."""
        rows = {name: value.to(self.device).split(1) for name, value in as_values(inputs).items()}
        samples = [dict(zip(rows, sample, strict=True)) for sample in zip(*rows.values(), strict=True)]
        leaving = [self._answer(number, values) for number, values in enumerate(samples)]
        return collect(leaving, self.stages.exits, self.costs)

    def _answer(self, number: int, values: dict[str, Any]) -> Leaving:
        for stage, exit in enumerate(self.stages.exits):
            step = self.stages.run(stage, values)
            if exit == self.stages.exits[-1] or bool(step.stop[0]):
                return Leaving(exit, np.array([number]), step.scores.cpu().numpy())
            values = step.values
        raise AssertionError("the last exit answers")
