"""The client process: answers the server's requests, owns data, ledger and outbox."""
