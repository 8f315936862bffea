import io

import pytest
from rich.console import Console

from shallowdeep import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """What would stand on a terminal, in place of standard error."""
    stream = Terminal()

    def console(**options):
        assert options == {"stderr": True}
        return Console(file=stream, width=100, force_terminal=True)

    monkeypatch.setattr(progress, "Console", console)
    return stream


def test_items_pass_in_order_without_a_terminal(capsys):
    assert list(progress.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", "")


def test_a_terminal_sees_title_count_and_words(terminal):
    with progress.bar("epoch 1", 4) as line:
        line.advance()
        line.advance(3)
        line.say("loss 0.5")
    assert all(text in terminal.getvalue() for text in ("epoch 1", "4/4", "loss 0.5"))


def test_a_bar_can_begin_in_the_middle(terminal):
    with progress.bar("resumed", 10, done=7) as line:
        line.advance()
    assert "8/10" in terminal.getvalue()


def test_track_moves_the_bar_once_per_item(terminal):
    assert list(progress.track(range(5), 5, "items")) == [0, 1, 2, 3, 4]
    assert "5/5" in terminal.getvalue()


def test_nothing_is_drawn_where_it_is_not_wanted(terminal):
    assert list(progress.track(range(5), 5, "items", shown=False)) == [0, 1, 2, 3, 4]
    assert "items" not in terminal.getvalue()


def test_an_error_ends_the_bar_and_passes(terminal):
    with pytest.raises(ZeroDivisionError), progress.bar("broken", 2):
        raise ZeroDivisionError
    assert list(progress.track([1], 1, "next")) == [1]  # a bar left open would refuse a second one
