"""The HTTP room: Litestar, and nothing else knows of it.

``app``       the application: routes, lifetime of the database, what goes around requests
``routes``    one handler per use case; each is a call of `talktime.operations`
``schemas``   what is answered, and how values are written in JSON
``bodies``    the bodies that are taken, decoded without floats, and what may be wrong with them
``params``    ids, query parameters, cursors and headers, likewise
``auth``      who is calling: the gate before all of /v1
``callers``   the kinds of callers, and what each may do
``keyring``   the service keys in force, held in memory
``tokens``    the host product's tokens, verified and, for development, made
``jwks``      the public keys for them, in a file
``problems``  domain error -> status, one table; problem documents
``docs``      the OpenAPI document and a page that shows it without reaching for the internet
``metrics``   what Prometheus sees of the processes
``outside``   and what the database tells it of the whole
``requests``  the ids of requests
"""
