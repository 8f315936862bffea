"""Cells chosen by name."""

import pytest

from shallowdeep.errors import ConfigError
from shallowdeep.studies.paper.matrix import Matrix
from shallowdeep.studies.selection import select


def test_select():
    cells = Matrix().cells()
    assert select(cells, []) == cells
    found = select(cells, ["cifar10/*/joint-*", "tinyimagenet/vgg16/plain-fast-seed0", "cifar10/vgg16/*"])
    assert len(found) == 4 + 1 + 3
    assert [cells.index(cell) for cell in found] == sorted(cells.index(cell) for cell in found)
    with pytest.raises(
        ConfigError, match=r"no cell fits 'cifar10/resnet65/plain\*'. Near it: .*cifar10/resnet56/plain"
    ):
        select(cells, ["cifar10/*", "cifar10/resnet65/plain*"])
