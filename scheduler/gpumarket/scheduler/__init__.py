"""Match: the book of offers, the ledger of orders and claims, and the Market service on top of them."""
