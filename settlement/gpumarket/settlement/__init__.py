"""Money and judgement: vouchers, channels, the journal, the chain, and how a result is judged."""
