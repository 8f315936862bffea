from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from shallowdeep.data.images import ImageSet
from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import ConfigError, DataError, NetworkError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.calls import exact_float32
from shallowdeep.networks.zoo import load_network
from shallowdeep.traces.record import record


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_images(n=50, size=16, classes=3, **changes):
    random = torch.Generator().manual_seed(3)
    parts = {
        "images": torch.randint(256, (n, 3, size, size), generator=random, dtype=torch.uint8),
        "labels": torch.arange(n) % classes,
        "ids": torch.arange(n) * 3 + 100,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.25),
        "class_names": ("oak", "cat", "dog", "fir")[:classes],
        "name": "toys",
        "split": "test",
    }
    return ImageSet(**(parts | changes))


@pytest.fixture
def sdn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AvgPool2d(4),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(128, 3),
        )
        return attach(net, torch.randn(2, 3, 16, 16), taps=("2", "3"))


def hooks(sdn):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sdn.modules())


def test_logits_are_those_of_a_plain_loop(sdn):
    images = make_images()
    trace = record(sdn, images, batch_size=16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    sdn.eval()
    with torch.no_grad():
        rows = [sdn(((image / 255 - mean) / std)[None]) for image in images.images]
    expected = [torch.cat(exits) for exits in zip(*rows, strict=True)]
    assert trace.num_exits == 3
    for found, exact in zip(trace.logits, expected, strict=True):
        # single images take other kernels than batches, and normalisation is one product and one sum
        torch.testing.assert_close(found, exact, atol=2e-6, rtol=0)


def test_logits_are_exactly_those_of_the_same_batches(sdn):
    images = make_images()
    trace = record(sdn, images, batch_size=16)
    sdn.eval()
    with torch.no_grad():
        parts = [sdn(batch.inputs) for batch in images.batches(16)]
    for found, exact in zip(trace.logits, zip(*parts, strict=True), strict=True):
        assert torch.equal(found, torch.cat(exact))


def test_order_ids_labels_and_costs_are_the_split_s(sdn):
    images = make_images().subset([4, 0, 30, 7])
    trace = record(sdn, images, batch_size=3)
    assert trace.ids.tolist() == [112, 100, 190, 121]
    assert trace.true_labels.tolist() == [1, 0, 0, 1]
    assert trace.costs == sdn.costs
    whole = record(sdn, make_images(), batch_size=50)
    # batches of other sizes add in another order
    torch.testing.assert_close(trace.logits[2], whole.logits[2][[4, 0, 30, 7]], atol=2e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 500])
def test_batch_size_does_not_matter(batch_size, sdn):
    one, other = record(sdn, make_images(), batch_size=25), record(sdn, make_images(), batch_size=batch_size)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)  # batches of other sizes add in another order
    assert torch.equal(one.predictions, other.predictions)


def test_twice_is_identical(sdn):
    sdn.train()  # dropout and batch statistics would differ
    one, other = record(sdn, make_images()), record(sdn, make_images())
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    assert one.info == other.info


def test_weights_statistics_and_random_state_stay(sdn):
    before, random = {k: v.clone() for k, v in sdn.state_dict().items()}, torch.get_rng_state()
    record(sdn.train(), make_images())
    assert all(torch.equal(before[name], tensor) for name, tensor in sdn.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_no_graph_is_kept(sdn):
    trace = record(sdn, make_images())
    assert not any(x.requires_grad for x in trace.logits)
    assert {(x.dtype, x.device.type) for x in trace.logits} == {(torch.float32, "cpu")}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in sdn.parameters())


@pytest.mark.parametrize("crash", [False, True])
def test_modes_and_hooks_come_back(crash, sdn):
    sdn.train()
    sdn.backbone[1].eval()  # as one does to keep a batch-norm's statistics
    modes = [module.training for module in sdn.modules()]
    if crash:
        calls = []

        def fail(module, args):
            calls.append(hooks(sdn))
            if len(calls) == 2:
                raise ZeroDivisionError

        with (
            sdn.exits[0].register_forward_pre_hook(fail),
            pytest.raises(ZeroDivisionError),
        ):
            record(sdn, make_images(), batch_size=20)
        assert calls == [3, 3]  # two taps, and this test's own
    else:
        record(sdn, make_images(), batch_size=20)
    assert [module.training for module in sdn.modules()] == modes
    assert hooks(sdn) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("images", "shape"), [({"size": 24}, "(3, 24, 24)"), ({"n": 4, "size": 2}, "(3, 2, 2)")])
