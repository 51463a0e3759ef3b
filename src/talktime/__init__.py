"""talktime: exact metering for chats that are paid by the minute, computed on read.

The rooms, from the top; imports point downwards only::

    cli             the `talktime` command
    api             HTTP: routes, schemas, problems, the service key    (beside it: the top-level package `reconciler`)
    operations      one function per use case: lock, decide, write; or read one snapshot
    settings        the environment, read once
    store           the only SQL: tables, locking, the ledger, the embedded PostgreSQL
    meter           the pure core: state, advance, commands, readings
    process         an event loop that ends on a signal
    errors          what can go wrong, in one tree
"""
