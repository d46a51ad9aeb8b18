"""The fastest setting of a host, found on the user's own pictures."""
