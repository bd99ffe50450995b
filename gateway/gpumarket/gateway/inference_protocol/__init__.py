"""The Open Inference Protocol v2 over REST and gRPC: tensors for models of the market, for clients of KServe, Triton and others."""
