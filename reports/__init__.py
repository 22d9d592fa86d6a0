"""Pictures and numbers about patterns and runs; nothing here trains, and nothing here needs a network.

`python -m reports.pattern`  which keys a query sees, reach and cost of an experiment's attention
`python -m reports.run`      report.html of one run folder
`python -m reports.compare`  runs side by side, mean and spread over seeds

The functions take plain data (run folder files, `WindowPattern` objects); only the command lines import
configs and models, and only when they run.
"""
