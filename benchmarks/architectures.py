"""Exits on networks that nobody here wrote: timm, torchvision, transformers, at their sizes with random weights.

Each network gets a process of its own with a time limit, so that one that fails is a row with its reason: legal
sites, exits asked for and got, FLOPs beside those of ptflops, a training step of the exits alone and one of everything,
``plain()`` and a saved file against the network as it was. Rows that are there already are kept. Writes
``results/benchmarks/architectures.json`` and the table in ``docs/architectures.md``::

    pip install ptflops
    python benchmarks/architectures.py                       # hours on two cores
    python benchmarks/architectures.py --only timm:resnet50  # one row, made anew
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shallowdeep.errors import IllegalTap, ShallowDeepError
from shallowdeep.networks.attach import SHARES, attach, choose_sites
from shallowdeep.networks.calls import batch_size, call, find_logits
from shallowdeep.networks.inputs import example_inputs_for
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.sites import Site, probe
from shallowdeep.networks.zoo import load_network
from shallowdeep.storage import read_json, write_json, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmarks" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
TABLE = re.compile(r"(<!-- table -->\n).*(\n<!-- end of table -->)", re.DOTALL)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "timm:mobilenetv3_small_100": {},
    "torchvision:shufflenet_v2_x1_0": {},
    "torchvision:squeezenet1_1": {},
    "torchvision:mnasnet0_5": {},
    "timm:deit_tiny_patch16_224": {},
    "timm:resnet18": {},
    "timm:efficientnet_b0": {},
    "timm:regnetx_004": {},
    "torchvision:regnet_y_400mf": {},
    "timm:ghostnet_100": {},
    "timm:mixer_s16_224": {},
    "timm:resmlp_12_224": {},
    "timm:pvt_v2_b0": {},
    "timm:poolformer_s12": {},
    "timm:repvgg_a0": {},
    "timm:vit_small_patch16_224": {},
    "timm:convnext_tiny": {},
    "timm:swin_tiny_patch4_window7_224": {},
    "torchvision:googlenet": {},
    "timm:resnet50": {},
    "timm:mobilevit_s": {},
    "timm:edgenext_small": {},
    "timm:levit_128s": {},
    "timm:maxvit_pico_rw_256": {},
    "timm:xcit_nano_12_p16_224": {},
    "timm:cait_xxs24_224": {},
    "timm:hrnet_w18_small": {},
    "timm:densenet121": {},
    "torchvision:inception_v3": {},
    "torchvision:vgg11_bn": {},
    "timm:beit_base_patch16_224": {},
    "hf:resnet": {},
    "hf:mobilevit": {},
    "hf:segformer": {},
    "hf:dinov2": {"image_size": 224, "hidden_size": 384, "num_attention_heads": 6},
    "hf:swin": {},
    "hf:vit": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "hf:distilbert": {},
    "hf:bert": {},
    "hf:roberta": {},
    "hf:electra": {},
    "hf:mpnet": {},
    "hf:deberta-v2": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "hf:albert": {},
    "hf:gpt2": {},
}
NUM_CLASSES = 10
PADDED = (16, 12, 9, 6)  # tokens of the four texts that are no padding


def examine(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Everything the table says of one network."""
    torch.manual_seed(0)
    start = time.monotonic()
    net = load_network(name, num_classes=NUM_CLASSES, **options)
    inputs = example_batch(net)
    original = logits_of(net, inputs)
    state = copy.deepcopy(net.state_dict())
    sites = probe(net, inputs)
    flops, params = whole_cost(net, inputs)
    row: dict[str, Any] = {
        "name": name,
        "options": options,
        "input": shapes(inputs),
        "params": params,
        "flops": flops,
        "flops_of_ptflops": count_with_ptflops(net, inputs) // batch_size(inputs),
        "sites": len(sites),
        "legal_sites": sum(site.legal for site in sites),
        "why_not": reasons(sites),
    }
    chosen, asked = nearest(sites, flops)
    row |= {
        "asked": asked,
        "got": [round(site.flops / flops, 3) for site in chosen],
        "taps": [site.name for site in chosen],
    }
    sdn = attach(net, inputs, taps=row["taps"])
    row["cost_at_the_end"] = sdn.costs.relative()[-1].item()
    row["plain_is_identical"] = torch.equal(logits_of(sdn.plain(), inputs), original) and same(net.state_dict(), state)
    row["exits_moved"], row["backbone_kept"] = train_exits(sdn, inputs)
    row["backbone_moved"] = train_all(sdn, inputs)
    row["load_is_identical"] = load_is_identical(sdn, inputs)
    row["seconds"] = round(time.monotonic() - start)
    return row


