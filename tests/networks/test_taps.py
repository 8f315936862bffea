import copy
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shallowdeep.errors import IllegalTap, NetworkError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sites import modules_after, probe, probe_sites
from shallowdeep.networks.taps import run_until, take_rows, tapped

WIDTH = 8


def legal(sites):
    return [site.name for site in sites if site.legal]


def reasons(sites):
    return {site.name: site.why_not for site in sites if not site.legal}


def layers(*modules):
    torch.manual_seed(0)
    return nn.Sequential(*[module() if isinstance(module, type) else module for module in modules])


@pytest.fixture
def vectors():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def linear(out=WIDTH):
    return nn.Linear(WIDTH, out)


class Branches(nn.Module):
    """``side`` does not lead to the logits, ``twice`` is called twice, ``never`` never."""

    def __init__(self):
        super().__init__()
        self.side, self.twice, self.never, self.fc = linear(), linear(), linear(), linear(3)

    def forward(self, x):
        self.side(x)
        return self.fc(self.twice(self.twice(x)))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Pair(nn.Module):
    """Gives out a tuple with a tensor, a mapping and something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x):
        return self.linear(x), {"half": x / 2}, "note"


class UsesPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.fc = Pair(), linear(3)

    def forward(self, x):
        full, rest, _ = self.pair(x)
        return self.fc(full + rest["half"])


class AttentionBlock(nn.Module):
    """Multiply-adds of ``t`` tokens, width 8: projections 4·64·t, products with keys and values 2·8·t², MLP 64·t."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), linear()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TokenNet(nn.Module):
    """The position is a parameter of the network itself: 5·8 = 40 parameters, the embedding 7·8 = 56."""

    def __init__(self, block=AttentionBlock):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(7, WIDTH), nn.Parameter(torch.randn(5, WIDTH))
        self.first, self.second, self.fc = block(), block(), linear(3)

    def forward(self, tokens):
        return self.fc(self.second(self.first(self.embed(tokens) + self.position)).mean(1))


TOKENS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 2, 2]])


class Crashing(nn.Module):
    """Raises when its switch is on."""

    def __init__(self):
        super().__init__()
        self.on = True

    def forward(self, x):
        if self.on:
            raise RuntimeError("burst pipe\nand more lines")
        return x


# Which sites are legal


def test_inside_a_residual_block_nothing_is_legal(tiny_net, images):
    sites = probe(tiny_net(), images, split_over=0.0)
    assert legal(sites) == [
        "stem.0", "stem.1", "stem.2", "stem", "blocks.0", "blocks.1", "blocks.2", "blocks", "drop", "fc",
    ]  # fmt: skip
    inner = {f"blocks.{i}.{name}" for i in range(3) for name in ("conv1", "bn1", "conv2", "bn2")}
    assert set(reasons(sites)) == inner
    assert all(reason.startswith("with 2 of 4 rows kept there, a later") for reason in reasons(sites).values())


@pytest.mark.parametrize(
    ("split_over", "expected"),
    [
        (0.5, ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks", "drop", "fc"]),
        (0.1, ["stem.0", "stem.1", "stem.2", "stem", "blocks.0", "blocks.1", "blocks.2", "blocks", "drop", "fc"]),
    ],
)
def test_cheap_legal_modules_are_not_opened(tiny_net, images, split_over, expected):
    sites = probe(tiny_net(), images, split_over=split_over)
    assert legal(sites) == expected  # the stem has 11 % of the network, a block 30 %
    assert ("blocks.0.conv1" in reasons(sites)) is (split_over == 0.1)


def test_other_reasons_are_named(vectors):
    sites = probe(Branches(), vectors, split_over=0.0)
    assert reasons(sites) == {
        "side": "with 2 of 4 rows kept there, 4 rows of logits come out",
        "twice": "called 2 times in one forward",
    }
    assert legal(sites) == ["fc"]


@pytest.mark.parametrize(
    "mixer", [Centred, lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)], ids=["mean", "batch-norm"]
)
def test_before_a_module_that_mixes_samples_nothing_is_legal(vectors, mixer):
    sites = probe(layers(linear(), nn.ReLU, mixer(), linear(), linear(3)), vectors)
    assert reasons(sites) == dict.fromkeys(
        ["0", "1"], "the rows kept there come out changed: later layers mix the samples"
    )
    assert legal(sites) == ["2", "3", "4"]


def test_one_row_that_could_broadcast_is_not_taken_for_legal(vectors):
    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = linear(), linear(3)

        def forward(self, x):
            return self.fc(x + self.inner(x[:1].expand_as(x)) * self.inner.weight.new_ones(len(x), 1))

    assert legal(probe(Broadcasts(), vectors[:1])) == ["fc"]


def test_a_module_without_the_samples_as_rows_is_refused(vectors):
    class Turned(nn.Module):
        def forward(self, x):
            return x.T

    class Back(Turned):
        pass

    sites = probe(layers(linear(), Turned, Back, linear(3)), vectors, split_over=0.0)
    assert reasons(sites) == {"1": "its output of shape (8, 4) does not have the 4 samples as rows"}


