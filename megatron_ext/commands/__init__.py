"""The subcommands of tools/convert_llama.py, one to a file: options, and `run`."""
