"""Methods in files: our own checkpoints, the hub, PEFT's and AdapterHub's files."""