def test_tuple_outputs_are_cut_in_all_their_tensors(vectors):
    sites = probe(UsesPair(), vectors, split_over=0.0)
    assert legal(sites) == ["pair", "fc"]
    assert list(reasons(sites)) == ["pair.linear"]
    net, rows = UsesPair(), torch.tensor([4, 0])
    with take_rows(net, "pair", rows):
        cut = net(vectors)
    # two rows are multiplied by another kernel than five
    torch.testing.assert_close(cut, net(vectors)[rows], atol=1e-6, rtol=1e-5)


def test_token_networks():
    sites = probe(TokenNet(), TOKENS)
    assert legal(sites) == ["embed", "first", "second", "fc"]
    assert set(reasons(sites)) == {f"{b}.{m}" for b in ("first", "second") for m in ("norm", "attention", "mlp")}
    assert [site.shape for site in sites if site.legal] == [(5, 8), (5, 8), (5, 8), (3,)]


def test_probe_sites_looks_at_the_given_ones_in_the_order_of_computation(tiny_net, images):
    net = tiny_net()
    sites = probe_sites(net, images, ["blocks.1", "stem", "blocks.0.bn1"])
    assert [site.name for site in sites] == ["stem", "blocks.0.bn1", "blocks.1"]
    by_name = {site.name: site for site in probe(net, images)}
    assert sites == [by_name[site.name] for site in sites]


def test_probe_sites_refuses_what_is_not_there(vectors):
    with pytest.raises(IllegalTap, match=r"no module 'sid'. Nearby: side, twice, never, fc"):
        probe_sites(Branches(), vectors, ["sid"])
    with pytest.raises(IllegalTap, match="'never' is not called in a forward"):
        probe_sites(Branches(), vectors, ["never"])


# What a site costs


def test_costs_by_hand(tiny_net, images):
    sites = {site.name: site for site in probe(tiny_net(), images)}
    block = 18_432
    assert {name: sites[name].flops // 2 for name in ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks", "fc")} == {
        "stem": 6_912,
        "blocks.0": 6_912 + block,
        "blocks.1": 6_912 + 2 * block,
        "blocks.2": 6_912 + 3 * block,
        "blocks": 6_912 + 3 * block,
        "fc": 6_912 + 3 * block + 20,
    }
    assert [sites[name].params for name in ("stem.0", "stem", "blocks.0", "blocks", "fc")] == [
        108, 116, 420, 1_028, 1_053,
    ]  # fmt: skip
    assert sites["blocks.1"].shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("block", "multiply_adds", "params"),
    [
        # (weights and biases) of four projections, the MLP; LayerNorm 16
        (AttentionBlock, 5 * 4 * 64 + 2 * 8 * 25 + 5 * 64, 4 * 64 + 4 * 8 + 64 + 8 + 16),
        (PlainAttention, 5 * 3 * 64 + 2 * 8 * 25, 3 * 64 + 3 * 8),
    ],
)
def test_attention_costs_by_hand(block, multiply_adds, params):
    sites = {site.name: site for site in probe(TokenNet(block), TOKENS)}
    assert [sites[name].flops for name in ("embed", "first", "second", "fc")] == [
        0, 2 * multiply_adds, 4 * multiply_adds, 4 * multiply_adds + 2 * 24,
    ]  # fmt: skip
    assert [sites[name].params for name in ("embed", "first", "second", "fc")] == [
        40 + 56, 96 + params, 96 + 2 * params, 96 + 2 * params + 27,
    ]  # fmt: skip


# What comes after a tap


def test_modules_after(tiny_net, images):
    assert modules_after(tiny_net(), images, "blocks.0") == ("blocks.1", "blocks.2", "drop", "fc")
    assert modules_after(tiny_net(), images, "blocks.1.bn1") == (
        "blocks.1.conv2", "blocks.1.bn2", "blocks.2", "drop", "fc",
    )  # fmt: skip


def test_modules_that_a_forward_never_enters_stay(vectors):
    # nn.MultiheadAttention reads the weights of its `out_proj` and never calls it.
    assert modules_after(TokenNet(), TOKENS, "first") == ("second", "fc")
    assert modules_after(Branches(), vectors, "twice") == ("fc",)


# Guests leave no trace


def test_probe_leaves_weights_buffers_modes_and_inputs(tiny_net, images, num_hooks):
    net = tiny_net().train()
    net.blocks[1].eval()
    state, modes, inputs = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], images.clone()
    net.fc.weight.grad = torch.ones(5, 4)
    probe(net, inputs, split_over=0.0)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert modes.count(False) == 5
    assert torch.equal(inputs, images)
    assert torch.equal(net.fc.weight.grad, torch.ones(5, 4))
    assert all(p.requires_grad for p in net.parameters())
    assert num_hooks(net) == 0


def test_an_example_of_one_number_is_enough():
    assert legal(probe(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)), torch.ones(1, 1))) == ["0", "1"]


