"""Networks with an attention mask: other tensors than the features have a row for each sample too."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from torch import nn

from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.sites import PROOF_ROWS, probe
from shallowdeep.networks.taps import take_rows

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_labels": 6}
BERT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": PROOF_ROWS, "intermediate_size": 32}
NETWORKS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL, **BERT)),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**SMALL, **BERT)),
    "distilbert": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(**SMALL, dim=16, n_layers=4, n_heads=2, hidden_dim=32),
    ),
}


def build(name):
    network, config = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(config).eval()


def make_tokens(n=7, length=9, seed=0):
    ids = torch.randint(5, 50, (n, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.arange(3, 3 + n)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def layers(sdn_or_sites):
    return [site for site in sdn_or_sites if site.name.rpartition(".")[2].isdigit()]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ends_of_layers_are_legal_and_name_the_masks_after_them(name):
    found = layers(probe(build(name), make_tokens(), split_over=0.3))
    assert len(found) == 4
    assert all(site.legal for site in found)
    later = [site.name for site in found]
    for i, site in enumerate(found):
        assert {module for module, _ in site.row_inputs} == set(later[i + 1 :])


def test_inside_a_layer_only_what_sees_everything_is_legal():
    legal = {site.name for site in probe(build("bert"), make_tokens(), split_over=0.0) if site.legal}
    inside = "bert.encoder.layer.1"
    assert {f"{inside}.attention.output", f"{inside}.attention", inside} <= legal
    # what is added to it later comes from before it: an exit there would see less than the next layer does
    assert f"{inside}.attention.self" not in legal
    assert f"{inside}.attention.output.dense" not in legal
    assert f"{inside}.attention.self.query" not in legal


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", [[0, 2, 5], [6]])
def test_dropping_rows_gives_exactly_their_answers(name, rows, num_hooks):
    net, tokens = build(name), make_tokens()
    site = layers(probe(net, tokens, split_over=0.3))[1]
    kept = torch.tensor(rows)
    with torch.no_grad():
        whole = net(**tokens).logits
        with take_rows(net, site.name, kept, site.row_inputs):
            dropped = net(**tokens).logits
    torch.testing.assert_close(dropped, whole[kept], atol=1e-5, rtol=1e-4)
    assert num_hooks(net) == 0


def test_without_the_mask_no_other_rows_are_dropped():
    tokens = {"input_ids": make_tokens()["input_ids"]}
    assert all(not site.row_inputs for site in probe(build("bert"), tokens, split_over=0.3))


@pytest.mark.parametrize("kind", [dict, transformers.BatchEncoding])
@pytest.mark.parametrize("n", [1, 5])
def test_attach_takes_a_tokenizers_batch_of_any_size(kind, n):
    sdn = attach(build("bert"), kind(make_tokens(n)), shares=(0.3, 0.6))
    with torch.no_grad():
        logits = sdn(kind(make_tokens(3)))
    assert [tuple(x.shape) for x in logits] == [(3, 6)] * 3


def test_padding_does_not_reach_the_default_exits():
    sdn, tokens = attach(build("bert"), make_tokens(), shares=(0.3, 0.6)).eval(), make_tokens()
    other = {**tokens, "input_ids": torch.where(tokens["attention_mask"].bool(), tokens["input_ids"], 7)}
    assert not torch.equal(tokens["input_ids"], other["input_ids"])
    with torch.no_grad():
        for ours, theirs in zip(sdn(tokens), sdn(other), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_row_inputs_are_saved(tmp_path):
    net = build("bert")
    sdn = attach(net, make_tokens(), shares=(0.3, 0.6))
    assert sdn.placements[0].site.row_inputs
    sdn.save(tmp_path / "sdn.safetensors")
    loaded = ShallowDeepNetwork.load(tmp_path / "sdn.safetensors", backbone=build("bert"))
    assert loaded.placements == sdn.placements


class Mixed(nn.Module):
    """A mask that only reaches the sum, not a submodule, after the first layer: its rows cannot be dropped."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, mask):
        return self.head(self.second(self.first(x)) * mask)


def test_a_mask_outside_any_submodule_is_the_reason_given():
    torch.manual_seed(0)
    sites = {site.name: site for site in probe(Mixed(), (torch.randn(2, 4), torch.rand(2, 1)), split_over=0.0)}
    assert [name for name, site in sites.items() if site.legal] == ["head"]
    assert "a later layer still wants 4" in sites["first"].why_not
