"""Raw text, or the prompts and answers of a task, to datasets; torch-free."""
