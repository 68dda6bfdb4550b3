"""Every figure of the tutorial, one function each.

A function takes plain data and the title, writes a PNG to `path` if one is given, and returns the
matplotlib `Figure`, which Jupyter shows when it is a cell's last value. The finding is written by
the caller, as the title; `source` names the run in small print.
"""

# ruff: noqa: F401 (the names are here for the callers)
from .idea import building_blocks, in_batch_diagram, temperature_bars
from .results import before_after, curve, intervals, projection, similarity_heatmaps
from .retrieval import metric_bars, metric_differences, mixture, worked_ndcg
from .style import MODELS
from .training import learning_rate, loss_curves, padding, time_and_memory, training_curves
