"""The command line: one tree of nouns, loaded lazily; one output layer."""
