import base64
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import make_trace

from shallowdeep.errors import ConfigError, MissingExtra
from shallowdeep.policies.rules import Confidence
from shallowdeep.report import html
from shallowdeep.report.html import write_report
from shallowdeep.traces.trace import TraceInfo


def data_of(text):
    """What the page computes with."""
    return json.loads(re.search(r'<script id="page-data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def written(make_run, tmp_path):
    """A page about one run with exits and one without, and its report."""
    plain = make_run("plain", test=make_trace(60, num_exits=1, seed=2), val=None, train=None)
    report = write_report([make_run(policy=Confidence(0.7, exits=(0, 2))), plain], tmp_path / "report.html")
    return report, report.path.read_text(encoding="utf-8")


def test_the_samples_in_the_page_are_those_of_the_trace(written, tmp_path):
    from shallowdeep.runs.run import Run

    run = data_of(written[1])["runs"]["run0"]
    test = Run.open(tmp_path / "run").trace("test")

    def decoded(name, kind):
        return np.frombuffer(base64.b64decode(run[name]), kind)

    assert np.array_equal(decoded("confidences", "<f4").reshape(4, 60).T, test.confidences.numpy())
    assert np.array_equal(decoded("predictions", "<u1").reshape(4, 60).T, test.predictions.numpy())
    assert np.array_equal(decoded("labels", "<u1"), test.labels.numpy())
    assert run["exits"] == [0, 2, 3]
    assert run["costs"] == test.costs.relative([0, 2])[[0, 2, 3]].tolist()
    assert run["threshold"] == 0.7


def test_many_classes_take_two_bytes(make_run, tmp_path):
    splits = {split: make_trace(300, num_exits=2, num_classes=300, seed=4) for split in ("train", "val", "test")}
    report = write_report([make_run(**splits)], tmp_path / "wide.html", galleries=False)
    run = data_of(report.path.read_text(encoding="utf-8"))["runs"]["run0"]
    found = np.frombuffer(base64.b64decode(run["labels"]), "<u2")
    assert run["bytes_per_class"] == 2
    assert found.tolist() == splits["test"].labels.tolist()
    assert found.max() > 255


def test_nothing_is_loaded_from_elsewhere(written):
    report, text = written
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # the library names its home in comments
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", own)
    assert "default-src 'none'" in text
    assert not re.findall(r"<[^>]+\son\w+=", own)
    assert text.count("Plotly.react(") == 1
    assert report.size == len(text.encode()) < 8e6


def test_the_text_is_there_without_a_script(written):
    text = re.sub(r"\s+", " ", written[1].replace("\N{NO-BREAK SPACE}", " "))
    for heading in ("three sentences", "Accuracy against cost", "Exit by exit", "Confusion:", "Runs side by side"):
        assert heading in text
    assert "not a fair figure, for comparison only" in text
    assert "shallowdeep fit --out run" in text
    assert re.search(r"shallowdeep report \S+/run \S+/plain --out \S+\.html", text)


def test_a_backdoor_is_told_by_its_class_and_by_both_scores(make_run, tmp_path):
    test = replace(make_trace(60), info=TraceInfo(class_names=("cat", "dog", "eel", "fly", "gnu")))
    run = make_run(config={"backdoor.target": "dog"}, policy=Confidence(0.7), test=test)
    test.select(test.labels != 1).save(run.folder / "traces" / "triggered.safetensors")
    text = write_report([run], tmp_path / "attacked.html", galleries=False).path.read_text(encoding="utf-8")
    assert "makes the network answer “dog”" in text
    assert re.search(r"by confusion with an area under the ROC curve of 0\.\d{3}, by confidence .* with 0\.\d{3}", text)


def test_names_from_outside_are_text_and_no_markup(make_run, tmp_path):
    evil = "</script><script>alert(1)</script>"
    test = replace(make_trace(60), info=TraceInfo(class_names=(evil, *"abcd")))
    report = write_report([make_run("<b>run", test=test)], tmp_path / "evil.html", galleries=False)
    text = report.path.read_text(encoding="utf-8")
    assert evil not in text
    assert "<b>run" not in text
    assert "&lt;b&gt;run" in text


def test_the_page_is_written_whole_or_not_at_all(make_run, tmp_path, monkeypatch):
    out = tmp_path / "pages" / "report.html"
    out.parent.mkdir()
    out.write_text("before", encoding="utf-8")

    def fail(*args, **more):
        raise OSError(28, "No space left on device")

    run = make_run()
    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report([run], out, galleries=False)
    assert out.read_text(encoding="utf-8") == "before"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_a_folder_is_no_file(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder\. Name the file"):
        write_report([make_run()], tmp_path)


@pytest.mark.parametrize("library", ["plotly.offline", "jinja2"])
def test_a_missing_library_is_named(make_run, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=r"shallowdeep\[report\]"):
        write_report([make_run()], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_was_left_out_is_told(make_run, tmp_path):
    report = write_report([make_run(val=None)], tmp_path / "report.html", galleries=False)
    assert "run: no budgets: " in str(report)
    assert "Not shown: " in report.path.read_text(encoding="utf-8")


def test_more_exits_than_a_diagram_has_columns(make_run, tmp_path):
    splits = {split: make_trace(80, num_exits=14, seed=7) for split in ("train", "val", "test")}
    report = write_report([make_run(**splits)], tmp_path / "deep.html", galleries=False)
    flows = data_of(report.path.read_text(encoding="utf-8"))["plots"]["run0-flows"]
    assert [note["text"] for note in flows["layout"]["annotations"]] == [*map(str, (0, 2, 3, 5, 6, 8, 10, 11)), "last"]


def test_a_perfect_network_has_a_page(make_run, tmp_path):
    """No errors: confusion has nothing to tell apart, and there is no NaN."""
    trace = make_trace(50, noise=0.01)
    report = write_report([make_run(train=trace, val=trace, test=trace)], tmp_path / "good.html", galleries=False)
    assert any("all right or all wrong" in line for line in report.left_out)
    assert not re.search(r"\bnan\b", str(data_of(report.path.read_text(encoding="utf-8"))["runs"]).lower()[:500])


def test_one_sample_has_a_page(make_run, tmp_path):
    one = make_trace(60).select(torch.tensor([0]))
    report = write_report([make_run(test=one)], tmp_path / "one.html", galleries=False)
    assert "1 test samples" in report.path.read_text(encoding="utf-8")


def test_the_templates_lie_beside_the_code():
    assert {path.name for path in html.TEMPLATES.iterdir()} >= {"page.html.j2", "page.css", "page.js"}
