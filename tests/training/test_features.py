import copy
import shutil
from dataclasses import dataclass, replace
from threading import Thread
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from torch import nn

from shallowdeep.data.samples import Augmentation
from shallowdeep.data.tensors import TensorSet
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.networks.exits import InternalClassifier, ReducingHead, TokenClassifier, VectorClassifier
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import run_until
from shallowdeep.training.features import FeatureReuse
from shallowdeep.training.loop import _epoch_seed, fit
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import named_strategy

RECIPE = Recipe(epochs=3, batch_size=64, optimizer="adamw", lr=3e-3, schedule="one_cycle", channels_last=True)
ONCE = FeatureReuse(passes=1)


@pytest.fixture(scope="session")
def little(digits):
    return replace(digits, train=digits.train.subset(range(290)), val=digits.val.subset(range(50)))


@pytest.fixture(scope="session")
def plainly(little):
    return replace(little, augment=None)


def trained(build, data, features=None, **options):
    sdn = build()
    history = fit(sdn, data, strategy="ic_only", recipe=RECIPE, features=features, progress=False, **options)
    return {name: tensor.clone() for name, tensor in sdn.state_dict().items()}, history


@dataclass
class DiesAt:
    """An objective that names itself as the one it stands for, up to the call that ends the run."""

    inner: object
    last: int
    calls: int = 0

    def __call__(self, logits, labels, progress):
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return self.inner(logits, labels, progress)

    def __repr__(self):
        return repr(self.inner)


def without_seconds(history):
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


EXAMPLE = 4  # samples of each split that tell what the network makes of them


def watch_backbone(monkeypatch):
    """Inputs that go through a backbone."""
    seen = []
    run = ShallowDeepNetwork.run_backbone
    monkeypatch.setattr(ShallowDeepNetwork, "run_backbone", lambda self, x: (seen.append(x), run(self, x))[1])
    return seen


def rows(inputs):
    return sum(len(x) for x in inputs)


def test_recorded_features_train_the_same_exits_bit_for_bit(build, plainly):
    online, history = trained(build, plainly)
    reused, again = trained(build, plainly, ONCE)
    assert all(torch.equal(online[name], reused[name]) for name in online)
    assert without_seconds(history) == without_seconds(again)
    assert "features_seconds" in again[0]
    assert "features_seconds" not in again[1]


def test_a_pass_sees_the_crops_that_its_epoch_would_have_seen(build, little, tmp_path):
    assert little.augment == Augmentation(pad=4)
    sdn = build()
    fit(
        sdn,
        little,
        strategy="ic_only",
        recipe=RECIPE,
        features=FeatureReuse(passes=2, folder=str(tmp_path)),
        progress=False,
    )
    for epoch in range(2):
        batches = little.train.batches(64, augment=little.augment, seed=_epoch_seed(0, 0, epoch))
        with torch.no_grad():
            expected = torch.cat(
                [sdn.exits[0].reduced(run_until(sdn.backbone, "2", batch.inputs)) for batch in batches]
            )
        found = torch.from_file(str(tmp_path / f"train-{epoch}" / "exit0.bin"), size=expected.numel())
        assert torch.allclose(found.view_as(expected), expected, atol=1e-5)


def test_the_backbone_runs_once_a_pass(build, little, monkeypatch):
    seen = watch_backbone(monkeypatch)
    fit(build(), little, strategy="ic_only", recipe=RECIPE, features=FeatureReuse(passes=2), progress=False)
    assert rows(seen) == 2 * len(little.train) + len(little.val) + 2 * EXAMPLE
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen if len(x) != EXAMPLE)


def test_epochs_take_turns_among_the_passes(build, little, monkeypatch):
    used = []
    batches = TensorSet.batches
    monkeypatch.setattr(
        TensorSet, "batches", lambda self, *a, **k: (used.append(self.inputs[0].data_ptr()), batches(self, *a, **k))[1]
    )
    trained(build, replace(little, val=None), FeatureReuse(passes=2), epochs=4)
    assert used[0] != used[1]
    assert used[:2] == used[2:]


def test_distillation_learns_from_recorded_answers_without_labels(build, plainly):
    batches = [batch.inputs for batch in plainly.train.batches(64)]
    online, reused = build(), build()
    before = copy.deepcopy(reused.backbone.state_dict())
    fit(online, batches, strategy="distil", recipe=replace_batch(64), progress=False)
    history = fit(reused, batches, strategy="distil", recipe=replace_batch(64), features=ONCE, progress=False)
    assert history[-1]["train_agreement"][-1] == 1.0
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in reused.backbone.state_dict().items())


def replace_batch(size):
    return Recipe(**{**RECIPE.model_dump(), "batch_size": size})


