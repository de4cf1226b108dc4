"""Send every test prompt to an OpenAI-compatible endpoint and score the answers.

endpoint.py   the asynchronous client: prompt → answer with its routing headers
scores.py     ROUGE-1, ROUGE-L, exact match; means by task, client and adapter; routing confusion
progress.py   a bar on a terminal, plain lines elsewhere
report.py     the report: tables, JSON, JSONL
run.py        records × models → report
offline.py    evaluation of a bundle's routing on labelled records, without an endpoint
"""

from fedrouter.evaluate.report import Report, render, to_json, write_json, write_records
from fedrouter.evaluate.run import ORACLE, evaluate, first_of_each_task, load
from fedrouter.evaluate.scores import TaggedRecord

__all__ = [
    "ORACLE",
    "Report",
    "TaggedRecord",
    "evaluate",
    "first_of_each_task",
    "load",
    "render",
    "to_json",
    "write_json",
    "write_records",
]
