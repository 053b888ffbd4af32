"""The wire between host, broker and worker. Standard library only; see ``docs/protocol.md``.

``frames``   the body format that carries JSON and raw bytes together
``values``   how Python values travel as JSON (the table in ``docs/values.md``)
``messages`` the requests and replies of both planes
``limits``   every size and time that the two sides agree on
"""

#: Version of the wire, apart from the package's. Checked once, at health.
PROTOCOL_VERSION = 1
