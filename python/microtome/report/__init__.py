"""The report of a training run, as one HTML file: its features and what they respond to."""

from microtome.report.features import About, choose, describe
from microtome.report.survey import survey
from microtome.report.write import write_report

__all__ = ["About", "choose", "describe", "survey", "write_report"]
