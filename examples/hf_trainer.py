"""Early exits in the Hugging Face Trainer: a transformers model with exits, and one method of the Trainer.

Half a minute on one core, offline::

    pip install "transformers[torch]"
    python examples/hf_trainer.py
"""

import tempfile
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import shallowdeep as sd

SHARES = (0.25, 0.5, 0.75)  # of the computation: where exits sit, and what their losses weigh in the end


class ExitsTrainer(Trainer):
    """Trains a network and its exits together."""

    objective = sd.Joint(weights=SHARES)
    loss_is_scaled_for_ga = False  # a batch's mean: the Trainer divides it where it accumulates gradients

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The network with exits takes the inputs as one mapping, and leaves the loss to the objective."""
        labels = inputs.pop("labels")
        logits = model(inputs)
        progress = self.state.global_step / max(1, self.state.max_steps)  # no steps: evaluated before training
        loss = self.objective(logits, labels, progress)
        return (loss, {"exits": logits}) if return_outputs else loss  # from a bare list it would drop the first


def accuracy_of_exits(prediction: EvalPrediction) -> dict[str, float]:
    """For the Trainer's own evaluation: its predictions are one array per exit."""
    hits = [(logits.argmax(1) == prediction.label_ids).mean() for logits in prediction.predictions]
    return {f"accuracy_exit_{exit}": float(share) for exit, share in enumerate(hits)}


def build_network() -> ViTForImageClassification:
    """A small Vision Transformer; yours may come ``from_pretrained``."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))


def build_dataset(images: sd.ImageSet) -> list[dict[str, Tensor]]:
    """Samples as the Trainer takes them."""
    inputs, labels, _ = next(images.batches(len(images)))
    return [{"pixel_values": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def arguments(folder: str, epochs: int, seed: int) -> TrainingArguments:
    """The first three are what a network needs that is none of the Trainer's own."""
    return TrainingArguments(
        label_names=["labels"],  # the Trainer finds none in the signature of `sdn.forward`
        remove_unused_columns=False,  # nor the names of the inputs
        save_strategy="no",  # sdn.save keeps the taps and costs as well
        output_dir=folder,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=0.2,
        use_cpu=True,
        disable_tqdm=True,
    )


def main(epochs: int = 12, seed: int = 0) -> tuple[sd.ShallowDeepNetwork, sd.Trace, sd.Decisions]:
    """Train, save, load, record, calibrate on validation data, replay on test data."""
    set_seed(seed)
    data = sd.load_data("digits")
    sdn = sd.attach(build_network(), {"pixel_values": data.example_inputs}, shares=SHARES)
    datasets = {split: build_dataset(data.split(split)) for split in ("train", "val", "test")}
    with tempfile.TemporaryDirectory() as folder:
        options = {"train_dataset": datasets["train"], "eval_dataset": datasets["val"]}
        trainer = ExitsTrainer(sdn, arguments(folder, epochs, seed), compute_metrics=accuracy_of_exits, **options)
        trainer.train()
        trainer.evaluate()  # prints the accuracy of every exit
        sdn.save(path := Path(folder) / "sdn.safetensors")
        sdn = sd.ShallowDeepNetwork.load(path, backbone=build_network())

    val, test = (sd.record(sdn, DataLoader(datasets[split], batch_size=64), split=split) for split in ("val", "test"))
    print("accuracy of each exit:", [f"{accuracy:.3f}" for accuracy in test.correct.double().mean(0)])
    decisions = sd.replay(test, sd.calibrate(val, max_cost=0.5))
    print("at most half the cost:", decisions)
    return sdn, test, decisions


if __name__ == "__main__":
    main()
