"""Models on disk: the content-addressed store, and the models that demo and tests run."""
