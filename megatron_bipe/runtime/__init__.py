"""The process: its launcher and child processes, environment variables, device and precision, logs, failures."""
