"""Networks from a grammar: the found sites are the written ones, and the function stays.

``-m long`` tries 3,000 of them, ``SE_INJECT_EXAMPLES=5000 pytest tests/test_random_networks.py``
so many.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from grammar import networks
from grammar_source import Network
from helpers import open_gates, randomize
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from se_inject import NoSiteError, plan_se, remove_se
from se_inject.edit.block_class import edit_of

# Each takes about 0.18 s of one core, and all tests have 25 minutes.
EXAMPLES = int(os.environ.get("SE_INJECT_EXAMPLES", "120"))
MANY = 3000
X = torch.randn(2, 3, 8, 8)


def trying(examples: int) -> settings:
    """The same examples in each run, but for those who ask for a number of them."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize="SE_INJECT_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def built(network: Network) -> torch.nn.Module:
    """A written network with random weights, whose output depends on its input.

    Of small networks in which a ReLU ends everything some are dead, and show no gate.
    """
    for seed in range(20):
        torch.default_generator.manual_seed(seed)
        model = randomize(network.build()).eval()
        with torch.no_grad():
            first, second = model(X.clone())
        if not torch.equal(first, second):
            break
    return model


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """In eval and in train mode, with the same random numbers and statistics each time."""
    result = []
    for training in (False, True):
        torch.default_generator.manual_seed(0)  # torch.manual_seed is 5 ms for the other devices
        with torch.no_grad():
            result.append(model.train(training)(X.clone()))
    return result


@trying(EXAMPLES)
@given(networks())
def test_sites_are_those_written_and_the_function_stays(network: Network) -> None:
    check(network)


@pytest.mark.long
@trying(MANY)
@given(networks())
def test_sites_of_3000(network: Network) -> None:
    check(network)


def check(network: Network) -> None:
    note(network.text)
    model = built(network)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = outputs(model)
    model.load_state_dict(state)  # train mode has moved the statistics

    try:
        plan: Any = plan_se(model, r=2, divisor=2, example_input=X, where=network.where)
        sites, skipped = plan.sites, plan.skipped
    except NoSiteError as error:
        sites, skipped = (), error.skipped
    assert Counter((site.block, site.channels) for site in sites) == network.sites
    assert Counter((s.block, s.reason) for s in skipped) == network.skipped
    if not sites:
        return

    check_function(model, plan, state, before)


PLACEMENTS = st.sampled_from(["pre", "post", "identity", "3x3"])


@trying(EXAMPLES // 2)
@given(networks(), PLACEMENTS)
def test_other_placements_keep_the_function(network: Network, placement: Any) -> None:
    check_placement(network, placement)


@pytest.mark.long
@trying(MANY // 2)
@given(networks(), PLACEMENTS)
def test_other_placements_of_1500(network: Network, placement: Any) -> None:
    check_placement(network, placement)


def check_placement(network: Network, placement: Any) -> None:
    """The same sites, or reasons of the placement's own for those that are not served."""
    note(f"{placement}\n{network.text}")
    model = built(network)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = outputs(model)
    model.load_state_dict(state)
    try:
        plan: Any = plan_se(
            model, r=2, divisor=2, example_input=X, placement=placement, where=network.where
        )
        sites, skipped = plan.sites, plan.skipped
    except NoSiteError as error:
        sites, skipped = (), error.skipped
    served, left = Counter(site.block for site in sites), Counter(s.block for s in skipped)
    assert not served - Counter(block for block, _ in network.sites.elements())
    assert served + left == Counter(
        block for block, _ in (*network.sites.elements(), *network.skipped.elements())
    )
    if sites:
        check_function(model, plan, state, before)


def check_function(
    model: torch.nn.Module, plan: Any, state: dict[str, torch.Tensor], before: list[torch.Tensor]
) -> None:
    """Equal after the plan, other with open gates, equal after removal."""
    plan.apply()
    for a, b in zip(outputs(model), before, strict=True):
        assert torch.equal(a, b)
    model.load_state_dict(state, strict=False)
    open_gates(model)
    assert not torch.equal(outputs(model)[0], before[0])
    remove_se(model)
    model.load_state_dict(state)
    assert not any(map(edit_of, model.modules()))
    for a, b in zip(outputs(model), before, strict=True):
        assert torch.equal(a, b)
