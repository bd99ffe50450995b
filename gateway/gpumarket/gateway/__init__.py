"""The gateway: programs that speak OpenAI's API or the Open Inference Protocol buy on the market, each within the budget of its key."""
