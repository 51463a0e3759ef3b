"""The store: the only room that speaks SQL.

``tables``     the schema, as SQLAlchemy Core metadata
``schema``     bringing a database to the newest schema
``database``   engine, transactions, retries, the translation of driver errors
``accounts``   account states: locked for a change, saved, or read in one snapshot
``exhaustion`` until when running clocks are sure of their credits
``ledger``     ledger entries, segments and rate cards
``history``    everything that is stored of an account, for those who check it
``outbox``     events that are to be told, and who sends them
``operators``  reads over all users, for the console; and the reconciler's passes
``keys``       service keys, and the console's sessions
``embedded``   the embedded PostgreSQL

Locking, the same everywhere: separate statements, in this order. Lock the account row (several in user_id order); then
read and lock its running and resumable chats in (user_id, chat_id) order; then read the clock. Whoever holds an
account lock advances all of its chats before it moves `materialized_through`. A fast heartbeat alone takes no account
lock: it locks the chat row, skipping a locked one, and moves nothing but `last_heartbeat_at`.
"""
