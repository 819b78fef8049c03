"""The report of a training run: which features there are, and what they respond to, as one HTML file."""

from microtome.report.features import About, choose, describe
from microtome.report.survey import survey
from microtome.report.write import write_report

__all__ = ["About", "choose", "describe", "survey", "write_report"]