def test_hooks_and_modes_after_a_crash(vectors, num_hooks):
    net = layers(linear(), Crashing, linear(3)).train()
    with pytest.raises(NetworkError, match=r"does not take the example inputs: burst pipe\. Pass"):
        probe(net, vectors)
    assert num_hooks(net) == 0

    def crash(context):
        with context:
            assert num_hooks(net) > 0
            net(vectors)

    for context in (tapped(net, ["0", "1"]), take_rows(net, "0", torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="burst pipe"):
            crash(context)
        assert num_hooks(net) == 0
    with pytest.raises(RuntimeError, match="burst pipe"):
        run_until(net, "2", vectors)
    assert num_hooks(net) == 0
    assert all(m.training for m in net.modules())
    net[1].on = False
    with tapped(net, ["0"]) as features:  # the turn is free again
        net(vectors)
    assert torch.equal(features["0"], net[0](vectors))


def test_hooks_are_gone_after_success(vectors, num_hooks):
    net = layers(linear(), nn.ReLU, linear(3))
    with take_rows(net, "0", torch.tensor([1, 2])):
        assert net(vectors).shape == (2, 3)
    run_until(net, "1", vectors)
    modules_after(net, vectors, "1")
    assert num_hooks(net) == 0
    assert net(vectors).shape == (5, 3)


def test_recording_changes_no_output(tiny_net, images, num_hooks):
    net = tiny_net()
    alone = net(images)
    with tapped(net, ["blocks.0", "stem"]) as features:
        recorded = net(images)
    assert torch.equal(recorded, alone)
    assert torch.equal(features["stem"], net.stem(images))
    assert torch.equal(features["blocks.0"], net.blocks[0](net.stem(images)))
    assert num_hooks(net) == 0


def test_run_until_computes_nothing_more(vectors):
    net = layers(linear(), nn.ReLU, Crashing, linear(3))
    assert torch.equal(run_until(net, "1", vectors), net[1](net[0](vectors)))
    with pytest.raises(IllegalTap, match="'never' is not called"):
        run_until(Branches(), "never", vectors)


# Threads, contexts in contexts, compilation


class Slow(nn.Module):
    """Hands over to another thread in the middle of a forward."""

    def forward(self, x):
        time.sleep(0.001)
        return x


def test_threads_get_their_own_answers(num_hooks):
    net = layers(linear(), Slow, linear(), Slow, linear(3))
    sdn = attach(net, torch.zeros(1, WIDTH), taps=["0", "2"]).eval()
    batches = [torch.randn(1 + i % 3, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    with torch.no_grad():
        expected = [sdn(x) for x in batches]

    def answer(x):
        with torch.no_grad():
            return sdn(x)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(answer, batches))
    assert all(torch.equal(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))
    assert num_hooks(net) == 0


def test_a_thread_waits_for_an_open_context(vectors):
    net = layers(linear(), nn.ReLU, linear(3))
    sdn = attach(net, vectors, taps=["1"])
    done = threading.Event()
    with sdn.tapped():
        thread = threading.Thread(target=lambda: (sdn(vectors), done.set()))
        thread.start()
        assert not done.wait(0.05)
    thread.join(5)
    assert done.is_set()


def test_contexts_nest(tiny_net, images, num_hooks):
    net = tiny_net()
    sdn, other = attach(net, images, taps=["stem", "blocks.1"]), attach(net, images, taps=["blocks.0"])
    sdn.eval()
    alone, other_alone = sdn(images), other(images)
    with sdn.tapped():
        assert num_hooks(net) == 2
        with sdn.tapped(), other.tapped():
            assert num_hooks(net) == 3  # the inner context of the same network adds none
            inner, other_inner = sdn(images), other(images)
        outer = sdn(images)
        assert num_hooks(net) == 2
    assert num_hooks(net) == 0
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(alone, inner, outer, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other_alone, other_inner, strict=True))


# A process of its own: the checks of shapes that this suite puts around every function cannot be compiled.
COMPILED = """
import torch
from torch import nn
from shallowdeep.networks.attach import attach

net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))
sdn, x, graphs = attach(net, torch.zeros(1, 8), taps=["1", "2"]).eval(), torch.randn(5, 8), []

def count(graph, example_inputs):
    graphs.append(graph)
    return graph

with sdn.tapped(), torch.no_grad():
    compiled = torch.compile(sdn, backend=count, fullgraph=True)
    found, again = compiled(x), compiled(x + 1)
equal = [torch.equal(a, b) for a, b in zip(found + again, sdn(x) + sdn(x + 1), strict=True)]
print(len(graphs), equal)
"""


def test_compiled_inside_the_context_is_one_graph():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=100)
    assert done.stdout == "1 [True, True, True, True, True, True]\n", done.stderr


def test_an_output_that_is_changed_in_place_is_no_site():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    reasons = {site.name: site.why_not for site in probe(net, torch.randn(2, 6), split_over=0.0)}
    assert reasons["0"] == "a later layer changes its output in place: take that layer instead"
    assert [name for name, why_not in reasons.items() if not why_not] == ["1", "2", "3", "4"]
