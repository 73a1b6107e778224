"""Several launches with one command: rows that survive whatever happens in them, and what they add up to.

run.py is the sweep, folder.py its record on the disk, isolate.py keeps one job from the others, report.py and its
neighbours show the end of it. Not here: what a job does (kt_launch.actions), how it is measured (kt_launch.bench).
"""
