"""Code of the embedding fine-tuning tutorial; `finetune` and `evaluation` are exported from the notebooks."""
