"""Run folders: one that was really trained, and such as hold Traces made up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reference import make_trace
from studies.tiny_network import RUN

from shallowdeep.config import load_config
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.runs.run import Run
from shallowdeep.storage import write_json
from shallowdeep.traces.trace import Trace


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two small networks on real digits, with exits and without; not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    runs = {}
    for name, changes in {"joint": {"strategy": "joint", "taps": ("1", "3")}, "plain": {"strategy": "plain"}}.items():
        run = runs[name] = Run.create(folder / name, load_config(changes=RUN | changes))
        run.fit(progress=False)
        run.record(progress=False)
    runs["joint"].calibrate(max_cost=0.5)
    return runs


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder around Traces; the splits that are not given are made up, ``None`` leaves one out."""

    def make(
        name: str = "run",
        *,
        policy: ExitPolicy | None = None,
        config: dict[str, object] | None = None,
        seed: int = 0,
        **traces: Trace | None,
    ) -> Run:
        run = Run(tmp_path / name, load_config(changes={"data": "digits", **(config or {})}))
        write_json(run.folder / "config.json", run.config.model_dump(mode="json"))
        write_json(run.folder / "environment.json", {"command": "shallowdeep fit --out run", "data_md5": {}})
        for number, split in enumerate(("train", "val", "test")):
            made = make_trace(60, seed=seed + number, split=split)
            trace = traces.get(split, made)
            if trace is not None:
                info = replace(trace.info, split=split)
                replace(trace, info=info).save(run.folder / "traces" / f"{split}.safetensors")
        if policy is not None:
            write_json(run.folder / "policy.json", policy.to_dict())
        return run

    return make
