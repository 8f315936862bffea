import inspect
import sys

import pytest

from shallowdeep import errors
from shallowdeep.errors import ConfigError, MissingExtra, NetworkError, ShallowDeepError, UnknownName, require


def test_the_drawn_tree_is_the_tree():
    found = {name: cls.__bases__[0].__name__ for name, cls in inspect.getmembers(errors, inspect.isclass)}
    assert found == {
        "ShallowDeepError": "Exception",
        "ConfigError": "ShallowDeepError",
        "UnknownName": "ConfigError",
        "DataError": "ShallowDeepError",
        "NetworkError": "ShallowDeepError",
        "IllegalTap": "NetworkError",
        "FileFormatError": "ShallowDeepError",
        "TraceError": "ShallowDeepError",
        "CalibrationError": "ShallowDeepError",
        "TrainingDiverged": "ShallowDeepError",
        "MissingExtra": "ShallowDeepError",
    } | {name: found[name] for name in ("Iterable", "ModuleType") if name in found}
    drawn = errors.__doc__.partition("Every message")[0]
    assert [name for name in found if issubclass(getattr(errors, name), ShallowDeepError) and name not in drawn] == []


def test_they_are_caught_as_pythons_own_too():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(NetworkError, ValueError)
    assert issubclass(MissingExtra, ImportError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg61", "no network 'vgg61'. Did you mean 'vgg16'? Known: resnet56, vgg16"),
        ("zzz", "no network 'zzz'. Known: resnet56, vgg16"),
    ],
)
def test_unknown_name_offers_the_nearest(name, message):
    assert str(UnknownName("network", name, ["vgg16", "resnet56"])) == message


def test_require_gives_the_module():
    assert require("json.decoder", extra="data") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("source", "reason"), [(None, "No module named"), ("raise RuntimeError('beside this torch')", "beside this torch")]
)
def test_require_names_the_command_that_installs(tmp_path, monkeypatch, source, reason):
    if source is not None:
        (tmp_path / "not_there_at_all.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra) as caught:
        require("not_there_at_all.part" if source is None else "not_there_at_all", extra="data")
    message = str(caught.value)
    assert "this needs 'not_there_at_all'" in message
    assert reason in message
    assert message.endswith('Install it with: pip install "shallowdeep[data]"')
