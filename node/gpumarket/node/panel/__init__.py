"""The panel role: this provider as one of five that judge a result in dispute."""