def test_images_of_another_shape(images, shape, sdn):
    with pytest.raises(NetworkError) as caught:
        record(sdn, make_images(**images))
    assert f"does not take inputs of shape {shape}: " in str(caught.value)
    assert hooks(sdn) == 0


def test_grey_images(sdn):
    grey = torch.zeros((4, 1, 16, 16), dtype=torch.uint8)
    images = make_images(n=4, images=grey, mean=(0.5,), std=(0.2,))
    with pytest.raises(NetworkError, match=r"does not take inputs of shape \(1, 16, 16\)"):
        record(sdn, images)


def test_memory_that_runs_out_is_no_wrong_shape(sdn, monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sdn, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        record(sdn, make_images())


def test_too_few_outputs(sdn):
    with pytest.raises(NetworkError, match=r"3 outputs, the data 4 classes. Build it with num_classes=4"):
        record(sdn, make_images(classes=4))


def test_more_outputs_than_classes(sdn):
    assert record(sdn, make_images(classes=2)).num_outputs == 3


def test_info_says_where_it_comes_from(sdn):
    tree = LabelTree((0, 1, 1), ("oak", "cat", "dog"), ("plant", "animal"))
    info = record(sdn, make_images(tree=tree), strategy="joint").info
    assert (info.model, info.data, info.split, info.strategy) == ("Sequential", "toys", "test", "joint")
    assert (info.precision, info.label_spaces, info.tree) == ("fp32", {"labels": 3}, tree)
    assert info.class_names == ("oak", "cat", "dog")
    assert info.versions["torch"] == torch.__version__
    named = attach(load_network("resnet20", num_classes=3), torch.randn(1, 3, 32, 32), taps=("layer1.0",))
    assert record(named, make_images(n=2, size=32)).info.model == "resnet20"


@pytest.fixture
def coarse():
    """Coarse arithmetic allowed by the new names alone, which forbids to ask by the old ones."""
    matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, cpu.fp32_precision
    matmul.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
    yield
    matmul.fp32_precision, cpu.fp32_precision = before


def precisions():
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    return [place.fp32_precision for place in places]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("crash", [False, True])
def test_float32_is_exact_inside_and_as_before_outside(crash, sdn):
    before, inside = precisions(), []

    def look(module, args):
        inside.append(precisions())
        if crash:
            raise ZeroDivisionError

    with sdn.exits[0].register_forward_pre_hook(look):
        if crash:
            with pytest.raises(ZeroDivisionError):
                record(sdn, make_images())
        else:
            record(sdn, make_images())
    assert len(inside) == 1
    assert not {"tf32", "bf16"} & set(inside[0])
    assert precisions() == before
    assert before[0] == "tf32"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.usefixtures("coarse")
def test_the_last_of_several_threads_puts_the_precision_back():
    before = precisions()
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert precisions()[0] == "ieee"
    second.__exit__(None, None, None)
    assert precisions() == before


def test_the_compiler_may_ask_for_the_precision_inside():
    with exact_float32():
        assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("bare", [False, True])
def test_weights_of_another_precision_are_refused(bare):
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(9, (5, 3), generator=torch.Generator().manual_seed(0))
    network = (net if bare else attach(net, tokens, taps=("1",))).bfloat16()
    message = r"these are torch.bfloat16 as well\. Convert the network .*Engine\(…, precision='bf16'\)\.record"
    with pytest.raises(ConfigError, match=message):
        record(network, [tokens])
    assert record(network.float(), [tokens]).info.precision == "fp32"


def test_autocast_outside_does_not_reach_in(sdn):
    expected = record(sdn, make_images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = record(sdn, make_images())
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_threads_that_record_one_network_do_not_meet(sdn):
    sdn.train()
    images, alone = make_images(), record(sdn, make_images())
    with ThreadPoolExecutor(3) as pool:
        traces = list(pool.map(lambda _: record(sdn, images, batch_size=7), range(6)))
    for trace in traces:
        for ours, theirs in zip(trace.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert sdn.training
    assert all(parameter.requires_grad for parameter in sdn.parameters())


def test_labels_in_some_batches_only(sdn):
    x = make_images(n=4).example_inputs
    with pytest.raises(DataError, match="some batches of stream have labels and some have none"):
        record(sdn, [(x, torch.zeros(4, dtype=torch.int64)), x])
