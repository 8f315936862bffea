"""What cells cost, from FLOPs, and how fast they ran."""

from shallowdeep.studies.estimates import Rates, forward_flops, training_flops
from shallowdeep.studies.paper.matrix import Matrix


def test_flops_are_those_of_the_network():
    assert forward_flops("vgg16", 10, 32) == 2 * 313_725_952  # the authors' 313.726 M multiply-adds
    plain, ic_only, joint, mixed = Matrix(data=["cifar10"], networks=["vgg16"], epochs=2).cells()
    one_pass = 45_000 * forward_flops("vgg16", 10, 32)
    assert training_flops(plain) == training_flops(joint) == training_flops(mixed) == 3 * 2 * one_pass
    assert training_flops(ic_only) == 4 * one_pass  # features of four passes
    published = Matrix(data=["cifar10"], networks=["vgg16"], recipes=["paper"]).cells()
    whole_pass = 50_000 * forward_flops("vgg16", 10, 32)
    assert [training_flops(cell) for cell in published[:2]] == [300 * whole_pass, 25 * whole_pass]


def test_rates_of_the_nearest_kind():
    plain, *_ = Matrix(data=["cifar10"], networks=["vgg16"]).cells()
    assert Rates({("cifar10", "vgg16"): 5.0, ("cifar100", "vgg16"): 9.0}).of(plain) == 5.0
    assert Rates({("cifar100", "vgg16"): 9.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 9.0
    assert Rates({("cifar10", "wrn32_4"): 3.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 2.0
    assert Rates({}).of(plain) is None
