"""Networks of another library, built from a configuration: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
import torch.nn.functional as F

from shallowdeep.networks.attach import attach
from shallowdeep.networks.sites import probe

transformers = pytest.importorskip("transformers")


def resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], layer_type="basic", num_labels=5
        )
    )


def convnext():
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(patch_size=2, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, num_labels=5,
        )
    )  # fmt: skip


BUILDERS = {"resnet": resnet, "convnext": convnext, "vit": vit}
LEGAL = {
    "resnet": ["resnet.embedder", "resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.2.layers.1"],
    "convnext": ["convnext.embeddings", "convnext.encoder.stages.2.layers.0", "convnext.encoder.stages.3"],
    "vit": ["vit.embeddings", "vit.layers.0", "vit.layers.3"],
}
REFUSED = {
    "resnet": {"resnet.encoder.stages.0.layers.0.layer": "a later layer still wants 4"},
    "convnext": {"convnext.encoder.stages.2.layers.0.dwconv": "a later layer still wants 4"},
    "vit": {
        "vit.layers.0.attention": "a later layer still wants 4",
        "vit.layers.0.attention.q_proj": "4 rows of logits come out",
        "vit.layers.0.dropout": "called 2 times",
    },
}


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BUILDERS)
def test_legal_sites_and_reasons(name, pixels):
    torch.manual_seed(0)
    sites = {site.name: site for site in probe(BUILDERS[name](), pixels, split_over=0.0)}
    assert [tap for tap in LEGAL[name] if not sites[tap].legal] == []
    assert all(reason in sites[tap].why_not for tap, reason in REFUSED[name].items())
    assert all(site.legal == (not site.why_not) for site in sites.values())


@pytest.mark.parametrize("inputs", ["tensor", "mapping"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_training_step_reaches_every_exit(name, inputs, pixels):
    torch.manual_seed(0)
    x = pixels if inputs == "tensor" else {"pixel_values": pixels}
    sdn = attach(BUILDERS[name](), x, shares=(0.3, 0.6, 0.8)).train()
    assert [round(p.got, 1) for p in sdn.placements] == {
        "resnet": [0.5, 0.6, 0.8], "convnext": [0.4, 0.6, 0.8], "vit": [0.2, 0.6, 0.8],
    }[name]  # fmt: skip
    before = [head.linear.weight.detach().clone() for head in sdn.exits]
    optimizer = torch.optim.SGD(sdn.parameters(), lr=0.01)
    labels = torch.tensor([0, 1, 2, 3])
    torch.stack([F.cross_entropy(logits, labels) for logits in sdn(x)]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for head in sdn.exits for p in head.parameters())
    assert sum(p.grad is None for p in sdn.backbone.parameters()) == 0
    optimizer.step()
    assert all(not torch.equal(a, head.linear.weight) for a, head in zip(before, sdn.exits, strict=True))
    sdn.eval()
    with torch.no_grad():
        logits = sdn(x)
    assert [tuple(each.shape) for each in logits] == [(4, 5)] * 4
    # a network cut off at an exit answers as the whole one does there
    assert all(torch.equal(sdn.truncate(i)(x), logits[i]) for i in range(3))
