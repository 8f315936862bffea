"""Networks that cannot be cut, or whose stages do not fit into one file: what the error says."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import shallowdeep as sd
from shallowdeep.errors import NetworkError
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.onnx.fold import NESTING, StageModel, fold
from shallowdeep.inference.stages import as_values, cut

WIDTH = 16


def refused(net, inputs, taps, message):
    """Exits can sit at the taps, but the network is not to be cut there; the network itself still runs."""
    sdn = sd.attach(net.eval(), inputs, taps=taps)
    with pytest.raises(NetworkError, match=message):
        cut(sdn, inputs)
    assert len(sd.Engine(sdn, sd.Confidence(0.5), backend="eager")(inputs)) == 4


class Mixed(nn.Module):
    """The mask is worked on before the first tap, and the result wanted behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), Plus(), nn.Linear(WIDTH, 5)

    def forward(self, x, mask):
        pairs = mask[:, :, None] @ mask[:, None]
        return self.last(self.second(self.first(x), pairs))


class Plus(nn.Module):
    def forward(self, x, pairs):
        return (x + pairs.mean(1)).relu()


def test_a_stage_that_would_repeat_work_says_which_input_it_wants():
    x, mask = torch.randn(2, 4, WIDTH)
    message = (
        r"the stage up to the last exit wants input_1 once more and would repeat work: \d+ FLOPs a sample instead "
        r"of \d+\. Something goes past first: choose another tap\. Engine\(…, backend='eager'\) runs"
    )
    refused(Mixed(), (x, mask), ["first"], message)


class Table(nn.Module):
    """A table of weights is worked on before the first tap, and the result wanted behind the second."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x):
        bias = self.mix(self.table).mean(0)
        return self.last(self.second(self.first(x).relu()) + bias)


def test_a_stage_that_would_repeat_work_on_weights_says_so():
    message = r"the stage up to the last exit wants something made of weights alone once more.*goes past second"
    refused(Table(), torch.randn(4, WIDTH), ["first", "second"], message)


class Choosing(nn.Module):
    """Goes one way or another by the numbers that come."""

    def forward(self, x):
        return x.relu() if bool((x > 0).any()) else x


def test_what_cannot_be_exported_is_named():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(), Choosing()), nn.Linear(WIDTH, 5))
    message = (
        r"^backbone\.1\.1 \(Choosing\) cannot be exported: .* It was met on the way to the stage up to exit 0 \(0\), "
        r"for which all .*backend='eager'\) runs"
    )
    refused(net, torch.randn(4, WIDTH), ["0"], message)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, state_0, features):
        return self.last(self.first(state_0 + features))


def test_names_that_stages_have_for_themselves_are_refused():
    x, y = torch.randn(2, 4, WIDTH)
    message = r"stages have inputs of their own named state_0, features\. Engine\(…, backend='eager'\)"
    refused(Named(), {"state_0": x, "features": y}, ["first"], message)


def test_an_input_that_is_no_tensor_is_named():
    with pytest.raises(NetworkError, match="takes tensors only; lengths is none"):
        as_values({"x": torch.zeros(2), "lengths": [1, 2]})


def test_more_exits_than_nest_in_one_file_are_refused_before_anything_is_exported(tmp_path):
    with torch.random.fork_rng():
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(NESTING + 2)))
    x = torch.randn(4, 4)
    sdn = sd.attach(net.eval(), x, taps=[str(place) for place in range(NESTING)])
    message = re.escape("25 exits do not nest in one file, at most 24 do. Let the policy look at fewer")
    for forms in ({}, {"single": False}, {"batched": False}):
        with pytest.raises(NetworkError, match=message):
            export(sdn, sd.Confidence(0.5), tmp_path / "out", example_inputs=x, **forms)
    assert list(tmp_path.iterdir()) == []


def test_more_stages_than_nest_do_not_fold():
    pytest.importorskip("onnx")
    with pytest.raises(NetworkError, match=r"25 exits do not nest.*export\(…, single=False, batched=False\)"):
        fold([StageModel(0, None)] * (NESTING + 1), [], batched=True)


COMPUTED = {
    "bias": lambda conv: prune.l1_unstructured(conv, "bias", 0.5),
    "weight": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "both": lambda conv: [prune.l1_unstructured(conv, name, 0.5) for name in ("weight", "bias")],
    "weight norm": parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:The tensor attribute.* assigned during export")  # what pruning does
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_convolution_whose_weights_are_computed_keeps_its_batch_norm(computed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv, x = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 8, 8)
        net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    COMPUTED[computed](conv)
    sdn = sd.attach(net.eval(), x, taps=["2"])
    own = sd.Engine(sdn, sd.Patience(9), backend="stages").record([x])
    for found, expected in zip(own.logits, sd.record(sdn, [x]).logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # the same sums


def test_one_label_set_answers(tmp_path):
    x = torch.randn(4, WIDTH)
    spaces = {"fine": 3, "coarse": 2}
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5))
    sdn = sd.attach(net, x, taps=["0"], label_spaces=spaces)
    message = "this network answers in the label sets fine, coarse; a policy looks at one softmax"
    with pytest.raises(NetworkError, match=message):
        sd.Engine(sdn, sd.Confidence(0.5))
    with pytest.raises(NetworkError, match=message):
        export(sdn, sd.Confidence(0.5), tmp_path / "out", example_inputs=x)
