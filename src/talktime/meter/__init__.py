"""The meter: pure arithmetic on frozen values. Standard library only; no clock, no I/O, no settings.

``units``     micro-credits and microseconds, their caps, and the one rounding
``state``     the values and the table of states
``advance``   an account's state at an instant -> its state at a later instant
``commands``  start, heartbeat, pause, stop, credit
``reading``   an account's state at an instant -> what is shown
``events``    an account's state before and after a change -> what is told of it
"""
