"""Sentences and numbers as the page writes them."""

from __future__ import annotations

from shallowdeep.report.content import Chapter
from shallowdeep.report.early import EarlyExits
from shallowdeep.report.missing import Missing

SPACE = "\N{NO-BREAK SPACE}"


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent.

    >>> percent(0.4837).replace(SPACE, " ")
    '48.4 %'
    """
    return f"{100 * share:.{digits}f}{SPACE}%"


def count(number: int) -> str:
    """A whole number with commas between thousands.

    >>> count(10000)
    '10,000'
    """
    return f"{number:,}"


def signed(number: float) -> str:
    """A number with its sign.

    >>> signed(-0.1)
    '−0.10'
    """
    return f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def points(difference: float) -> str:
    """A difference of two shares in points of per cent, with its sign.

    >>> points(-0.0044)
    '−0.44'
    """
    return signed(100 * difference)


def verdict(chapter: Chapter) -> tuple[str, ...]:
    """What a run shows, in three sentences; in one where it has no internal exits."""
    early = chapter.early
    right = f"right on {percent(chapter.accuracy, 2)} of the {count(chapter.n)} test samples"
    if early is None:
        return (
            f"This {chapter.network} is {right}. It has one exit only, its own output, so nobody can leave early: "
            "attach exits and train them to see where it overthinks.",
        )
    if isinstance(early.overthinking, Missing):
        return (
            f"These {count(chapter.n)} test samples have no labels, so an answer is judged by whether it is the last "
            "exit's own: agreement, not accuracy.",
            _before_the_end(early),
            _saving(chapter, early),
        )
    found = early.overthinking
    return (
        f"Run to its end, this {chapter.network} is {right}, but on {percent(found.wasteful)} of them an earlier exit "
        "had the right answer already.",
        f"{percent(found.destructive_of_errors)} of its errors come from thinking too long: an earlier exit had the "
        "right answer, and going on destroyed it.",
        _saving(chapter, early),
    )


def _before_the_end(early: EarlyExits) -> str:
    agreeing = max(exit.accuracy for exit in early.exits[:-1])
    return f"The best earlier exit gives the last one's answer to {percent(agreeing)} of them."


def _saving(chapter: Chapter, early: EarlyExits) -> str:
    if early.other is not None:
        found, rule = early.other.decisions, f"its policy ({early.other.policy.kind})"
    elif early.start.chosen:
        found, rule = early.start.decisions, f"a confidence of {early.start.threshold:.3f} or more"
    else:
        return (
            "Nobody leaves early yet, because no threshold was chosen for this run. Choose one on validation data: "
            f"shallowdeep calibrate {chapter.name} --max-cost 0.5"
        )
    kept = "it is right on" if chapter.measure == "accuracy" else "it answers as the last exit would on"
    saved = 1 - found.cost
    ending = f", which saves {percent(saved)} of the computation" if saved > 0 else ", which saves nothing"
    price = f" ({points(found.accuracy - chapter.accuracy)} points)" if chapter.measure == "accuracy" else ""
    return (
        f"Leaving early by {rule}, {kept} {percent(found.accuracy, 2)}{price} at {percent(found.cost)} of the "
        f"cost{ending}."
    )
