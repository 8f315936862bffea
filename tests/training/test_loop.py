import copy
import errno
import json
import math
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from shallowdeep.errors import ConfigError, DataError, FileFormatError, NetworkError, TrainingDiverged
from shallowdeep.networks.attach import attach
from shallowdeep.training.features import FeatureReuse
from shallowdeep.training.loop import fit
from shallowdeep.training.objectives import Joint, Plain
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import STRATEGIES, Phase, named_strategy

RECIPE = Recipe(epochs=3, batch_size=64, lr=0.05, schedule="one_cycle", clip_norm=5.0)
STEPS = 4  # batches of an epoch of `little`
KEYS = {"phase", "trains", "precision", "epoch", "loss", "lr", "train_accuracy", "seconds", "val_accuracy"}


@pytest.fixture(scope="session")
def little(digits):
    """Few images, where what counts is how the loop goes and not what is learnt; 17 are always left over."""
    return replace(digits, train=digits.train.subset(range(STEPS * 64 + 17)), val=digits.val.subset(range(50)))


@dataclass
class Watched:
    """An objective that also does something at some of its calls; it names itself as the one it watches."""

    inner: object
    act: object  # called with the number of the call from 0, the logits and the loss; its result is the loss
    calls: int = field(default=0)

    def __call__(self, logits, labels, progress):
        number, self.calls = self.calls, self.calls + 1
        return self.act(number, logits, self.inner(logits, labels, progress))

    def __repr__(self):
        return repr(self.inner)


class Killed(Exception):
    pass


def kill_at(step):
    def act(number, logits, loss):
        if number == step:
            raise Killed
        return loss

    return act


def watch(phases, index, act):
    """The same phases, the objective of one of them watched."""
    return tuple(
        replace(phase, objective=Watched(phase.objective, act)) if i == index else phase
        for i, phase in enumerate(phases)
    )


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def train(sdn, data, strategy="joint", **options):
    return fit(sdn, data, strategy=strategy, progress=False, device="cpu", **({"recipe": RECIPE} | options))


def hooks(sdn):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in sdn.modules())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def read_history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


# What training does


@pytest.mark.parametrize("recipe", ["fast", "paper"])
def test_the_loss_falls(recipe, build, digits):
    # of plain: joint's loss gains weight as it goes
    history = train(build(), digits, "plain", recipe=recipe, epochs=4)
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    assert history[-1]["val_accuracy"][0] > 0.4  # chance is 0.1


def test_every_exit_learns(build, digits):
    history = train(build(), digits, "joint", recipe="fast", epochs=4)
    assert min(history[-1]["val_accuracy"]) > 0.4
    assert min(history[-1]["train_accuracy"]) > 0.4


def test_exits_learn_on_a_network_trained_before(build, digits):
    sdn = build()
    mixed = train(sdn, digits, "mixed", recipe="fast", epochs=3)
    assert [len(record["val_accuracy"]) for record in mixed] == [1, 1, 1, 3, 3, 3]
    assert mixed[2]["val_accuracy"][0] > 0.4
    fresh = build(seed=1)
    fresh.backbone.load_state_dict(sdn.backbone.state_dict())
    exits = train(fresh, digits, "ic_only", recipe="fast", epochs=4)
    assert exits[-1]["loss"] < 0.75 * exits[0]["loss"]
    assert min(exits[-1]["val_accuracy"][:2]) > 0.2
    assert exits[-1]["val_accuracy"][2] == mixed[-1]["val_accuracy"][2]


def test_reported_accuracy_is_the_network_s(build, digits):
    sdn = build()
    history = train(sdn, digits, epochs=2)
    (batch,) = digits.val.batches(len(digits.val))
    with torch.no_grad():
        right = [float((x.argmax(1) == batch.labels).float().mean()) for x in sdn(batch.inputs)]
    # the same counts, divided once in float32 and once averaged
    assert history[-1]["val_accuracy"] == pytest.approx(right, abs=1e-6)


def test_ic_only_leaves_the_backbone_bit_identical(build, little):
    sdn = build().train()
    inputs = little.val.example_inputs
    with torch.no_grad():
        before, exits, last = state(sdn.backbone), state(sdn.exits), sdn.eval()(inputs)[-1]
    train(sdn, little, "ic_only")
    assert same(state(sdn.backbone), before)
    assert "1.running_mean" in before
    assert torch.equal(sdn(inputs)[-1], last)
    assert not same(state(sdn.exits), exits)