def test_a_folder_is_shared_by_strategies_and_kept(build, little, tmp_path, monkeypatch):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path / "kept"))
    trained(build, little, reuse)
    seen = watch_backbone(monkeypatch)
    fit(build(seed=0), little, strategy="distil", recipe=RECIPE, features=reuse, progress=False)
    assert rows(seen) == 2 * EXAMPLE


def test_the_runs_own_features_go_when_it_is_trained(build, little, tmp_path):
    trained(build, little, ONCE, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.jsonl"]


@pytest.mark.parametrize("left", [True, False])
def test_killed_while_exits_train_it_goes_on_from_what_was_recorded(build, little, tmp_path, monkeypatch, left):
    whole, _ = trained(build, little, FeatureReuse(passes=2))
    phases = named_strategy("ic_only", build(), RECIPE)
    reuse = FeatureReuse(passes=2)

    doomed = replace(phases[0], objective=DiesAt(phases[0].objective, 6))  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        fit(build(), little, strategy=(doomed,), features=reuse, folder=tmp_path, progress=False)
    assert (tmp_path / "features" / "train-1" / "manifest.json").exists()
    if not left:
        shutil.rmtree(tmp_path / "features" / "train-1")  # as if killed while that was recorded
    seen = watch_backbone(monkeypatch)
    sdn = build()
    fit(sdn, little, strategy=phases, features=reuse, folder=tmp_path, resume=True, progress=False)
    assert rows(seen) == 2 * EXAMPLE + (0 if left else len(little.train))
    assert all(torch.equal(whole[name], tensor) for name, tensor in sdn.state_dict().items())
    assert not (tmp_path / "features").exists()


def test_features_of_other_weights_or_data_are_refused(build, little, tmp_path):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path / "kept"))
    trained(build, little, reuse)
    with pytest.raises(ConfigError, match=r"another run \(backbone, features differ"):
        fit(build(seed=1), little, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)
    less = replace(little, train=little.train.subset(range(200)))
    with pytest.raises(ConfigError, match="samples"):
        fit(build(), less, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)
    with pytest.raises(ConfigError, match="augment, seed"):
        fit(build(), replace(little, augment=None), strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)


def test_what_the_network_makes_of_the_samples_tells_features_apart(build, plainly, tmp_path):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path))
    trained(build, plainly, reuse)
    brighter = replace(plainly, train=replace(plainly.train, mean=(0.2, 0.2, 0.2)))
    with pytest.raises(ConfigError, match=r"inputs, features differ"):
        fit(build(), brighter, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)
    smoother = build()
    smoother.backbone[2] = nn.GELU()  # the same weights in another network
    with pytest.raises(ConfigError, match=r"another run \(features differ"):
        fit(smoother, plainly, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)


def test_a_stream_has_no_folder(build, plainly, tmp_path):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path / "kept"))
    batches = [batch.inputs for batch in plainly.train.batches(64)]
    with pytest.raises(ConfigError, match=r"is a stream\. Leave it out"):
        fit(build(), batches, strategy="distil", recipe=RECIPE, features=reuse, progress=False)


def test_a_stream_of_fewer_samples_than_a_batch_is_refused(build, plainly):
    batches = [(batch.inputs, batch.labels) for batch in plainly.train.subset(range(60)).batches(30)]
    with pytest.raises(ConfigError, match=r"a batch of 64 is more than the 60 samples to train on"):
        fit(build(), batches, strategy="ic_only", recipe=RECIPE, features=ONCE, progress=False)


def test_begun_anew_a_run_forgets_what_was_recorded(build, little, tmp_path):
    phases = named_strategy("ic_only", build(), RECIPE)
    doomed = replace(phases[0], objective=DiesAt(phases[0].objective, 2))
    with pytest.raises(KeyboardInterrupt):
        fit(build(), little, strategy=(doomed,), features=ONCE, folder=tmp_path, progress=False)
    other, _ = trained(build, little, ONCE, folder=tmp_path, seed=1)
    assert not (tmp_path / "features").exists()
    assert all(torch.equal(tensor, trained(build, little, ONCE, seed=1)[0][name]) for name, tensor in other.items())


def test_features_left_by_a_run_that_is_trained_go_when_it_is_resumed(build, little, tmp_path):
    trained(build, little, ONCE, folder=tmp_path)
    (tmp_path / "features" / "val").mkdir(parents=True)  # killed between the last epoch and that
    trained(build, little, ONCE, folder=tmp_path, resume=True)
    assert not (tmp_path / "features").exists()


def test_features_are_of_the_recipes_precision(build, little, tmp_path):
    recipe = Recipe(**{**RECIPE.model_dump(), "precision": "bf16", "epochs": 1})
    reuse = FeatureReuse(passes=1, folder=str(tmp_path))
    fit(build(), little, strategy="ic_only", recipe=recipe, features=reuse, progress=False)
    kept = torch.from_file(str(tmp_path / "val" / "exit2.bin"), size=len(little.val) * 10)
    assert torch.equal(kept, kept.bfloat16().float())
    with pytest.raises(ConfigError, match="precision"):
        fit(build(), little, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)


