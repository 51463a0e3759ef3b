"""The simulator: random histories of many users against the real service and database, over HTTP, with faults.

``uv run python -m tests.simulator --histories 100`` runs histories and shows how far it is; each is replayed by its seed.

``history``    one history: what happens, step by step, and the comparison after each
``beliefs``    what may be stored after a step, according to the reference, and what it must show
``processes``  API processes and reconcilers that are quick to start, and are killed between two statements
"""