def test_plain_leaves_the_exits_bit_identical_and_puts_on_no_hooks(build, little):
    sdn = build()
    before, backbone, seen = state(sdn.exits), state(sdn.backbone), []

    def act(number, logits, loss):
        seen.append((len(logits), hooks(sdn)))
        return loss

    train(sdn, little, watch(named_strategy("plain", sdn, RECIPE), 0, act))
    assert same(state(sdn.exits), before)
    assert not same(state(sdn.backbone), backbone)
    assert set(seen) == {(1, 0)}


def test_joint_keeps_its_hooks_on_for_the_whole_epoch(build, little):
    sdn, seen = build(), []

    def act(number, logits, loss):
        seen.append((len(logits), hooks(sdn)))
        return loss

    train(sdn, little, watch(named_strategy("joint", sdn, RECIPE), 0, act))
    assert set(seen) == {(3, 2)}
    assert hooks(sdn) == 0


def test_a_final_head_is_trained_with_the_backbone(build, little):
    sdn = build(label_spaces={"labels": 10}, final_head=nn.Linear(10, 10))
    before = state(sdn.final_head)
    train(sdn, little, "ic_only", epochs=1)
    assert same(state(sdn.final_head), before)
    train(sdn, little, "plain", epochs=1)
    assert not same(state(sdn.final_head), before)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("crash", [False, True])
def test_the_network_comes_back_unfrozen_in_evaluation_mode(strategy, crash, build, little):
    sdn = build().train()
    phases = named_strategy(strategy, sdn, RECIPE, epochs=1)
    if crash:
        with pytest.raises(Killed):
            train(sdn, little, watch(phases, len(phases) - 1, kill_at(2)))
    else:
        train(sdn, little, phases)
    assert not sdn.frozen
    assert all(parameter.requires_grad and parameter.grad is None for parameter in sdn.parameters())
    assert not any(module.training for module in sdn.modules())
    assert hooks(sdn) == 0


def test_what_the_caller_froze_stays_frozen(build, little):
    sdn = build()
    sdn.backbone[0].requires_grad_(False)
    before = state(sdn.backbone[0]), state(sdn.backbone[3])
    train(sdn, little, "mixed", epochs=1)
    assert same(state(sdn.backbone[0]), before[0])
    assert not same(state(sdn.backbone[3]), before[1])
    train(sdn, little, "ic_only", epochs=1)
    assert [p.requires_grad for p in sdn.backbone.parameters()][:3] == [False, False, True]


def test_a_frozen_backbone_is_thawed_for_a_phase_that_trains_it(build, little):
    sdn = build().freeze_backbone()
    before = state(sdn.backbone)
    train(sdn, little, epochs=1)
    assert not same(state(sdn.backbone), before)
    assert sdn.frozen
    assert not any(parameter.requires_grad for parameter in sdn.backbone.parameters())


def test_global_random_states_stay(build, little):
    # not Python's own: the run-time type checks of these tests draw from it
    torch.manual_seed(5)
    before = torch.get_rng_state(), repr(np.random.get_state())
    train(build(), little, "mixed", epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]
    with pytest.raises(Killed):
        train(build(), little, watch(named_strategy("joint", build(), RECIPE), 0, kill_at(1)))
    assert torch.equal(torch.get_rng_state(), before[0])


def test_a_seed_decides_everything(build, little):
    def weights(seed, disturbed=0):
        torch.manual_seed(disturbed)
        sdn = build()
        train(sdn, little, epochs=2, seed=seed)
        return state(sdn)

    assert same(weights(3), weights(3, disturbed=1))
    assert not same(weights(3), weights(4))


@pytest.mark.parametrize("seed", [20_261_121, 2**62])
def test_large_seeds(seed, build, little):
    assert len(train(build(), little, epochs=1, seed=seed)) == 1


def test_every_epoch_and_phase_has_its_own_seed():
    from shallowdeep.training.loop import _epoch_seed

    # checkpoints of earlier versions go on with these numbers
    assert _epoch_seed(0, 0, 0) == 0
    assert _epoch_seed(0, 1, 2) == 1_000_005
    assert _epoch_seed(2, 1, 3) == (2 * 1_000_003 + 1) * 1_000_003 + 3
    seeds = [_epoch_seed(s, p, e) for s in (0, 1, 20_261_121) for p in range(3) for e in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


# The recipe is followed


def spy(monkeypatch, look):
    """Call ``look`` with the optimiser before each of its steps."""
    build_optimizer = Recipe.build_optimizer

    def watched(recipe, parameters):
        optimizer = build_optimizer(recipe, parameters)
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: look(opt))
        return optimizer

    monkeypatch.setattr(Recipe, "build_optimizer", watched)


