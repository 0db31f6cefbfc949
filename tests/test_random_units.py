"""Networks without residual additions from a grammar: the found units are the written ones."""

from collections import Counter
from typing import Any

import pytest
from grammar_source import Network
from hypothesis import given, note
from hypothesis import strategies as st
from test_random_networks import EXAMPLES, MANY, X, built, check_function, outputs, trying
from unit_grammar import chains, joined_networks

from se_inject import NoSiteError, plan_se

NETWORKS = st.one_of(joined_networks(), chains())


@trying(EXAMPLES // 2)
@given(NETWORKS)
def test_units_are_those_written_and_the_function_stays(network: Network) -> None:
    check(network)


@pytest.mark.long
@trying(MANY // 3)
@given(NETWORKS)
def test_units_of_1000(network: Network) -> None:
    check(network)


def check(network: Network) -> None:
    note(network.text)
    model = built(network)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = outputs(model)
    model.load_state_dict(state)  # train mode has moved the statistics
    try:
        plan: Any = plan_se(model, r=2, divisor=2, example_input=X)
        sites = plan.sites
    except NoSiteError:
        sites = ()
    assert Counter((site.block, site.channels) for site in sites) == network.sites
    if sites:
        check_function(model, plan, state, before)
