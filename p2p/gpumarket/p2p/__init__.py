"""Offers over libp2p: gossip, snapshots on joining, and the supervised process that contains py-libp2p."""