def test_the_learning_rate_follows_the_recipe_batch_by_batch(monkeypatch, build, little):
    rates = []
    spy(monkeypatch, lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    history = train(build(), little)
    assert rates == [RECIPE.rate((epoch + step / STEPS) / 3) for epoch in range(3) for step in range(STEPS)]
    assert [record["lr"] for record in history] == [RECIPE.rate(epoch / 3) for epoch in range(3)]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_gradients_are_clipped(clip_norm, monkeypatch, build, little):
    norms = []

    def look(optimizer):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))

    spy(monkeypatch, look)
    train(build(), little, recipe=RECIPE.model_copy(update={"clip_norm": clip_norm}), epochs=1)
    assert len(norms) == STEPS
    if clip_norm is None:
        assert min(norms) > 0.6
    else:
        # float32 sums over 10,000 gradients, and clip_grad_norm_ divides by the norm + 1e-6
        assert norms == pytest.approx([clip_norm] * STEPS, rel=1e-4)


def test_objectives_see_progress_rise_to_one(build, little):
    seen = []

    def objective(logits, labels, progress):
        seen.append(progress)
        return Joint((0.3, 0.6))(logits, labels, progress)

    train(build(), little, (Phase(objective, "all", RECIPE),))
    assert seen == [(epoch + step / STEPS) / 3 for epoch in range(3) for step in range(STEPS)]


def test_epochs_shorten_phases_given_by_hand(build, little):
    phases = (Phase(Plain(), "backbone", RECIPE), Phase(Joint((0.3, 0.6)), "all", RECIPE))
    history = train(build(), little, phases, epochs=1)
    assert [(record["phase"], record["epoch"]) for record in history] == [(0, 1), (1, 1)]