def example_batch(net: nn.Module) -> Any:
    """Four images of noise, or four texts of which three are padded."""
    example = example_inputs_for(net)
    if isinstance(example, Tensor):
        return torch.randn(4, *example.shape[1:])
    ids = torch.stack([example["input_ids"][0].roll(i) for i in range(len(PADDED))])
    mask = torch.stack([(torch.arange(ids.shape[1]) < length).long() for length in PADDED])
    padding = net.config.pad_token_id or 0  # type: ignore[union-attr]
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


def shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return "×".join(map(str, inputs.shape[1:]))
    return f"{inputs['input_ids'].shape[1]} tokens, masked"


def logits_of(net: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return find_logits(call(net.eval(), inputs))


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


def whole_cost(net: nn.Module, inputs: Any) -> tuple[int, int]:
    costs = attach(net, inputs, taps=[]).costs
    return costs.backbone_flops[-1], costs.backbone_params[-1]


def count_with_ptflops(net: nn.Module, inputs: Any) -> int:
    """FLOPs of a forward as ptflops counts them, 2 per multiply-add, the additions of biases left out as here."""
    from ptflops import aten_ops, get_model_complexity_info

    def linear(values: list[Any], outputs: Any) -> int:
        return aten_ops.matmul_flop(values[1:3], outputs)

    def conv(values: list[Any], outputs: Any) -> int:
        return aten_ops.conv_flop([*values[:2], None, *values[3:]], outputs)

    aten = torch.ops.aten
    hooks = {aten.addmm: linear, aten.convolution: conv, aten.baddbmm: linear}
    keywords = inputs if isinstance(inputs, dict) else None
    # Fused attention is one operator that it does not know.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        macs, _ = get_model_complexity_info(
            Called(net.eval(), keywords),
            (1,),
            input_constructor=lambda _: {"x": inputs},
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
            custom_modules_hooks=hooks,
        )
    return 2 * macs


class Called(nn.Module):
    """A network of any inputs as one of a single input."""

    def __init__(self, net: nn.Module, keywords: dict[str, Tensor] | None):
        super().__init__()
        self.net, self.keywords = net, keywords

    def forward(self, x: Any) -> Any:
        """What the network returns."""
        return self.net(x) if self.keywords is None else self.net(**self.keywords)


def reasons(sites: list[Site]) -> dict[str, int]:
    """How often each kind of refusal was given."""
    found: dict[str, int] = {}
    for site in sites:
        if not site.legal:
            reason = re.sub(r"\(.*\)", "", re.sub(r"\d+", "n", site.why_not)).strip()
            found[reason] = found.get(reason, 0) + 1
    return found


