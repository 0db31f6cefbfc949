"""What the gates of SE blocks do: record them, sum them up, draw them, fold the constant ones.

    model ──record──▶ gates ──streaming──▶ statistics ──▶ table, advice, pictures
                                               │
                                               └──▶ fold ──change──▶ model with fewer SE blocks

``record_gates``, ``gate_statistics``, ``fold_se`` and ``prune_se`` are public. The report and the
command line also use ``advice``, ``gates_table``, ``statistics_dict`` (advice) and the pictures.
"""

from se_inject.gates.advice import advice, gates_table, statistics_dict, verdict
from se_inject.gates.change import Change, measure_change
from se_inject.gates.fold import Folding, fold_se, prune_se
from se_inject.gates.record import record_gates
from se_inject.gates.statistics import BlockGates, GateStatistics, gate_statistics

__all__ = [
    "BlockGates",
    "Change",
    "Folding",
    "GateStatistics",
    "advice",
    "fold_se",
    "gate_statistics",
    "gates_table",
    "measure_change",
    "prune_se",
    "record_gates",
    "statistics_dict",
    "verdict",
]
