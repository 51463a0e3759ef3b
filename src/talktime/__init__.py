"""talktime: exact metering for chats that are paid by the minute, computed on read.

The rooms, from the top; imports point downwards only::

    cli             the `talktime` command; `serving` and `terminal` and `watch` are what it does, `arguments` its words
    legacy          moving in from an old system's tables, and back
    ops             files for those who run it
    web             what browsers get: the JavaScript client, the demo, the console
    api             HTTP: routes, schemas, problems, who may call    (beside it: the top-level package `reconciler`)
    operations      one function per use case: lock, decide, write; or read one snapshot
    operating       what operators look at, over all users
    keys            service keys, and the console's sessions
    settings        the environment, read once; `webhooks` is its part about where events are sent
    store           the only SQL: tables, locking, the ledger, the outbox, the embedded PostgreSQL
    meter           the pure core: state, advance, commands, readings
    process         an event loop that ends on a signal
    errors          what can go wrong, in one tree
"""
