"""What PyTorch's stages have of their own."""

import pytest

import shallowdeep as sd
from shallowdeep.networks import calls


@pytest.mark.parametrize("backend", ["stages", "plain"])
def test_the_switches_of_precision_are_set_once_a_call(small, images, backend, monkeypatch):
    engine = sd.Engine(small, sd.Confidence(2.0), backend=backend, example_inputs=images, micro_batch=8)
    engine(images)
    times = []

    def counted():
        times.append(1)
        return []

    monkeypatch.setattr(calls, "_set_exact", counted)
    engine(images)
    assert len(times) == 1
