"""Metrics, protocols and the reports they end in: plain functions, (subject, records) -> `Report`.

Light at import: torch loads when a model is first asked something.
"""

from __future__ import annotations

from ecliptic.eval.base_to_new import base_to_new
from ecliptic.eval.dispatch import evaluate
from ecliptic.eval.ood import ood, ood_report
from ecliptic.eval.report import (
    BarChart,
    Commands,
    Confusion,
    Gallery,
    Heatmap,
    Heatmaps,
    Number,
    Numbers,
    Picture,
    Report,
    Section,
    Table,
    join,
)
from ecliptic.eval.retrieval import retrieval
from ecliptic.eval.zero_shot import classify, zero_shot

__all__ = [
    "BarChart",
    "Commands",
    "Confusion",
    "Gallery",
    "Heatmap",
    "Heatmaps",
    "Number",
    "Numbers",
    "Picture",
    "Report",
    "Section",
    "Table",
    "base_to_new",
    "classify",
    "evaluate",
    "join",
    "ood",
    "ood_report",
    "retrieval",
    "zero_shot",
]
