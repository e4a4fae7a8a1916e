"""One HTML file about one or several runs: nothing to serve, nothing to fetch, no script. Imports no torch."""

from mmtrain.report.write import write_report

__all__ = ["write_report"]
