import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shallowdeep.errors import TraceError
from shallowdeep.networks.costs import Costs, count_flops, count_params, flop_counter

COSTS = Costs((20, 50, 100), (4, 6, 0), (1, 5, 9), (2, 3, 0), (0.15, 0.45, 1.0))


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        (None, [0.24, 0.60, 1.10]),
        ([0, 1, 2], [0.24, 0.60, 1.10]),
        ([1], [0.20, 0.56, 1.06]),
        ([0], [0.24, 0.54, 1.04]),
        ([], [0.20, 0.50, 1.00]),
    ],
)
def test_relative_counts_the_enabled_heads_up_to_each_exit(exits, expected):
    cost = COSTS.relative(exits=exits)
    assert cost.dtype == torch.float64
    assert cost.tolist() == pytest.approx(expected, rel=1e-12)  # two roundings of a double


def test_select_keeps_some_exits():
    assert COSTS.select([0, 2]) == Costs((20, 100), (4, 0), (1, 9), (2, 0), (0.15, 1.0))
    assert COSTS.num_exits == 3


@pytest.mark.parametrize("costs", [COSTS, Costs((1,), (0,), (1,), (0,))])
def test_dict_round_trip_through_json(costs):
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((20, 100), (4,), (1, 9), (2, 0)), r"one entry per exit in every list, got lists of \[1, 2\]"),
        (((20, 100), (4, 0), (1, 9), (2, 0), (1.0,)), r"one entry per exit in every list, got lists of \[1, 2\]"),
        (((), (), (), ()), r"got lists of \[0\]"),
        (((100, 20), (4, 0), (1, 9), (2, 0)), r"must rise from exit to exit, got \(100, 20\)"),
        (((0, 0), (4, 0), (1, 9), (2, 0)), r"must rise from exit to exit, got \(0, 0\)"),
    ],
)
def test_inconsistent_costs_are_refused(parts, message):
    with pytest.raises(TraceError, match=message):
        Costs(*parts)


@given(
    steps=st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), min_size=1, max_size=9),
    last=st.integers(1, 10**12),
    data=st.data(),
)
def test_cost_never_falls_and_holds_the_backbone(steps, last, data):
    backbone = [sum(step for step, _ in steps[: i + 1]) for i in range(len(steps))]
    backbone, heads = [*backbone, backbone[-1] + last], [*(head for _, head in steps), 0]
    exits = data.draw(st.lists(st.integers(0, len(steps)), unique=True))
    costs = Costs(tuple(backbone), tuple(heads), (0,) * len(heads), (0,) * len(heads))
    cost, share = costs.relative(exits), torch.tensor(backbone, dtype=torch.float64) / backbone[-1]
    assert (cost.diff() >= 0).all()
    assert (cost >= share).all()
    assert (cost <= costs.relative()).all()


def test_flops_are_two_per_multiply_add_and_leave_the_mode_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    net[0].eval()
    assert count_flops(net, torch.zeros(2, 3, 8, 8)) == 2 * 2 * (64 * 27 * 4 + 256 * 5)
    assert [module.training for module in net] == [False, True, True, True, True]
    assert net[1].num_batches_tracked == 0


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_is_counted():
    q, k = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 7, 4)  # 3 samples, 2 heads, 5 queries, 7 keys
    assert count_flops(Attention(), (q, k, k)) == 3 * 2 * (2 * 5 * 7 * 4 + 2 * 5 * 7 * 4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    projections, products, mlp = 4 * 8 * 8, 5 * 8 + 5 * 8, 2 * 8 * 16  # per token
    assert count_flops(layer, torch.zeros(3, 5, 8)) == 3 * 5 * 2 * (projections + products + mlp)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_are_counted(kind, gates, bidirectional):
    layers = kind(8, 16, num_layers=2, bidirectional=bidirectional, batch_first=True)
    directions = 2 if bidirectional else 1
    first, second = gates * 16 * (8 + 16), gates * 16 * (directions * 16 + 16)  # one direction, one step
    assert count_flops(layers, torch.zeros(3, 5, 8)) == 3 * 5 * 2 * directions * (first + second)


@pytest.mark.parametrize(("kind", "mode"), [(nn.LSTM, 2), (nn.GRU, 3)])
def test_recurrent_layers_of_a_gpu_count_what_those_of_a_cpu_do(kind, mode):
    with torch.device("meta"):  # the kernel's shapes, without the device
        weights = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)._flat_weights
        x, state = torch.zeros(3, 5, 8), torch.zeros(4, 3, 16)
    with flop_counter() as counter:
        cell = state if kind is nn.LSTM else None
        torch.ops.aten._cudnn_rnn(x, weights, 4, None, state, cell, mode, 16, 0, 2, True, 0.0, False, True, [], None)
    on_cpu = count_flops(kind(8, 16, num_layers=2, bidirectional=True, batch_first=True), torch.zeros(3, 5, 8))
    assert counter.get_total_flops() == on_cpu > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_counting_restores_the_fused_path_after_success_and_crash(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with flop_counter():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(KeyError), flop_counter():
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_params(nn.Sequential(layer, layer, nn.Linear(3, 2))) == 12 + 8
