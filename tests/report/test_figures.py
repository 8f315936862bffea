"""Figures for papers: the page's diagrams, drawn from the same descriptions."""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import matplotlib
import pytest
from reference import make_trace

from shallowdeep.errors import ConfigError, FileFormatError, MissingExtra, UnknownName
from shallowdeep.report.content import make_page
from shallowdeep.report.figures import write_figures
from shallowdeep.report.plots.images import draw_galleries
from shallowdeep.report.plots.page import make_plots
from shallowdeep.report.plots.paper import draw_plot, palette, styled

DIAGRAMS = ("curve", "leaving", "exits", "flows", "histogram", "roc", "risk")


@pytest.fixture(scope="module")
def drawn(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return write_figures([digits["joint"], digits["plain"]], folder)


def test_every_diagram_is_a_file_of_each_format(drawn):
    wanted = {*(f"joint-{name}" for name in DIAGRAMS), "compare", "joint-images", "joint-destroyed"}
    assert set(drawn.names) == wanted
    assert {path.name for path in drawn.folder.iterdir()} == {
        f"{name}.{kind}" for name in wanted for kind in ("svg", "pdf")
    }
    for name in wanted:
        assert ElementTree.parse(drawn.folder / f"{name}.svg").getroot().tag.endswith("svg")
        assert (drawn.folder / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    assert str(drawn).startswith(f"{drawn.folder}: joint-curve, ")


def test_lines_and_points_are_those_of_the_page(digits):
    plots = make_plots(make_page([digits["joint"]]))
    for name in ("curve", "roc", "risk"):
        plot = plots[f"run0-{name}"]
        lines = draw_plot(plot).axes[0].lines
        assert len(lines) >= len(plot.data) > 1
        for trace, line in zip(plot.data, lines, strict=False):
            assert line.get_xdata().tolist() == trace["x"]
            assert line.get_ydata().tolist() == trace["y"]
            assert line.get_label() == trace["name"]


def test_wrong_ones_stand_on_right_ones(digits):
    plot = make_plots(make_page([digits["joint"]]))["run0-leaving"]
    right, wrong = draw_plot(plot).axes[0].containers
    assert [bar.get_height() for bar in right] == plot.data[0]["y"]
    assert [bar.get_height() for bar in wrong] == pytest.approx(plot.data[1]["y"])
    assert [bar.get_y() for bar in wrong] == plot.data[0]["y"]
    assert sum(bar.get_height() for bar in [*right, *wrong]) == pytest.approx(100, abs=0.01)


def test_bands_are_as_thick_as_their_samples_are_many(make_run):
    page = make_page([make_run(test=make_trace(200, num_exits=4, seed=3))], galleries=False)
    axes = draw_plot(make_plots(page)["run0-flows"]).axes[0]
    flows = page.chapters[0].early.bands
    nodes = iter(container.patches[0] for container in axes.containers)
    for counts in flows.counts:
        for count in filter(None, counts):
            assert next(nodes).get_height() == pytest.approx(0.9 * count / 200)
    bands = [patch.get_path().vertices for patch in axes.patches if type(patch).__name__ == "PathPatch"]
    moves = [count for move in flows.moves for row in move for count in row if count]
    assert [points[0, 1] - points[-2, 1] for points in bands] == pytest.approx([0.9 * count / 200 for count in moves])
    for before, after in pairwise(sorted({points[0, 0] for points in bands} | {1.0})):
        column = [points for points in bands if points[0, 0] == before]
        assert [points[3, 0] for points in column] == pytest.approx([after] * len(column), abs=0.002)
        for top, bottom in ((0, -2), (3, 4)):  # where they leave, and where they arrive: no band lies over another
            stacked = sorted(column, key=lambda points: -points[top, 1])
            assert all(above[bottom, 1] > below[top, 1] - 1e-9 for above, below in pairwise(stacked))


def test_a_legend_names_each_colour_of_the_bands(make_run):
    page = make_page([make_run(test=make_trace(200, num_exits=4, seed=3))], galleries=False)
    handles, labels = draw_plot(make_plots(page)["run0-flows"]).axes[0].get_legend_handles_labels()
    found = {
        label: matplotlib.colors.to_hex(bar.patches[0].get_facecolor())
        for label, bar in zip(labels, handles, strict=True)
    }
    assert found == {
        "right": palette()["--right"],
        "lost: wrong, was right before": palette()["--lost"],
        "not yet right": palette()["--quiet"],
    }


def test_what_only_a_slider_moves_is_left_out(digits, drawn):
    text = (drawn.folder / "joint-curve.svg").read_text(encoding="utf-8")
    assert "<!-- the run&apos;s policy -->" in text or "<!-- the run's policy -->" in text
    assert "threshold above" not in text


def test_colours_are_the_pages_light_ones():
    assert palette()["--paper"] == "#ffffff"
    assert palette()["--right-soft"] == (0, 128 / 255, 92 / 255, 0.3)


def test_the_same_runs_give_the_same_files(digits, drawn, tmp_path):
    write_figures([digits["joint"], digits["plain"]], tmp_path)
    for path in drawn.folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_settings_of_matplotlib_are_left_alone(make_run, tmp_path):
    before = dict(matplotlib.rcParams)
    write_figures([make_run()], tmp_path / "figures", formats=["svg"], galleries=False)
    assert dict(matplotlib.rcParams) == before


def test_destroyed_images_stand_above_where_exits_looked(digits):
    chapter = make_page([digits["joint"]]).chapters[0]
    figure = draw_galleries(chapter)["destroyed"]
    pictures = [picture for gallery in chapter.early.galleries[1] for picture in gallery.pictures]
    columns = min(len(pictures), 6)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    views = [chapter.early.saliency[picture.row] for picture in pictures[:columns]]
    assert titles[:columns] == [picture.label for picture in pictures[:columns]]
    assert titles[columns : 2 * columns] == [first.answer for first, _ in views]
    assert titles[2 * columns :] == [last.answer for _, last in views]


def test_names_are_no_formulas(make_run, tmp_path):
    page = make_page([make_run("$a$")], galleries=False)
    with styled():
        figure = draw_plot(make_plots(page)["run0-curve"])
        figure.axes[0].set_title(r"$\no formula$")
        figure.savefig(tmp_path / "curve.svg")
    assert "formula$ -->" in (tmp_path / "curve.svg").read_text(encoding="utf-8")


def test_a_network_that_is_never_right_has_no_images_to_show(digits):
    chapter = make_page([digits["joint"]]).chapters[0]
    none = tuple(tuple(replace(gallery, pictures=()) for gallery in part) for part in chapter.early.galleries)
    assert draw_galleries(replace(chapter, early=replace(chapter.early, galleries=none))) == {}


def test_without_images_there_are_diagrams_alone(make_run, tmp_path):
    found = write_figures([make_run()], tmp_path / "figures", formats=["pdf"], galleries=False)
    assert [name.removeprefix("run-") for name in found.names] == list(DIAGRAMS)
    assert "Images were left out of this report on request." in str(found)


@pytest.mark.parametrize(
    ("formats", "error", "message"),
    [(["png"], UnknownName, "figure format 'png'"), ([], ConfigError, "Name one: svg or pdf")],
)
def test_formats_that_are_none(make_run, tmp_path, formats, error, message):
    with pytest.raises(error, match=message):
        write_figures([make_run()], tmp_path / "figures", formats=formats)
    assert not (tmp_path / "figures").exists()


def test_one_exit_has_nothing_to_draw(make_run, tmp_path):
    alone = make_run(test=make_trace(30, num_exits=1))
    with pytest.raises(ConfigError, match="nothing to draw: run has one exit"):
        write_figures([alone], tmp_path / "figures", galleries=False)


def test_a_full_disk_leaves_the_figure_that_was_there(make_run, tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    run, place = make_run(), tmp_path / "figures"
    place.mkdir()
    (place / "run-curve.svg").write_text("before")
    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_figures([run], place, galleries=False)
    assert {path.name: path.read_text() for path in place.iterdir()} == {"run-curve.svg": "before"}


def test_matplotlib_missing_is_said(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"shallowdeep\[report\]"):
        write_figures([make_run()], tmp_path / "figures", galleries=False)


def test_a_run_that_was_not_recorded(make_run, tmp_path):
    with pytest.raises(FileFormatError, match="shallowdeep record"):
        write_figures([make_run(test=None)], tmp_path / "figures")
