"""What `python -m training.doctor` looks at: the machine, its kernels, a training step, and ranks that add up."""
