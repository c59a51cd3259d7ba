"""The client process: answers the server's requests, owns data, ledger and outbox."""

import os

# Leaves TLS 1.2 without a cipher suite: gRPC's Python binding has no setting for the
# lowest version, this list is for 1.2 alone, and the one suite on it needs a shared
# secret that nobody has. gRPC reads it once, at its import, which is why it stands in
# the first file of ours that any process with gRPC or Flower in it loads.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
# Its lines in a format of its own, one a failed handshake, have no place in our log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
