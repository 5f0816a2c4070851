"""The process and the machine it runs on: environment variables, the device, its precision and its limits."""
