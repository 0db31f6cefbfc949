"""benchmarks/overhead.py: each arm is the network that its name says."""

import overhead
from timm.layers import SEModule

from se_inject import SqueezeExcite
from se_inject.layers.deployed import DeployedSE

KINDS = (SEModule, SqueezeExcite, DeployedSE)


def test_the_arms_are_what_they_are_called() -> None:
    count = {
        name: tuple(
            sum(isinstance(m, kind) for m in overhead.ARMS[name].build("resnet18").modules())
            for kind in (SEModule, SqueezeExcite)
        )
        for name in ("base", "timm", "se_inject", "se_inject, blocks compiled")
    }
    assert count == {
        "base": (0, 0),
        "timm": (8, 0),
        "se_inject": (0, 8),
        "se_inject, blocks compiled": (0, 8),
    }


def test_what_is_compared_runs_in_the_same_way() -> None:
    for way, names in overhead.WAYS.items():
        for arm in map(overhead.ARMS.__getitem__, names):
            assert arm.over in names, way
            assert arm.beside is None or arm.beside in names, way


def test_eager_networks_share_a_process_on_cuda() -> None:
    """They wait for Python there, and the overhead is between arms of one process."""
    cuda, cpu = (overhead.Setting("resnet18", "inference", 1, "nchw", d) for d in ("cuda", "cpu"))
    assert sorted(overhead.processes_of(overhead.ARMS, cuda)) == sorted(
        [
            *([name] for way in ("compiled", "graphs") for name in overhead.WAYS[way]),
            [
                "base",
                "timm",
                "se_inject",
                "se_inject, blocks compiled",
                *overhead.WAYS["optimized"],
            ],
        ]
    )
    assert overhead.processes_of(overhead.ARMS, cpu) == [[name] for name in overhead.ARMS]


def test_the_optimized_arms_are_deployed() -> None:
    names = overhead.WAYS["optimized"]
    models = [overhead.ARMS[name].build("resnet18") for name in names]
    kinds = [[sum(isinstance(m, k) for m in n.modules()) for k in KINDS] for n in models]
    assert kinds == [[0, 0, 0], [8, 0, 0], [0, 0, 8]]


def test_an_overhead_is_over_the_base_of_the_same_round() -> None:
    seconds = {"base": [1.0, 2.0, 4.0], "timm": [1.2, 2.4, 4.8], "se_inject": [1.1, 2.2, 4.4]}
    measured = {name: {"seconds": s, "peak_bytes": 8} for name, s in seconds.items()}
    rows = overhead.summarise(measured, batch=2, floor=0.1)
    assert [round(q, 9) for q in rows["timm"]["overhead_quartiles"]] == [0.2, 0.2, 0.2]
    assert round(rows["se_inject"]["overhead_to_timm"], 9) == 0.5
    assert round(rows["se_inject"]["seconds_to_timm_quartiles"][1], 9) == round(1.1 / 1.2, 9)
    assert rows["se_inject"]["images_per_second"] == 2 / 2.2
