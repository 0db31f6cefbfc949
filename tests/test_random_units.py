"""Networks without residual additions from a grammar: the found units are the written ones."""

import os
from collections import Counter
from typing import Any

from grammar_source import Network
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from test_random_networks import EXAMPLES, X, built, check_function, outputs
from unit_grammar import chains, joined_networks

from se_inject import NoSiteError, plan_se


@settings(
    max_examples=EXAMPLES // 3,
    deadline=None,
    derandomize="SE_INJECT_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.one_of(joined_networks(), chains()))
def test_units_are_those_written_and_the_function_stays(network: Network) -> None:
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
