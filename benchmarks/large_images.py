"""The engine against the sum of its stages' times at 224 pixels, with forced shares of samples at each exit.

ResNet-50 and ViT-S of ``transformers``, built from their configurations with random weights: what they answer means
nothing, so a scripted policy sends a given share of the samples out at each exit::

    python benchmarks/large_images.py --threads 2 --rounds 5

Prints JSON on standard output. The figure is engine ÷ bound, the bound being the measured stage times at the row
counts that arrive; the same network without exits stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shallowdeep.inference.timing.bench import measure_speed
from shallowdeep.networks.attach import attach
from shallowdeep.networks.inputs import example_inputs_for
from shallowdeep.networks.zoo import load_network
from shallowdeep.policies.rules import State, Verdict
from shallowdeep.provenance import describe_machine
from shallowdeep.versions import versions_of

NETWORKS: dict[str, dict[str, Any]] = {
    "hf:resnet": {},  # the configuration's own defaults: ResNet-50
    "hf:vit": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
    },
}


@dataclass(frozen=True)
class Scripted:
    """Samples leave by lot: a share of them at each exit, whatever they are.

    Args:
        shares: of all samples that leave at each internal exit looked at.
        exits: these.
    """

    kind: ClassVar[str] = "scripted"
    shares: tuple[float, ...]
    exits: tuple[int, ...]

    def start(self, rows: int, num_outputs: int) -> State:
        """No lot is drawn yet."""
        return (torch.full((rows,), -1.0),)

    def step(self, state: State, logits: Tensor, exit: int) -> Verdict:
        """The lot is drawn at the first exit, from the digits of a logit that mean nothing."""
        lot = torch.where(state[0] < 0, (logits[:, 0] * 1000.0) % 1.0, state[0])
        until = sum(share for share, at in zip(self.shares, self.exits, strict=True) if at <= exit)
        return Verdict(lot < until, (lot,), logits.softmax(-1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"kind": self.kind, **asdict(self)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.2, 0.2], help="leaving at each exit")
    parser.add_argument(
        "--at", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the cost to place exits at"
    )
    parser.add_argument("--backends", nargs="+", default=["eager", "stages", "compiled", "onnx"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.networks:
        torch.manual_seed(0)
        net = load_network(name, num_classes=1000, **NETWORKS[name]).to(args.device)
        example: Any = example_inputs_for(net)
        sdn = attach(net, example.to(args.device), shares=tuple(args.at)).eval()
        images = torch.randn(args.rounds * max(args.batch_sizes), 3, 224, 224, device=args.device)
        report = measure_speed(
            sdn,
            Scripted(tuple(args.shares), tuple(range(len(args.shares)))),
            images,
            torch.zeros(len(images), dtype=torch.int64),
            batch_sizes=args.batch_sizes,
            backends=args.backends,
            rounds=args.rounds,
            smaller=False,
            progress=True,
        )
        print(report, file=sys.stderr, flush=True)
        found[name] = {"options": NETWORKS[name], "taps": sdn.taps, **report.to_dict()}
    values = {
        "command": " ".join(["python", "benchmarks/large_images.py", *sys.argv[1:]]),
        "environment": describe_machine(args.device),
        "libraries": versions_of(("transformers",)),
        "networks": found,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
