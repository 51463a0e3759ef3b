"""The simulator: random histories of many users against the real service and database, over HTTP, with faults.

``uv run python -m tests.simulator --histories 100`` runs histories and shows how far it is. Time is the tests' own,
and leases are microseconds long; the product does not know. A history that shows a difference tells how to repeat it.

``history``    one history: what happens, step by step, and the comparison after each
``beliefs``    what may be stored after a step, according to the reference
``readings``   what readings must then show
``looks``      looking at the service, and comparing
``deployment`` what runs: API processes with their settings, and reconcilers
``service``    API processes as their callers meet them
``processes``  starting them, and reconcilers, and killing them between two statements; ``warm`` forks them
``runs``       histories run to their end, several at once
"""
