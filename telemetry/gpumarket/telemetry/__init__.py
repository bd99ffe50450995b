"""What a process shows of itself: metrics, health, traces. It decides nothing, and nothing waits for it."""
