"""The HTTP room: Litestar, and nothing else knows of it.

``app``       the application: routes, lifetime of the database, what goes around requests
``routes``    one handler per use case; each is a call of `talktime.operations`
``schemas``   what is answered, and how values are written in JSON
``inputs``    what is taken from a body, a path, a query or a header, and what is wrong with it
``auth``      who is calling
``problems``  domain error -> status, one table; problem documents
``docs``      the OpenAPI document and a page that shows it without reaching for the internet
``metrics``   counts and durations of requests
"""