def nearest(sites: list[Site], flops: int) -> tuple[list[Site], list[float]]:
    """The paper's six exits, or as many of them as the network has places for."""
    for count in range(len(SHARES), 0, -1):
        asked = SHARES[:: len(SHARES) // count][:count] if count < len(SHARES) else SHARES
        try:
            return choose_sites(sites, asked, flops), list(asked)
        except IllegalTap as error:
            refused = error
    raise refused


def train_exits(sdn: ShallowDeepNetwork, inputs: Any) -> tuple[bool, bool]:
    """Whether one step of the exits alone moves each of them, and keeps every weight and buffer of the backbone."""
    before, backbone = copy.deepcopy(sdn.exits.state_dict()), copy.deepcopy(sdn.backbone.state_dict())
    sdn.freeze_backbone().train()
    step(sdn, sdn(inputs)[:-1])
    after = sdn.exits.state_dict()
    moved = [
        any(not torch.equal(after[k], before[k]) for k in after if k.startswith(f"{i}.")) for i in range(len(sdn.exits))
    ]
    sdn.freeze_backbone(False)
    return all(moved), same(sdn.backbone.state_dict(), backbone)


def train_all(sdn: ShallowDeepNetwork, inputs: Any) -> float:
    """Share of the backbone's weight tensors that one step of every exit moves."""
    before = [p.detach().clone() for p in sdn.backbone.parameters()]
    step(sdn.train(), sdn(inputs))
    moved = [not torch.equal(p, old) for p, old in zip(sdn.backbone.parameters(), before, strict=True)]
    return sum(moved) / len(moved)


def step(sdn: ShallowDeepNetwork, logits: list[Tensor]) -> None:
    weights = [p for p in sdn.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    labels = torch.arange(len(logits[0])) % NUM_CLASSES
    torch.stack([F.cross_entropy(each, labels) for each in logits]).sum().backward()
    for weight in weights:  # untrained, some networks' gradients are beyond all measure
        torch.nn.utils.clip_grad_norm_(weight, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def load_is_identical(sdn: ShallowDeepNetwork, inputs: Any) -> bool:
    """Whether a file of the network, read without it, answers the same to the last bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdn.safetensors"
        sdn.save(path)
        other = ShallowDeepNetwork.load(path).eval()
    sdn.eval()
    with torch.no_grad():
        return all(torch.equal(a, b) for a, b in zip(other(inputs), sdn(inputs), strict=True))


# One process for each, and the page


def examine_alone(name: str, threads: int) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from operator_schema import define_operators  # type: ignore[import-not-found]

    define_operators()
    torch.set_num_threads(threads)
    talk = io.StringIO()
    try:
        with redirect_stdout(talk):
            row = examine(name, ARCHITECTURES[name])
    except ShallowDeepError as error:
        row = {"name": name, "options": ARCHITECTURES[name], "failed": str(error)}
    print(json.dumps(row))


def spawn(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", name, "--threads", str(args.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"not done after {args.limit:.0f} s"}
    if done.returncode != 0:
        return {"name": name, "failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    packages = ("torch", "timm", "torchvision", "transformers", "ptflops")
    return {
        "command": "python benchmarks/architectures.py",
        "threads": args.threads,
        "limit_s": args.limit,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | input | GFLOPs | ours / ptflops | legal sites | exits at % of the FLOPs | cost with exits "
        "| exits alone | all | plain | file |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            reason = row["failed"].partition(". ")[0].replace("|", "/")
            lines.append(f"| `{row['name']}` | {reason} |" + " |" * 9)
            continue
        cells = [
            f"`{row['name']}`",
            row["input"],
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops'] / row['flops_of_ptflops']:.4f}",
            f"{row['legal_sites']} of {row['sites']}",
            " ".join(f"{100 * share:.0f}" for share in row["got"]),
            f"{row['cost_at_the_end']:.3f}",
            "✓" if row["exits_moved"] and row["backbone_kept"] else "✗",
            f"{row['backbone_moved']:.0%}",
            "✓" if row["plain_is_identical"] else "✗",
            "✓" if row["load_is_identical"] else "✗",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(rows: list[dict[str, Any]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, TABLE.sub(lambda found: f"{found[1]}{as_table(rows)}{found[2]}", text))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ARCHITECTURES, metavar="NAME", help="these rows, made anew")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--retry", action="store_true", help="make failed rows anew")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.alone:
        examine_alone(args.alone, args.threads)
        return
    rows = {row["name"]: row for row in (read_json(RESULTS)["rows"] if RESULTS.exists() else [])}
    for name in args.only or ARCHITECTURES:
        if name in rows and not args.only and not (args.retry and "failed" in rows[name]):
            continue
        rows[name] = spawn(name, args)
        print(name, rows[name].get("failed") or f"{rows[name]['seconds']} s", file=sys.stderr, flush=True)
        ordered = [rows[key] for key in ARCHITECTURES if key in rows]
        write_json(RESULTS, {"settings": settings(args), "rows": ordered})
        write_page(ordered)


if __name__ == "__main__":
    main()
