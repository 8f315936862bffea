"""Every example runs, and what it claims is so; what the docs quote of them is what they say."""

import ast
import copy
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

import shallowdeep as sd

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
QUICK = {  # settings for seconds; a new example needs a line
    "plain_loop": {"epochs": 3},
    "lightning_module": {"epochs": 3},
    "hf_trainer": {"epochs": 6},
    "production": {"network_epochs": 4, "exit_epochs": 3},
}
NEEDS = {"lightning_module": ("lightning",), "hf_trainer": ("transformers", "accelerate")}
CHANCE = 0.1


def load(name):
    """An example as a module, or a skip where a library it shows is not installed."""
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library, exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracies(trace):
    return trace.correct.double().mean(0).tolist()


def hooks(network):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in network.modules() for kind in kinds for hook in getattr(module, kind).values()]


MARKS = {
    "lightning_module": [
        pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),  # Lightning's own affair
        pytest.mark.filterwarnings("ignore:.*does not have many workers"),
        pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    ],
    "hf_trainer": [pytest.mark.slow],
    "production": [pytest.mark.slow],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in QUICK])
def test_example_does_what_it_says(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sdn, test, decisions = load(name).main(**QUICK[name])

    # every exit has learned, far beyond chance, and the policy leaves early without losing what it promised
    assert test.info.split == "test"
    assert len(test) == 360
    assert min(accuracies(test)[1:]) > 5 * CHANCE
    assert accuracies(test)[0] > 3 * CHANCE
    assert decisions.accuracy > accuracies(test)[-1] - 0.1
    assert decisions.cost < (0.9 if name == "production" else 0.6)
    # the Trace is of the network that is given back, which is left without hooks and fit to be copied
    assert hooks(sdn) == []
    again = sd.record(copy.deepcopy(sdn), sd.load_data("digits").test)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again.logits, test.logits, strict=True))
    # nothing is left behind in the folder, and the reader is told what came out
    assert list(tmp_path.iterdir()) == []
    assert str(decisions) in capsys.readouterr().out


def test_every_example_is_tried_here():
    assert set(EXAMPLES) == set(QUICK)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_says_what_it_shows_and_how_to_run_it(name):
    source = EXAMPLES[name].read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{name}.py" in docstring
    assert "torchvision" not in source
    assert 40 <= len(source.splitlines()) <= 100


def test_a_plain_loop_ends_at_the_weights_of_fit():
    """With the same batches and recipe there is nothing that fit does besides."""
    example, data = load("plain_loop"), sd.load_data("digits")
    inputs, labels, _ = next(data.train.batches(512))
    batches = list(zip(inputs.split(64), labels.split(64), strict=True))
    recipe = sd.Recipe(epochs=2, batch_size=64, optimizer="adamw", lr=5e-3, schedule="one_cycle")
    torch.manual_seed(0)
    ours = sd.attach(example.build_network(), data.example_inputs, shares=example.SHARES)
    theirs = copy.deepcopy(ours)

    sd.fit(ours, batches, strategy="joint", recipe=recipe, device="cpu", progress=False)

    objective, optimizer = sd.Joint(weights=example.SHARES), recipe.build_optimizer(list(theirs.parameters()))
    theirs.train()
    with theirs.tapped():
        for epoch in range(recipe.epochs):
            for step, (x, y) in enumerate(batches):
                progress = (epoch + step / len(batches)) / recipe.epochs
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(progress)
                objective(theirs(x), y, progress).backward()
                optimizer.step()
                optimizer.zero_grad()

    expected = ours.state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in theirs.state_dict().items())


def test_hugging_face_evaluates_every_exit_of_the_network(tmp_path):
    """Also before training, when the Trainer does not know of any step."""
    example, data = load("hf_trainer"), sd.load_data("digits")
    torch.manual_seed(0)
    sdn = sd.attach(example.build_network(), {"pixel_values": data.example_inputs}, shares=example.SHARES)
    trainer = example.ExitsTrainer(
        sdn,
        example.arguments(str(tmp_path), epochs=1, seed=0),
        eval_dataset=example.build_dataset(data.val),
        compute_metrics=example.accuracy_of_exits,
    )
    found = trainer.evaluate()
    logits = list(sd.record(sdn, data.val).logits)
    loss = float(trainer.objective(logits, data.val.labels.long(), 0.0))
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-4)
    accuracy = [found[f"eval_accuracy_exit_{exit}"] for exit in range(sdn.num_exits)]
    assert accuracy == pytest.approx(accuracies(sd.record(sdn, data.val)), abs=1 / len(data.val))
    assert f"eval_accuracy_exit_{sdn.num_exits}" not in found


def test_production_example_notices_a_change():
    """The proof that the backbone is unchanged can fail: for a weight, a statistic and an answer."""
    example = load("production")
    torch.manual_seed(0)
    network = sd.load_network("resnet20", num_classes=10).eval()
    inputs = torch.randn(2, 3, 32, 32)
    example.assert_unchanged(network, copy.deepcopy(network), inputs)
    for change in (
        lambda: network.fc.bias.data.add_(1e-3),
        lambda: network.stem[1].num_batches_tracked.add_(1),  # which no answer shows
        lambda: network.train(),
    ):
        before = copy.deepcopy(network)
        change()
        with pytest.raises(AssertionError):
            example.assert_unchanged(network, before, inputs)


@pytest.mark.parametrize("number", range(3))
def test_own_loop_page_quotes_the_examples(number):
    """Blocks that need a library of their own (```py) are pieces of the examples, word for word."""
    quotes = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text(), re.DOTALL)
    assert len(quotes) == 3
    sources = [re.sub(r"(?m)^ +", "", path.read_text()) for path in EXAMPLES.values()]
    quote = re.sub(r"(?m)^ +", "", textwrap.dedent(quotes[number]))
    assert any(quote in source for source in sources)
