"""The command line: each command a few lines over the Python API, under the same name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from shallowdeep.console import assignments, numbers, options, placements, refuse, show
from shallowdeep.errors import ConfigError, ShallowDeepError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="See where a neural network overthinks, and stop it there.",
)

study_app = typer.Typer(no_args_is_help=True, help="Published tables, run again: resumable, a cell at a time.")
app.add_typer(study_app, name="study")

RunPath = Annotated[Path, typer.Argument(help="run folder")]
Precision = Annotated[str, typer.Option(help="of weights and arithmetic: fp32, bf16 or int8")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the three runs")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the runs in that folder")] = False,
) -> None:
    """The whole job on real digits, offline: train, record, analyse, choose a threshold."""
    from shallowdeep.demo import run_demo

    run_demo(out, say=typer.echo, resume=resume)
    typer.echo(
        f"\nRun folders: {out}/plain, ic_only, joint\nLook closer: shallowdeep analyze {quote(str(out / 'ic_only'))}"
    )


@app.command()
def probe(
    network: Annotated[str | None, typer.Argument(help="network by name; without one: list the names")] = None,
    num_classes: Annotated[int, typer.Option(help="outputs of the network")] = 10,
    image_size: Annotated[int | None, typer.Option(help="side of the images in pixels")] = None,
    shares: Annotated[list[float] | None, typer.Option(help="cost shares to place exits at (repeat)")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="option of the network, key=value (repeat)")] = None,
    everywhere: Annotated[bool, typer.Option(help="look inside every block, however cheap")] = False,
) -> None:
    """Prove where exits may sit, and show where they would."""
    from shallowdeep.networks.attach import SHARES, attach, total_flops
    from shallowdeep.networks.costs import count_params
    from shallowdeep.networks.inputs import example_inputs_for
    from shallowdeep.networks.sites import probe
    from shallowdeep.networks.zoo import load_network, networks

    if network is None:
        typer.echo("\n".join(networks()))
        return
    net = load_network(network, num_classes=num_classes, image_size=image_size, **options(set_ or []))
    example = example_inputs_for(net)
    total = total_flops(net, example)
    sites = probe(net, example, split_over=0.0 if everywhere else 0.1)
    show(
        f"{network}: {total / 1e6:.1f} MFLOPs, {count_params(net) / 1e6:.3f} M parameters",
        [
            {
                "site": site.name,
                "shape": "×".join(map(str, site.shape)),
                "MFLOPs": f"{site.flops / 1e6:.1f}",
                "share": site.flops / total,
                "exit": "yes" if site.legal else site.why_not,
            }
            for site in sites
        ],
    )
    places = len({site.flops for site in sites if site.legal and 0 < site.flops < total})
    usual = SHARES if places >= len(SHARES) or everywhere else [(i + 1) / (places + 1) for i in range(places)]
    if shares or usual:
        show("Exits", placements(attach(net, example, shares=tuple(shares or usual))))


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="run folder to make")],
    config: Annotated[Path | None, typer.Option(help="TOML file with the keys of a RunConfig")] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100, …; folder:PATH, parquet:PATH, hub:OWNER/NAME")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the data sets")] = None,
    network: Annotated[
        str | None, typer.Option(help="by name; timm:NAME, torchvision:NAME, hf:NAME, package.module:function")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="plain, ic_only, joint, mixed or distil")] = None,
    recipe: Annotated[str | None, typer.Option(help="paper or fast")] = None,
    epochs: Annotated[int | None, typer.Option(help="of each phase")] = None,
    seed: Annotated[int | None, typer.Option(help="of initial weights, order and augmentation")] = None,
    threads: Annotated[int | None, typer.Option(help="of the CPU")] = None,
    init: Annotated[str | None, typer.Option(help="run whose backbone weights to start from")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    devices: Annotated[int | None, typer.Option(help="processes on each machine, one a device")] = None,
    num_nodes: Annotated[int | None, typer.Option(help="machines")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any key, e.g. recipe.lr=0.1 (repeat)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in that folder")] = False,
) -> None:
    """Train a Shallow-Deep Network into a run folder."""
    from shallowdeep.config import load_config
    from shallowdeep.processes import is_first
    from shallowdeep.runs.run import Run

    named = {
        "data": data, "data_dir": data_dir, "network": network, "strategy": strategy, "recipe.name": recipe,
        "recipe.epochs": epochs, "seed": seed, "threads": threads, "init": init, "device": device,
        "devices": devices, "num_nodes": num_nodes,
    }  # fmt: skip
    changes = {key: value for key, value in named.items() if value is not None} | assignments(set_ or [])
    if resume and config is None and not changes:
        run = Run.open(out)
    else:
        run = Run.create(out, load_config(config, changes), resume=resume)
    sdn = run.fit(resume=resume)
    if not is_first():
        return
    if sdn.exits:
        show("Exits", placements(sdn))
    typer.echo(f"Trained: {run.weights}\nNext: shallowdeep record {quote(str(out))}")


@app.command()
def record(run: RunPath, precision: Precision = "fp32") -> None:
    """Run each split through the trained network once, and keep what every exit said."""
    from shallowdeep.processes import is_first
    from shallowdeep.runs.run import Run

    for split, trace in Run.open(run).record(precision=precision).items():
        if is_first():
            typer.echo(f"{split}: {len(trace)} samples, {trace.num_exits} exits")


@app.command()
def analyze(
    source: Annotated[Path, typer.Argument(help="run folder, or a Trace file")],
    val: Annotated[Path | None, typer.Option(help="beside a file: Trace for thresholds (budgets)")] = None,
    train: Annotated[Path | None, typer.Option(help="beside a file: Trace of training data (confusion)")] = None,
) -> None:
    """Overthinking, confusion and accuracy within budgets, from what was recorded."""
    from shallowdeep.analysis.together import analyze_traces
    from shallowdeep.runs.run import Run
    from shallowdeep.traces.trace import Trace

    if source.is_dir():
        found = Run.open(source).analyze()
    else:
        found = analyze_traces(
            Trace.load(source), *(None if path is None else Trace.load(path) for path in (val, train))
        )
    for name, result in found.items():
        show(name.capitalize(), result.rows())
        typer.echo(f"{result}\n")


@app.command()
def calibrate(
    run: RunPath,
    max_cost: Annotated[float | None, typer.Option(help="mean cost allowed, 1.0 is the plain network")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="accuracy that may be given up, e.g. 0.01")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="share of the last exit's answers kept, e.g. 0.99")
    ] = None,
    reference: Annotated[str, typer.Option(help="drop measured from: last exit, or original network")] = "last",
    original: Annotated[Path | None, typer.Option(help="run of the original network")] = None,
    rule: Annotated[str, typer.Option(help="confidence or patience")] = "confidence",
    answer: Annotated[str, typer.Option(help="of the unsure: last or most_confident")] = "last",
    precision: Precision = "fp32",
) -> None:
    """Choose when to stop, on validation data; writes policy.json, or policy-int8.json for that precision."""
    from shallowdeep.runs.run import Run

    chosen = Run.open(run)
    decisions = chosen.calibrate(
        precision=precision,
        original=None if original is None else Run.open(original),
        max_cost=max_cost,
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        reference=reference,
        rule=rule,
        answer=answer,
    )
    steps = f"replay {quote(str(run))}" if precision == "fp32" else f"bench {quote(str(run))} --precision {precision}"
    typer.echo(f"{chosen.policy(precision)}\nOn validation: {decisions}\nNext: shallowdeep {steps}")


@app.command()
def replay(
    run: RunPath,
    split: Annotated[str, typer.Option(help="recorded split: train, val or test")] = "test",
    precision: Precision = "fp32",
) -> None:
    """What the chosen policy does on a recorded split."""
    from shallowdeep.runs.run import Run

    decisions = Run.open(run).replay(split, precision=precision)
    show(f"Policy on {split}", decisions.rows())
    typer.echo(str(decisions))


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder to write")],
    precision: Annotated[str, typer.Option(help="fp32 or int8")] = "fp32",
    uint8: Annotated[bool, typer.Option("--uint8", help="take images as they are in files")] = False,
    stages_only: Annotated[bool, typer.Option("--stages-only", help="no files that leave by themselves")] = False,
    opset: Annotated[int | None, typer.Option(help="of ONNX operators, for an older runtime")] = None,
) -> None:
    """Write the network and its policy as a folder that runs without PyTorch."""
    from shallowdeep.runs.run import Run

    options: dict[str, Any] = {} if opset is None else {"opset": opset}
    typer.echo(str(Run.open(run).export(out, precision=precision, uint8=uint8, stages_only=stages_only, **options)))
    typer.echo(f"Next: python {out / 'run.py'} images.npy --out answers.npz")


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(help="run folder, or one that was exported")],
    batch_size: Annotated[list[int] | None, typer.Option(help="samples in a batch (repeat); 1, 8, 32, 256")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="of the engine (repeat); without: all there are")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or int8 (repeat); fp32")] = None,
    num_samples: Annotated[int | None, typer.Option(help="of the test split, at most; 2000")] = None,
    rounds: Annotated[int, typer.Option(help="times that each figure is taken")] = 10,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …; auto")] = None,
    threads: Annotated[int | None, typer.Option(help="of the CPU; without: as many as PyTorch takes")] = None,
    smaller: Annotated[
        bool | None, typer.Option("--smaller/--no-smaller", help="also the networks that end at one exit; yes")
    ] = None,
    shared_pool: Annotated[
        bool, typer.Option("--shared-pool", help="one pool of threads for all sessions of ONNX Runtime")
    ] = False,
    provider: Annotated[list[str] | None, typer.Option(help="of ONNX Runtime, for an exported folder")] = None,
) -> None:
    """Time early exits against the same network without them, by batch size and back end.

    In an exported folder, time samples that leave at the first exit against such as go through; the manifest keeps it.
    """
    if (run / "manifest.json").exists():
        given = {
            "--backend": backend, "--precision": precision, "--num-samples": num_samples, "--device": device,
            "--smaller": smaller, "--shared-pool": shared_pool or None,
        }  # fmt: skip
        refuse(given, "for a run folder; an exported one takes --batch-size, --rounds, --threads and --provider")
        from shallowdeep.inference.timing.folder import bench_folder

        # The process is ours and does nothing else: all sessions share one pool of threads.
        found = bench_folder(
            run,
            batch_sizes=batch_size or (1, 32),
            rounds=rounds,
            threads=threads,
            providers=provider or ("CPUExecutionProvider",),
            shared_pool=True,
        )
        typer.echo(f"{found}\nWritten into {run / 'manifest.json'}")
        return
    refuse({"--provider": provider}, "for an exported folder; name back ends by --backend")
    from shallowdeep.inference.timing.bench import DEFAULT_BACKENDS
    from shallowdeep.runs.run import Run

    report = Run.open(run).bench(
        batch_sizes=batch_size or (1, 8, 32, 256),
        backends=backend or DEFAULT_BACKENDS,
        precisions=precision or ("fp32",),
        num_samples=2000 if num_samples is None else num_samples,
        rounds=rounds,
        device=device or "auto",
        threads=threads,
        smaller=smaller is not False,
        shared_pool=shared_pool,
        progress=True,
    )
    show("Early exits against the same network without them: median of the rounds (their middle half)", report.rows())
    show("Against the stages' own times, and the replay's answers", report.bound_rows())
    if rows := report.static_rows():
        show("Smaller networks without exits", rows)
    typer.echo(f"{report}\nWritten into {run / 'results' / report.name}.json")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, recorded")],
    out: Annotated[Path | None, typer.Option(help="page to write; report.html, where no figures are asked for")] = None,
    figures: Annotated[Path | None, typer.Option(help="folder for the same figures as files, for papers")] = None,
    format: Annotated[list[str] | None, typer.Option(help="of the figures: svg, pdf (repeat); both")] = None,
    images: Annotated[bool, typer.Option(help="with galleries of images; they need the data")] = True,
) -> None:
    """One page that shows where networks overthink: self-contained, interactive, for the browser."""
    from shallowdeep.report.figures import FORMATS, write_figures
    from shallowdeep.report.html import write_report
    from shallowdeep.runs.run import Run

    opened = [Run.open(run) for run in runs]
    if figures is not None:
        typer.echo(str(write_figures(opened, figures, formats=format or FORMATS, galleries=images)))
    elif format:
        raise ConfigError(f"--format {' '.join(format)} is for figures. Name their folder: --figures figures")
    if figures is None or out is not None:
        typer.echo(str(write_report(opened, out or "report.html", galleries=images)))


@app.command()
def explore(
    run: RunPath,
    host: Annotated[str, typer.Option(help="to listen on; others reach the page only if this is not 127.0.0.1")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0: any free one")] = 8000,
    max_upload: Annotated[float, typer.Option(help="largest image file, in MB")] = 10.0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")] = False,
) -> None:
    """A local page: pick or drop an image, and see the prediction evolve, exit by exit, as it is computed."""
    from shallowdeep.explore.server import serve
    from shallowdeep.runs.run import Run

    serve(Run.open(run), host=host, port=port, max_upload_mb=max_upload, open_browser=open_, say=typer.echo)


@study_app.command()
def paper(
    list_: Annotated[bool, typer.Option("--list", help="show what is done and what is missing; run nothing")] = False,
    table: Annotated[bool, typer.Option("--table", help="write the page from the results; run nothing")] = False,
    only: Annotated[list[str] | None, typer.Option(help="cells by name, * for anything (repeat)")] = None,
    data: Annotated[list[str] | None, typer.Option(help="data set (repeat); the paper's three")] = None,
    network: Annotated[list[str] | None, typer.Option(help="network (repeat); the paper's four")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="fast or paper (repeat); fast")] = None,
    epochs: Annotated[int | None, typer.Option(help="of every training, instead of the recipe's")] = None,
    seeds: Annotated[str, typer.Option(help="with commas between them")] = "0",
    threads: Annotated[int, typer.Option(help="of the CPU, in each cell")] = 1,
    passes: Annotated[
        int | None,
        typer.Option(help="whose features are recorded for IC-only training, instead of the recipe's; 0: none"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="the training step, by PyTorch's compiler")] = False,
    jobs: Annotated[int, typer.Option(help="cells side by side")] = 1,
    runs: Annotated[Path, typer.Option(help="folder for run folders")] = Path("runs/paper"),
    results: Annotated[Path, typer.Option(help="folder for the cells' results")] = Path("results/paper"),
    out: Annotated[Path, typer.Option(help="page that --table writes")] = Path("docs/results/paper.md"),
    backdoor: Annotated[
        list[Path] | None, typer.Option(help="beside --table: what backdoors did, other than RESULTS/backdoor (repeat)")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the data sets")] = None,
) -> None:
    """The paper's table: four networks, three data sets, four strategies, resumed where it was left."""
    from shallowdeep.studies.cells import Place
    from shallowdeep.studies.listing import list_besides, list_cells
    from shallowdeep.studies.paper.matrix import Matrix
    from shallowdeep.studies.paper.page import write_page
    from shallowdeep.studies.selection import select
    from shallowdeep.studies.side_by_side import run_cells

    if backdoor and not table:
        raise ConfigError(f"--backdoor {backdoor[0]} is for the page. Write it: shallowdeep study paper --table")
    if table and not list_:
        given = {"--only": only, "--data": data, "--network": network, "--recipe": recipe, "--epochs": epochs}
        refuse(
            given | {"--passes": passes}, "for cells to run or to list; --table writes all that lies under --results"
        )
    if table:
        typer.echo(f"{write_page(results, out, backdoor or [])} cells are in {out}")
    matrix = Matrix(
        data=data or Matrix.data, networks=network or Matrix.networks, recipes=recipe or Matrix.recipes,
        seeds=numbers(seeds), epochs=epochs, threads=threads, passes=passes,
    )  # fmt: skip
    chosen, place = select(matrix.cells(), only or []), Place(runs, results, data_dir, device, compile)
    if list_:
        rows, besides = list_cells(chosen, place), list_besides(chosen, place, only or [])
        show(f"{len(rows)} cells, {sum(row['state'] == 'done' for row in rows)} done", rows)
        if besides:
            show(f"{len(besides)} results of other lengths, recipes or seeds", besides)
    if list_ or table:
        return
    found = run_cells(chosen, place, jobs=jobs, say=typer.echo)
    done, failed = ([one for one in found if one.word == word] for word in ("done", "failed"))
    typer.echo(f"{len(done)} of {len(found)} cells are done. Next: shallowdeep study paper --table")
    for one in failed:
        typer.echo(f"error: {one.cell}: {one.message}", err=True)
    if failed:
        raise typer.Exit(2)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: typer.echo(f"warning: {message}", err=True)
            app(prog_name="shallowdeep")
    except (ShallowDeepError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
