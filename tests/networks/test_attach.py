import pytest
import torch
from torch import nn

from shallowdeep.errors import ConfigError, IllegalTap, NetworkError
from shallowdeep.networks.attach import attach, choose_sites, total_flops
from shallowdeep.networks.exits import VectorClassifier
from shallowdeep.networks.sites import Site


@pytest.fixture
def mlp():
    """Four layers of 64, 64, 64 and 24 multiply-adds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


# By shares


def test_asked_and_got(mlp):
    sdn = attach(mlp, X, shares=(0.6, 0.3))
    # 64, 128 and 192 of 216; the activation costs nothing and comes later than its layer
    assert sdn.taps == ("1", "3")
    assert [placement.asked for placement in sdn.placements] == [0.3, 0.6]
    assert [placement.got for placement in sdn.placements] == [64 / 216, 128 / 216]
    assert [placement.unreached for placement in sdn.placements] == [("2", "3", "4", "5"), ("4", "5")]
    assert sdn.costs.backbone_flops == (128, 256, 432)
    assert sdn.costs.head_flops == (48, 48, 0)
    assert sdn.costs.backbone_params == (72, 144, 243)
    assert sdn.costs.head_params == (27, 27, 0)
    assert sdn.costs.nominal == (0.3, 0.6, 1.0)


def test_flops_do_not_depend_on_the_batch(mlp):
    assert total_flops(mlp, X) == total_flops(mlp, X[:1]) == 432
    assert attach(mlp, X, shares=(0.3,)).costs == attach(mlp, X[:1], shares=(0.3,)).costs


def site(name, flops, legal=True):
    return Site(name, (8,), flops, legal, "" if legal else "no")


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.1, 0.2), ["b", "d"]),  # the last of equal cost; no second exit at one place
        ((0.42,), ["d"]),
        ((0.9, 0.8), ["d", "e"]),  # the deeper share leaves the shallower one a place
        ((0.5,), ["d"]),  # the nearest one, c at 0.5, is not legal
        ((), []),
    ],
)
def test_choice_of_sites(shares, expected):
    sites = [site("a", 20), site("b", 20), site("c", 50, legal=False), site("d", 60), site("e", 80), site("f", 100)]
    assert [chosen.name for chosen in choose_sites(sites, shares, 100)] == expected


def test_too_few_legal_sites(mlp):
    with pytest.raises(IllegalTap, match=r"4 exits were asked for, but this network has 3 legal .* costs: 1, 3, 4\."):
        attach(mlp, X, shares=(0.2, 0.4, 0.6, 0.8))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (-0.1,), (15.0, 30.0)])
def test_shares_that_are_none(mlp, shares):
    with pytest.raises(IllegalTap, match="distinct fractions of the network between 0 and 1"):
        attach(mlp, X, shares=shares)


# By name


def test_taps_by_name(mlp):
    sdn = attach(mlp, X, taps=["0", "3"])
    assert sdn.taps == ("0", "3")
    assert [placement.asked for placement in sdn.placements] == [None, None]
    assert [placement.got for placement in sdn.placements] == [64 / 216, 128 / 216]
    assert sdn.costs.nominal is None


def test_no_taps_is_one_exit(mlp):
    sdn = attach(mlp, X, taps=())
    assert sdn.num_exits == 1
    (logits,) = sdn(X)
    assert torch.equal(logits, mlp(X))
    assert sdn.costs.relative().tolist() == [1.0]


def test_an_illegal_tap_is_refused_with_reason_and_neighbours(tiny_net, images):
    with pytest.raises(IllegalTap) as caught:
        attach(tiny_net(), images, taps=["stem", "blocks.1.conv1"])
    message = str(caught.value)
    assert message.startswith("no exit can sit at 'blocks.1.conv1': with 2 of 4 rows kept there, a later layer still")
    # conv1 is half a block after blocks.0 and half a block before blocks.1
    assert set(message.split("Legal taps nearby: ")[1].rstrip(".").split(", ")) >= {"blocks.0", "blocks.1"}


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["0", "9"], r"no module '9'\. Nearby: 0, 1, 2, 3, 4, 5"),
        (["3", "0"], r"from shallow to deep, got \('3', '0'\)"),
        (["1", "0"], r"from shallow to deep, got \('1', '0'\)"),  # of equal cost
        (["0", "3", "0"], r"must differ from each other, got \('0', '3', '0'\)"),
    ],
)
def test_taps_that_make_no_sense(mlp, taps, message):
    with pytest.raises(IllegalTap, match=message):
        attach(mlp, X, taps=taps)


# What cannot be attached to


def test_a_compiled_network_is_refused(mlp):
    with pytest.raises(NetworkError, match=r"is compiled, .* attach first, then compile"):
        attach(torch.compile(mlp, backend="eager"), X)


def test_a_wrapped_network_is_refused(mlp):
    with pytest.raises(NetworkError, match="wrapped in DataParallel: attach first, then wrap"):
        attach(nn.DataParallel(mlp), X)


class Demanding(nn.Module):
    def forward(self, x):
        raise ValueError("channels\nshould be 3")


@pytest.mark.parametrize(
    ("net", "inputs", "message"),
    [
        (nn.Linear(8, 3), torch.zeros(2, 7), "mat1 and mat2 shapes cannot be multiplied"),
        (nn.Linear(8, 3), (X, X), "takes 2 positional arguments but 3 were given"),
        (nn.Linear(8, 3), {"y": X}, "unexpected keyword argument 'y'"),
        (nn.Embedding(3, 5), torch.tensor([[7]]), "index out of range"),
        (Demanding(), X, r"channels\. Pass"),
    ],
)
@pytest.mark.parametrize("options", [{"shares": (0.5,)}, {"taps": ()}])
def test_an_example_the_network_does_not_take(net, inputs, message, options):
    with pytest.raises(NetworkError, match=f"does not take the example inputs: .*{message}"):
        attach(net, inputs, **options)


@pytest.mark.parametrize("inputs", [torch.zeros(0, 8), ()])
def test_an_example_without_rows(inputs):
    with pytest.raises(NetworkError):
        attach(nn.Linear(8, 3), inputs, taps=())


# Label sets


@pytest.mark.parametrize("widths", [{"fine": 3, "coarse": 2}, {"fine": 2}])
def test_label_spaces_must_fit_the_last_exit(mlp, widths):
    with pytest.raises(
        NetworkError, match=rf"the last exit gives 3 logits, .* need {sum(widths.values())}\. Pass final"
    ):
        attach(mlp, X, taps=["1"], label_spaces=widths)


def test_label_spaces_are_columns_of_every_exit(mlp):
    sdn = attach(mlp, X, taps=["1"], label_spaces={"fine": 3, "coarse": 2}, final_head=nn.Linear(3, 5))
    assert [tuple(logits.shape) for logits in sdn(X)] == [(4, 5), (4, 5)]
    assert sdn.num_outputs == 5
    assert sdn.costs.head_params == (45, 20)


# Inputs and outputs of other kinds


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.join = nn.ReLU()

    def forward(self, a, b):
        return self.fc(self.join(self.left(a) + self.right(b)))


@pytest.mark.parametrize("inputs", [(X, X + 1), [X, X + 1], {"b": X + 1, "a": X}])
def test_tuples_and_mappings_of_inputs(inputs):
    net = TwoInputs()
    sdn = attach(net, inputs, taps=["join"])
    logits = sdn(inputs)
    hidden = torch.relu(net.left(X) + net.right(X + 1))
    assert torch.equal(logits[0], sdn.exits[0](hidden))
    assert torch.equal(logits[1], net.fc(hidden))
    assert torch.equal(sdn.truncate(0)(inputs), logits[0])


class Returns(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.pack, self.hidden, self.fc = pack, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.hidden(x)
        return self.pack(self.fc(hidden), hidden)


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "pack",
    [
        lambda logits, hidden: {"hidden": hidden, "logits": logits},
        lambda logits, hidden: (logits, hidden[:, :, None]),
        lambda logits, hidden: {"loss": hidden.sum(), "answer": logits},
        lambda logits, hidden: WithLogits(logits),
    ],
)
def test_obvious_logits_are_found(pack):
    net = Returns(pack)
    sdn = attach(net, X, taps=["hidden"])
    assert torch.equal(sdn(X)[1], net.fc(net.hidden(X)))


def test_logits_takes_them_out_of_anything_else():
    net = Returns(lambda logits, hidden: (hidden, logits))
    with pytest.raises(
        NetworkError, match=r"returned a tuple where logits of shape \(n, outputs\) are needed. Pass log"
    ):
        attach(net, X, taps=["hidden"])
    sdn = attach(net, X, taps=["hidden"], logits=lambda output: output[1])
    assert torch.equal(sdn(X)[1], net.fc(net.hidden(X)))
    assert sdn.num_outputs == 3


def test_logits_of_another_shape_are_refused():
    with pytest.raises(NetworkError, match=r"returned shape \(4, 8, 1\) where logits"):
        attach(nn.Unflatten(1, (8, 1)), X, taps=())


def test_head_builds_every_exit(mlp):
    built = []

    def head(site, num_outputs):
        built.append((site.name, site.shape, num_outputs))
        return VectorClassifier(site.shape, num_outputs)

    sdn = attach(mlp, X, taps=["1", "3"], head=head)
    assert built == [("1", (8,), 3), ("3", (8,), 3)]
    assert [tuple(logits.shape) for logits in sdn(X)] == [(4, 3)] * 3


def test_a_network_compiled_in_place_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net.compile(backend="eager")
    with pytest.raises(NetworkError, match="attach first, then compile"):
        attach(net, torch.zeros(2, 4), taps=["0"])


def test_an_example_of_one_repeated_token_proves_nothing():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(NetworkError, match="different tokens"):
        attach(net, torch.zeros(2, 3, dtype=torch.long), taps=["0"])
    assert attach(net, torch.tensor([[1, 2, 3]]), taps=["0"]).taps == ("0",)


def test_logits_that_are_not_finite_prove_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.constant_(net[1].bias, float("nan"))
    with pytest.raises(NetworkError, match="not finite"):
        attach(net, torch.zeros(2, 4), taps=["0"])


def test_exits_take_the_network_s_number_type():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).to(torch.bfloat16)
    sdn = attach(net, torch.zeros(2, 4, dtype=torch.bfloat16), taps=["0"])
    assert [logits.dtype for logits in sdn(torch.zeros(2, 4, dtype=torch.bfloat16))] == [torch.bfloat16] * 2


class Add(nn.Module):
    def forward(self, x, more):
        return x + more


class GivesItsWeightAway(nn.Module):
    """A weight of its own is an input of a submodule, as the class token of timm's CaiT is."""

    def __init__(self):
        super().__init__()
        self.first, self.add, self.last = nn.Linear(4, 4), Add(), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        return self.last(self.add(self.first(x), self.token))


def test_a_weight_that_is_an_input_of_a_submodule():
    net = GivesItsWeightAway()
    net.last.bias.requires_grad_(False)
    sdn = attach(net, torch.randn(2, 4), taps=("first",))
    assert sdn.costs.backbone_flops == (32, 48)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["last.bias"]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.body(x)
        return {"coarse": self.first(hidden), "fine": self.second(hidden)}


def test_logits_by_name():
    x = torch.randn(3, 4)
    sdn = attach(Heads(), x, taps=("body",), logits="fine")
    assert [tuple(logits.shape) for logits in sdn(x)] == [(3, 3)] * 2
    with pytest.raises(ConfigError, match=r"no entry of the network's output, a dict, 'fin'\. Did you mean 'fine'"):
        attach(Heads(), x, taps=("body",), logits="fin")
    with pytest.raises(NetworkError, match="their name in the network's output"):
        attach(Heads(), x, taps=("body",))
