"""Several launches with one command: rows that survive whatever happens in a job, and a report over them.

run.py runs the sweep, folder.py stores it on disk, isolate.py separates the jobs, report.py and its neighbours present
the results. Not here: what a job does (kt_launch.actions), how it is measured (kt_launch.bench).
"""
