"""Squeeze-and-Excitation for a network you already have.

    model ──trace──▶ block graphs ──sites──▶ residual sites ──plan──▶ Plan ──inject──▶ model
                                                                │
                                                                └─cost──▶ report (table, JSON)

``inject_se(model)`` puts an SE block on every residual branch of a timm, torchvision or
hand-written CNN, and leaves everything else alone: the same object, the same checkpoint keys,
the same outputs to the last bit, until training moves the new weights.
"""

from se_inject.errors import (
    ArgumentError,
    ForwardError,
    NoSiteError,
    SEInjectError,
    UnknownModelError,
    UnsupportedModelError,
)
from se_inject.inject import inject_se, remove_se, se_parameters
from se_inject.plan import Plan, Site, Skipped, plan_se
from se_inject.squeeze_excite import SqueezeExcite

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ForwardError",
    "NoSiteError",
    "Plan",
    "SEInjectError",
    "Site",
    "Skipped",
    "SqueezeExcite",
    "UnknownModelError",
    "UnsupportedModelError",
    "inject_se",
    "plan_se",
    "remove_se",
    "se_parameters",
]
