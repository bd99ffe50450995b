"""Wire contract, generated from the .proto files beside it. Regenerate with `make proto`."""
