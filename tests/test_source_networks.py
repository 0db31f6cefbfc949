"""Networks written as source code in people's idioms: what is found, what stays, what is scaled.

``-m long`` runs 10,000 of them.
"""

import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from source_grammar import Network, build, write_network
from test_untouched import state_of
from test_whole import state
from torch import Tensor, nn

from se_inject import NoSiteError, plan_se, remove_se

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def hooks_ran(model: nn.Module) -> list[Any]:
    return [list(m.ran) for m in model.modules() if hasattr(m, "ran")]


def outputs(model: nn.Module, weights: dict[str, Tensor]) -> list[Tensor]:
    """In eval and in train mode, from the same weights and random numbers."""
    model.load_state_dict(weights, strict=False)
    result = []
    with torch.no_grad():
        for mode in (False, True):
            torch.default_generator.manual_seed(0)  # not those of other devices: 5 ms each time
            result.append(model.train(mode)(X.clone()))
    return result


def with_gradients(model: nn.Module, weights: dict[str, Tensor]) -> list[Tensor]:
    """The outputs, and the gradients in train mode.

    A network that changes in place what its own backward needs has no gradients.
    """
    result = outputs(model, weights)
    model.load_state_dict(weights, strict=False)
    x = X.clone().requires_grad_()
    torch.default_generator.manual_seed(0)
    out = model(x)
    parameters = [p for n, p in model.named_parameters() if n in weights]
    try:
        grads = torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return result
    return result + [torch.zeros(()) if g is None else g for g in grads]


def same(now: list[Tensor], before: list[Tensor]) -> bool:
    """Outputs to the bit. The parts of a gradient may be summed in another order."""
    close = 1e-5 * max((float(t.abs().max()) for t in before[2:]), default=0.0)
    if len(before) == 2:
        now = now[:2]  # the network itself has no gradients
    return all(map(torch.equal, now[:2], before[:2])) and all(
        torch.allclose(a, b, rtol=0, atol=close) for a, b in zip(now[2:], before[2:], strict=True)
    )


@torch.no_grad()
def shut_gates(model: nn.Module, sites: Any) -> None:
    for site in sites:
        se = model.get_submodule(site.name)
        se.fc2.weight.zero_()
        se.fc2.bias.fill_(-1e4)


def check(network: Network, folder: Path) -> None:
    """All that is said in docs/robustness.md of one network."""
    name = f"written_{network.seed}"
    torch.manual_seed(network.seed)
    model = randomize(build(network.text, folder, name))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = with_gradients(model, weights)
    model.load_state_dict(weights)
    model.train(network.seed % 2 == 0)

    everything, ran = list(state_of(model)), hooks_ran(model)
    try:
        plan: Any = plan_se(model, r=2, divisor=2, example_input=X, where="residual")
        sites, skipped = plan.sites, plan.skipped
    except NoSiteError as error:
        sites, skipped = (), error.skipped
    assert list(state_of(model)) == everything, "planning changed the model"
    assert hooks_ran(model) == ran, "planning ran a hook"
    said = [(s.block, s.reason, s.detail) for s in skipped]
    assert Counter((site.block, site.channels) for site in sites) == network.sites, said
    assert Counter((s.block, s.reason) for s in skipped) == network.skipped, said
    if not sites:
        return

    pickles = "parametrizations" not in network.text  # which torch does not pickle
    keys, light = list(model.state_dict()), state(model.eval())
    plan.apply()
    added = [k for k in model.state_dict() if k not in weights]
    assert [k for k in model.state_dict() if k not in added] == keys, "keys changed"
    assert all(any(k.startswith(f"{site.name}.") for site in sites) for k in added)
    assert same(with_gradients(model, weights), before), "another function or other gradients"
    if pickles:
        again = pickle.loads(pickle.dumps(model))
        assert same(outputs(again, weights), before[:2]), "another function after pickle"

    shut_gates(model, sites)
    shut = build(network.shut, folder, f"{name}_shut")
    assert same(outputs(model, weights), outputs(shut, weights)), "another map is scaled"
    remove_se(model)
    assert state(model.eval()) == light, "something is left"
    assert same(outputs(model, weights), before[:2]), "another function after remove_se"


def run(seeds: range, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    for seed in seeds:
        network = write_network(seed)
        try:
            check(network, folder)
        except Exception as error:
            raise AssertionError(
                f"seed {seed} {network.kinds}: {error!r}\n{network.text}"
            ) from error
        finally:
            for module in (f"written_{seed}", f"written_{seed}_shut"):
                sys.modules.pop(module, None)


@pytest.mark.filterwarnings("ignore:r=2 is more than the channels")
@pytest.mark.parametrize("part", range(5))
def test_source_networks(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 of them: each takes about 0.16 s of one core."""
    run(range(part * 100, part * 100 + 100), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:r=2 is more than the channels")
@pytest.mark.parametrize("part", range(20))
def test_10000_source_networks(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(range(1000 + part * 500, 1500 + part * 500), tmp_path, monkeypatch)
