"""A whole market on one machine: the chain, the roles as processes of their own, cheaters, and the demo."""
