"""Do all run times decide alike? Every back end and exported file on a complete test split, against the replay.

Each policy is replayed on the Trace that ``record`` gives (fp32); in another precision on the back end's own Trace. A
difference within 1e-5 of a threshold is a tie; any other is a defect::

    python benchmarks/decisions.py RUN --out decisions.json
    python benchmarks/decisions.py RUN --engines "eager bf16" "stages bf16" --samples 1000 --out bf16.json

RUN is a run folder with exits, such as one of ``results/`` with its weights. It needs the run's data. The figures are
written after each way to run, so that none is lost; what cannot run at all is among them, with its error.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shallowdeep as sd
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.timing.bench import agreement
from shallowdeep.provenance import describe_environment
from shallowdeep.storage import write_json
from shallowdeep.versions import versions_of

MICRO_BATCH = 250
COMPILED = 32  # rows at a time, and the one size that is compiled for: each takes a minute or more
ENGINES = (
    "eager fp32",
    "stages fp32",
    "compiled fp32",
    "onnx fp32",
    "onnx fp32 batches",
    "openvino fp32",
    "onnx int8",
    "onnx int8 batches",
    "openvino int8",
)
FORMS = ("stages", "batched", "single")  # of an exported folder


def policies_for(val: sd.Trace) -> dict[str, sd.ExitPolicy]:
    threshold = sd.calibrate(val, max_accuracy_drop=0.01).to_dict()["threshold"]
    return {
        "confidence": sd.Confidence(threshold),
        "most confident answers": sd.Confidence(threshold, answer="most_confident"),
        "every other exit": sd.Confidence(threshold, exits=tuple(range(0, val.num_exits - 1, 2))),
        "patience": sd.Patience(2),
    }


class Comparison:
    """Rows of figures, one per policy and way to run it.

    Args:
        sdn: the network.
        test: samples to answer.
        calibration: inputs for int8.
        keep: called with all rows after each.
    """

    def __init__(
        self,
        sdn: sd.ShallowDeepNetwork,
        test: Any,
        calibration: torch.Tensor,
        keep: Callable[[list[dict[str, Any]]], None],
    ):
        self.sdn, self.test, self.calibration, self.keep = sdn, test, calibration, keep
        self.images = torch.cat([batch.inputs for batch in test.batches(1000)])
        self.trace = sd.record(sdn, test)
        self.rows: list[dict[str, Any]] = []

    def engine(self, policy: sd.ExitPolicy, backend: str, precision: str, calls: str = "") -> dict[str, Any]:
        """Figures of an engine that answers all in one call, or (``calls="batches"``) a micro-batch in each."""
        options: dict[str, Any] = {"calibration": self.calibration} if precision == "int8" else {}
        options |= {"sizes": (COMPILED,)} if backend == "compiled" else {}
        engine = sd.Engine(
            self.sdn,
            policy,
            backend=backend,
            precision=precision,
            example_inputs=self.images[:8],
            micro_batch=COMPILED if backend == "compiled" else MICRO_BATCH,
            **options,
        )
        answers = joined([engine(part) for part in self.images.split(MICRO_BATCH if calls else len(self.images))])
        if precision == "fp32":
            return self.figures(answers, self.trace, policy)
        return self.figures(answers, engine.record(self.test, batch_size=MICRO_BATCH), policy)

    def figures(self, answers: sd.Answers, trace: sd.Trace, policy: sd.ExitPolicy) -> dict[str, Any]:
        """Answers against a replay."""
        shares = np.bincount(answers.exits, minlength=self.sdn.num_exits) / len(answers)
        return {
            "n": len(answers),
            **agreement(answers.labels, answers.exits, trace, policy),
            "accuracy": float((answers.labels == trace.true_labels.numpy()).mean()),
            "cost": float(answers.costs.mean()),
            "exit_shares": shares.round(4).tolist(),
        }

    def note(self, policy: str, way: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one way, and keep its figures or its error."""
        started = time.perf_counter()
        try:
            found = run()
        except Exception as error:  # the others shall run all the same
            found = {"error": f"{type(error).__name__}: {error}"}
        self.rows.append({"policy": policy, "way": way, **found, "seconds": round(time.perf_counter() - started, 1)})
        self.keep(self.rows)
        shown = ("policy", "way", "n", "differing", "ties", "error", "seconds")
        print({name: self.rows[-1][name] for name in shown if name in self.rows[-1]}, flush=True)


def joined(parts: list[sd.Answers]) -> sd.Answers:
    """The answers of several calls as those of one."""
    fields = {
        field.name: np.concatenate([getattr(one, field.name) for one in parts])
        for field in dataclasses.fields(sd.Answers)
    }
    return sd.Answers(**{**fields, "ids": np.arange(len(fields["ids"]))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--engines",
        nargs="*",
        default=ENGINES,
        help="each a back end and a precision, and perhaps the word 'batches': a call for each",
    )
    parser.add_argument("--forms", nargs="*", default=FORMS, help="of an exported folder")
    parser.add_argument("--policies", nargs="+", help="some of the four; all where not given")
    parser.add_argument("--samples", type=int, help="of the test split, at most; all where not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = sd.Run.open(given.run)
    sdn = run.load()
    data = run.load_data(sdn.backbone)
    test: Any = data.split("test")
    test = test if given.samples is None else test.sample(given.samples)
    about = {
        **describe_environment(data, "cpu"),
        "run_times": versions_of(("onnxruntime", "openvino")),
        "data": test.name,
        "network": run.config.network,
        "n": len(test),
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        if given.out:
            write_json(given.out, {**about, "rows": rows})

    compared = Comparison(sdn, test, next(iter(data.split("val").batches(512))).inputs, keep)
    policies = policies_for(sd.record(sdn, data.split("val")))
    about["policies"] = {name: policy.to_dict() for name, policy in policies.items()}
    for name in given.policies or policies:
        policy = policies[name]
        for way in given.engines:
            compared.note(name, way, lambda: compared.engine(policy, *way.split()))  # noqa: B023
        if given.forms:
            exported(compared, name, policy, given.forms, given.threads)
    rows = compared.rows
    wrong = [one for one in rows if "error" in one or one["differing"] > one["ties"]]
    print(f"{len(rows)} ways to run {len(test)} images: {len(wrong)} decide otherwise than the replay, or do not run")
    sys.exit(bool(wrong))


def exported(compared: Comparison, name: str, policy: sd.ExitPolicy, forms: list[str], threads: int) -> None:
    """All forms of one exported folder."""
    images, settings = compared.images.numpy(), Settings(threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        out = sd.export(compared.sdn, policy, Path(folder) / "out", example_inputs=compared.images[:8]).folder

        def run(form: str) -> dict[str, Any]:
            answers = sd.Runner(out, form, micro_batch=MICRO_BATCH, settings=settings)(images)
            return compared.figures(answers, compared.trace, policy)

        for form in forms:
            compared.note(name, f"runner, {form}", lambda: run(form))  # noqa: B023


if __name__ == "__main__":
    main()
