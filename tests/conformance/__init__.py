"""TorchRec's own tests, run against sharders of ours."""
