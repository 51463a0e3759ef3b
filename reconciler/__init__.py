"""The reconciler: materializes what the meter computes, and audits what is stored. Run by cron or beside the API.

``sweep``   passes over all that is due
``audit``   re-derives what is stored and names each difference; ``chats``, ``ledger`` and ``replay`` are the laws that
            it holds accounts to, ``differences`` is how it tells
``python -m reconciler --help`` lists the options.
"""
