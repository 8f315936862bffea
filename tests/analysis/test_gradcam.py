import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shallowdeep.analysis.gradcam import gradcam
from shallowdeep.errors import ConfigError, NetworkError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network


class Relu(nn.Module):
    """A ReLU in one of the ways that networks write it."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return {
            "function": F.relu,
            "in place": lambda x: F.relu(x, inplace=True),
            "method": lambda x: x.relu(),
            "method in place": lambda x: x.relu_(),
        }[self.way](x)


def two_maps(relu):
    """Class 0 is the mean of what is positive in the image, class 1 of what is negative, class 2 minus class 0."""
    conv, linear = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 3, bias=False)
    net = nn.Sequential(conv, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    return attach(net, torch.zeros(2, 1, 8, 8), taps=["1"])


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def stretched(maps):
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize(
    "relu", [nn.ReLU(), nn.ReLU(inplace=True), *map(Relu, ("function", "in place", "method", "method in place"))]
)
def test_a_known_map(relu):
    sdn = two_maps(relu)
    for wanted, sign in ((0, 1), (1, -1)):
        found = gradcam(sdn, IMAGES, classes=torch.full((5,), wanted), guided=True)
        expected = (sign * IMAGES[:, 0]).clamp(min=0)
        assert torch.allclose(found.maps, stretched(expected), atol=1e-6)
        # the gradient at the ReLU is positive for either class, and goes through where the ReLU is open
        gradient = sign * (sign * IMAGES > 0).float() / 64
        assert torch.allclose(found.guided, gradient * found.maps[:, None], atol=1e-7)
    against = gradcam(sdn, IMAGES, classes=torch.full((5,), 2), guided=True)
    assert torch.equal(against.maps, torch.zeros(5, 8, 8))  # nothing speaks for it
    assert torch.equal(against.guided, torch.zeros(5, 1, 8, 8))


def test_without_classes_it_explains_what_the_exit_answers():
    sdn = two_maps(nn.ReLU())
    found = gradcam(sdn, IMAGES)
    assert torch.equal(found.classes, sdn(IMAGES)[-1].argmax(1))
    assert torch.equal(found.maps, gradcam(sdn, IMAGES, classes=found.classes).maps)
    first = gradcam(sdn, IMAGES, exit=0)
    assert torch.equal(first.classes, sdn(IMAGES)[0].argmax(1))
    assert (first.exit, first.site) == (0, "1")


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return attach(load_network("resnet20", num_classes=10), torch.zeros(2, 3, 32, 32), shares=(0.3, 0.7)).eval()


PICTURES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(sdn, exit, site):
    """Grad-CAM of each image by itself, from the gradients of the whole network."""
    maps, kept = [], []
    for picture in PICTURES:
        handle = sdn.backbone.get_submodule(site).register_forward_hook(lambda *call: kept.append(call[2]))
        logits = sdn(picture[None].requires_grad_())[exit][0]
        handle.remove()
        features = kept.pop()
        gradient = torch.autograd.grad(logits[logits.argmax()], features)[0]
        weights = gradient[0].mean((1, 2))
        map = sum(weight * feature for weight, feature in zip(weights, features[0], strict=True)).clamp(min=0).detach()
        large = F.interpolate(map[None, None], size=(32, 32), mode="bicubic", align_corners=False)[0, 0].clamp(min=0)
        maps.append((large - large.min()) / (large.max() - large.min()))
    return torch.stack(maps)


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_as_by_hand_whatever_the_batch(resnet, exit):
    found = gradcam(resnet, PICTURES, exit=exit, batch_size=4)
    assert found.site == ("layer3" if exit == 2 else resnet.taps[exit])
    assert torch.allclose(found.maps, by_hand(resnet, exit, found.site), atol=1e-4)


def test_an_earlier_site_for_a_deeper_exit(resnet):
    found = gradcam(resnet, PICTURES, exit=1, site="layer1")
    assert torch.allclose(found.maps, by_hand(resnet, 1, "layer1"), atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_network_is_left_as_it_was(frozen):
    sdn = two_maps(nn.ReLU())
    sdn.freeze_backbone(frozen).train()
    for parameter in sdn.exits.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(sdn.state_dict())
    modes = [module.training for module in sdn.modules()]
    needs = [parameter.requires_grad for parameter in sdn.parameters()]
    gradcam(sdn, IMAGES, exit=0, guided=True)
    with pytest.raises(NetworkError):
        gradcam(sdn, IMAGES, site="nowhere")
    assert [module.training for module in sdn.modules()] == modes
    assert [parameter.requires_grad for parameter in sdn.parameters()] == needs
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in sdn.exits.parameters())
    assert all(parameter.grad is None for parameter in sdn.backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in sdn.state_dict().items())
    assert not any(module._forward_hooks for module in sdn.modules())


def test_guided_is_not_the_plain_gradient(resnet):
    found = gradcam(resnet, PICTURES, guided=True)
    seen = PICTURES.clone().requires_grad_()
    logits = resnet(seen)[-1]
    (plain,) = torch.autograd.grad(logits.gather(1, logits.argmax(1, keepdim=True)).sum(), seen)
    assert found.guided.shape == PICTURES.shape
    assert not torch.allclose(found.guided, plain * found.maps[:, None], atol=1e-5)


@pytest.mark.parametrize("exit", [0, -1])
def test_a_vision_transformer_is_seen_over_the_image(exit):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 32}
    net = load_network("hf:vit", num_classes=5, image_size=32, patch_size=8, **options)
    sdn = attach(net, PICTURES[:2], shares=(0.4,))
    found = gradcam(sdn, PICTURES, exit=exit)
    assert found.maps.shape == (6, 32, 32)
    assert found.maps.amax((1, 2)).tolist() == [1.0] * 6
    assert "embeddings" in found.site


class Patches(nn.Module):
    """Tokens of an image's patches behind some other ones; the answer is how bright the brightest patch is."""

    def __init__(self, side, others):
        super().__init__()
        self.side, self.others = side, others
        self.embed, self.mix, self.head = nn.Identity(), nn.Linear(1, 1), nn.Linear(1, 2)

    def forward(self, x):
        patches = F.avg_pool2d(x, self.side).flatten(2).mean(1)[..., None]
        tokens = self.embed(torch.cat([torch.zeros(len(x), self.others, 1), patches], dim=1))
        return self.head(self.mix(tokens).amax(1))


