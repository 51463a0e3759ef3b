"""Moving in from a system that wrote durations by a timer, and moving out again.

``tables`` finds the old tables under the names that they have; ``source`` reads them; ``taking_over`` decides, without
looking at anything else, what becomes of a user's rows; ``importing`` writes that and proves it.
"""
