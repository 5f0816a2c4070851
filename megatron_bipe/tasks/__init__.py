"""Fine-tuning tasks: files, prompts, metrics and evaluation, one package for each."""
