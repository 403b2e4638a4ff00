"""The REST API of the training service, with server-sent events.

app        routes and endpoints; a place for static pages
requests   reads requests, within limits, and refuses those of other web pages
events     events of a job as a stream
responses  JSON, and errors with their status
openapi    the description of the API
server     the port
"""
