import pytest
import torch
import torch.nn.functional as F

from shallowdeep.errors import NetworkError
from shallowdeep.networks.exits import (
    InternalClassifier,
    MixedPool,
    TokenClassifier,
    VectorClassifier,
    build_head,
    default_head,
    head_config,
)
from shallowdeep.networks.sites import Site

# First row or column of each window, and the window's width, for one side of a map.
WINDOWS = {
    32: ([0, 8, 16, 24], 8),
    16: ([0, 4, 8, 12], 4),
    14: ([0, 3, 6, 9], 5),
    8: ([0, 2, 4, 6], 2),
    7: ([0, 1, 2, 3], 4),
    5: ([0, 1, 2, 3], 2),
    4: ([0, 1, 2, 3], 1),
    2: ([0, 1], 1),
    1: ([0], 1),
}
SIZES = [(side, side) for side in WINDOWS] + [(16, 7), (2, 8)]


def by_loop(features, mix):
    n, channels, height, width = features.shape
    (rows, tall), (columns, wide) = WINDOWS[height], WINDOWS[width]
    out = torch.empty(n, channels, len(rows), len(columns))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            window = features[:, :, top : top + tall, left : left + wide].flatten(2)
            out[:, :, i, j] = mix * window.max(2).values + (1 - mix) * window.mean(2)
    return out


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mix", [0.3, 0.0, 1.0, -0.5])
def test_mixed_pool_is_the_loop_over_windows(height, width, mix):
    pool = MixedPool(height, width)
    if pool.pools:
        pool.mix.data.fill_(mix)
    features = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    pooled = pool(features)
    assert pooled.shape == (2, 3, min(height, 4), min(width, 4))
    # a mean of up to 64 numbers of size 1 in another order
    torch.testing.assert_close(pooled, by_loop(features, mix), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("mix", "expected"), [(0.0, 4.5), (1.0, 9.0), (0.5, 6.75), (-0.5, 2.25)])
def test_the_mix_weighs_the_maximum_and_is_not_clamped(mix, expected):
    pool = MixedPool(8, 8)
    pool.mix.data.fill_(mix)
    corner = pool(torch.arange(64.0).view(1, 1, 8, 8))[0, 0, 0, 0]  # of 0, 1, 8, 9
    assert corner.item() == expected


@pytest.mark.parametrize(("side", "count"), [(32, 1), (5, 1), (4, 1), (3, 0), (2, 0), (1, 0)])
def test_the_mix_exists_from_side_four_on(side, count):
    assert sum(p.numel() for p in MixedPool(side, side).parameters()) == count


def test_the_mix_is_drawn_from_zero_to_one():
    torch.manual_seed(0)
    mixes = torch.stack([MixedPool(8, 8).mix.detach() for _ in range(200)])
    assert 0 <= mixes.min() < 0.1
    assert 0.9 < mixes.max() < 1


def test_the_mix_learns():
    pool = MixedPool(8, 8)
    pool(torch.arange(64.0).view(1, 1, 8, 8)).sum().backward()
    assert pool.mix.grad.item() == 16 * 4.5  # each of 16 windows: maximum less mean


def test_internal_classifier_is_pool_then_linear():
    head = InternalClassifier((3, 8, 8), 5)
    features = torch.randn(2, 3, 8, 8)
    expected = F.linear(by_loop(features, head.pool.mix.detach()).flatten(1), head.linear.weight, head.linear.bias)
    # 48 products in another order
    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in head.parameters()) == 3 * 16 * 5 + 5 + 1


@pytest.mark.parametrize(("pool", "expected"), [("first", [1.0, -1.0]), ("mean", [-1.0, 1.0])])
def test_token_head_pools_then_normalises(pool, expected):
    head = TokenClassifier((2, 2), 2, pool)
    head.linear.weight.data.copy_(torch.eye(2))
    head.linear.bias.data.zero_()
    logits = head(torch.tensor([[[3.0, 1.0], [1.0, 5.0]]]))
    # LayerNorm adds 1e-5 to a variance of 0.25
    torch.testing.assert_close(logits, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_token_head_refuses_another_pooling():
    with pytest.raises(NetworkError, match="pools by 'mean' or 'first', got 'max'"):
        TokenClassifier((2, 2), 2, "max")


def test_vector_head_is_linear():
    head = VectorClassifier((3,), 2)
    head.linear.weight.data.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]]))
    head.linear.bias.data.copy_(torch.tensor([0.5, 0.0]))
    assert head(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[7.5, -2.0]]


@pytest.mark.parametrize(
    ("shape", "kind"), [((3, 6, 6), InternalClassifier), ((7, 8), TokenClassifier), ((8,), VectorClassifier)]
)
def test_default_head_goes_by_the_number_of_dimensions(shape, kind):
    head = default_head(Site("a", shape, 1, True, ""), 5)
    assert type(head) is kind
    assert head(torch.zeros(2, *shape)).shape == (2, 5)
    again = build_head(head_config(head, shape, 5))
    assert type(again) is kind
    again.load_state_dict(head.state_dict())


def test_default_head_refuses_other_features():
    with pytest.raises(NetworkError, match=r"no default head for features of shape \(2, 3, 4, 5\) at 'video'"):
        default_head(Site("video", (2, 3, 4, 5), 1, True, ""), 5)


def test_a_head_of_the_users_own_is_custom():
    class Mine(VectorClassifier):
        pass

    assert head_config(Mine((3,), 2), (3,), 2)["kind"] == "custom"
    config = head_config(TokenClassifier((4, 3), 2, "first"), (4, 3), 2)
    assert config == {"kind": "tokens", "shape": [4, 3], "num_outputs": 2, "pool": "first"}
    assert build_head(config).pool == "first"


def test_maps_with_channels_last_get_the_same_head_turned_round():
    first, last = (default_head(Site("s", shape, 1, True, ""), 3) for shape in ((6, 8, 8), (8, 8, 6)))
    last.load_state_dict(first.state_dict())
    features = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        assert torch.equal(last(features.permute(0, 2, 3, 1)), first(features))
    assert head_config(last, (8, 8, 6), 3)["channels_last"]
    again = build_head(head_config(last, (8, 8, 6), 3))
    assert again.channels_last
    assert not default_head(Site("s", (8, 8, 8), 1, True, ""), 3).channels_last
