"""VM hosts: their rows, the SSH transport that reaches them, enrolment, placement, reconcile and the watcher.

In charge of everything between a row and a verb of hostd. Knows nothing of devboxes or executions: what an upper
app wants to hear of its ids it registers in `hosts.registry`.
"""
