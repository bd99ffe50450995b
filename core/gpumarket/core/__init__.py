"""Terms, units, errors, signing, codec and ports: what every role shares and nothing that does I/O by itself."""