def test_two_runs_on_one_folder_take_turns(build, little, tmp_path):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path))
    lock = FileLock(tmp_path / "train-0.lock")
    waiting = Thread(target=trained, args=(build, little, reuse))
    with lock:
        waiting.start()
        waiting.join(timeout=1.0)
        assert waiting.is_alive()
        assert not (tmp_path / "train-0").exists()
    waiting.join()
    assert (tmp_path / "train-0" / "manifest.json").exists()


def test_too_little_room_is_noticed_at_the_beginning(build, little, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(free=1_000))
    reuse = FeatureReuse(passes=1, folder=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match=r"has 0.0 GB left, and a pass needs .*features.folder"):
        fit(build(), little, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)
    assert not (tmp_path / "kept" / "train-0").exists()


@pytest.mark.parametrize("damage", ["short", "manifest", "missing"])
def test_damaged_features_are_named(build, little, tmp_path, damage):
    reuse = FeatureReuse(passes=1, folder=str(tmp_path))
    trained(build, little, reuse)
    if damage == "short":
        path = tmp_path / "train-0" / "exit1.bin"
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "manifest":
        (tmp_path / "train-0" / "manifest.json").write_text('{"about": {}, "rows": "many", "columns": {}}')
    else:
        (tmp_path / "train-0" / "labels.bin").unlink()
    with pytest.raises(FileFormatError, match=r"train-0 is damaged.*Remove it"):
        trained(build, little, reuse)


def test_half_precision_takes_half_the_room(build, little, tmp_path):
    sizes = {}
    for dtype in ("fp32", "fp16"):
        reuse = FeatureReuse(passes=1, folder=str(tmp_path / dtype), dtype=dtype)
        state, _ = trained(build, little, reuse)
        sizes[dtype] = (tmp_path / dtype / "train-0" / "exit0.bin").stat().st_size
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert sizes["fp32"] == 2 * sizes["fp16"]


def test_what_does_not_fit_in_half_precision_is_refused(build, little, tmp_path):
    sdn = build()
    with torch.no_grad():
        sdn.backbone[1].weight.fill_(1e6)
    reuse = FeatureReuse(passes=1, folder=str(tmp_path / "kept"), dtype="fp16")
    with pytest.raises(ConfigError, match=r"exit0 are not finite in torch.float16.*fp32"):
        fit(sdn, little, strategy="ic_only", recipe=RECIPE, features=reuse, progress=False)
    assert not (tmp_path / "kept" / "train-0").exists()


def test_a_moving_backbone_has_no_features_to_reuse(build, little):
    with pytest.raises(ConfigError, match=r"features.passes=1 is for a frozen backbone, and this trains 'all'"):
        fit(build(), little, strategy="joint", features=ONCE, progress=False)


def test_several_processes_are_refused(build, little, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        fit(build(), little, strategy="ic_only", features=ONCE, progress=False)


def test_a_head_of_ones_own_sees_whole_features(digits, build, plainly):
    def head(site, num_outputs):
        return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(site.shape).numel(), num_outputs))

    online, reused = (build(head=head) for _ in range(2))
    reused.load_state_dict(online.state_dict())
    for sdn, features in ((online, None), (reused, ONCE)):
        fit(sdn, plainly, strategy="ic_only", recipe=RECIPE, features=features, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(online.exits.parameters(), reused.exits.parameters(), strict=True))


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (InternalClassifier((5, 8, 8), 3), (2, 5, 8, 8)),
        (InternalClassifier((5, 7, 9), 3), (2, 5, 7, 9)),
        (InternalClassifier((5, 4, 4), 3), (2, 5, 4, 4)),
        (InternalClassifier((5, 2, 2), 3), (2, 5, 2, 2)),
        (InternalClassifier((8, 8, 5), 3, channels_last=True), (2, 8, 8, 5)),
        (TokenClassifier((6, 5), 3), (2, 6, 5)),
        (TokenClassifier((6, 5), 3, pool="first"), (2, 6, 5)),
        (VectorClassifier((5,), 3), (2, 5)),
    ],
)
def test_every_head_answers_alike_from_what_it_reduces_to(head, shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert isinstance(head, ReducingHead) == (not isinstance(head, VectorClassifier))
    reduced = head.reduced(features) if isinstance(head, ReducingHead) else features
    assert len(reduced) == len(features)
    answer = head.from_reduced(reduced) if isinstance(head, ReducingHead) else head(reduced)
    assert torch.equal(answer, head(features))
