"""Do all run times decide alike? Every back end and exported file on a complete test split, against the replay.

Each policy is replayed on the Trace that ``record`` gives (fp32); in another precision on the back end's own Trace. A
difference within 1e-5 of a threshold is a tie; any other is a defect::

    python benchmarks/decisions.py RUN

RUN is a run folder with exits, such as one of ``results/`` with its weights. It needs the run's data.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import shallowdeep as sd
from shallowdeep.inference.bench import agreement

MICRO_BATCH = 250
ENGINES = [
    ("eager", "fp32"),
    ("stages", "fp32"),
    ("compiled", "fp32"),
    ("onnx", "fp32"),
    ("openvino", "fp32"),
    ("onnx", "int8"),
]
ONE_BY_ONE = 2_000  # samples for the single file, which takes one at a time


def policies_for(val: sd.Trace) -> dict[str, sd.ExitPolicy]:
    threshold = sd.calibrate(val, max_accuracy_drop=0.01).to_dict()["threshold"]
    return {
        "confidence": sd.Confidence(threshold),
        "most confident answers": sd.Confidence(threshold, answer="most_confident"),
        "every other exit": sd.Confidence(threshold, exits=tuple(range(0, val.num_exits - 1, 2))),
        "patience": sd.Patience(2),
    }


def compare(answers: sd.Answers, trace: sd.Trace, policy: sd.ExitPolicy) -> dict[str, int]:
    rows = np.full((2, len(trace)), -1)
    rows[:, answers.ids] = answers.labels, answers.exits
    return agreement(rows[0], rows[1], trace, policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    run = sd.Run.open(given.run)
    sdn = run.load()
    data = run.load_data(sdn.backbone)
    images = torch.cat([batch.inputs for batch in data.test.batches(1000)])
    calibration = next(iter(data.val.batches(512))).inputs
    trace, rows = sd.record(sdn, data.test), []
    for name, policy in policies_for(sd.record(sdn, data.val)).items():
        for backend, precision in ENGINES:
            options = {"calibration": calibration} if precision == "int8" else {}
            engine = sd.Engine(
                sdn, policy, backend=backend, precision=precision, example_inputs=images[:8],
                micro_batch=32 if backend == "compiled" else MICRO_BATCH, **options,
            )  # fmt: skip
            own = trace if precision == "fp32" else None
            if own is None:
                own = engine.record(data.test, batch_size=MICRO_BATCH)
                if len(engine.exits) < sdn.num_exits:
                    continue  # its Trace has the exits it looks at alone
            rows.append(row(name, f"{backend} {precision}", engine(images), own, policy))
        with tempfile.TemporaryDirectory() as folder:
            out = sd.export(sdn, policy, Path(folder) / "out", example_inputs=images[:8]).folder
            array = images.numpy()
            for form, most in (("stages", None), ("batched", None), ("single", ONE_BY_ONE)):
                answers = sd.Runner(out, form, micro_batch=MICRO_BATCH)(array[:most])
                rows.append(row(name, f"runner, {form}", answers, trace, policy))
    figures = {
        "n": len(images),
        "data": data.test.name,
        "rows": rows,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "onnxruntime", "openvino", "shallowdeep")},
        "command": f"python benchmarks/decisions.py {given.run.name}",
    }
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2) + "\n")
    wrong = [one for one in rows if one["differing"] > one["ties"]]
    print(f"{len(rows)} ways to run {len(images)} images: {len(wrong)} decide otherwise than the replay")
    sys.exit(bool(wrong))


def row(policy: str, way: str, answers: sd.Answers, trace: sd.Trace, rule: sd.ExitPolicy) -> dict[str, object]:
    shares = np.bincount(answers.exits, minlength=trace.num_exits) / len(answers)
    found = {
        "policy": policy,
        "way": way,
        "n": len(answers),
        **compare(answers, trace, rule),
        "accuracy": float((answers.labels == trace.labels[: len(answers)].numpy()).mean()),
        "cost": float(answers.costs.mean()),
        "exit_shares": shares.round(4).tolist(),
    }
    print(time.strftime("%H:%M"), {key: found[key] for key in ("policy", "way", "n", "differing", "ties")}, flush=True)
    return found


if __name__ == "__main__":
    main()
