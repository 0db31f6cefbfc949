"""benchmarks/overhead.py: each arm is the network that its name says."""

import overhead
from timm.layers import SEModule

from se_inject import SqueezeExcite


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


def test_an_overhead_is_over_the_base_of_the_same_round() -> None:
    seconds = {"base": [1.0, 2.0, 4.0], "timm": [1.2, 2.4, 4.8], "se_inject": [1.1, 2.2, 4.4]}
    measured = {name: {"seconds": s, "peak_bytes": 8} for name, s in seconds.items()}
    rows = overhead.summarise(measured, batch=2, floor=0.1)
    assert [round(q, 9) for q in rows["timm"]["overhead_quartiles"]] == [0.2, 0.2, 0.2]
    assert round(rows["se_inject"]["overhead_to_timm"], 9) == 0.5
    assert round(rows["se_inject"]["seconds_to_timm_quartiles"][1], 9) == round(1.1 / 1.2, 9)
    assert rows["se_inject"]["images_per_second"] == 2 / 2.2
