"""A small network whose samples really leave at different exits, and policies to run on it."""

import pytest
import torch
from torch import nn

import shallowdeep as sd

NUM_SAMPLES = 40


@pytest.fixture(scope="session")
def images():
    return torch.randn(NUM_SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def small(images):
    """A convolutional network with batch-norm, in-place ReLU, a residual and dropout; four exits; not trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sdn = sd.attach(Residual(), images[:2], taps=["stem", "first", "second"]).eval()
        with torch.no_grad():
            for module in sdn.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
                    module.weight.uniform_(0.5, 1.5)
                if isinstance(module, nn.Linear):  # confidences that lie apart
                    module.weight.mul_(8)
    return sdn


class Block(nn.Module):
    def __init__(self, width, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x[..., :: self.stride, :: self.stride])


class Residual(nn.Module):
    def __init__(self, width=8, num_classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.first, self.second = Block(width, 2), Block(width)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.second(self.first(self.stem(x)))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture(scope="session")
def trace(small, images):
    return sd.record(small, sd.TensorSet(images, torch.zeros(len(images), dtype=torch.int64), num_classes=5))


POLICIES = {
    "confidence": lambda c: sd.Confidence(c),
    "most confident": lambda c: sd.Confidence(c, answer="most_confident"),
    "some exits": lambda c: sd.Confidence(c, exits=(0, 2)),
    "no exits": lambda c: sd.Confidence(c, exits=()),
    "patience": lambda c: sd.Patience(1),
    "everyone stops": lambda c: sd.Confidence(0.0),
    "nobody stops": lambda c: sd.Confidence(1.5),
}


@pytest.fixture(params=POLICIES)
def policy(request, trace):
    """Each kind of policy, its threshold where samples part ways."""
    confidences = torch.stack([logits.softmax(-1).amax(-1) for logits in trace.logits[:-1]])
    return POLICIES[request.param](confidences.quantile(0.5).item())


@pytest.fixture(scope="session", autouse=True)
def tracing_without_type_checks():
    """A graph is traced with symbols in the place of whole numbers, which the type checks of the suite refuse."""
    from jaxtyping import config

    from shallowdeep.inference.onnx import convert as onnx_convert

    convert = onnx_convert._convert

    def unchecked(*args):
        config.update("jaxtyping_disable", True)
        try:
            return convert(*args)
        finally:
            config.update("jaxtyping_disable", False)

    onnx_convert._convert = unchecked
    yield
    onnx_convert._convert = convert
