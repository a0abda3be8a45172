"""What `gpu.py` measures: whole models."""