def test_bf16_is_asked_for_and_loss_stays_float32(build, little):
    seen = []

    def act(number, logits, loss):
        seen.append((logits[0].dtype, loss.dtype))
        return loss

    sdn, recipe = build(), RECIPE.model_copy(update={"precision": "bf16"})
    exact, coarse = copy.deepcopy(sdn), sdn
    train(exact, little, epochs=1)
    train(coarse, little, watch(named_strategy("joint", sdn, recipe, epochs=1), 0, act))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert not same(state(exact), state(coarse))
    assert {tensor.dtype for tensor in coarse.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("precision", "trains", "expected"),
    [
        ("bf16", "all", {"whole": True, "depthwise": True, "strided": False}),
        ("bf16", "exits", {"whole": True, "depthwise": True, "strided": True}),
        ("fp32", "all", {"whole": False, "depthwise": False, "strided": False}),
    ],
)
def test_strided_depthwise_convolutions_alone_are_trained_in_float32(little, precision, trains, expected, monkeypatch):
    net = nn.Sequential()
    net.add_module("whole", nn.Conv2d(3, 8, 3, stride=2, padding=1))
    net.add_module("depthwise", nn.Conv2d(8, 8, 3, padding=1, groups=8))
    net.add_module("strided", nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8))
    net.add_module("last", nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 10)))
    sdn = attach(net, little.example_inputs, taps=["depthwise"])
    names = {module: name for name, module in net.named_children()}
    coarse, computed = {}, nn.Conv2d._conv_forward

    def see(self, inputs, weight, bias):
        coarse[names[self]] = torch.is_autocast_enabled("cpu")
        return computed(self, inputs, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", see)
    phase = Phase(Joint((0.5,)), trains, RECIPE.model_copy(update={"precision": precision}))
    train(sdn, little, (phase,), epochs=1, validate_every=0, features=FeatureReuse(passes=0))
    assert coarse == expected
    assert not any("forward" in vars(module) for module in sdn.modules())


def test_channels_last_reaches_inputs_and_weights(build, little):
    sdn, recipe, seen = build(), RECIPE.model_copy(update={"channels_last": True}), []

    def look(module, args):
        tensors = (args[0], module.weight)
        seen.append([x.is_contiguous(memory_format=torch.channels_last) for x in tensors])

    with sdn.backbone[0].register_forward_pre_hook(look):
        train(sdn, little, recipe=recipe, epochs=1, validate_every=0)
    assert seen == [[True, True]] * STEPS


# What is refused


def test_too_few_outputs(build, little):
    with pytest.raises(NetworkError, match=r"7 outputs, the data 10 classes. Build it with num_classes=10"):
        train(build(num_classes=7), little)


def test_more_outputs_than_classes_are_fine(build, little):
    assert len(train(build(num_classes=12), little, epochs=1)) == 1


def test_a_batch_larger_than_the_data(build, little):
    recipe = RECIPE.model_copy(update={"batch_size": 300})
    with pytest.raises(ConfigError, match="a batch of 300 is more than the 273 samples"):
        train(build(), little, recipe=recipe)


def test_nothing_to_train(build, little):
    phase = Phase(Plain(), "exits", RECIPE)
    with pytest.raises(ConfigError, match="trains 'exits', and the network has no such weights"):
        train(build(taps=()), little, (phase,))


# What is kept


def test_history_has_one_line_per_epoch(build, little, tmp_path):
    history = train(build(), little, "mixed", epochs=2, folder=tmp_path)
    assert read_history(tmp_path) == history
    assert [set(record) for record in history] == [KEYS] * 4
    assert [(r["phase"], r["trains"], r["epoch"]) for r in history] == [
        (0, "backbone", 1),
        (0, "backbone", 2),
        (1, "all", 1),
        (1, "all", 2),
    ]
    assert [len(r["train_accuracy"]) for r in history] == [1, 1, 3, 3]
    assert all(r["seconds"] > 0 and math.isfinite(r["loss"]) for r in history)
    assert files(tmp_path) == ["checkpoint.pt", "history.jsonl"]


@pytest.mark.parametrize(("every", "looks"), [(0, []), (1, [1, 2, 3]), (2, [2]), (5, [])])
def test_validation_only_as_often_as_asked(every, looks, build, little):
    history = train(build(), little, validate_every=every)
    assert [record["epoch"] for record in history if "val_accuracy" in record] == looks


def test_validation_does_not_touch_training(build, little):
    one, other = build(), build()
    train(one, little, validate_every=0)
    train(other, little, validate_every=1)
    assert same(state(one), state(other))


def test_nothing_is_kept_without_a_folder(build, little, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(build(), little, epochs=1)
    assert files(tmp_path) == []


# Killed and resumed

MOMENTS = [(name, phase) for name in STRATEGIES for phase in range(2 if name == "mixed" else 1)]


@pytest.mark.parametrize(("strategy", "phase"), MOMENTS)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(strategy, phase, epoch, build, little, tmp_path):
    step = epoch * STEPS + random.Random(f"{strategy} {phase} {epoch}").randrange(STEPS)
    whole = build()
    expected = train(whole, little, strategy)

    broken = build()
    phases = named_strategy(strategy, broken, RECIPE)
    with pytest.raises(Killed):
        train(broken, little, watch(phases, phase, kill_at(step)), folder=tmp_path)
    resumed = build()
    history = train(resumed, little, strategy, folder=tmp_path, resume=True)
    assert same(state(resumed), state(whole))
    assert timeless(history) == timeless(expected)
    assert read_history(tmp_path) == history


@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_run_goes_on_in_the_precision_it_was_begun_in(in_bf16, build, little, tmp_path, monkeypatch):
    recipe = RECIPE.model_copy(update={"precision": "auto"})
    monkeypatch.setattr("shallowdeep.training.place.computes_in_bf16", lambda device: in_bf16)
    whole = build()
    expected = train(whole, little, recipe=recipe)
    assert {record["precision"] for record in expected} == {"bf16" if in_bf16 else "fp32"}

    broken = build()
    with pytest.raises(Killed):
        train(broken, little, watch(named_strategy("joint", broken, recipe), 0, kill_at(STEPS)), folder=tmp_path)
    monkeypatch.setattr("shallowdeep.training.place.computes_in_bf16", lambda device: not in_bf16)
    resumed = build()
    assert timeless(train(resumed, little, recipe=recipe, folder=tmp_path, resume=True)) == timeless(expected)
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_run_killed_in_every_epoch_ends_where_an_uninterrupted_one_does(optimizer, build, little, tmp_path):
    recipe = Recipe(epochs=3, batch_size=64, lr=0.01, optimizer=optimizer, channels_last=True, precision="bf16")
    whole = build()
    expected = train(whole, little, "mixed", recipe=recipe)
    for phase, step in [(0, 2), (0, STEPS + 1), (0, 1), (1, 3), (1, STEPS + 3)]:
        sdn = build()
        phases = watch(named_strategy("mixed", sdn, recipe), phase, kill_at(step))
        with pytest.raises(Killed):
            train(sdn, little, phases, folder=tmp_path, resume=True)
    sdn = build()
    history = train(sdn, little, "mixed", recipe=recipe, folder=tmp_path, resume=True)
    assert same(state(sdn), state(whole))
    assert timeless(history) == timeless(expected)


def test_a_finished_run_is_not_trained_again(build, little, tmp_path):
    sdn, fresh = build(), build(seed=1)
    history = train(sdn, little, "mixed", folder=tmp_path)
    written = (tmp_path / "checkpoint.pt").read_bytes()
    phases = watch(watch(named_strategy("mixed", sdn, RECIPE), 0, kill_at(0)), 1, kill_at(0))
    assert train(fresh, little, phases, folder=tmp_path, resume=True) == history
    assert same(state(fresh), state(sdn))
    assert (tmp_path / "checkpoint.pt").read_bytes() == written


def test_a_run_goes_on_after_a_finished_phase(build, little, tmp_path):
    whole = build()
    train(whole, little, "mixed")
    sdn = build()
    with pytest.raises(Killed):
        train(sdn, little, watch(named_strategy("mixed", sdn, RECIPE), 1, kill_at(0)), folder=tmp_path)
    resumed = build(seed=1)  # all it needs is in the checkpoint
    train(resumed, little, "mixed", folder=tmp_path, resume=True)
    assert same(state(resumed), state(whole))


def test_resuming_where_nothing_is_begins_anew(build, little, tmp_path):
    one, other = build(), build()
    train(one, little, folder=tmp_path / "new", resume=True)
    train(other, little)
    assert same(state(one), state(other))


def test_without_resume_a_checkpoint_is_overwritten(build, little, tmp_path):
    train(build(seed=1), little, folder=tmp_path)
    one, other = build(), build()
    history = train(one, little, folder=tmp_path)
    train(other, little)
    assert len(history) == 3
    assert same(state(one), state(other))


def test_a_function_as_objective_can_be_resumed(build, little, tmp_path):
    def phases():
        def objective(logits, labels, progress):
            return Plain()(logits, labels, progress)

        return (Phase(objective, "all", RECIPE),)

    first, again = phases(), phases()  # the same function, elsewhere in memory
    history = train(build(), little, first, folder=tmp_path)
    assert train(build(), little, again, folder=tmp_path, resume=True) == history


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"strategy": "plain"},
        {"epochs": 4},
        {"recipe": RECIPE.model_copy(update={"lr": 0.01})},
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, build, little, tmp_path):
    train(build(), little, folder=tmp_path)
    written = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileFormatError, match=r"checkpoint.pt belongs to another run .* Use another folder"):
        train(build(), little, folder=tmp_path, resume=True, **change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == written


def test_a_checkpoint_of_another_network_is_refused(build, little, tmp_path):
    # joint's weights would tell the two apart before
    train(build(num_classes=12), little, "plain", folder=tmp_path)
    with pytest.raises(FileFormatError, match=r"checkpoint.pt is of another network \(.*shapes differ"):
        train(build(), little, "plain", folder=tmp_path, resume=True)


def test_a_checkpoint_with_other_taps_is_refused(build, little, tmp_path):
    train(build(taps=("1", "5")), little, folder=tmp_path)
    with pytest.raises(FileFormatError, match=r"has its exits at \['1', '5'\], this network at \['2', '5'\]"):
        train(build(taps=("2", "5")), little, folder=tmp_path, resume=True)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del kept["taps"]  # as earlier versions wrote it
    torch.save(kept, tmp_path / "checkpoint.pt")
    assert len(train(build(taps=("1", "5")), little, folder=tmp_path, resume=True)) == 3


@pytest.mark.parametrize("strategy", ["ic_only", "distil"])
def test_a_checkpoint_does_not_bring_another_frozen_network(strategy, build, little, tmp_path):
    train(build(), little, strategy, folder=tmp_path)
    other = build(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        FileFormatError, match=r"other weights in the frozen network \(.* first 'backbone\.0\.weight'\)"
    ):
        train(other, little, strategy, folder=tmp_path, resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_what_cannot_be_trained_is_refused_in_words(build, little):
    with pytest.raises(ConfigError, match=r"1 epoch or more, got epochs=0"):
        fit(build(), little, epochs=0)
    with pytest.raises(DataError, match="no samples to train on"):
        fit(build(), [], strategy="distil")


def test_a_network_without_exits_attached_is_refused_in_words():
    code = "import shallowdeep as sd; from torch import nn; sd.fit(nn.Linear(3, 4), sd.load_data('digits'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # no type checks
    assert "NetworkError: fit trains a Shallow-Deep Network, got Linear: attach(net, inputs) makes one" in found.stderr


def test_identity_is_that_of_earlier_checkpoints(build, little, tmp_path):
    train(build(), little, "ic_only", folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(kept) == {"identity", "phase", "epochs", "sdn", "taps", "optimizer", "history"}
    assert kept["identity"] == (
        "digits of 273, seed 0, (Phase(objective=Exits(label_smoothing=0.0), trains='exits', "
        "recipe=Recipe(epochs=3, batch_size=64, optimizer='sgd', lr=0.05, momentum=0.9, nesterov=False, "
        "weight_decay=0.0005, schedule='one_cycle', milestones=(), warmup=0.25, clip_norm=5.0, "
        "label_smoothing=0.0, precision='fp32', channels_last=False)),)"
    )


# Damaged files


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint(share, build, little, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(build(), little, epochs=1, folder=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError, match=f"{path} is damaged or foreign .* Remove it"):
        train(build(), little, epochs=1, folder=tmp_path, resume=True)


def test_a_checkpoint_of_random_bytes(build, little, tmp_path):
    path, numbers = tmp_path / "checkpoint.pt", random.Random(0)
    for length in range(1, 300, 10):
        path.write_bytes(numbers.randbytes(length))
        with pytest.raises(FileFormatError, match=f"{path} is damaged or foreign"):
            train(build(), little, epochs=1, folder=tmp_path, resume=True)


@dataclass
class Trap:
    """Unpickled, it makes a file."""

    victim: Path

    def __reduce__(self):
        return (os.mkdir, (str(self.victim),))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"identity": trap}])
def test_code_in_a_checkpoint_does_not_run(write, wrap, build, little, tmp_path):
    path = tmp_path / "checkpoint.pt"
    write(wrap(Trap(tmp_path / "victim")), path)
    with pytest.raises(FileFormatError, match=f"{path} is damaged or foreign"):
        train(build(), little, epochs=1, folder=tmp_path, resume=True)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("value", [[1, 2], {"weights": torch.ones(2)}])
def test_a_foreign_file_of_tensors(value, build, little, tmp_path):
    torch.save(value, tmp_path / "checkpoint.pt")
    with pytest.raises(FileFormatError, match=r"checkpoint.pt belongs to another run"):
        train(build(), little, epochs=1, folder=tmp_path, resume=True)


def test_a_precision_that_is_none(build, little, tmp_path):
    train(build(), little, epochs=1, folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    history = [{**record, "precision": ["fp8"]} for record in json.loads(kept["history"])]
    torch.save({**kept, "history": json.dumps(history)}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileFormatError, match=r"checkpoint.pt is damaged .*names a precision \['fp8'\]"):
        train(build(), little, epochs=1, folder=tmp_path, resume=True)


# When writing fails


def leave_first_epoch_whole(monkeypatch, folder, action, error, build, data):
    """Break an action from the second checkpoint on; then mend it and go on to the end."""
    whole = build()
    expected = train(whole, data)
    with monkeypatch.context() as patch:
        action(patch)
        with pytest.raises(error):
            train(build(), data, folder=folder)
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (kept["phase"], kept["epochs"]) == (0, 1)
    assert not [name for name in files(folder) if "partial" in name]
    resumed = build()
    history = train(resumed, data, folder=folder, resume=True)
    assert same(state(resumed), state(whole))
    assert timeless(history) == timeless(expected)
    assert read_history(folder) == history


def test_a_save_killed_before_the_rename_leaves_the_checkpoint_before(monkeypatch, build, little, tmp_path):
    def action(patch):
        rename, renamed = Path.replace, []

        def failing(path, target):
            if Path(target).name == "checkpoint.pt":
                renamed.append(path)
                assert path.stat().st_size > 1000  # it was written in full
                if len(renamed) == 2:
                    raise Killed
            return rename(path, target)

        patch.setattr(Path, "replace", failing)

    leave_first_epoch_whole(monkeypatch, tmp_path, action, Killed, build, little)


def test_a_full_disk_leaves_the_checkpoint_before(monkeypatch, build, little, tmp_path):
    def action(patch):
        save, saved = torch.save, []

        def failing(value, file):
            save(value, file)
            saved.append(file)
            if len(saved) == 2:
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(torch, "save", failing)

    leave_first_epoch_whole(monkeypatch, tmp_path, action, OSError, build, little)


# Divergence


@pytest.mark.parametrize("clip_norm", [None, 5.0])
@pytest.mark.parametrize("strategy", ["plain", "joint"])
def test_a_loss_that_is_no_number(strategy, clip_norm, build, little, tmp_path):
    sdn, recipe = build(), RECIPE.model_copy(update={"clip_norm": clip_norm})

    def act(number, logits, loss):
        return loss * math.nan if number == STEPS + 1 else loss

    phases = named_strategy(strategy, sdn, recipe)
    with pytest.raises(TrainingDiverged, match=r"the loss became nan in epoch 2. The checkpoint .* is kept"):
        train(sdn, little, watch(phases, 0, act), folder=tmp_path)
    assert files(tmp_path) == ["checkpoint.pt", "history.jsonl"]
    assert len(read_history(tmp_path)) == 1

    one_epoch, loaded = build(), build(seed=1)
    with pytest.raises(Killed):
        train(one_epoch, little, watch(phases, 0, kill_at(STEPS)))
    with pytest.raises(Killed):
        train(loaded, little, watch(phases, 0, kill_at(0)), folder=tmp_path, resume=True)
    assert torch.equal(loaded.backbone[0].weight, one_epoch.backbone[0].weight)


def test_divergence_is_seen_within_an_epoch(build, digits):
    sdn = build()
    phases = named_strategy("joint", sdn, RECIPE.model_copy(update={"batch_size": 20}), epochs=1)
    watched = watch(phases, 0, lambda number, logits, loss: loss * math.nan)
    with pytest.raises(TrainingDiverged, match="nan in epoch 1"):
        train(sdn, digits, watched)
    assert watched[0].objective.calls == 20  # of 62


def test_weights_spoilt_by_the_last_step_are_not_kept(build, little, tmp_path):
    def act(number, logits, loss):
        # a finite loss whose slope is infinite
        return (loss * 0).sqrt() if number == 2 * STEPS - 1 else loss

    sdn = build()
    recipe = RECIPE.model_copy(update={"clip_norm": None})
    phases = watch(named_strategy("joint", sdn, recipe), 0, act)
    with pytest.raises(TrainingDiverged, match=r"'backbone.0.weight' is no longer finite in epoch 2"):
        train(sdn, little, phases, folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epochs"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in kept["sdn"].values())


# Compiled


COMPILED = """
import json, sys
import torch
from torch import nn
import shallowdeep as sd
from shallowdeep.training.recipes import Recipe

torch.set_num_threads(1)
graphs, compile = [], torch.compile
torch.compile = lambda network: compile(network, backend=lambda graph, _: graphs.append(graph) or graph)
data = sd.load_data("digits")
histories = []
for compiled in (False, True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    sdn = sd.attach(net, data.example_inputs, taps=["2"])
    recipe = Recipe(epochs=2, lr=0.05)
    histories.append(sd.fit(sdn, data, strategy="mixed", recipe=recipe, compile=compiled, progress=False))
    hooks = sum(len(module._forward_hooks) for module in sdn.modules())
outputs = [len(next(node for node in graph.graph.nodes if node.op == "output").args[0]) for graph in graphs]
print(json.dumps({"histories": histories, "outputs": outputs, "hooks": hooks}))
"""


@pytest.mark.slow
def test_compiled_it_trains_what_it_trains_otherwise():
    # in a process of its own: the compiler does not see through the checks of types that tests switch on
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for record, other in zip(*found["histories"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert record["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=0.02)
    # one graph with the backbone alone and one with its exits inside: a second epoch compiles nothing anew
    assert found["outputs"] == [1, 2]
    assert found["hooks"] == 0


def test_without_a_compiler_one_is_told(build, little, monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", Mock(side_effect=RuntimeError("no g++")))
    with pytest.raises(ConfigError, match=r"compile=True needs a C\+\+ compiler \(no g\+\+\).*leave compile out"):
        train(build(), little, compile=True)
