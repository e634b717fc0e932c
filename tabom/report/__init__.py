"""The report: one self-contained HTML file of responses as they were decoded, training curves and evaluations."""

from tabom.report.gather import Source, gather
from tabom.report.page import render

__all__ = ["Source", "gather", "render"]
