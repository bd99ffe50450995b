"""The deployed contracts as Python sees them: ABI and bytecode, deployment, and the address book that names them."""
