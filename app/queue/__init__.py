"""The queue: jobs in a database, and a worker that starts them as supervised processes.

Whether a job runs is never stored: it follows from its lock, processes and files (`app.runs`).
"""
