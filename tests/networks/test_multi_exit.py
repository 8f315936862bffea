"""Networks that bring their own exits: small ones built as MSDNet and BranchyNet are, their costs counted by hand."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shallowdeep.errors import NetworkError
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.multi_exit import MultiExitNetwork, find_exits


def conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Branchy(nn.Module):
    """A chain of convolutions with a side branch after the first two, as BranchyNet has them.

    Multiply-adds at 8×8, by hand: conv1 64·27·4 = 6,912; conv2 at stride 2 16·36·8 = 4,608; conv3 16·72·8 = 9,216;
    fc 8·5 = 40. Branch 1: convolution 64·36·2 = 4,608 and linear 2·5 = 10; branch 2: linear 8·5 = 40.
    Parameters: 108 + 8, 288 + 16, 576 + 16, 45; branch 1 72 + 4 + 15, branch 2 45.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 4), conv(4, 8, stride=2), conv(8, 8)
        self.branch1 = nn.Sequential(conv(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
        self.branch2 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv1(x)
        first = self.branch1(x)
        x = self.conv2(x)
        second = self.branch2(x)
        return first, second, self.fc(self.conv3(x).mean((2, 3)))


class Step(nn.Module):
    """A step of every scale: each reads its own map and, but for the finest, the finer one at stride 2."""

    def __init__(self, widths):
        super().__init__()
        self.own = nn.ModuleList(conv(width, width) for width in widths)
        self.finer = nn.ModuleList(conv(a, b, stride=2) for a, b in pairwise(widths))

    def forward(self, maps):
        out = [own(x) for own, x in zip(self.own, maps, strict=True)]
        return [out[0], *(x + down(finer) for x, down, finer in zip(out[1:], self.finer, maps, strict=False))]


class Classifier(nn.Module):
    """Reads the coarsest scale alone."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.conv, self.linear = conv(width, width), nn.Linear(width, num_classes)

    def forward(self, maps):
        return self.linear(self.conv(maps[-1]).mean((2, 3)))


class MultiScale(nn.Module):
    """Two scales in parallel, each step all of them, a classifier after each of three steps: MSDNet in small.

    Multiply-adds at 8×8: first map 64·27·4 = 6,912 and its coarser one at 4×4 16·36·6 = 3,456; each step
    64·36·4 = 9,216, 16·54·6 = 5,184 and down 16·36·6 = 3,456, in all 17,856; each classifier 16·54·6 = 5,184
    and 6·5 = 30.
    """

    WIDTHS = (4, 6)

    def __init__(self):
        super().__init__()
        self.first, self.coarser = conv(3, 4), conv(4, 6, stride=2)
        self.steps = nn.ModuleList(Step(self.WIDTHS) for _ in range(3))
        self.classifiers = nn.ModuleList(Classifier(6, 5) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        maps, logits = [x, self.coarser(x)], []
        for step, classifier in zip(self.steps, self.classifiers, strict=True):
            maps = step(maps)
            logits.append(classifier(maps))
        return logits


@pytest.fixture(params=[1, 3], ids=["one row", "three rows"])
def example(request):
    return torch.zeros(request.param, 3, 8, 8)


def test_costs_of_a_branchy_network(example):
    net = MultiExitNetwork(Branchy(), example)
    assert (net.num_exits, net.num_outputs, net.label_spaces) == (3, 5, {"labels": 5})
    assert net.taps == ("branch1", "branch2")
    assert net.costs == Costs(
        backbone_flops=(2 * 6_912, 2 * 11_520, 2 * 20_776),
        head_flops=(2 * 4_618, 2 * 40, 0),
        backbone_params=(116, 420, 1_057),
        head_params=(91, 45, 0),
    )
    # the whole network without its branches is 1.0; leaving last pays for both branches
    assert net.costs.relative().tolist() == pytest.approx([11_530 / 20_776, 16_178 / 20_776, 25_434 / 20_776])
    assert net.costs.relative(exits=[]).tolist()[-1] == 1.0


def test_costs_of_a_multi_scale_network(example):
    net = MultiExitNetwork(MultiScale(), example)
    before, step, head = 10_368, 17_856, 5_214
    assert net.taps == ("classifiers.0", "classifiers.1")
    assert net.costs.backbone_flops == (2 * (before + step), 2 * (before + 2 * step), 2 * (before + 3 * step + head))
    assert net.costs.head_flops == (2 * head, 2 * head, 0)
    # first 108 + 8, coarser 216 + 12; step 144 + 8, 324 + 12 and 216 + 12; classifier 324 + 12 + 35
    assert net.costs.backbone_params == (344 + 716, 344 + 2 * 716, 344 + 3 * 716 + 371)
    assert net.costs.head_params == (371, 371, 0)


@pytest.mark.parametrize("build", [Branchy, MultiScale])
def test_forward_is_the_networks_own(build, images):
    net = build().eval()
    sdn = MultiExitNetwork(net, images)
    assert sdn.backbone is net
    with sdn.tapped(), torch.no_grad():
        found, own = sdn(images), net(images)
        assert torch.equal(sdn.run_backbone(images), own[-1])
    assert isinstance(found, list)
    assert [torch.equal(a, b) for a, b in zip(found, own, strict=True)] == [True] * 3


def test_the_network_is_left_as_it_was(images, num_hooks):
    net = Branchy().train()
    before = [value.clone() for value in net.state_dict().values()]
    MultiExitNetwork(net, images)
    assert num_hooks(net) == 0
    assert all(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_a_plain_network_has_one_exit(tiny_net, images):
    net = MultiExitNetwork(tiny_net(), images)
    assert (net.num_exits, net.num_outputs, net.taps) == (1, 5, ())
    assert net.costs == Costs((2 * 62_228,), (0,), (1_053,), (0,))
    assert torch.equal(net(images)[0], net.backbone(images))


class Functional(nn.Module):
    """Its first exit is computed in the network's own forward: nothing tells where it begins."""

    def __init__(self, order=(0, 1), softens=True):
        super().__init__()
        self.stem, self.head, self.fc = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.order, self.softens = order, softens

    def forward(self, x):
        x = self.stem(x)
        first = self.head(x) * 2 if self.softens else self.head(x)
        last = self.fc(F.relu(x)) * 2
        return [(first, last)[i] for i in self.order]


def test_an_exit_without_a_module_asks_for_costs():
    x = torch.randn(2, 6)
    with pytest.raises(NetworkError, match=r"logits of exit 0 are no submodule's output.*or pass costs="):
        MultiExitNetwork(Functional(), x)
    costs = Costs((40, 50), (10, 0), (28, 58), (15, 0))
    net = MultiExitNetwork(Functional(), x, costs=costs)
    assert (net.costs, net.taps, net.num_exits) == (costs, (), 2)
    assert len(net(x)) == 2


def test_the_last_exit_needs_no_module():
    # stem 2·24, head 2·12; the last exit's linear layer 2·12 belongs to the network
    assert MultiExitNetwork(Functional(softens=False), torch.randn(2, 6)).costs == Costs(
        (48, 72), (24, 0), (28, 43), (15, 0)
    )


class AtTheEnd(nn.Module):
    """Computes every exit after the whole network: leaving early would save nothing as it is written."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        first = self.a(x)
        return [head(h) for head, h in zip(self.heads, (first, self.b(first)), strict=True)]


def reversed_exits(output):
    return output[::-1]


@pytest.mark.parametrize(
    ("net", "options"),
    [(AtTheEnd(), {}), (Branchy(), {"exits_of": reversed_exits})],
    ids=["at the end", "last first"],
)
def test_exits_out_of_order_ask_for_costs(net, options):
    x = torch.randn(2, 3, 8, 8) if isinstance(net, Branchy) else torch.randn(2, 6)
    with pytest.raises(NetworkError, match=r"cost cannot be told.*Pass costs=, or exits_of="):
        MultiExitNetwork(net, x, **options)


def test_exits_of_finds_what_is_no_plain_list():
    class Nested(Branchy):
        def forward(self, x):
            *early, last = super().forward(x)
            return {"early": early, "answer": last}

    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(NetworkError, match="Pass"):
        MultiExitNetwork(nn.Sequential(Nested(), Leave()), x)
    net = MultiExitNetwork(Nested(), x, exits_of=lambda output: [*output["early"], output["answer"]])
    assert net.costs.backbone_flops == (2 * 6_912, 2 * 11_520, 2 * 20_776)


class Leave(nn.Module):
    def forward(self, output):
        return output["early"] + [output["answer"][:, :2]]


def test_a_network_that_leaves_by_itself_is_refused(images):
    class Leaving(Branchy):
        def forward(self, x):
            return super().forward(x)[: 3 if len(x) > 1 else 1]

    net = MultiExitNetwork(Leaving(), images)
    with pytest.raises(NetworkError, match="gave logits of 1 exits where costs tell of 3"):
        net(images[:1])


def test_costs_of_another_number_of_exits(images):
    with pytest.raises(NetworkError, match="logits of 3 exits where costs tell of 1"):
        MultiExitNetwork(Branchy(), images, costs=Costs((10,), (0,), (1,), (0,)))


def test_inputs_it_does_not_take():
    with pytest.raises(NetworkError, match="does not take the example inputs"):
        MultiExitNetwork(Branchy(), torch.zeros(1, 5, 8, 8))


def test_find_exits():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert find_exits((a, b)) == [a, b]
    assert find_exits(a) == [a]
    assert find_exits({"logits": b, "hidden": torch.zeros(2, 3, 4)}) == [b]
    with pytest.raises(NetworkError, match="one shape"):
        find_exits([a, torch.zeros(2, 4)])


def test_a_head_used_twice_counts_each_time():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

        def forward(self, x):
            logits = []
            for block in self.blocks:
                x = block(x)
                logits.append(self.head(x))
            return logits

    costs = MultiExitNetwork(Shared(), torch.randn(2, 4)).costs
    assert costs.head_flops == (16, 16, 0)
    assert costs.backbone_flops == (32, 64, 96 + 16)
