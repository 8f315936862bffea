"""The command line: each command a few lines over the Python API, under the same name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shallowdeep.errors import ConfigError, ShallowDeepError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="See where a network overthinks, and stop it there.",
)

RunFolder = Annotated[Path, typer.Argument(help="run folder")]


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="run folder to make")],
    config: Annotated[Path | None, typer.Option(help="TOML file with a RunConfig")] = None,
    data: Annotated[str | None, typer.Option(help="data set")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the data sets")] = None,
    network: Annotated[str | None, typer.Option(help="network")] = None,
    strategy: Annotated[str | None, typer.Option(help="plain, ic_only, joint or mixed")] = None,
    recipe: Annotated[str | None, typer.Option(help="paper or fast")] = None,
    epochs: Annotated[int | None, typer.Option(help="of each phase")] = None,
    seed: Annotated[int | None, typer.Option(help="of initial weights, order and augmentation")] = None,
    threads: Annotated[int | None, typer.Option(help="of the CPU")] = None,
    init: Annotated[str | None, typer.Option(help="run whose backbone weights to start from")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any key of the configuration, e.g. recipe.lr=0.1")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in that folder")] = False,
) -> None:
    """Train a Shallow-Deep Network into a run folder."""
    from shallowdeep.runs import Run, load_config

    named = {
        "data": data, "data_dir": data_dir, "network": network, "strategy": strategy, "recipe.name": recipe,
        "recipe.epochs": epochs, "seed": seed, "threads": threads, "init": init, "device": device,
    }  # fmt: skip
    changes = {key: value for key, value in named.items() if value is not None} | _assignments(set_ or [])
    run = Run.create(out, load_config(config, changes), resume=resume)
    run.fit(resume=resume)
    typer.echo(f"trained: {run.weights}")


@app.command()
def record(run: RunFolder) -> None:
    """Run the splits through a trained network once, and keep what every exit said."""
    from shallowdeep.runs import Run

    for split, trace in Run(run).record().items():
        typer.echo(f"{split}: {len(trace)} samples, {trace.num_exits} exits")


def _assignments(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for key, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"--set takes key=value, got '{key}'.")
    return {key: value for key, _, value in pairs}


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        app()
    except ShallowDeepError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
