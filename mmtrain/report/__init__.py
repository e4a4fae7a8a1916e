"""One HTML file about one or several runs: nothing to serve, nothing to fetch, no script. Imports no torch.

``collect`` gathers what is shown as plain data, ``charts`` draws the curves, ``report.html.jinja`` lays out the page.
How a run folder is read, and what state a run is in, belongs in ``mmtrain.runs``.
"""

from mmtrain.report.write import write_report

__all__ = ["write_report"]