@pytest.mark.parametrize(("shape", "others", "patch"), [((32, 32), 0, 5), ((32, 32), 1, 2), ((32, 64), 5, 11)])
def test_a_bright_patch_lights_up_where_it_is(shape, others, patch):
    net = Patches(8, others)
    with torch.no_grad():
        net.mix.weight.fill_(1.0)
        net.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    image = torch.full((1, 1, *shape), 0.1)
    row, column = divmod(patch, shape[1] // 8)
    image[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 5.0
    sdn = attach(net, image.repeat(4, 1, 1, 1), taps=["mix"])
    map = gradcam(sdn, image, classes=torch.tensor([0])).maps[0]
    assert map.shape == shape
    assert divmod(int(map.argmax()), shape[1]) in [(row * 8 + i, column * 8 + j) for i in range(8) for j in range(8)]
    assert map[row * 8 + 4, column * 8 + 4] > 0.8


def test_maps_with_their_channels_last():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    net = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), Last(), nn.Flatten(), nn.Linear(192, 2))
    sdn = attach(net, torch.zeros(4, 1, 8, 8), taps=["1"])
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[3].weight.fill_(1.0)
    found = gradcam(sdn, IMAGES, classes=torch.zeros(5, dtype=torch.int64), site="1")
    assert torch.allclose(found.maps, stretched(IMAGES[:, 0].clamp(min=0)), atol=1e-6)


def test_guided_through_a_relu6():
    found = gradcam(two_maps(nn.ReLU6()), 10 * IMAGES, classes=torch.zeros(5, dtype=torch.int64), guided=True)
    open = (10 * IMAGES > 0) & (10 * IMAGES < 6)
    assert torch.allclose(found.guided, open.float() / 64 * found.maps[:, None], atol=1e-7)


def test_without_relus_nothing_is_guided():
    with pytest.raises(NetworkError, match="has none"):
        gradcam(two_maps(nn.GELU()), IMAGES, guided=True)


def test_a_sequence_has_a_number_for_each_token():
    class Reads(nn.Module):
        """The answer is the third token's first feature."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(self.mix(self.embed(ids))[:, 2])

    ids = torch.arange(12).view(2, 6) % 9
    sdn = attach(Reads(), ids, taps=["mix"])
    with torch.no_grad():
        sdn.backbone.mix.weight.copy_(torch.eye(4))
        sdn.backbone.embed.weight.abs_()
        sdn.backbone.head.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    found = gradcam(sdn, ids, classes=torch.zeros(2, dtype=torch.int64))
    assert found.maps.tolist() == [[0, 0, 1, 0, 0, 0]] * 2
    assert found.site == "embed"
    with pytest.raises(NetworkError, match="guided Grad-CAM is of images"):
        gradcam(sdn, ids, guided=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exit": 3}, NetworkError, "no exit 3: .* 0 to 2"),
        ({"site": "nowhere"}, NetworkError, "'nowhere' is no submodule"),
        ({"site": "fc"}, NetworkError, "neither maps"),
        ({"classes": torch.tensor([1])}, ConfigError, r"shape \(1,\) for 6 samples"),
        ({"classes": torch.full((6,), 10)}, ConfigError, "from 0 to 9"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"exit": 0, "site": "layer3"}, NetworkError, "does not depend on 'layer3'"),
    ],
)
def test_bad_arguments_are_named(resnet, options, error, message):
    with pytest.raises(error, match=message):
        gradcam(resnet, PICTURES, **options)
