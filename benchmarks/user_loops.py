"""The same exits trained by ``fit`` and by three loops of users' own: do they end at the same accuracy?

The loops are those of ``examples``: a plain one, Lightning's and the Hugging Face Trainer's. Every run of a seed
starts from the same weights and has the same digits, objective, optimiser, schedule, clipping and number of epochs,
without augmentation. Two questions:

- Each loop in an order of its own: does the accuracy of its exits differ from fit's by more than the order does?
  ``reordered`` is fit itself in another order, which shows what that is.
- All loops in one order: by how much do the trained weights differ from fit's? (0 means equal bit for bit.)

From the root of the repository, one thread, some minutes::

    python benchmarks/user_loops.py --seeds 10
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

import shallowdeep as sd

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]
with suppress(ImportError):  # where torchvision does not load, its operators must be known before Lightning is imported
    importlib.import_module("operator_schema").define_operators()

import hf_trainer  # noqa: E402
import lightning  # noqa: E402
import lightning_module  # noqa: E402
import plain_loop  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

SHARES = plain_loop.SHARES
RECIPE = sd.Recipe(
    epochs=8, batch_size=64, optimizer="adamw", lr=5e-3, weight_decay=1e-2, schedule="one_cycle", clip_norm=1.0
)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t by number of pairs, for an interval of 95 %."""


