"""``fedrouter report``: one self-contained HTML file about a run, and its figures as separate files.

gather.py   a run's files, and its bundle's routing of test data
figures.py  the figures, drawn with Matplotlib
page.py     the HTML page
"""

from fedrouter.report.page import write_report

__all__ = ["write_report"]
