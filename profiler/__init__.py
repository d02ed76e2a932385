"""What a model costs: FLOPs and memory by layer, and the peak of a training step, without a GPU."""