class Order(Sampler):
    """Another order in every pass, drawn from a seed: also when the last pass was not asked for its end."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed, self.passes = num_samples, seed, 0

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(1000 * self.seed + self.passes)
        self.passes += 1
        return iter(torch.randperm(self.num_samples, generator=random).tolist())

    def __len__(self) -> int:
        return self.num_samples


class Loader(DataLoader):
    """Shuffled batches, as ``(inputs, labels)`` or as mappings."""

    def __init__(self, images: sd.ImageSet, recipe: sd.Recipe, seed: int, *, mappings: bool = False):
        samples: Any = hf_trainer.build_dataset(images)
        if not mappings:
            samples = [tuple(sample.values()) for sample in samples]
        super().__init__(samples, recipe.batch_size, sampler=Order(len(samples), seed), drop_last=True)


def optimizer_and_schedule(sdn: sd.ShallowDeepNetwork, recipe: sd.Recipe, steps: int) -> tuple[Any, Any]:
    """The recipe as an optimiser and a scheduler of PyTorch's, with so many steps in an epoch."""
    optimizer = recipe.build_optimizer(list(sdn.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # the schedule's factor is the rate itself
    total = recipe.epochs * steps
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.rate(step / total))


def by_fit(sdn: sd.ShallowDeepNetwork, train: sd.ImageSet, recipe: sd.Recipe, seed: int) -> None:
    sd.fit(sdn, Loader(train, recipe, seed), strategy="joint", recipe=recipe, device="cpu", progress=False)


def by_plain_loop(sdn: sd.ShallowDeepNetwork, train: sd.ImageSet, recipe: sd.Recipe, seed: int) -> None:
    """That of ``examples/plain_loop.py``, with the recipe's optimiser."""
    loader, objective = Loader(train, recipe, seed), sd.Joint(weights=SHARES)
    optimizer, scheduler = optimizer_and_schedule(sdn, recipe, len(loader))
    sdn.train()
    with sdn.tapped():
        for epoch in range(recipe.epochs):
            for step, (inputs, labels) in enumerate(loader):
                progress = (epoch + step / len(loader)) / recipe.epochs
                objective(sdn(inputs), labels, progress).backward()
                torch.nn.utils.clip_grad_norm_(sdn.parameters(), recipe.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()


def by_lightning(sdn: sd.ShallowDeepNetwork, train: sd.ImageSet, recipe: sd.Recipe, seed: int) -> None:
    """That of ``examples/lightning_module.py``, with the recipe's optimiser."""
    loader = Loader(train, recipe, seed)

    class Module(lightning_module.EarlyExits):
        def configure_optimizers(self) -> dict[str, Any]:
            optimizer, scheduler = optimizer_and_schedule(self.sdn, recipe, len(loader))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    lightning.Trainer(
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_norm,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(sdn.train()), loader)


def by_hf_trainer(sdn: sd.ShallowDeepNetwork, train: sd.ImageSet, recipe: sd.Recipe, seed: int) -> None:
    """That of ``examples/hf_trainer.py``, with the recipe's optimiser; its inputs are named as the backbone's."""
    loader = Loader(train, recipe, seed, mappings=True)

    class Trainer(hf_trainer.ExitsTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return loader

        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **options: Any) -> Any:
            renamed = {"input": inputs["pixel_values"], "labels": inputs["labels"]}
            return super().compute_loss(model, renamed, *rest, **options)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.epochs,
            max_grad_norm=recipe.clip_norm,
            label_names=["labels"],
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        optimizers = optimizer_and_schedule(sdn, recipe, len(loader))
        Trainer(sdn, arguments, train_dataset=loader.dataset, optimizers=optimizers).train()


Loop = Callable[[sd.ShallowDeepNetwork, sd.ImageSet, sd.Recipe, int], None]
LOOPS: dict[str, Loop] = {
    "fit": by_fit,
    "reordered": by_fit,
    "plain_loop": by_plain_loop,
    "lightning": by_lightning,
    "hf_trainer": by_hf_trainer,
}


def initial(data: sd.Splits, seed: int) -> sd.ShallowDeepNetwork:
    torch.manual_seed(seed)
    return sd.attach(plain_loop.build_network(), data.example_inputs, shares=SHARES)


def in_orders_of_their_own(data: sd.Splits, seeds: int) -> Iterator[dict[str, Any]]:
    """One record per run: accuracy of every exit on test, and how long training took."""
    for seed in range(seeds):
        start = initial(data, seed)
        for number, (name, train) in enumerate(LOOPS.items()):
            sdn = copy.deepcopy(start)
            began = time.perf_counter(), time.process_time()
            train(sdn, data.train, RECIPE, 100 * seed + number)
            seconds, processor = time.perf_counter() - began[0], time.process_time() - began[1]
            accuracy = sd.record(sdn, data.test).correct.double().mean(0).tolist()
            yield {"loop": name, "seed": seed, "accuracy": accuracy, "seconds": seconds, "processor_s": processor}


def in_one_order(data: sd.Splits, epochs: int) -> dict[str, float]:
    """Largest difference of a trained weight from fit's, with all loops in the same order."""
    train, recipe = data.train.sample(1024), RECIPE.model_copy(update={"epochs": epochs})
    trained = {}
    for name, train_by in LOOPS.items():
        sdn = initial(data, 0)
        train_by(sdn, train, recipe, 1 if name == "reordered" else 0)
        trained[name] = sdn.state_dict()
    return {
        name: max(float((weights[key] - trained["fit"][key]).abs().max()) for key in weights)
        for name, weights in trained.items()
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per loop and exit: mean and spread over the seeds, and the difference from fit, paired by seed."""
    found = {}
    for name in LOOPS:
        exits = [list(values) for values in zip(*(r["accuracy"] for r in runs if r["loop"] == name), strict=True)]
        fits = [list(values) for values in zip(*(r["accuracy"] for r in runs if r["loop"] == "fit"), strict=True)]
        pairs = [[a - b for a, b in zip(*both, strict=True)] for both in zip(exits, fits, strict=True)]
        found[name] = {
            "accuracy_mean": [statistics.mean(values) for values in exits],
            "accuracy_std": [statistics.stdev(values) for values in exits],
            "difference_from_fit": [statistics.mean(values) for values in pairs],
            "difference_half_width_95": [half_width(values) for values in pairs],
            "within_noise": [abs(statistics.mean(values)) <= half_width(values) for values in pairs],
            "seconds_median": statistics.median(r["seconds"] for r in runs if r["loop"] == name),
            "processor_s_median": statistics.median(r["processor_s"] for r in runs if r["loop"] == name),
        }
    return found


def half_width(differences: list[float]) -> float:
    """Of the 95 % interval of a mean of paired differences."""
    n = len(differences)
    return T_975[n] * statistics.stdev(differences) / n**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, choices=sorted(T_975))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "user_loops.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = sd.load_data("digits")
    same_order = in_one_order(data, epochs=4)
    print("largest difference of a weight from that of fit, one order:", same_order, flush=True)
    runs = []
    for run in in_orders_of_their_own(data, args.seeds):
        runs.append(run)
        print(run, flush=True)
    packages = ("torch", "lightning", "transformers", "accelerate")
    report = {
        "command": f"python benchmarks/user_loops.py --seeds {args.seeds}",
        "settings": {"n": args.seeds, "threads": args.threads, "shares": SHARES, "recipe": RECIPE.model_dump()},
        "data": {"name": data.name, "train": len(data.train), "test": len(data.test), "augmentation": None},
        "environment": {
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "one_order_largest_weight_difference": same_order,
        "within_noise": "the 95 % interval of the mean difference from fit, paired by seed, holds 0",
        "orders_of_their_own": summarise(runs),
        "runs": runs,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["orders_of_their_own"], indent=2))


if __name__ == "__main__":
    main()
