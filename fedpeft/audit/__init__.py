"""The privacy audit: what leaks, what is claimed, and a report of both."""
