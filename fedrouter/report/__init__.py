"""``fedrouter report``: one self-contained HTML file about a run, and its figures beside it.

gather.py   what is in a run, and how its bundle routes test data
figures.py  figures, with Matplotlib
page.py     all of it as one page
"""

from fedrouter.report.page import write_report

__all__ = ["write_report"]
