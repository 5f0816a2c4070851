"""Downloads from the Hugging Face Hub that can be resumed and are verified."""
